"""Which SIMD instructions this process emits: what the CPU has, or the lower level that `NUMPYESM_ISA` asks for."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm

from ...errors import InvalidOption

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), see Linux's Documentation/arch/x86/xstate.rst.
_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA = 158, 0x1023, 18


@dataclass(frozen=True)
class Isa:
    """One level of SIMD and the shape of the register tiles that suits it.

    Attributes
    ----------
    name : str
        `amx`, `avx512`, `avx2`, `avx2-bf16`, `neon` or `plain`.
    lanes : int
        float32 numbers in a register.
    vectors : int
        Registers across a tile; a tile has `lanes * vectors` columns.
    rows : int
        Rows of a tile: `rows * vectors` accumulators and what a step needs beside them fill the register file.
    fused : bool
        Whether multiplication and addition are one instruction.
    bf16 : bool
        Whether low precision multiplies bf16. Elsewhere it is a way to store weights, which are widened to float32.
    spelled_out : bool
        Whether these products are made of others, slowly: `avx2-bf16` is for tests on CPUs that have no bf16.
    tiles : bool
        Whether it does so on the tile registers of AMX; float32 and what is not a product are as on AVX-512.
    """

    name: str
    lanes: int
    vectors: int
    rows: int
    fused: bool = True
    bf16: bool = False
    spelled_out: bool = False
    tiles: bool = False

    @property
    def columns(self) -> int:
        """Columns of a register tile."""
        return self.lanes * self.vectors


@cache
def tiles_granted() -> bool:
    """Whether the system lets this process use tile registers: Linux wants to be asked, as they are 8 kB a thread."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    return bool(system_call(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA) == 0)


@cache
def host_levels() -> dict[str, Isa]:
    """The levels that this CPU can run, best first."""
    features = llvm.get_host_cpu_features()
    machine = platform.machine().lower()
    levels: list[Isa] = []
    if features.get("avx512f") and features.get("avx512bw") and features.get("avx512vl"):
        bf16 = features.get("avx512bf16", False)
        if bf16 and features.get("amx-tile") and features.get("amx-bf16") and tiles_granted():
            levels.append(Isa("amx", 16, 2, 12, bf16=True, tiles=True))
        levels.append(Isa("avx512", 16, 2, 12, bf16=bf16))
    if features.get("avx2") and features.get("fma"):
        levels += [Isa("avx2", 8, 2, 6), Isa("avx2-bf16", 8, 2, 6, bf16=True, spelled_out=True)]
    if machine in ("aarch64", "arm64"):
        levels.append(Isa("neon", 4, 2, 8, bf16=features.get("bf16", False)))
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
