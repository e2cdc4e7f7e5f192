"""Write requirements-dev.lock: every distribution of the development environment, its version and its hashes.

    python tools/lock.py requirements-dev.lock      # in the environment that the tests pass in; needs `uv`

torch is pinned in pyproject.toml and left out here: which of its builds fits (CPU or CUDA) is the machine's affair, and
each has another hash. To make the environment anew:

    pip install torch==2.13.0
    pip install --no-deps --require-hashes -r requirements-dev.lock
    pip install --no-deps --editable .
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LEFT_OUT_PREFIXES = ("nvidia-", "cuda-")
_LEFT_OUT = ("torch", "triton", "numpyesm")


def main() -> int:
    """Lock to what is installed here; the exit code is uv's."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "requirements-dev.lock")
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    installed = {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version.split("+")[0]
        for distribution in importlib.metadata.distributions()
    }
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        pins = (f"{name}=={version}" for name, version in sorted(installed.items()) if name not in ("numpyesm", "pip"))
        constraints.write_text("\n".join(pins) + "\n")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        command = [
            uv, "pip", "compile", "--quiet", "--extra", "test", "--generate-hashes", "--python-version", version,
            "--constraint", str(constraints), "--no-header", "--no-annotate", "pyproject.toml",
        ]  # fmt: skip
        for name in _LEFT_OUT:
            command += ["--no-emit-package", name]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    # What only torch's CUDA builds need goes with torch.
    kept, skip = [], False
    for line in done.stdout.splitlines():
        if line and not line.startswith((" ", "#")):
            skip = line.startswith(_LEFT_OUT_PREFIXES)
        if not skip and not line.startswith("# "):
            kept.append(line)
    assert __doc__ is not None
    head = "".join(f"# {line}".rstrip() + "\n" for line in __doc__.strip().splitlines())
    output.write_text(f"{head}# Python {version}\n" + "\n".join(kept) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
