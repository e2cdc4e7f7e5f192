"""What is computed for each record and how it is stored: everything that the numbers in the output depend on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .._version import __version__
from ..config import ModelConfig
from ..errors import BulkError, InvalidOption
from ..fasta import IDS
from ..model import ESM2
from ..options import Outputs, one_of
from ..passes import Passes
from ..results import EncodeResult, Field, count_numbers, fields
from ..streaming.batches import LongSequences, Pending, encode_batch
from ..weights.integrity import weights_sha256

Array = npt.NDArray[Any]
# Where weights were found does not matter, as long as they are the same.
_WHERE_FOUND = ("source", "source_sha256")
_DTYPES = {"fp32": "<f4", "fp16": "<f2"}


@dataclass(frozen=True)
class Shard:
    """Share `index` (from 1) of `count`: the records that one task of a job array takes.

    A record's share follows from the hash of its sequence, not from its place: identical sequences are in the same
    share, so that they are computed once over all shares, and nothing depends on what stands before a record.
    """

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Shard:
        """Read `3/8`; None is the whole."""
        if text is None:
            return cls()
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text) if isinstance(text, str) else None
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InvalidOption(f"shard={text!r}: expected i/n with i from 1 to n, such as 3/8")
        return cls(int(match[1]), int(match[2]))

    def takes(self, digest: bytes) -> bool:
        """Whether the sequence with this SHA-256 digest is in the share."""
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1


@dataclass(frozen=True)
class Settings:
    """Checked options of a run on one model.

    The outputs of a record are kept as bytes: arrays one behind the other, in the order of `fields`.
    """

    config: ModelConfig
    outputs: Outputs
    long: LongSequences = field(default_factory=LongSequences)
    dtype: str = "fp32"  # of the stored numbers; or "fp16"
    shard: Shard = field(default_factory=Shard)
    ids: str = "first-word"  # how records are named, see `fasta.record_name`

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, tuple(_DTYPES))
        one_of("ids", self.ids, IDS)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Of the stored numbers."""
        return np.dtype(_DTYPES[self.dtype])

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """The arrays of a record, in the order in which they are stored."""
        return tuple(fields(self.outputs))

    def shape(self, output: Field, length: int) -> tuple[int, ...]:
        """Shape of an array of a record of `length` residues."""
        return output.shape(self.config, self.long.residues(length))

    def num_bytes(self, length: int) -> int:
        """Bytes of the arrays of a record of `length` residues."""
        return count_numbers(self.outputs, self.config, self.long.residues(length)) * self.stored_dtype.itemsize

    def encode(self, passes: Passes, batch: Sequence[Pending], budget: int) -> Iterator[tuple[int, bytes]]:
        """Yield the number and the packed outputs of each sequence of a batch that is not done, in any order."""
        for number, result in encode_batch(passes, batch, self.outputs, self.long, budget):
            yield number, self.pack(result)

    def pack(self, result: EncodeResult) -> bytes:
        """The arrays of a result as bytes; BulkError if a number does not fit into float16."""
        arrays = result.to_arrays()
        return b"".join(self._stored(output.name, arrays[output.name]) for output in self.fields)

    def _stored(self, name: str, array: Array) -> bytes:
        with np.errstate(over="ignore"):
            stored = array.astype(self.stored_dtype)
        if self.dtype == "fp16" and np.isinf(stored).any() and not np.isinf(array).any():
            raise BulkError(f"{name} has {float(np.abs(array).max()):g}, beyond float16: use dtype fp32")
        return stored.tobytes()

    def unpack(self, data: bytes, length: int) -> Iterator[tuple[Field, Array]]:
        """Yield each output of a record with its array, a view of `data`."""
        start = 0
        for output in self.fields:
            shape = self.shape(output, length)
            array = np.frombuffer(data, self.stored_dtype, math.prod(shape), start).reshape(shape)
            yield output, array
            start += array.nbytes


def describe(model: ESM2, settings: Settings, output_format: str) -> dict[str, Any]:
    """Everything that the output depends on but the input; runs of equal descriptions give equal outputs."""
    checkpoint, outputs, long, shard = model.checkpoint, settings.outputs, settings.long, settings.shard
    return {
        "version": __version__,
        "model": model.name,
        "weights": {
            "source": checkpoint.source,
            "source_sha256": checkpoint.source_sha256 or None,
            "sha256": weights_sha256(checkpoint),
            "synthetic": checkpoint.synthetic,
        },
        "backend": model.backend,
        "precision": model.precision,
        "format": output_format,
        "parameters": {
            "repr_layers": list(outputs.layers),
            "include": list(outputs.include),
            "dtype": settings.dtype,
            "long": long.rule,
            "overlap": long.overlap if long.rule == "windows" else None,
            "shard": f"{shard.index}/{shard.count}",
            "ids": settings.ids,
        },
        **({"labels": model.labels} if "classes" in outputs.include else {}),
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first thing in which two descriptions differ, in words; empty if they are the same."""
    for key, value in one.items():
        if key in _WHERE_FOUND:
            continue
        there = other.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            inner = difference(value, there)
            if inner:
                return f"{key} {inner}" if key != "parameters" else inner
        elif there != value:
            return f"{key} {json.dumps(there)} instead of {json.dumps(value)}"
    return ""
