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
from email import message_from_string
from pathlib import Path

import pytest

import numpyesm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
VERSION: str = numpyesm.__version__
INFO = f"numpyesm-{VERSION}.dist-info"


def build(kind: str, source: Path, output: Path) -> Path:
    """Run the build backend that pyproject.toml names, in a process of its own."""
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, output]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the unpacked sdist, which must therefore be complete."""
    folder = tmp_path_factory.mktemp("release")
    left = ".git .venv* .trained __pycache__ *.egg-info *.safetensors *.pt *.nb? .*_cache .hypothesis .cache build dist"
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*left.split(), "*-output"))
    sdist = build("sdist", folder / "source", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return sdist, build("wheel", folder / "unpacked" / f"numpyesm-{VERSION}", folder)


def package_files() -> set[str]:
    """Everything in the package that is not left behind by running it."""
    files = {path for path in (ROOT / "numpyesm").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".nbi", ".nbc", ".pyc")}


def test_wheel_is_pure_python_and_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    assert built[1].name == f"numpyesm-{VERSION}-py3-none-any.whl"
    assert built[1].stat().st_size < 1_000_000
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if not name.startswith(INFO)}
        texts = {name: archive.read(f"{INFO}/{name}").decode() for name in ("WHEEL", "METADATA", "entry_points.txt")}
        assert f"{INFO}/licenses/LICENSE" in archive.namelist()
    assert names == package_files()
    assert {"numpyesm/py.typed", "numpyesm/data/example_proteins.fasta", "numpyesm/service/page/index.html"} <= names
    assert message_from_string(texts["WHEEL"]).get_all("Tag") == ["py3-none-any"]
    assert "[console_scripts]\nnumpyesm = numpyesm.cli:main\n" in texts["entry_points.txt"]
    metadata = message_from_string(texts["METADATA"])
    said = ("Version", "Requires-Python", "License-Expression", "Description-Content-Type")
    assert [metadata[name] for name in said] == [VERSION, ">=3.10", "MIT", "text/markdown"]
    plain = {re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert plain == {"numpy", "safetensors", "huggingface-hub"}
    assert set(metadata.get_all("Provides-Extra", [])) >= {"plot", "fast", "serve", "bulk", "ray", "sklearn", "all"}


def test_sdist_holds_what_a_build_needs_and_no_tests(built: tuple[Path, Path]) -> None:
    assert built[0].name == f"numpyesm-{VERSION}.tar.gz"
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not [name for name in names if name.startswith(("tests", "weights", "bench", "."))]


def test_version_stands_in_one_place() -> None:
    assert (ROOT / "numpyesm" / "_version.py").read_text() == f'__version__ = "{VERSION}"\n'
    others = [path for path in (ROOT / "numpyesm").rglob("*.py") if path.name != "_version.py"]
    assert [path for path in others if re.search(rf"[\"']v?{re.escape(VERSION)}[\"']", path.read_text("utf-8"))] == []
    assert re.search(rf"^version: \"?{re.escape(VERSION)}\"?$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()
