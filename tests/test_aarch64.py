"""The NumPy backend as on ARM, under qemu-user: run where `tools/check_aarch64.py` has set it up.

NUMPYESM_AARCH64_ROOT names its folder; NUMPYESM_AARCH64_SETUP=1 sets it up (apt-get and PyPI are asked).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def machine():
    spec = importlib.util.spec_from_file_location("check_aarch64", ROOT / "tools" / "check_aarch64.py")
    assert spec is not None
    tool = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    sys.modules["check_aarch64"] = tool
    spec.loader.exec_module(tool)
    folder = os.environ.get("NUMPYESM_AARCH64_ROOT") or Path(tempfile.gettempdir()) / "numpyesm-aarch64"
    machine = tool.Emulated(Path(folder))
    if os.environ.get("NUMPYESM_AARCH64_SETUP") == "1":
        machine.set_up()
    if not machine.is_ready:
        pytest.skip("no emulated aarch64 here: python tools/check_aarch64.py sets one up")
    return machine


def test_numpy_backend_gives_this_machines_numbers(machine) -> None:
    verdict = machine.compare("numpy", "fp32")
    assert verdict.good, verdict.text
