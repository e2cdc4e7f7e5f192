"""What is published: an sdist and a wheel that run by themselves, one version, workflows that name what is there."""

from __future__ import annotations

import importlib.metadata
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
from typing import Any

import pytest

import numpyesm
from numpyesm.cli.parser import build_parser

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
VERSION: str = numpyesm.__version__

_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|Temporary failure|ProxyError|ConnectTimeout|unreachable"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Away from this source tree: what is imported must be what was installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NUMPYESM", "PIP_"))}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300
    )


def pip_install(python: Path | str, *arguments: str | Path, cwd: Path) -> None:
    done = run(
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", *arguments, cwd=cwd
    )
    if done.returncode and _NO_NETWORK.search(done.stderr):
        pytest.skip("the package index cannot be reached from here")
    assert done.returncode == 0, done.stderr


def build(kind: str, source: Path, output: Path, setuptools: str) -> Path:
    """Run the build backend that pyproject.toml names, in a process of its own."""
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    done = run(sys.executable, "-c", code, output, cwd=source, PYTHONPATH=setuptools)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the unpacked sdist, which must therefore be complete."""
    folder = tmp_path_factory.mktemp("release")
    setuptools = ""
    try:
        current = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        current = 0
    if current < 77:
        setuptools = str(folder / "setuptools")
        pip_install(sys.executable, "--target", setuptools, "setuptools>=77", cwd=folder)
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.egg-info", "*.safetensors", "*.pt", "*.nb?",
                                     ".*_cache", ".hypothesis", ".cache", "build", "dist", "*-output")  # fmt: skip
    shutil.copytree(ROOT, source, ignore=ignored)
    sdist = build("sdist", source, folder, setuptools)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return sdist, build("wheel", folder / "unpacked" / f"numpyesm-{VERSION}", folder, setuptools)


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


def test_wheel_is_pure_python(built: tuple[Path, Path]) -> None:
    wheel = built[1]
    assert wheel.name == f"numpyesm-{VERSION}-py3-none-any.whl"
    metadata = wheel_metadata(wheel, "WHEEL")
    assert metadata.get_all("Tag") == ["py3-none-any"]
    assert metadata["Root-Is-Purelib"] == "true"


def test_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if not name.startswith(f"numpyesm-{VERSION}.dist-info/")}
    assert inside == package_files()
    assert {"numpyesm/py.typed", "numpyesm/data/example_proteins.fasta", "numpyesm/service/page/index.html"} <= inside
    assert f"numpyesm-{VERSION}.dist-info/licenses/LICENSE" in names
    assert built[1].stat().st_size < 1_000_000


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
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    required = metadata.get_all("Requires-Dist") or []
    plain = {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line}
    assert plain == {"numpy", "safetensors", "huggingface-hub"}
    assert set(metadata.get_all("Provides-Extra") or []) >= {"plot", "fast", "serve", "bulk", "ray", "sklearn", "all"}


def test_wheel_runs_in_a_bare_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    environment = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    folder = environment / ("Scripts" if os.name == "nt" else "bin")
    pip_install(folder / "python", built[1], cwd=tmp_path)

    where = run(folder / "python", "-c", "import numpyesm; print(numpyesm.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(environment), where.stderr
    listed = run(folder / "python", "-m", "pip", "list", "--disable-pip-version-check", cwd=tmp_path).stdout
    assert not re.search(r"^(torch|numba|fastapi|pydantic|scipy|matplotlib)\s", listed, re.MULTILINE)
    quiet = {"NUMPYESM_OFFLINE": "1", "NUMPYESM_CACHE": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    assert run(folder / "numpyesm", "--version", cwd=tmp_path, **quiet).stdout.split()[-1] == VERSION
    done = run(folder / "numpyesm", "demo", "--output", "out", cwd=tmp_path, **quiet)
    assert done.returncode == 0, done.stderr
    assert "mean embedding" in done.stdout
    assert "SYNTHETIC WEIGHTS" in done.stdout + done.stderr
    assert (tmp_path / "out" / "embeddings.npz").stat().st_size > 1000


# -- one version --------------------------------------------------------------------------------------------------


def test_version_stands_in_one_place() -> None:
    assert (ROOT / "numpyesm" / "_version.py").read_text() == f'__version__ = "{VERSION}"\n'
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", VERSION)
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject
    assert 'version = { attr = "numpyesm._version.__version__" }' in pyproject
    for path in (ROOT / "numpyesm").rglob("*.py"):
        if path.name != "_version.py":
            assert not re.search(rf"[\"']v?{re.escape(VERSION)}[\"']", path.read_text(encoding="utf-8")), path


def test_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    assert sections[1][0] == VERSION
    for _, date in sections[1:]:
        assert date == "unreleased" or re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # fmt: skip
    commands = re.search(r"The command line: (.*?)\.\n", text, re.DOTALL)
    assert commands is not None
    for name in re.findall(r"`([\w-]+)`", commands[1]):
        assert name in subcommands(), name


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == VERSION
    assert citation["license"] == "MIT"
    assert citation["type"] == "software"
    assert citation["message"]
    assert citation["title"] == "numpyesm"
    assert citation["authors"]
    assert citation["references"][0]["doi"] == "10.1126/science.ade2574"


# -- GitHub -------------------------------------------------------------------------------------------------------


def subcommands() -> set[str]:
    choices = [action.choices for action in build_parser()._actions if action.choices and not action.option_strings]
    return set(choices[0])


def workflow(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text())  # type: ignore[no-any-return]


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_what_is_there(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    script = "\n".join(step["run"] for step in steps(path) if "run" in step)
    for target in re.findall(r"\bmake ([\w-]+)", script):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"(?<![\w/])((?:tests|tools|numpyesm|\.ci)/[\w./-]+)", script):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"^numpyesm ([\w-]+)", script, re.MULTILINE):
        assert name in subcommands(), name
    extras = re.search(r"\[project.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert extras is not None
    for group in re.findall(r'"\.\[([\w,]+)\]"', script):
        for extra in group.split(","):
            assert re.search(rf"^{extra} = ", extras[1], re.MULTILINE), extra


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_careful(path: Path) -> None:
    content = workflow(path)
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        assert set(job.get("permissions", {})) <= {"contents", "id-token"}
        for needed in [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", []):
            assert needed in content["jobs"]
    for step in steps(path):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@(release/)?v\d+", step["uses"]), step["uses"]
        # What others can choose (titles, branch names) must not become part of a script.
        assert "${{ github.event" not in step.get("run", "")
    # YAML 1.1 reads the key `on` as true.
    assert "pull_request_target" not in content[True]


def test_tests_run_everywhere() -> None:
    jobs = workflow(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    matrix = jobs["tests"]["strategy"]["matrix"]
    assert set(matrix["os"]) == {"ubuntu-latest", "macos-latest", "windows-latest"}
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert ".ci/run" in [step.get("run") for step in jobs["all"]["steps"]]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    # `make test`, on systems that have no make.
    script = [step["run"] for step in jobs["tests"]["steps"] if "run" in step]
    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    for line in recipe[1].splitlines():
        assert line.strip().replace("$(TEST_BIN)/", "") in script
    pinned = re.search(r"torch==([\d.]+)", (ROOT / "Makefile").read_text())
    assert pinned is not None
    assert any(f"install torch=={pinned[1]} " in line for line in script)


def test_no_job_on_linux_downloads_cuda() -> None:
    """`make lint` and `.ci/run` install torch, of which PyPI's build for Linux brings gigabytes."""
    jobs = workflow(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    for name, job in jobs.items():
        for step in job["steps"]:
            run = step.get("run", "")
            if re.match(r"make (lint|test)\b(?!-)|\.ci/run", run):
                assert job["env"]["PIP_EXTRA_INDEX_URL"] == "https://download.pytorch.org/whl/cpu", name
            if "torch==" in run:
                assert "/whl/cpu" in run, name


def test_release_is_published_without_a_token() -> None:
    content = workflow(ROOT / ".github" / "workflows" / "release.yml")
    assert list(content[True]) == ["push"]
    assert content[True]["push"] == {"tags": ["v[0-9]*"]}
    publish = content["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert publish["needs"] == "build"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_issue_templates(path: Path) -> None:
    content = workflow(path)
    if path.name == "config.yml":
        assert content["blank_issues_enabled"] is True
        return
    assert content["name"]
    assert content["description"]
    fields = [item for item in content["body"] if item["type"] != "markdown"]
    assert {item["type"] for item in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({item["id"] for item in fields}) == len(fields)
    assert all(item["attributes"]["label"] for item in fields)
    for name in re.findall(r"`numpyesm ([\w-]+)`", path.read_text()):
        assert name in subcommands(), name


def test_contributing_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)\b(?= +#|`)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    # A row of the table names files beside the first one, or below the package.
    for name in re.findall(r"`([\w./-]+(?:/|\.py|\.md|\.cff|\.yml))`", text):
        bases = (ROOT, ROOT / "numpyesm", ROOT / "numpyesm" / "kernels")
        assert any((base / name).exists() for base in bases), name
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / name).exists(), name
