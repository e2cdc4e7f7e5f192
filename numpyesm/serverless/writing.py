"""Results as the bytes of an answer, and how many there will be: Lambda takes 6 MB and no more."""

from __future__ import annotations

import io
import json
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from ..alphabet import AMINO_ACIDS, MASK_TOKEN
from ..config import ModelConfig
from ..results import EncodeResult, PredictResult, stack_results
from .validation import Work

Result = EncodeResult | PredictResult | float

# Of the whole answer as JSON, in which a binary body is base64.
MAX_ANSWER = 6 * 1024 * 1024
_AROUND = 2048  # status, headers, and what AWS puts around them

# Bytes of one number in an answer, at least: a request that is too large even so is refused before it is computed.
_LEAST_BYTES = {"json": 8.0, "gzip": 4.0 * 4 / 3, "npz": 4.0 * 4 / 3}


def numbers_of(work: Work, config: ModelConfig) -> int:
    """How many numbers the answer has."""
    width = config.embed_dim * len(work.layers)
    total = 0
    for sequence, residues in zip(work.sequences, work.lengths, strict=True):
        length = sequence.count(MASK_TOKEN) if work.positions == "masked" else residues
        if work.action == "encode":
            total += width * (("mean" in work.include) + ("bos" in work.include))
            total += width * length * ("per_token" in work.include)
            total += length * length * ("contacts" in work.include)
            total += 20 * length * ("logits" in work.include)
            total += config.num_layers * length * ("attentions" in work.include)
        else:
            total += 20 * length if work.action == "predict" else 1
    return total


def fits(size: float) -> bool:
    """Whether a body of so many bytes (base64 counted) can be sent."""
    return size + _AROUND <= MAX_ANSWER


def may_fit(numbers: int, form: str) -> bool:
    """Whether so many numbers might fit in this form."""
    return fits(numbers * _LEAST_BYTES[form])


def to_json(results: list[Any]) -> bytes:
    """`{"results": [...]}`, each float32 in nine digits, which is all that it has.

    Raises
    ------
    ValueError
        If a number is not finite, for which JSON has no word.
    """
    documents = [{"log_prob": r} if isinstance(r, float) else r.to_dict(arrays=True) for r in results]
    return "".join(_pieces({"results": documents})).encode()


def _pieces(value: Any) -> list[str]:
    if isinstance(value, np.ndarray):
        return [_array(value)]
    if isinstance(value, dict):
        out = ["{"]
        for key, inner in value.items():
            out += [json.dumps(key), ":", *_pieces(inner), ","]
        return [*out[:-1], "}"]
    if isinstance(value, list) and value and isinstance(value[0], dict | np.ndarray):
        out = ["["]
        for inner in value:
            out += [*_pieces(inner), ","]
        return [*out[:-1], "]"]
    return [json.dumps(value, allow_nan=False, separators=(",", ":"))]


def _array(array: npt.NDArray[Any]) -> str:
    if not np.isfinite(array).all():
        raise ValueError("a result is not a finite number")
    if array.ndim == 1:
        return "[" + ",".join(["%.9g"] * len(array)) % tuple(array.tolist()) + "]"
    return "[" + ",".join(_array(row) for row in array) + "]"


def to_npz(results: list[Any]) -> bytes:
    """As the service's: `mean_12` and `bos_12` as (n, D), the others one an item (`contacts_0`)."""
    if isinstance(results[0], float):
        arrays: dict[str, npt.NDArray[Any]] = {"log_prob": np.array(results, dtype=np.float64)}
    else:
        arrays = stack_results(results)
        if any(name.startswith("logits") for name in arrays):
            arrays["vocab_tokens"] = np.array(AMINO_ACIDS)
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def to_gzip(content: bytes) -> bytes:
    """Gzip by Huffman codes alone: digits have no repetitions to find."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(content) + packer.flush()
