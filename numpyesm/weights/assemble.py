"""From the tensors of a checkpoint, under its own names, to the canonical layout.

fair-esm and Hugging Face store the same tensors under different names: a `Naming` is that difference, and all else is
common. Both store matrices as (out_features, in_features).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import PRESETS, VOCAB_SIZE, ModelConfig
from ..errors import CheckpointError
from .checkpoint import FREQUENCIES, computed_frequencies
from .safetensors_file import shorten
from .tensor import FLOAT_DTYPES, STORAGE_DTYPES, StoredTensor

Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Naming:
    """What one family of checkpoints calls each part; the names of a layer follow `layers.<number>.`."""

    embedding: str
    layers: str
    query: str
    key: str
    value: str
    attention_norm: str
    out_proj: str
    ffn_norm: str
    fc1: str
    fc2: str
    final_norm: str
    tied_embedding: str
    frequencies: str

    def layer(self, index: int) -> str:
        return f"{self.layers}{index}."


LM_DENSE, LM_NORM, LM_BIAS = "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"
CONTACT_REGRESSION = "contact_head.regression"


def deduce_config(tensors: Tensors, naming: Naming, num_heads: int | None, origin: str) -> ModelConfig:
    """The model's shape, from the tensors themselves; only the number of heads leaves no trace in them.

    Parameters
    ----------
    num_heads : int or None
        From the checkpoint's configuration; None to take it from the preset that has this shape.
    """
    numbered = re.compile(re.escape(naming.layers) + r"(\d{1,6})\.")
    layers = {int(match[1]) for name in tensors if (match := numbered.match(name))}
    if not layers:
        raise CheckpointError(f"{origin} is not an ESM-2 checkpoint: it has no encoder layers")
    missing = next((index for index in range(len(layers)) if index not in layers), None)
    if missing is not None:
        raise CheckpointError(f"{origin} is incomplete: layer {missing} is missing")
    vocabulary, width = _matrix_shape(tensors, naming.embedding, origin)
    if vocabulary != VOCAB_SIZE:
        raise CheckpointError(
            f"{origin} is not an ESM-2 checkpoint: it knows {vocabulary} tokens, ESM-2 has {VOCAB_SIZE}"
        )
    ffn, _ = _matrix_shape(tensors, naming.layer(0) + naming.fc1 + ".weight", origin)
    if num_heads is None:
        same = (preset for preset in PRESETS.values() if (preset.num_layers, preset.embed_dim) == (len(layers), width))
        preset = next(same, None)
        if preset is None:
            raise CheckpointError(
                f"{origin} does not say how many attention heads it has, and {len(layers)} layers of width {width} "
                "is no published ESM-2 model"
            )
        num_heads = preset.num_heads
    try:
        return ModelConfig(len(layers), width, num_heads, ffn)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def _matrix_shape(tensors: Tensors, name: str, origin: str) -> tuple[int, int]:
    if name not in tensors:
        raise CheckpointError(f"{origin} is not a complete ESM-2 checkpoint: tensor {shorten(name)} is missing")
    shape = tensors[name].shape
    if len(shape) != 2:
        raise CheckpointError(f"{origin} has tensor {shorten(name)} of shape {shape}, expected a matrix")
    return shape


class Assembler:
    """Takes tensors out of a checkpoint one by one, checked; knows at the end which it did not take.

    Parameters
    ----------
    tensors : mapping of str to StoredTensor
        Under the names of `naming`, LM head and contact head under fair-esm's.
    """

    def __init__(self, tensors: Tensors, config: ModelConfig, naming: Naming, origin: str) -> None:
        self.tensors = tensors
        self.config = config
        self.naming = naming
        self.origin = origin
        self.used: set[str] = set()
        self.storage = _common_storage(tensors, (naming.embedding, naming.layers, "lm_head."))

    @property
    def precision(self) -> str:
        """`fp32`, `fp16` or `bf16`: that of the matrices."""
        return next(name for name, dtype in FLOAT_DTYPES.items() if dtype == self.storage)

    def assemble(self) -> dict[str, StoredTensor]:
        """Every tensor of the canonical layout that the checkpoint has."""
        naming, width, ffn = self.naming, self.config.embed_dim, self.config.ffn_dim
        embedding = self.vector_or_matrix(naming.embedding, (VOCAB_SIZE, width))
        result = {"embed_tokens.weight": StoredTensor(np.ascontiguousarray(embedding), self.storage)}
        self.check_tied(embedding)
        for index in range(self.config.num_layers):
            theirs, ours = naming.layer(index), f"layers.{index}."
            result |= self.norm(ours + "attention_norm", theirs + naming.attention_norm)
            heads = [theirs + part for part in (naming.query, naming.key, naming.value)]
            result |= self.linear(ours + "qkv", heads, width, width)
            result |= self.linear(ours + "out_proj", [theirs + naming.out_proj], width, width)
            result |= self.norm(ours + "ffn_norm", theirs + naming.ffn_norm)
            result |= self.linear(ours + "fc1", [theirs + naming.fc1], width, ffn)
            result |= self.linear(ours + "fc2", [theirs + naming.fc2], ffn, width)
        result |= self.norm("final_norm", naming.final_norm)
        if any(name.startswith((LM_DENSE, LM_NORM)) for name in self.tensors):
            result |= self.linear("lm_head.dense", [LM_DENSE], width, width)
            result |= self.norm("lm_head.norm", LM_NORM)
            result["lm_head.bias"] = self.vector(LM_BIAS, VOCAB_SIZE)
        if any(name.startswith(CONTACT_REGRESSION) for name in self.tensors):
            maps = self.config.num_layers * self.config.num_heads
            weight = self.vector_or_matrix(f"{CONTACT_REGRESSION}.weight", (1, maps), "F32")
            result["contact_head.weight"] = StoredTensor(np.ascontiguousarray(weight.reshape(maps)))
            result["contact_head.bias"] = self.vector(f"{CONTACT_REGRESSION}.bias", 1)
        result[FREQUENCIES] = StoredTensor(self.frequencies())
        return result

    def frequencies(self) -> npt.NDArray[np.float32]:
        """The rotary frequencies as stored, once or in every layer; computed if the checkpoint has none: (C/2,)."""
        layers = [self.naming.layer(index) for index in range(self.config.num_layers)]
        present = [name for name in self.tensors if name.endswith(self.naming.frequencies)]
        if not present:
            return computed_frequencies(self.config.head_dim)
        without = [layer for layer in layers if not any(name.startswith(layer) for name in present)]
        if 0 < len(without) < len(layers):
            raise CheckpointError(
                f"{self.origin} is incomplete: it has {shorten(present[0])}, but none under {shorten(without[0])}"
            )
        first, *others = (self.vector_or_matrix(name, (self.config.head_dim // 2,), "F32") for name in present)
        for name, values in zip(present[1:], others, strict=True):
            if not np.array_equal(values, first):
                raise CheckpointError(
                    f"{self.origin} has different rotary frequencies in {shorten(present[0])} and {shorten(name)}"
                )
        outside = first[(first <= 0) | (first > 1)]
        if len(outside):
            raise CheckpointError(
                f"{self.origin} has a rotary frequency of {outside[0]:g} in {shorten(present[0])}, expected (0, 1]"
            )
        return np.ascontiguousarray(first)

    def linear(self, ours: str, theirs: list[str], inputs: int, outputs: int) -> dict[str, StoredTensor]:
        """One linear step of ours from one or (query, key, value) three of theirs."""
        weight = np.empty((inputs, outputs * len(theirs)), STORAGE_DTYPES[self.storage])
        bias = np.empty(outputs * len(theirs), np.float32)
        for part, name in enumerate(theirs):
            columns = slice(part * outputs, (part + 1) * outputs)
            weight[:, columns] = self.vector_or_matrix(f"{name}.weight", (outputs, inputs)).T
            bias[columns] = self.vector_or_matrix(f"{name}.bias", (outputs,), "F32")
        return {f"{ours}.weight": StoredTensor(weight, self.storage), f"{ours}.bias": StoredTensor(bias)}

    def norm(self, ours: str, theirs: str) -> dict[str, StoredTensor]:
        width = self.config.embed_dim
        return {f"{ours}.{part}": self.vector(f"{theirs}.{part}", width) for part in ("weight", "bias")}

    def vector(self, name: str, length: int) -> StoredTensor:
        return StoredTensor(np.ascontiguousarray(self.vector_or_matrix(name, (length,), "F32")))

    def vector_or_matrix(self, name: str, shape: tuple[int, ...], storage: str | None = None) -> npt.NDArray[Any]:
        """One tensor of theirs as it is, checked, in the storage dtype."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.origin} is incomplete: tensor {shorten(name)} is missing")
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(f"{self.origin} has tensor {shorten(name)} of shape {tensor.shape}, expected {shape}")
        if tensor.dtype not in STORAGE_DTYPES:
            raise CheckpointError(f"{self.origin} has tensor {shorten(name)} stored as {tensor.dtype}, not as a float")
        self.used.add(name)
        if not is_finite(tensor):
            raise CheckpointError(f"{self.origin} has NaN or infinite numbers in tensor {shorten(name)}")
        try:
            stored = tensor.stored_as(storage or self.storage)
        except OverflowError as error:
            raise CheckpointError(
                f"{self.origin} has tensor {shorten(name)} with too large numbers: {error}"
            ) from error
        if not is_finite(stored):  # float64 beyond float32
            raise CheckpointError(f"{self.origin} has numbers too large for float32 in tensor {shorten(name)}")
        return stored.raw

    def check_tied(self, embedding: npt.NDArray[Any]) -> None:
        """The LM head's matrix is the embedding. Files that store it twice must agree with themselves."""
        name = self.naming.tied_embedding
        if name not in self.tensors:
            return
        tied = self.vector_or_matrix(name, embedding.shape)
        if not np.array_equal(tied, embedding):
            raise CheckpointError(
                f"{self.origin} has an LM head whose matrix {shorten(name)} is not its embedding, as it is in ESM-2"
            )

    def check_unused(self, ignored: Iterable[str], within: tuple[str, ...] = ("",)) -> None:
        """Refuse a checkpoint with parts that an ESM-2 model does not have.

        Parameters
        ----------
        ignored : iterable of str
            Endings of names that mean nothing here.
        within : tuple of str
            Where to look: beginnings of names.
        """
        endings = tuple(ignored)
        for name in self.tensors:
            if name not in self.used and name.startswith(within) and not name.endswith(endings):
                raise CheckpointError(
                    f"{self.origin} is not a plain ESM-2 model: tensor {shorten(name)} is not part of one"
                )


def _common_storage(tensors: Tensors, prefixes: tuple[str, ...]) -> str:
    """The dtype that all matrices share; float32 if they do not."""
    found = {tensor.dtype for name, tensor in tensors.items() if len(tensor.shape) == 2 and name.startswith(prefixes)}
    (dtype,) = found if len(found) == 1 else ("F32",)
    return dtype if dtype in FLOAT_DTYPES.values() else "F32"


def is_finite(tensor: StoredTensor) -> bool:
    """Whether a tensor is free of NaN and infinity."""
    if tensor.dtype == "BF16":  # all exponent bits set
        return not bool(((tensor.raw & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(tensor.raw).all())
