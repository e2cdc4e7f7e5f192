"""numpyesm's own file format: safetensors in the canonical layout, described by its metadata."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..config import ModelConfig
from ..errors import CheckpointError, InvalidOption
from .checkpoint import CLASSIFIER, Checkpoint, canonical_shapes
from .rounding import LOW, made_for_file
from .safetensors_file import write_safetensors
from .tensor import PRECISION_DTYPES, DeferredTensor, StoredTensor, groups_of

FORMAT = "numpyesm"
FORMAT_VERSION = "2"  # 1 had no rotary frequencies
_SCALE = ".scale"  # of the int8 matrix before the dot


def save_canonical(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    precision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a canonical file atomically.

    Parameters
    ----------
    path : str or path
    checkpoint : Checkpoint
    precision : {'fp32', 'fp16', 'bf16', 'int8'}, optional
        Storage of the matrices; the default is the checkpoint's own. Norms, biases, rotary frequencies, contact head
        and classifier are always float32, being small and sensitive; with bf16 and int8 so are the embedding and the
        LM head. Lower precision is rounded as `rounding.py` says; all files hold the mean input of each matrix.
    progress : callable, optional
        See `write_safetensors`.
    """
    precision = precision or checkpoint.precision
    check_dtype(precision)
    made = made_for_file(checkpoint, precision)
    tensors: dict[str, StoredTensor] = {}
    for name, shape in canonical_shapes(checkpoint.config).items():
        dtype = _storage(name, shape, precision)
        if name in made:
            tensors |= _written(name, shape, dtype, made[name])
        elif tensor := checkpoint.tensors.get(name):
            tensors |= _written(name, shape, dtype, partial(_stored, name, tensor, dtype), [tensor])
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": checkpoint.config.to_json(),
        "source": checkpoint.source,
        "source_sha256": checkpoint.source_sha256,
        "precision": precision,
        "data_sha256": "",
    }
    if checkpoint.synthetic:
        metadata["synthetic"] = "true"
    write_safetensors(path, tensors, metadata, progress)


def check_dtype(dtype: str) -> None:
    """Raise InvalidOption unless a file can store its matrices in this dtype."""
    if dtype not in PRECISION_DTYPES:
        raise InvalidOption(f"dtype is {dtype!r}, expected one of {', '.join(PRECISION_DTYPES)}")


def is_canonical(metadata: dict[str, str]) -> bool:
    """Whether a safetensors file with this metadata is numpyesm's own."""
    return metadata.get("format") == FORMAT


def checkpoint_from(tensors: dict[str, StoredTensor], metadata: dict[str, str], path: Path) -> Checkpoint:
    """Return the checkpoint in an opened canonical file."""
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        remedy = "convert the original checkpoint again" if version in (None, "1") else "update numpyesm"
        raise CheckpointError(
            f"{path} has format version {version!r}, this numpyesm reads version {FORMAT_VERSION}: {remedy}"
        )
    precision = metadata.get("precision", "")
    if precision not in PRECISION_DTYPES:
        raise CheckpointError(f"{path} has precision {precision[:40]!r}, expected one of {', '.join(PRECISION_DTYPES)}")
    for name, tensor in tensors.items():
        expected = _storage(name, tensor.shape, precision)
        if tensor.dtype != expected:
            raise CheckpointError(
                f"{path} has tensor {name[:80]!r} stored as {tensor.dtype}, expected {expected}; convert it again"
            )
    try:
        return Checkpoint(
            config=ModelConfig.from_json(metadata.get("config", "")),
            tensors=_with_scales(tensors),
            source=metadata.get("source", ""),
            source_sha256=metadata.get("source_sha256", ""),
            precision=precision,
            synthetic=metadata.get("synthetic") == "true",
            metadata=metadata,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _storage(name: str, shape: tuple[int, ...], precision: str) -> str:
    """Return the dtype of a tensor in a file of this precision."""
    narrow = len(shape) == 2 and not name.startswith(CLASSIFIER) and not name.endswith(_SCALE)
    if precision in LOW:
        narrow = narrow and name.startswith("layers.")
    return PRECISION_DTYPES[precision] if narrow else "F32"


def _with_scales(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Join each int8 matrix with its scales."""
    joined = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALE)}
    for name, tensor in joined.items():
        if tensor.dtype == "I8":
            scale = tensors.get(name + _SCALE)
            if scale is None:
                raise CheckpointError(f"tensor {name + _SCALE!r} is missing")
            if scale.shape != (groups_of(tensor.shape[0]), tensor.shape[1]):
                raise CheckpointError(f"tensor {name + _SCALE!r} has the wrong shape: convert the original again")
            joined[name] = replace(tensor, scale=scale.raw)
    return joined


def _written(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    make: Callable[[], StoredTensor],
    sources: Sequence[StoredTensor] = (),
) -> dict[str, StoredTensor]:
    """A tensor that `make` makes once it is written; an int8 matrix with its scales."""
    tensors: dict[str, StoredTensor] = {name: DeferredTensor(shape, dtype, lambda: make().raw, sources)}
    if dtype == "I8":
        groups = (groups_of(shape[0]), shape[1])
        tensors[name + _SCALE] = DeferredTensor(groups, "F32", lambda: np.asarray(make().scale), sources)
    return tensors


def _stored(name: str, tensor: StoredTensor, dtype: str) -> StoredTensor:
    try:
        return tensor.stored_as(dtype)
    except OverflowError as error:
        raise CheckpointError(f"tensor {name!r} cannot be stored as fp16: {error}; use bf16 or fp32") from error
