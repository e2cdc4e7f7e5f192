"""Results as bytes, piece by piece: JSON or `.npz`, gzipped or not; never the whole of a large answer at once."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from ..alphabet import AMINO_ACIDS
from ..results import EncodeResult, PredictResult, stack_results
from .jobs import Result
from .negotiation import JSON_TYPE, NPZ_TYPE

# Numbers written at a time: orjson keeps the GIL while it writes, and the event loop must have its turn.
_PIECE_NUMBERS = 1 << 15
# Pieces are gathered to about this many bytes before they are sent.
_SEND_BYTES = 1 << 18


def json_pieces(results: Sequence[Result]) -> Iterator[bytes]:
    """`{"results": [...]}`: exactly what `json.dumps` of the results' `to_dict()` says, float32 in their own digits."""
    return _gather(_write({"results": [_document(result) for result in results]}))


def _document(result: Result) -> dict[str, Any]:
    return {"log_prob": result} if isinstance(result, float) else result.to_dict(arrays=True)


def _write(value: Any) -> Iterator[bytes]:
    if isinstance(value, np.ndarray):
        yield from _write_array(value)
    elif isinstance(value, dict):
        opening = b"{"
        for key, inner in value.items():
            yield opening + orjson.dumps(key) + b":"
            yield from _write(inner)
            opening = b","
        yield b"}" if value else b"{}"
    elif isinstance(value, list) and any(isinstance(inner, dict | np.ndarray) for inner in value):
        opening = b"["
        for inner in value:
            yield opening
            yield from _write(inner)
            opening = b","
        yield b"]"
    else:
        yield orjson.dumps(value)


def _write_array(array: npt.NDArray[Any]) -> Iterator[bytes]:
    rows = max(1, _PIECE_NUMBERS // max(1, array[0].size)) if array.ndim > 1 and len(array) else _PIECE_NUMBERS
    yield b"["
    for start in range(0, len(array), rows):
        piece = np.ascontiguousarray(array[start : start + rows])
        text = orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)
        yield (b"," if start else b"") + text[1:-1]
    yield b"]"


def npz_pieces(results: Sequence[Result]) -> Iterator[bytes]:
    """An `.npz` file for `numpy.load`: `mean_12` and `bos_12` as (n, D), the others one an item (`contacts_0`)."""
    arrays: dict[str, npt.NDArray[Any]]
    if isinstance(results[0], EncodeResult | PredictResult):
        arrays = stack_results(results)  # type: ignore[arg-type]
        if any(name.startswith("logits") for name in arrays):
            arrays["vocab_tokens"] = np.array(AMINO_ACIDS)
    else:
        arrays = {"log_prob": np.array(results, dtype=np.float64)}
    return _gather(_write_npz(arrays))


def _write_npz(arrays: dict[str, npt.NDArray[Any]]) -> Iterator[bytes]:
    written = _Collector()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in list(arrays):
            array = np.ascontiguousarray(arrays.pop(name))
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, np.lib.format.header_data_from_array_1_0(array))
                # Not write_array: it would hand over 16 MB at a time, for each client that reads slowly.
                for piece in _byte_pieces(array):
                    entry.write(piece)
                    yield written.take()
            yield written.take()
    yield written.take()


def _byte_pieces(array: npt.NDArray[Any]) -> Iterator[bytes]:
    flat = array.reshape(-1).view(np.uint8)
    return (flat[start : start + _SEND_BYTES].tobytes() for start in range(0, flat.size, _SEND_BYTES))


class _Collector(io.RawIOBase):
    """A file that cannot seek, and gives away what was written."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(self._pieces[-1])

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def gzip_pieces(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Gzip by Huffman codes alone: digits have no repetitions to find, and searching costs ten times more."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
    yield from _gather(compressor.compress(piece) for piece in pieces)
    yield compressor.flush()


def _gather(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of some size."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= _SEND_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


FORMS: dict[str, Callable[[Sequence[Result]], Iterator[bytes]]] = {JSON_TYPE: json_pieces, NPZ_TYPE: npz_pieces}
