"""Run numpyesm as on aarch64 (ARM) under qemu-user, and compare its numbers with this machine's.

    python tools/check_aarch64.py --root /tmp/aarch64            # NumPy backend
    python tools/check_aarch64.py --root /tmp/aarch64 --numba    # the NEON kernels too: some minutes of compiling

Needs Debian's or Ubuntu's apt-get and a network the first time: qemu-user-static and Python for arm64 are unpacked into
`--root`, not installed; NumPy, Numba and llvmlite are PyPI's aarch64 wheels. Exit code 1 if any number differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ROOT = Path(__file__).resolve().parents[1]

DEBIAN = "http://deb.debian.org/debian"
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = (f"python{PYTHON}", "libstdc++6", "libgcc-s1")
WHEELS = {"numpy": ("numpy",), "numba": ("numpy", "numba", "llvmlite")}
# What qemu's "max" CPU has and nobody can see there, because /proc/cpuinfo is this machine's.
_FEATURES = "bf16"
# Allowed error against this machine's float32, as a share of an output's size: the largest for fp32, else the RMS.
ALLOWED = {"fp32": 2e-5, "bf16": 0.02, "int8": 0.05}

# Runs on either machine: a model of random weights, all outputs of a short and a long sequence, into one .npz.
WORK = """
import sys, warnings
warnings.simplefilter("ignore")
backend, precision, features, out = sys.argv[1:]
if features:
    from numpyesm.kernels.compiled import isa
    isa.host_features = lambda: frozenset(features.split(","))
import platform
import numpy as np
from numpyesm import ESM2
from numpyesm.config import ModelConfig
from numpyesm.weights.synthetic import random_checkpoint
model = ESM2(random_checkpoint(ModelConfig(3, 80, 20, 320), 1), backend=backend, precision=precision, threads=2)
sequences = ["MKTFFVLVLLLSGALAAPVA", "MAKTLVSERIDPKQNFYMHWC" * 9]
results = model.encode(sequences, [0, -1], ["mean", "per_token", "contacts", "logits", "attentions"])
arrays = {f"{i}_{k}": v for i, r in enumerate(results) for k, v in r.to_arrays().items()}
arrays["predict"] = model.predict(["MK<mask>TW"])[0].logits
arrays["log_prob"] = model.log_prob(sequences)
np.savez(out, **arrays)
print(platform.machine())
"""


def main(arguments: list[str] | None = None) -> int:
    """Prints a table; 1 if a number is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "numpyesm-aarch64")
    parser.add_argument("--numba", action="store_true", help="the NEON kernels as well")
    options = parser.parse_args(arguments)
    machine = Emulated(options.root.absolute())
    machine.set_up("numba" if options.numba else "numpy")
    runs = [("numpy", "fp32", "")]
    if options.numba:
        runs += [("numba", "fp32", ""), ("numba", "int8", _FEATURES), ("numba", "bf16", _FEATURES)]
    failed = False
    for backend, precision, features in runs:
        error = machine.error(backend, precision, features)
        failed |= error > ALLOWED[precision]
        print(f"aarch64 {backend:5} {precision}: error {error:.1e}, allowed {ALLOWED[precision]:.0e}")
    return int(failed)


