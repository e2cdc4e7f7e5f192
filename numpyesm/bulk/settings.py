"""What is computed for each record: everything that the numbers in the output depend on, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidOption
from ..fasta import IDS, record_name
from ..options import Outputs
from ..streaming.batches import LongSequences

DTYPES = ("fp32", "fp16")


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

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Settings:
    """Checked options of a run.

    Attributes
    ----------
    outputs : Outputs
    long : LongSequences
    dtype : {"fp32", "fp16"}
        How numbers are stored.
    shard : Shard
    ids : {"first-word", "accession"}
        How records are called: by the first word of their header, or by the accession in it (`fasta.accession`).
    """

    outputs: Outputs
    long: LongSequences = field(default_factory=LongSequences)
    dtype: str = "fp32"
    shard: Shard = field(default_factory=Shard)
    ids: str = "first-word"

    def __post_init__(self) -> None:
        for name, value, allowed in (("dtype", self.dtype, DTYPES), ("ids", self.ids, IDS)):
            if value not in allowed:
                raise InvalidOption(f"{name}={value!r}: allowed are {', '.join(allowed)}")

    def record_id(self, first_word: str) -> str:
        """The id of a record: of `sp|P12345|NAME_HUMAN` either the whole or `P12345`."""
        return record_name(first_word, self.ids)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in the output's metadata."""
        return {
            "repr_layers": list(self.outputs.layers),
            "include": list(self.outputs.include),
            "dtype": self.dtype,
            "long": self.long.rule,
            "overlap": self.long.overlap if self.long.rule == "windows" else None,
            "shard": str(self.shard),
            "ids": self.ids,
        }
