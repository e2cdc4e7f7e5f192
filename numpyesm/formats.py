"""Results as JSON, as `.npz` and gzipped: one writer for the command line, the HTTP service and Lambda.

Everything is written in pieces of a few hundred kilobytes, so that a large answer is never held in memory as text.
Numbers have the fewest digits that give back the same float32 (or float64); NaN and infinity, which JSON cannot
express, become `null`. orjson, if installed, writes numbers about fifteen times as fast; their values are the same.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .alphabet import AMINO_ACIDS
from .results import ClassifyResult, EncodeResult, PredictResult, stack_results

orjson: Any
try:
    import orjson
except ImportError:
    orjson = None

# A float is the log-probability of one sequence.
Result: TypeAlias = EncodeResult | PredictResult | ClassifyResult | float
Array: TypeAlias = npt.NDArray[Any]

# Numbers turned into text at a time. This holds the GIL, and an event loop must have its turn.
_NUMBERS = 1 << 15
_PIECE_BYTES = 1 << 18


def json_results(results: Sequence[Result], ids: Sequence[str] | None = None) -> Iterator[bytes]:
    """Write `{"results": [...]}`, each result as its `to_dict()` has it, or a float as `{"log_prob": ...}`.

    `ids`, one per result, are the first key of each: `"id"`.
    """
    documents = [{"log_prob": one} if isinstance(one, float) else one.to_dict(arrays=True) for one in results]
    if ids is not None:
        documents = [{"id": name} | document for name, document in zip(ids, documents, strict=True)]
    return json_pieces({"results": documents})


def json_pieces(document: Any) -> Iterator[bytes]:
    """Write a JSON document, in which arrays become lists of numbers."""
    return _gather(_value(document))


def json_bytes(document: Any) -> bytes:
    """Return a small JSON document whole."""
    return b"".join(_value(document))


def _value(value: Any) -> Iterator[bytes]:
    if isinstance(value, np.ndarray):
        yield from _array(value)
    elif isinstance(value, Mapping):
        opening = b"{"
        for key, inner in value.items():
            yield opening + _scalar(key) + b":"
            yield from _value(inner)
            opening = b","
        yield b"}" if value else b"{}"
    elif isinstance(value, list | tuple):
        opening = b"["
        for inner in value:
            yield opening
            yield from _value(inner)
            opening = b","
        yield b"]" if value else b"[]"
    else:
        yield _scalar(value)


def _scalar(value: Any) -> bytes:
    if isinstance(value, float) and not math.isfinite(value):
        return b"null"
    # A lone surrogate, which UTF-8 cannot encode, is written as an escape.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def _array(array: Array) -> Iterator[bytes]:
    """Write an array of one or more dimensions as nested lists, some rows at a time."""
    rows = max(1, _NUMBERS // max(1, math.prod(array.shape[1:])))
    yield b"["
    for start in range(0, len(array), rows):
        piece = np.ascontiguousarray(array[start : start + rows])
        text = orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY) if orjson else _numpy_text(piece)
        yield (b"," if start else b"") + text[1:-1]
    yield b"]"


def _numpy_text(array: Array) -> bytes:
    if array.ndim > 1:
        return b"[" + b",".join(map(_numpy_text, array)) + b"]"
    digits = array.astype("S32")
    digits[~np.isfinite(array)] = b"null"
    return b"[" + b",".join(digits.tolist()) + b"]"


def npz_results(results: Sequence[Result], ids: Sequence[str] | None = None) -> Iterator[bytes]:
    """Write an `.npz` file: `mean_12` and `bos_12` as (n, D), other outputs as `stack_results` has them.

    With `ids`, the file also has an array of strings of that name.
    """
    arrays: dict[str, Array] = {}
    if all(isinstance(result, float) for result in results):
        arrays = {"log_prob": np.array(results, dtype=np.float64)}
    else:
        arrays = stack_results(results)  # type: ignore[arg-type]
        if hasattr(results[0], "vocab_tokens") and any(name.startswith("logits") for name in arrays):
            arrays["vocab_tokens"] = np.array(AMINO_ACIDS)
        if labels := getattr(results[0], "labels", None):
            arrays["labels"] = np.array(labels)
    return npz_pieces(arrays, ids)


def npz_pieces(arrays: Mapping[str, Array], ids: Sequence[str] | None = None) -> Iterator[bytes]:
    """Write an `.npz` file for `numpy.load`, without a second copy of any array."""
    return _gather(_zip(arrays, ids))


def _zip(arrays: Mapping[str, Array], ids: Sequence[str] | None) -> Iterator[bytes]:
    import zipfile  # with its compressors; JSON does without

    written = _Written()
    with zipfile.ZipFile(written, "w") as archive:

        def entry(
            name: str, values: Any, kind: np.dtype[Any], shape: tuple[int, ...], compression: int
        ) -> Iterator[bytes]:
            """Write one array; not by NumPy's `write_array`, which hands over 16 MB at a time."""
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = compression
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
            step = max(1, _PIECE_BYTES // kind.itemsize)
            with archive.open(info, "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, len(values), step):
                    file.write(np.asarray(values[start : start + step], kind).tobytes())
                    yield written.take()

        if ids is not None:
            # NumPy pads strings to the longest. Compressed, a header of a megabyte does not cost as much per record.
            kind = np.dtype(f"U{max([1, *map(len, ids)])}")
            yield from entry("ids", ids, kind, (len(ids),), zipfile.ZIP_DEFLATED)
        for name, array in arrays.items():
            flat = np.ascontiguousarray(array).reshape(-1)
            yield from entry(name, flat, array.dtype, array.shape, zipfile.ZIP_STORED)
    yield written.take()


class _Written(io.RawIOBase):
    """A file that cannot seek and hands over what was written to it."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(self._pieces[-1])

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def gzip_pieces(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Compress with Huffman codes alone: digits hardly repeat, and searching for repeats takes ten times as long."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
    yield from _gather(compressor.compress(piece) for piece in pieces)
    yield compressor.flush()


def _gather(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join small pieces until they have a size worth sending."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= _PIECE_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)
