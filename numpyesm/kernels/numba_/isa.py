"""Which SIMD instructions this process emits: what the CPU has, or the lower level that `NUMPYESM_ISA` asks for."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm

from ...errors import InvalidOption


@dataclass(frozen=True)
class Isa:
    """One level of SIMD and the shape of the register tiles that suits it.

    Attributes
    ----------
    name : str
        `avx512`, `avx2`, `neon` or `plain`.
    lanes : int
        float32 numbers in a register.
    vectors : int
        Registers across a tile; a tile has `lanes * vectors` columns.
    rows : int
        Rows of a tile: `rows * vectors` accumulators and what a step needs beside them fill the register file.
    fused : bool
        Whether multiplication and addition are one instruction.
    bf16, int8 : bool
        Whether the CPU multiplies these itself.
    """

    name: str
    lanes: int
    vectors: int
    rows: int
    fused: bool = True
    bf16: bool = False
    int8: bool = False

    @property
    def columns(self) -> int:
        """Columns of a register tile."""
        return self.lanes * self.vectors

    @property
    def precisions(self) -> list[str]:
        """Precisions that this level has."""
        return ["fp32", *(["bf16"] if self.bf16 else []), *(["int8"] if self.int8 else [])]


def host_levels() -> dict[str, Isa]:
    """The levels that this CPU can run, best first."""
    features = llvm.get_host_cpu_features()
    machine = platform.machine().lower()
    levels: list[Isa] = []
    if features.get("avx512f") and features.get("avx512bw") and features.get("avx512vl"):
        bf16 = features.get("avx512bf16", False)
        levels.append(Isa("avx512", 16, 2, 12, bf16=bf16, int8=features.get("avx512vnni", False)))
    if features.get("avx2") and features.get("fma"):
        levels.append(Isa("avx2", 8, 2, 6))
    if machine in ("aarch64", "arm64"):
        levels.append(Isa("neon", 4, 2, 8, bf16=features.get("bf16", False), int8=features.get("dotprod", False)))
    levels.append(Isa("plain", 4, 2, 4, fused=False))
    return {isa.name: isa for isa in levels}


@cache
def host_isa() -> Isa:
    """The level in use in this process.

    Raises
    ------
    InvalidOption
        `NUMPYESM_ISA` names a level that this CPU does not have.
    """
    levels = host_levels()
    wanted = os.environ.get("NUMPYESM_ISA", "").strip().lower()
    if not wanted:
        return next(iter(levels.values()))
    if wanted not in levels:
        raise InvalidOption(f"NUMPYESM_ISA={wanted}: this CPU has {', '.join(levels)}")
    return levels[wanted]


def check_precision(isa: Isa, precision: str) -> None:
    """Raise InvalidOption unless `isa` has this precision."""
    if precision not in isa.precisions:
        forced = " (set by NUMPYESM_ISA)" if os.environ.get("NUMPYESM_ISA") else ""
        raise InvalidOption(
            f"precision={precision!r}: the instruction set in use, {isa.name}{forced}, has {', '.join(isa.precisions)}"
        )
