"""What the CPU has and the system lets programs use, under LLVM's names."""

from __future__ import annotations

import sys
from functools import cache

# As Linux lists them in /proc/cpuinfo, where LLVM writes a hyphen or nothing.
_RENAMED = {"avx512_bf16": "avx512bf16", "amx_tile": "amx-tile", "amx_bf16": "amx-bf16"}
# Names of macOS's sysctl.
_DARWIN = {
    "hw.optional.avx2_0": ("avx2",),
    "hw.optional.fma": ("fma",),
    "hw.optional.avx512f": ("avx512f",),
    "hw.optional.avx512bw": ("avx512bw",),
    "hw.optional.avx512vl": ("avx512vl",),
    "hw.optional.arm.FEAT_BF16": ("bf16",),
}
# Numbers of Windows' IsProcessorFeaturePresent: it knows no bf16. Every CPU with AVX2 has FMA; all with AVX-512 but
# Knights Landing have its byte, word and length parts.
_WINDOWS = {40: ("avx2", "fma"), 41: ("avx512f", "avx512bw", "avx512vl")}


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
