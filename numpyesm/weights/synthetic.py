"""Seeded random weights of the right shape, for timing and trying things out. Their outputs mean nothing.

The scales are chosen so that the numbers behave like a trained model's: attention is neither uniform nor one-hot, no
activation explodes, and a contact map has a few bright spots. So timings and tolerances carry over.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt

from ..config import PRESETS, ModelConfig, preset_name
from ..errors import InvalidOption
from .checkpoint import DECODER, FREQUENCIES, INPUT_MEANS, Checkpoint, canonical_shapes, computed_frequencies
from .tensor import DeferredTensor, StoredTensor

_QUERY_KEY_STD = 1.2  # of the channels of q and k, so that the scores have a standard deviation of about 1.4
_BRANCH_STD = 0.15  # of what one block adds to the residual stream; the embedding has 0.1
_EMBEDDING_STD = 0.1  # of the tied embedding: logits then have a standard deviation of about 2
_CONTACT_NONZERO = 0.25  # of the coefficients; 61 of 240 in the real 35M
_CONTACT_BIAS = -4.0
_CONTACT_STD = 90.0
# Matrices of more numbers, those of the 3B and 15B models, are made when they are used: all of them are 11 and 60 GB.
_DEFERRED = 6 << 20


def is_synthetic_spec(spec: str) -> bool:
    """Whether `spec` asks for synthetic weights."""
    return spec == "synthetic" or spec.startswith("synthetic:")


def parse_synthetic(spec: str) -> tuple[str, int]:
    """Return preset name and seed of `synthetic[:name[:seed]]`; InvalidOption if `spec` is anything else."""
    parts = spec.split(":")
    name = preset_name(parts[1]) if len(parts) > 1 else "esm2-35m"
    seed = parts[2] if len(parts) > 2 else "0"
    plain = seed.isascii() and seed.isdigit() and len(seed) <= 18
    if parts[0] != "synthetic" or len(parts) > 3 or name is None or not plain:
        raise InvalidOption(
            f"{spec!r} is not synthetic[:name[:seed]] with a name of "
            f"{', '.join(PRESETS)} and a natural number as the seed"
        )
    return name, int(seed)


def synthetic_checkpoint(spec: str) -> Checkpoint:
    """Make the random weights that `synthetic[:name[:seed]]` asks for."""
    name, seed = parse_synthetic(spec)
    return random_checkpoint(PRESETS[name], seed, source=f"synthetic:{name}:{seed}")


def random_checkpoint(config: ModelConfig, seed: int = 0, *, source: str | None = None) -> Checkpoint:
    """Make random weights of any shape, flagged synthetic. Equal seeds give equal weights."""
    tensors: dict[str, StoredTensor] = {}
    shapes = canonical_shapes(config)
    # The decoder is tied, as in ESM-2; there is nothing natural to take means of.
    names = [name for name in shapes if name != DECODER and not name.startswith(INPUT_MEANS)]
    for number, name in enumerate(names):
        shape = shapes[name]
        # One stream per tensor, so that a tensor added at the end of the layout changes no other.
        make = partial(_random_tensor, name, shape, config, (seed, number))
        tensors[name] = DeferredTensor(shape, "F32", make) if math.prod(shape) > _DEFERRED else StoredTensor(make())
    source = source or f"synthetic:custom:{seed}"
    return Checkpoint(config, tensors, source=source, synthetic=True)


def _random_tensor(
    name: str, shape: tuple[int, ...], config: ModelConfig, seed: tuple[int, int]
) -> npt.NDArray[np.float32]:
    stream = np.random.Generator(np.random.PCG64(seed))
    kind = name.rsplit(".", 1)[-1]
    if name == FREQUENCIES:  # in half precision, as the official checkpoints have them
        return computed_frequencies(config.head_dim).astype(np.float16).astype(np.float32)
    if name == "contact_head.bias":
        return np.full(shape, _CONTACT_BIAS, np.float32)
    values = stream.standard_normal(shape, np.float32)
    if name == "contact_head.weight":
        # The more maps are used, the less each weighs, so that their sum keeps its spread.
        used = stream.random(shape) < _CONTACT_NONZERO
        scale = _CONTACT_STD / math.sqrt(max(1, int(used.sum())))
        return np.where(used, np.abs(values) * np.float32(scale), np.float32(0))
    if "norm" in name:
        values *= np.float32(0.1)
        return values + np.float32(1) if kind == "weight" else values
    if kind == "bias":
        values *= np.float32(0.02)
        return values
    values *= np.float32(_EMBEDDING_STD if name == "embed_tokens.weight" else 1 / math.sqrt(shape[0]))
    if name.endswith(".qkv.weight"):
        values[:, : 2 * config.embed_dim] *= np.float32(_QUERY_KEY_STD)
    elif name.endswith((".out_proj.weight", ".fc2.weight")):
        values *= np.float32(_BRANCH_STD)
    return values
