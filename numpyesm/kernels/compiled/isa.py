"""SIMD levels: what each needs of a CPU, the shape of its register tiles, and which one this process uses.

Features of CPUs have LLVM's names.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from functools import cache

from ...errors import InvalidOption

# As Linux lists features in /proc/cpuinfo, where LLVM writes a hyphen or nothing.
_RENAMED = {
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "amx_tile": "amx-tile",
    "amx_bf16": "amx-bf16",
}
# Names of macOS's sysctl.
_DARWIN = {
    "hw.optional.avx2_0": ("avx2",),
    "hw.optional.fma": ("fma",),
    "hw.optional.avx512f": ("avx512f",),
    "hw.optional.avx512bw": ("avx512bw",),
    "hw.optional.avx512dq": ("avx512dq",),
    "hw.optional.avx512vl": ("avx512vl",),
    "hw.optional.arm.FEAT_BF16": ("bf16",),
}
# Numbers of Windows' IsProcessorFeaturePresent: it knows no bf16. Every CPU with AVX2 has FMA; all with AVX-512 but
# Knights Landing have its byte, word, length and further parts.
_WINDOWS = {40: ("avx2", "fma"), 41: ("avx512f", "avx512bw", "avx512dq", "avx512vl")}
# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), see Linux's Documentation/arch/x86/xstate.rst.
_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA = 158, 0x1023, 18

# Set in the processes of `kernels/build.py` only: what they compile may not run on this machine.
BUILD_FOR = "NUMPYESM_BUILD_FOR"

# Rows of one tile register and of a product of two by two; steps of k (4 bytes of a row) that one instruction takes.
HALF_ROWS, ROWS, STEPS = 16, 32, 16


@dataclass(frozen=True)
class Isa:
    """One level of SIMD and the shape of the register tiles that suits it.

    Attributes
    ----------
    name : str
        As `NUMPYESM_ISA` spells it.
    needs : tuple of str
        Features of the CPU. Code of this level uses nothing else.
    lanes : int
        float32 numbers in a register.
    vectors : int
        Registers across a tile; a tile has `lanes * vectors` columns.
    rows : int
        Rows of a tile: `rows * vectors` accumulators and what a step needs beside them fill the register file.
    strip_rows : int
        Rows of attention's tiles, which are two registers wide: exponentials find registers beside them.
    fused : bool
        Whether multiplication and addition are one instruction.
    bf16 : bool
        Whether low precision multiplies bf16. Elsewhere it is a way to store weights, which are widened to float32.
    spelled_out : bool
        Whether these products are made of others, slowly: `avx2-bf16` is for tests on CPUs that have no bf16.
    tiles : bool
        Whether they run on the tile registers of AMX; float32 and what is not a product are as on AVX-512.
    slow_with : str
        A feature of CPUs that run the next level faster.
    """

    name: str
    needs: tuple[str, ...]
    lanes: int
    vectors: int
    rows: int
    strip_rows: int
    fused: bool = True
    bf16: bool = False
    spelled_out: bool = False
    tiles: bool = False
    slow_with: str = ""

    @property
    def columns(self) -> int:
        """Columns of a register tile."""
        return self.lanes * self.vectors

    @property
    def strip_columns(self) -> int:
        """Queries that attention takes at a time."""
        return 2 * self.lanes

    @property
    def narrow_rows(self) -> int:
        """Rows that a product in bf16 takes at a time."""
        return ROWS if self.tiles else self.rows

    @property
    def narrow_steps(self) -> int:
        """Steps of k, of two numbers in bf16, that such a product takes at a time."""
        return STEPS if self.tiles else 1


_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_LEVELS = {
    "x86_64": (
        Isa(
            "amx", (*_AVX512, "avx512bf16", "avx512vbmi", "amx-tile", "amx-bf16"), 16, 2, 12, 12, bf16=True, tiles=True
        ),
        # Intel's cores with AMX take four times as long for `vdpbf16ps` as for `vfmadd`: measured, a pass 1.8 times.
        Isa("avx512-bf16", (*_AVX512, "avx512bf16"), 16, 2, 12, 12, bf16=True, slow_with="avx512fp16"),
        Isa("avx512", _AVX512, 16, 2, 12, 12),
        Isa("avx2", _AVX2, 8, 3, 4, 6),
        Isa("avx2-bf16", _AVX2, 8, 3, 4, 6, bf16=True, spelled_out=True),
        Isa("plain", (), 4, 2, 4, 4, fused=False),
    ),
    "aarch64": (  # all of which have NEON
        Isa("neon-bf16", ("bf16",), 4, 2, 8, 8, bf16=True),
        Isa("neon", (), 4, 2, 8, 8),
        Isa("plain", (), 4, 2, 4, 4, fused=False),
    ),
}


def architecture() -> str:
    """`x86_64`, `aarch64`, or what the system calls another one."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def levels(target: str = "") -> dict[str, Isa]:
    """The levels of an architecture, this machine's by default, best first."""
    return {isa.name: isa for isa in _LEVELS.get(target or architecture(), _LEVELS["x86_64"][-1:])}


