"""What is computed for each record: everything that the numbers in the output depend on, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..config import MAX_RESIDUES
from ..errors import InvalidOption, MissingHead
from ..model import ESM2
from ..options import BY_LAYER, INCLUDES, check_includes, check_layers
from .shard import Shard

DTYPES = ("fp32", "fp16")
LONG = ("error", "truncate", "windows")
DEFAULT_OVERLAP = 512


@dataclass(frozen=True)
class Settings:
    """Checked options of a run.

    Attributes
    ----------
    layers : tuple of int
        Ascending, 0 to the number of layers.
    include : tuple of str
        In the order of `options.INCLUDES`.
    dtype : {"fp32", "fp16"}
        How embeddings are stored.
    long : {"error", "truncate", "windows"}
        What becomes of sequences of more than 2048 residues.
    overlap : int
        Least number of residues that neighbouring windows share.
    shard : Shard
    """

    layers: tuple[int, ...]
    include: tuple[str, ...]
    dtype: str
    long: str
    overlap: int
    shard: Shard

    @classmethod
    def check(
        cls,
        model: ESM2,
        *,
        repr_layers: Iterable[int],
        include: Iterable[str],
        dtype: str = "fp32",
        long: str = "error",
        overlap: int = DEFAULT_OVERLAP,
        shard: str | Shard | None = None,
    ) -> Settings:
        """The options as `encode` would read them for this model; InvalidOption or MissingHead if it cannot."""
        wanted = check_includes(include)
        layers = check_layers(repr_layers, model.config.num_layers)
        if not layers and wanted & BY_LAYER:
            raise InvalidOption(f"repr_layers is empty, but include asks for {', '.join(sorted(wanted & BY_LAYER))}")
        if "logits" in wanted and not model.checkpoint.has_lm_head:
            raise MissingHead(f"logits: the weights ({model.checkpoint.source}) have no LM head")
        if "contacts" in wanted and not model.checkpoint.has_contact_head:
            raise MissingHead(f"contacts: the weights ({model.checkpoint.source}) have no contact head")
        for name, value, allowed in (("dtype", dtype, DTYPES), ("long", long, LONG)):
            if value not in allowed:
                raise InvalidOption(f"{name}={value!r}: allowed are {', '.join(allowed)}")
        if isinstance(overlap, bool) or not isinstance(overlap, int) or not 0 <= overlap <= MAX_RESIDUES // 2:
            raise InvalidOption(f"overlap={overlap!r}: expected a whole number from 0 to {MAX_RESIDUES // 2}")
        return cls(
            layers=tuple(layers),
            include=tuple(name for name in INCLUDES if name in wanted),
            dtype=dtype,
            long=long,
            overlap=overlap,
            shard=shard if isinstance(shard, Shard) else Shard.parse(shard),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in the output's metadata."""
        return {
            "repr_layers": list(self.layers),
            "include": list(self.include),
            "dtype": self.dtype,
            "long": self.long,
            "overlap": self.overlap if self.long == "windows" else None,
            "shard": str(self.shard),
        }
