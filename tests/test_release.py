"""What is published: a complete sdist, a wheel of the package alone, and one version.

CI's job `wheel` installs the wheel in bare environments and runs the demo.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import numpyesm

ROOT = Path(__file__).parents[1]
VERSION: str = numpyesm.__version__


def build(kind: str, source: Path, output: Path) -> Path:
    """Run the build backend that pyproject.toml names, in a process of its own."""
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, output]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_sdist_is_enough_for_a_wheel_of_the_package_alone(tmp_path: Path) -> None:
    """Pure Python, and no tests in either; what running the package leaves behind is not its part."""
    left = ".git .venv* .trained __pycache__ *.egg-info *.safetensors *.pt *.nb? .*_cache .hypothesis .cache build dist"
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*left.split(), "*-output"))
    package = {path.relative_to(tmp_path / "source").as_posix() for path in (tmp_path / "source/numpyesm").rglob("*.*")}
    assert {"numpyesm/py.typed", "numpyesm/data/example_proteins.fasta", "numpyesm/service/page/index.html"} <= package
    sdist = build("sdist", tmp_path / "source", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not [name for name in names if name.startswith(("tests", "weights", "bench", "."))]

    wheel = build("wheel", tmp_path / "unpacked" / f"numpyesm-{VERSION}", tmp_path)
    assert wheel.name == f"numpyesm-{VERSION}-py3-none-any.whl"
    info = f"numpyesm-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if not name.startswith(info)} == package
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        requirements = message_from_bytes(archive.read(f"{info}/METADATA")).get_all("Requires-Dist", [])
    plain = {re.split(r"[^\w-]", line)[0] for line in requirements if "extra ==" not in line}
    assert plain == {"numpy", "safetensors", "huggingface-hub"}


def test_version_stands_in_one_place() -> None:
    assert (ROOT / "numpyesm" / "_version.py").read_text() == f'__version__ = "{VERSION}"\n'
    others = [path for path in (ROOT / "numpyesm").rglob("*.py") if path.name != "_version.py"]
    assert [path for path in others if re.search(rf"[\"']v?{re.escape(VERSION)}[\"']", path.read_text("utf-8"))] == []
    assert re.search(rf"^version: \"?{re.escape(VERSION)}\"?$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()