@cache
def host_features() -> frozenset[str]:
    """Features of this CPU; empty where the system does not tell."""
    try:
        if sys.platform == "win32":
            import ctypes

            present = ctypes.windll.kernel32.IsProcessorFeaturePresent
            return frozenset(name for number, names in _WINDOWS.items() if present(number) for name in names)
        if sys.platform == "darwin":
            return frozenset(name for key, names in _DARWIN.items() if _sysctl(key) for name in names)
        return _proc_cpuinfo()
    except OSError:
        return frozenset()


def _proc_cpuinfo() -> frozenset[str]:
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        for line in lines:
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(_RENAMED.get(flag, flag) for flag in flags.split())
    return frozenset()


def _sysctl(key: str) -> int:
    import ctypes

    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    libc = ctypes.CDLL(None)
    failed = libc.sysctlbyname(key.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value


@cache
def tiles_granted() -> bool:
    """Whether the system lets this process use tile registers: Linux wants to be asked, as they are 8 kB a thread."""
    if not sys.platform.startswith("linux") or architecture() != "x86_64":
        return False
    import ctypes  # nothing else needs it before code is called

    system_call = ctypes.CDLL(None, use_errno=True).syscall
    return bool(system_call(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA) == 0)


@cache
def host_levels() -> dict[str, Isa]:
    """The levels that this CPU can run and the system grants, best first."""
    features = host_features()
    return {
        name: isa
        for name, isa in levels().items()
        if features.issuperset(isa.needs) and (not isa.tiles or tiles_granted())
    }


@cache
def wanted_levels() -> dict[str, Isa]:
    """The levels that this process may use: all that help on this CPU, or the one that `NUMPYESM_ISA` asks for.

    Raises
    ------
    InvalidOption
        `NUMPYESM_ISA` names a level that this CPU does not have.
    """
    found = host_levels()
    wanted = os.environ.get("NUMPYESM_ISA", "").strip().lower()
    if not wanted:
        features = host_features()
        return {name: isa for name, isa in found.items() if not isa.spelled_out and isa.slow_with not in features}
    if wanted not in found:
        raise InvalidOption(f"NUMPYESM_ISA={wanted}: this CPU has {', '.join(found)}")
    return {wanted: found[wanted]}


def host_isa() -> Isa:
    """The best of `wanted_levels`."""
    return next(iter(wanted_levels().values()))


def target_isa() -> Isa:
    """The level that this process compiles for: `host_isa`, or what `kernels/build.py` asks for."""
    wanted = os.environ.get(BUILD_FOR)
    return levels()[wanted] if wanted else host_isa()


def portable_cpu(isa: Isa) -> tuple[str, str]:
    """LLVM's CPU and features for code that every machine of this level runs."""
    return ("x86-64" if architecture() == "x86_64" else "generic"), ",".join(f"+{name}" for name in isa.needs)
