"""Safetensors files: opened and validated by the library of that name, mapped and written here.

The library copies tensors and has no bfloat16 for NumPy; here they are views of the mapped file. Its writer
is not used: the order of metadata differs from run to run, a file is readable by its owner only, devices are replaced
by files, and the interface that takes bfloat16 changed in version 0.8.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..files import atomic_write
from ..printable import quoted
from .reading import map_file, view_of
from .tensor import ALL_DTYPES, StoredTensor, bytes_of

# Parsing a header takes 25 times its size: a long one must go with a large file. That of ESM-2 15B has 150 kB.
_FREE_HEADER = 256 << 10
_HEADER_SHARE = 8
_MAX_DIMENSIONS = 8
_ALIGNMENT = 64  # bytes: a cache line, and the widest SIMD load


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins with these (at least 9) bytes may be a safetensors file."""
    return len(head) >= 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= 1 << 40


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Map a safetensors file: its tensors as read-only views, in file order, and its metadata.

    The map lives as long as any of the tensors. CheckpointError if the file is truncated, corrupted or not a
    safetensors file, or holds numbers of a kind that NumPy lacks.
    """
    path = Path(path)
    mapped, header, start = _open(path)
    metadata = header.pop("__metadata__", None) or {}
    tensors: dict[str, StoredTensor] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if dtype not in ALL_DTYPES:
            raise CheckpointError(
                f"{path} has tensor {quoted(name)} stored as {quoted(dtype)}, as quantised models are; "
                "save the model as float32, float16 or bfloat16"
            )
        if len(shape) > _MAX_DIMENSIONS:
            raise CheckpointError(f"{path} has tensor {quoted(name)} of {len(shape)} dimensions")
        tensors[name] = StoredTensor(_view(mapped, start + entry["data_offsets"][0], ALL_DTYPES[dtype], shape), dtype)
    return tensors, metadata


def read_safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Only the metadata, for a look at a file without its tensors."""
    return _open(Path(path))[1].get("__metadata__") or {}


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write tensors in the given order, whole or not at all; equal input gives equal bytes.

    Each tensor is asked for its numbers when it is written, and releases them. Metadata go into the header, sorted by
    key; `data_sha256` is filled in if it is there. `progress` is called with the bytes of tensors that are written, and
    that there are. OSError if the file cannot be written.
    """
    import hashlib  # loads OpenSSL: not when a file is only opened

    entries: dict[str, Any] = {}
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.nbytes]
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes

    def header(metadata: Mapping[str, str]) -> bytes:
        fields = {"__metadata__": dict(sorted(metadata.items()))} | entries
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        return struct.pack("<Q", len(text)) + text

    written = dict(metadata)
    digest, done = hashlib.sha256(), 0
    if "data_sha256" in written:  # known at the end, as long as this
        written["data_sha256"] = digest.hexdigest()
    with atomic_write(path) as file:
        file.write(header(written))
        for tensor in tensors.values():
            content = bytes_of(tensor.raw)
            digest.update(content)
            file.write(content)
            tensor.release()
            done += len(content)
            if progress is not None:
                progress(done, position)
        if "data_sha256" in written:
            written["data_sha256"] = digest.hexdigest()
            file.seek(0)
            file.write(header(written))


def _open(path: Path) -> tuple[mmap.mmap | bytes, dict[str, Any], int]:
    """The mapped file, its validated header, and where the tensors' bytes begin."""
    from safetensors import SafetensorError, deserialize, safe_open  # half a millisecond: not at import

    mapped = map_file(path)
    size = len(mapped)
    length = int.from_bytes(mapped[:8], "little")
    if length > max(_FREE_HEADER, size // _HEADER_SHARE):
        raise CheckpointError(f"{path} is not an intact safetensors file: its header of {length} bytes is too long")
    try:
        if isinstance(mapped, bytes):
            deserialize(mapped)  # type: ignore[no-untyped-call]
        else:
            with safe_open(path, framework="np"):
                pass
        header = json.loads(mapped[8 : 8 + length], object_pairs_hook=_without_duplicates)
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).removeprefix("Error while deserializing").removeprefix(" header").lstrip(": ")[:200]
        raise CheckpointError(f"{path} is damaged, truncated or not a safetensors file: {reason}") from error
    return mapped, header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON allows a name twice; the library takes the last, other readers the first.
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name appears twice in its header")
    return mapping


def _view(mapped: mmap.mmap | bytes, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    count = math.prod(shape)
    if count == 0:
        return np.empty(tuple(min(extent, 1) for extent in shape), dtype)  # numpy refuses (0, 2**47, 2**47)
    return view_of(mapped, dtype, count, start).reshape(shape)
