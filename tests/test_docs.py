"""What is published. README and pages: their Python runs, their commands exist, their links lead somewhere.

And a complete sdist, a wheel of the package alone, one version. CI's job `wheel` tries the wheel in bare environments.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
from running_service import serving

import numpyesm
from numpyesm import ESM2, weights
from numpyesm.cli import main
from numpyesm.cli.parser import build_parser
from numpyesm.compat.extract import create_parser

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1]
VERSION: str = numpyesm.__version__
WITH_PYTHON = ["README.md", *(f"docs/{name}.md" for name in ("tutorial", "scoring", "from-fair-esm", "service"))]
OTHERS = ["weights/README.md", *(f"docs/{name}.md" for name in ("scaling", "lambda", "small-machines", "fine-tuned"))]
HOST = "http://127.0.0.1:8000"


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Words of each command, continued lines joined."""
    lines = "\n".join(blocks(page, "console")).replace("\\\n", " ").splitlines()
    return [shlex.split(re.split(r"\s+# ", line)[0]) for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def service(small_file: str) -> Iterator[str]:
    """The address of a service that has the model of the pages, but small and synthetic."""
    with serving("--model", f"esm2-35m={small_file}") as running:
        yield running.url


@pytest.fixture(scope="module")
def synthetic() -> ESM2:
    """What stands for the weights that the pages name."""
    return ESM2.from_pretrained("synthetic:esm2-35m", backend="numpy")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The files that the tutorial names, in the working directory."""
    monkeypatch.chdir(tmp_path)
    ubiquitin = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
    (tmp_path / "wild_type.fasta").write_text(f">ubiquitin\n{ubiquitin}\n")
    crambin = "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN"
    (tmp_path / "proteins.fasta").write_text(f">ubiquitin\n{ubiquitin}\n>crambin\n{crambin}\n")
    (tmp_path / "variants.csv").write_text("mutant,DMS_score\nI44A,0.1\nK48R,0.9\nI44A:K48R,0.2\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON)
@pytest.mark.usefixtures("folder")
def test_python_runs(page: str, synthetic: ESM2, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """As written, but for the weights, which are synthetic here, and the port of the service; shapes are as stated."""
    monkeypatch.setattr(ESM2, "from_pretrained", lambda *_, **__: synthetic)
    monkeypatch.setattr(weights, "open_weights", lambda _: synthetic.checkpoint, raising=False)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        if HOST in block:
            block = block.replace(HOST, request.getfixturevalue("service"))
        exec(compile(block, page, "exec"), names)
        for expression, shape in re.findall(r"^(?:\w+ = )?(\S.*?) +# (\([\d, ]+\))", block, re.MULTILINE):
            assert eval(expression, names).shape == eval(shape), expression


@pytest.mark.parametrize("page", WITH_PYTHON + OTHERS)
def test_commands_exist(page: str) -> None:
    found = commands(page)
    assert found
    for words in found:
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        elif words[0] == "numpyesm":
            build_parser().parse_args(words[1:])
        elif words[:2] == ["pip", "install"]:
            for extra in re.findall(r"[\w]+", words[2]):
                assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), extra
        elif words[:3] == ["python", "-m", "numpyesm.compat.extract"]:
            create_parser().parse_args(words[3:])
        elif words[0] == "python":
            text = (ROOT / words[1]).read_text()
            for option in (word for word in words[2:] if word.startswith("-")):
                assert f'"{option}"' in text, option
        elif words[:2] == ["docker", "build"]:
            assert f" AS {words[words.index('--target') + 1]}\n" in (ROOT / "Dockerfile").read_text()
        else:
            assert words[0] in ("curl", "docker"), words


@pytest.mark.slow
def test_tutorial_commands_run(monkeypatch: pytest.MonkeyPatch, folder: Path, small_file: str) -> None:
    """All that need neither the network nor another program."""
    chosen = ["--weights", small_file, "--backend", "numpy"]
    runnable = {"encode", "embed", "predict", "contacts", "score", "scan"}
    ours = [words[1:] for words in commands("docs/tutorial.md") if words[0] == "numpyesm" and "--weights" not in words]
    found = [words for words in ours if words[0] in runnable]
    assert {words[0] for words in found} == runnable
    for words in found:
        assert main([*words, *chosen]) == 0, words
        if "-o" in words:
            assert (folder / words[words.index("-o") + 1]).stat().st_size > 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", ["docs/tutorial.md", "docs/service.md"])
def test_curl_runs(page: str, service: str) -> None:
    calls = [words for words in commands(page) if words[0] == "curl"]
    assert calls
    for words in calls:
        done = subprocess.run([w.replace(HOST, service) for w in words], capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)["results"][0]["embeddings"], done.stdout


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", page.read_text()):
            name = (target[0] or target[1]).partition("#")[0]
            if name and not name.startswith(("http:", "https:")):
                assert (page.parent / name).exists(), (page.name, name)


# -- the package ---------------------------------------------------------------------------------------------------


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
