"""The level and the CPU that kernels are compiled for: this machine, or what `kernels/build.py` asks for."""

from __future__ import annotations

import os

from ..compiled.isa import Isa, architecture, host_isa, levels

# Set in the processes of `kernels/build.py` only: such code may not run on this machine.
BUILD_FOR = "NUMPYESM_BUILD_FOR"


def target_isa() -> Isa:
    """The level in use in this process."""
    wanted = os.environ.get(BUILD_FOR)
    return levels()[wanted] if wanted else host_isa()


def portable_cpu(isa: Isa) -> tuple[str, str]:
    """LLVM's CPU and features for code that every machine of this level runs."""
    return ("x86-64" if architecture() == "x86_64" else "generic"), ",".join(f"+{name}" for name in isa.needs)
