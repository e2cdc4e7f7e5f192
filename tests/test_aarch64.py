"""The NumPy backend on ARM under qemu-user, where `tools/check_aarch64.py` has set it up.

NUMPYESM_AARCH64_ROOT names its folder; NUMPYESM_AARCH64_SETUP=1 sets it up (asks apt-get and PyPI).
"""

from __future__ import annotations

import os
import runpy
import tempfile
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "check_aarch64.py"


@pytest.mark.slow
def test_numpy_backend_gives_this_machines_numbers() -> None:
    tool = runpy.run_path(str(TOOL))
    machine = tool["Emulated"](
        Path(os.environ.get("NUMPYESM_AARCH64_ROOT", tempfile.gettempdir() + "/numpyesm-aarch64"))
    )
    if os.environ.get("NUMPYESM_AARCH64_SETUP") == "1":
        machine.set_up()
    if not machine.is_ready:
        pytest.skip("no emulated aarch64 here: python tools/check_aarch64.py sets one up")
    assert machine.error("numpy", "fp32") <= tool["ALLOWED"]["fp32"]
