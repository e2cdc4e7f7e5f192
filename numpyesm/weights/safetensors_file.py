"""Read and write safetensors files: a length, a JSON header, then the tensors' bytes one behind the other.

The reader is our own, because a file from anywhere may be handed in: everything in the header is checked against the
file before it is believed, and the tensors are views of the mapped file, so nothing is read before it is used.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, WeightsNotFound
from ..files import atomic_write
from .tensor import STORAGE_DTYPES, StoredTensor

# Not weights, but found beside them (position_ids); carried along so that a reader can ignore them by name.
OTHER_DTYPES: dict[str, np.dtype] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
_DTYPES = STORAGE_DTYPES | OTHER_DTYPES
_MAX_HEADER = 16 << 20
# A header takes 25 times its size when it is taken apart: a large one must go with a large file. ESM-2 15B has 150 kB.
_FREE_HEADER = 256 << 10
_HEADER_SHARE = 8
_MAX_DIMENSIONS = 8
# Of file systems and sandboxes that have no maps.
_CANNOT_MAP = {errno.ENODEV, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP}
_ALIGNMENT = 64  # a cache line, and the widest SIMD load


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins with these (at least 9) bytes may be a safetensors file."""
    return len(head) >= 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= 1 << 40


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Map a safetensors file.

    Parameters
    ----------
    path : str or path
        The file.

    Returns
    -------
    tensors : dict of str to StoredTensor
        Read-only views, in file order; the map lives as long as any of them.
    metadata : dict of str to str

    Raises
    ------
    CheckpointError
        If the file is truncated, corrupted or no safetensors file.
    """
    path = Path(path)
    mapped = map_file(path)
    try:
        header, data_start = _read_header(mapped)
        metadata = _metadata(header.pop("__metadata__", {}))
        return _tensors(header, mapped, data_start), metadata
    except _Malformed as error:
        raise CheckpointError(f"{path} is not an intact safetensors file: {error}") from error


def read_safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Only the metadata, for looking at a file without opening its tensors."""
    path = Path(path)
    try:
        header, _ = _read_header(map_file(path))
        return _metadata(header.get("__metadata__", {}))
    except _Malformed as error:
        raise CheckpointError(f"{path} is not an intact safetensors file: {error}") from error


def map_file(path: Path) -> mmap.mmap | bytes:
    """Map a whole file read-only; read it where files cannot be mapped."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
                raise CheckpointError(f"{path} is empty")
            try:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                if error.errno not in _CANNOT_MAP:
                    raise
                return file.read()
    except FileNotFoundError as error:
        raise WeightsNotFound(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors in the order given; equal input gives equal bytes, and the file appears whole or not at all.

    Parameters
    ----------
    path : str or path
        The file to make or replace.
    tensors : mapping of str to StoredTensor
        Streamed one by one: no second copy of everything is made.
    metadata : mapping of str to str
        Goes into the header, sorted by key.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.raw.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor).data)


def tensor_bytes(tensor: StoredTensor) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor as they stand in a file; a view where it is contiguous."""
    raw = np.ascontiguousarray(tensor.raw, dtype=_DTYPES[tensor.dtype])
    return raw.reshape(-1).view(np.uint8)


class _Malformed(Exception):
    """What is wrong with a file, without its name."""


def _read_header(mapped: mmap.mmap | bytes) -> tuple[dict[str, Any], int]:
    size = len(mapped)
    if size < 8:
        raise _Malformed(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", mapped[:8])
    if length > size - 8:
        raise _Malformed(f"its header should have {length} bytes but the file has {size} (truncated?)")
    if length > max(_FREE_HEADER, min(_MAX_HEADER, size // _HEADER_SHARE)):
        raise _Malformed(f"its header of {length} bytes is implausibly long")
    try:
        header = json.loads(mapped[8 : 8 + length].decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _Malformed("its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _Malformed("its header is not a JSON object")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON lets a name stand twice and readers then differ in which one counts.
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise _Malformed("a name stands twice in its header")
    return mapping


def _metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Malformed("its metadata is not a mapping of strings")
    return metadata


def _tensors(header: dict[str, Any], mapped: mmap.mmap | bytes, data_start: int) -> dict[str, StoredTensor]:
    entries = sorted(
        (begin, end, name, dtype, shape)
        for name, (begin, end, dtype, shape) in ((name, _entry(name, entry)) for name, entry in header.items())
    )
    tensors: dict[str, StoredTensor] = {}
    position = 0
    for begin, end, name, dtype, shape in entries:
        # The format forbids holes and overlaps, so a lost or doubled piece cannot hide.
        if begin != position:
            raise _Malformed(f"tensor {shorten(name)} does not begin where the one before it ends")
        if end > len(mapped) - data_start:
            raise _Malformed(f"tensor {shorten(name)} ends beyond the end of the file (truncated?)")
        position = end
        tensors[name] = StoredTensor(_view(mapped, data_start + begin, _DTYPES[dtype], shape), dtype)
    if position != len(mapped) - data_start:
        raise _Malformed(f"{len(mapped) - data_start - position} bytes behind its last tensor belong to nothing")
    return tensors


def _entry(name: str, entry: object) -> tuple[int, int, str, tuple[int, ...]]:
    """(begin, end, dtype, shape) of one header entry, consistent in itself."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"the entry of tensor {shorten(name)} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _Malformed(f"tensor {shorten(name)} is stored as {shorten(dtype)}, which cannot be read")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS or any(extent >= 1 << 48 for extent in shape):
        raise _Malformed(f"the shape of tensor {shorten(name)} is impossible")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _Malformed(f"the offsets of tensor {shorten(name)} are impossible")
    begin, end = offsets
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise _Malformed(f"tensor {shorten(name)} has {end - begin} bytes, which its shape {shape} does not need")
    return begin, end, dtype, tuple(shape)


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _view(mapped: mmap.mmap | bytes, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    count = math.prod(shape)
    if count == 0:
        return np.empty(tuple(min(extent, 1) for extent in shape), dtype)  # numpy refuses (0, 2**47, 2**47)
    flat = np.frombuffer(mapped, dtype, count, start)
    if start % dtype.itemsize:  # other writers do not align
        flat = flat.copy()
        flat.flags.writeable = False
    return flat.reshape(shape)


def shorten(value: object) -> str:
    """A name from a file, fit for an error message."""
    text = repr(value) if isinstance(value, str | int) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
