"""What is published: an sdist and a wheel that run by themselves, and one version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import numpyesm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
VERSION: str = numpyesm.__version__

_NO_NETWORK = re.compile(r"NewConnectionError|NameResolutionError|Temporary failure|ProxyError|ConnectTimeout")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Away from this source tree: what is imported must be what was installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NUMPYESM", "PIP_"))}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300
    )


def build(kind: str, source: Path, output: Path) -> Path:
    """Run the build backend that pyproject.toml names, in a process of its own."""
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    done = run(sys.executable, "-c", code, output, cwd=source)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the unpacked sdist, which must therefore be complete."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    left = ".git .venv* .trained __pycache__ *.egg-info *.safetensors *.pt *.nb? .*_cache .hypothesis .cache build dist"
    ignored = shutil.ignore_patterns(*left.split(), "*-output")
    shutil.copytree(ROOT, source, ignore=ignored)
    sdist = build("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return sdist, build("wheel", folder / "unpacked" / f"numpyesm-{VERSION}", folder)


def package_files() -> set[str]:
    """Everything in the package that is not left behind by running it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "numpyesm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".nbi", ".nbc", ".pyc")
    }


def wheel_metadata(wheel: Path, name: str) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(f"numpyesm-{VERSION}.dist-info/{name}"))


def test_wheel_is_pure_python_and_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    wheel = built[1]
    assert wheel.name == f"numpyesm-{VERSION}-py3-none-any.whl"
    assert wheel_metadata(wheel, "WHEEL").get_all("Tag") == ["py3-none-any"]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if not name.startswith(f"numpyesm-{VERSION}.dist-info/")}
    assert inside == package_files()
    assert {"numpyesm/py.typed", "numpyesm/data/example_proteins.fasta", "numpyesm/service/page/index.html"} <= inside
    assert f"numpyesm-{VERSION}.dist-info/licenses/LICENSE" in names
    assert wheel.stat().st_size < 1_000_000


def test_sdist_holds_what_a_build_needs_and_no_tests(built: tuple[Path, Path]) -> None:
    sdist = built[0]
    assert sdist.name == f"numpyesm-{VERSION}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not [name for name in names if name.startswith(("tests", "weights", "bench", "."))]


def test_metadata(built: tuple[Path, Path]) -> None:
    metadata = wheel_metadata(built[1], "METADATA")
    found = [
        metadata[name] for name in ("Version", "Requires-Python", "License-Expression", "Description-Content-Type")
    ]
    assert found == [VERSION, ">=3.10", "MIT", "text/markdown"]
    required = metadata.get_all("Requires-Dist") or []
    plain = {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line}
    assert plain == {"numpy", "safetensors", "huggingface-hub"}
    assert set(metadata.get_all("Provides-Extra") or []) >= {"plot", "fast", "serve", "bulk", "ray", "sklearn", "all"}


@pytest.mark.network
def test_wheel_runs_in_a_bare_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    environment = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    folder = environment / ("Scripts" if os.name == "nt" else "bin")
    installed = run(folder / "python", "-m", "pip", "install", "--quiet", "--retries", "1", built[1], cwd=tmp_path)
    if installed.returncode and _NO_NETWORK.search(installed.stderr):
        pytest.skip("the package index cannot be reached from here")
    assert installed.returncode == 0, installed.stderr

    where = run(folder / "python", "-c", "import numpyesm; print(numpyesm.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(environment), where.stderr
    listed = run(folder / "python", "-m", "pip", "list", "--disable-pip-version-check", cwd=tmp_path).stdout
    assert not re.search(r"^(torch|numba|starlette|scipy|matplotlib)\s", listed, re.MULTILINE)
    quiet = {"NUMPYESM_OFFLINE": "1", "NUMPYESM_CACHE": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    assert run(folder / "numpyesm", "--version", cwd=tmp_path, **quiet).stdout.split()[-1] == VERSION
    done = run(folder / "numpyesm", "demo", "--output", "out", cwd=tmp_path, **quiet)
    assert done.returncode == 0, done.stderr
    assert "mean embedding" in done.stdout
    assert "SYNTHETIC WEIGHTS" in done.stdout + done.stderr
    assert (tmp_path / "out" / "embeddings.npz").stat().st_size > 1000


def test_version_stands_in_one_place() -> None:
    assert (ROOT / "numpyesm" / "_version.py").read_text() == f'__version__ = "{VERSION}"\n'
    for path in (ROOT / "numpyesm").rglob("*.py"):
        if path.name != "_version.py":
            assert not re.search(rf"[\"']v?{re.escape(VERSION)}[\"']", path.read_text(encoding="utf-8")), path
    assert re.search(rf"^version: \"?{re.escape(VERSION)}\"?$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()
