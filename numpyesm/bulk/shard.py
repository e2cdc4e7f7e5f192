"""`--shard i/n`: which records a job of an array takes.

The share goes by the sequence's hash, not by the record's place: identical sequences fall to the same shard, so that
they are computed once over all shards too, and a record's shard does not depend on what stands before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InvalidOption


@dataclass(frozen=True)
class Shard:
    """Number `index` (from 1) of `count` shares."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Shard:
        """`3/8`; None is the whole."""
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