class Emulated:
    """A folder with qemu, Python and wheels of aarch64."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.system = root / "system"
        self.wheels = root / "wheels"

    @property
    def qemu(self) -> str | None:
        """The emulator, if it is there."""
        unpacked = self.root / "qemu/usr/bin/qemu-aarch64-static"
        return (
            str(unpacked) if unpacked.exists() else shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        )

    @property
    def python(self) -> Path:
        return self.system / f"usr/bin/python{PYTHON}"

    def set_up(self, what: str = "numpy") -> None:
        """Fetch what is missing; installs nothing on this machine."""
        self.root.mkdir(parents=True, exist_ok=True)
        if self.qemu is None:
            self._unpack(self._download(["qemu-user-static"], self.root / "debs-host", {}), self.root / "qemu")
        if not self.python.exists():
            self._unpack(self._download(self._closure(), self.root / "debs", self._apt()), self.system)
        if not all((self.wheels / name).is_dir() for name in WHEELS[what]):
            platforms = [f"manylinux_2_{n}_aarch64" for n in (28, 27, 17)] + ["manylinux2014_aarch64"]
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(self.wheels)]
            command += ["--only-binary=:all:", "--no-deps", "--no-compile", "--python-version", PYTHON]
            command += [part for platform in platforms for part in ("--platform", platform)]
            subprocess.run([*command, "--implementation", "cp", *WHEELS[what]], check=True, stdout=sys.stderr)

    def error(self, backend: str, precision: str, features: str = "") -> float:
        """How far the emulated machine's outputs are from this one's float32, by the measure of `ALLOWED`."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._run_there(backend, precision, features, folder / "theirs.npz")
            command = [sys.executable, "-c", WORK, "numpy", "fp32", "", str(folder / "truth.npz")]
            subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
            theirs, truth = dict(np.load(folder / "theirs.npz")), dict(np.load(folder / "truth.npz"))
        assert set(theirs) == set(truth)
        measure = largest_error if precision == "fp32" else mean_error
        return max(measure(theirs[name], truth[name]) for name in truth)

    def _run_there(self, backend: str, precision: str, features: str, out: Path) -> None:
        assert self.qemu is not None
        environment = {
            "PYTHONHOME": str(self.system / "usr"),
            "PYTHONPATH": os.pathsep.join((str(self.wheels), str(ROOT))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(self.root / "numba-cache"),
            "HOME": str(self.root),
            "PATH": os.environ["PATH"],
        }
        if features:
            levels = ",".join(f"+{name}" for name in ("fp-armv8", "lse", "crc", "v8.2a", *features.split(",")))
            environment |= {"NUMBA_CPU_NAME": "neoverse-v1", "NUMBA_CPU_FEATURES": levels}
        command = [self.qemu, "-cpu", "max", "-L", str(self.system), str(self.python)]
        done = subprocess.run(
            [*command, "-c", WORK, backend, precision, features, str(out)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{backend} {precision} failed under qemu:\n{done.stderr[-3000:]}")
        assert done.stdout.startswith("aarch64"), done.stdout

    def _apt(self) -> dict[str, str]:
        """An apt of its own for arm64, which knows nothing of this machine's packages and changes none."""
        apt = self.root / "apt"
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        (apt / "sources.list").write_text(f"deb {DEBIAN} {SUITE} main\n")
        (apt / "status").touch()
        settings = {
            "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": apt / "state",
            "Dir::State::status": apt / "status", "Dir::Cache": apt / "cache", "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::sourcelist": apt / "sources.list", "APT::Sandbox::User": "root",
        }  # fmt: skip
        (apt / "apt.conf").write_text("".join(f"{key} {json.dumps(str(value))};\n" for key, value in settings.items()))
        environment = {"APT_CONFIG": str(apt / "apt.conf")}
        subprocess.run(["apt-get", "update", "-qq"], env=os.environ | environment, check=True, stdout=sys.stderr)
        return environment

    def _closure(self) -> list[str]:
        """The packages and all that they depend on."""
        command = ["apt-get", "install", "-y", "--no-install-recommends", "--print-uris", *PACKAGES]
        done = subprocess.run(command, env=os.environ | self._apt(), capture_output=True, text=True, check=True)
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith("'")]
        return sorted({line[1].split("_")[0] for line in lines} - {"dpkg", "tar"})

    @staticmethod
    def _download(packages: list[str], folder: Path, environment: dict[str, str]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *packages]
        subprocess.run(command, cwd=folder, env=os.environ | environment, check=True, stdout=sys.stderr)
        return folder

    @staticmethod
    def _unpack(debs: Path, target: Path) -> None:
        for deb in sorted(debs.glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(deb), str(target)], check=True)


def largest_error(found: Array, truth: Array) -> float:
    """Largest difference, as a share of the largest number if that exceeds 1, as log-probabilities do."""
    return float(np.abs(found - truth).max() / max(1.0, np.abs(truth).max()))


def mean_error(found: Array, truth: Array) -> float:
    """Root mean square of the difference, as a share of the output's own."""
    return float(np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2.0)))


if __name__ == "__main__":
    sys.exit(main())
