"""The Dockerfile, read instruction by instruction: docker itself cannot run where the tests run."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from numpyesm.cli.parser import build_parser

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, arguments), continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found, stage = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        assert name == name.upper(), line
        if name == "FROM":
            stage = rest.split(" AS ")[1]
        found.append((stage, name, rest.strip()))
    return found


def stages() -> dict[str, str]:
    """Each stage and what it is made from."""
    return {rest.split(" AS ")[1]: rest.split(" AS ")[0] for _, name, rest in instructions() if name == "FROM"}


def chain(stage: str) -> list[str]:
    bases = stages()
    found = [stage]
    while bases[found[-1]] in bases:
        found.append(bases[found[-1]])
    return found


def of(stage: str, name: str) -> list[str]:
    """Arguments of an instruction in a stage and in those it is made from, in order."""
    return [rest for at in reversed(chain(stage)) for s, n, rest in instructions() if (s, n) == (at, name)]


def test_only_known_instructions() -> None:
    known = {"ARG", "FROM", "ENV", "WORKDIR", "RUN", "COPY", "USER", "ENTRYPOINT", "CMD", "EXPOSE", "HEALTHCHECK",
             "STOPSIGNAL"}  # fmt: skip
    assert {name for _, name, _ in instructions()} <= known
    assert set(stages()) == {"build", "runtime", "lambda", "serve"}
    assert instructions()[-1][0] == "serve"  # what `docker build .` makes


def test_bases_are_pinned_to_a_version() -> None:
    for base in stages().values():
        assert base in stages() or re.fullmatch(r"python:\$\{PYTHON\}-slim-bookworm", base)
    assert ("", "ARG", "PYTHON=3.12") in instructions()


@pytest.mark.parametrize("stage", ["lambda", "serve"])
def test_nobody_runs_it(stage) -> None:
    user = of(stage, "USER")[-1]
    assert int(user.split(":")[0]) > 0
    assert not of(stage, "RUN")  # nothing is installed in what is shipped


@pytest.mark.parametrize("stage", ["lambda", "serve"])
def test_nothing_is_written_outside_of_tmp(stage) -> None:
    variables = dict(part.split("=", 1) for line in of(stage, "ENV") for part in line.split())
    assert variables["HOME"] == "/tmp"
    assert variables["NUMPYESM_CACHE"].startswith("/tmp")
    assert variables["PYTHONDONTWRITEBYTECODE"] == "1"
    assert variables["NUMPYESM_OFFLINE"] == "1"


def test_the_kernels_are_baked_in_where_they_are_looked_for() -> None:
    (warmup,) = (rest for rest in of("build", "RUN") if "numpyesm warmup" in rest)
    folder = re.search(r"warmup --cache (\S+)", warmup)[1]
    assert f"NUMBA_CACHE_DIR={folder}" in " ".join(of("serve", "ENV"))
    assert folder.startswith("/opt")
    assert "--from=build /opt /opt" in of("serve", "COPY")


def test_what_is_copied_is_there_and_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for rest in of("build", "COPY"):
        *sources, _ = rest.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source.rstrip("/") in kept


def test_shell_lines_are_valid() -> None:
    for rest in of("build", "RUN"):
        done = subprocess.run(["sh", "-n"], input=rest, text=True, capture_output=True)
        assert done.returncode == 0, (rest, done.stderr)


def test_the_commands_exist() -> None:
    for _, name, rest in instructions():
        if name in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)  # no shell between the process and its signals
    assert json.loads(of("lambda", "CMD")[-1]) == ["numpyesm.serverless.handler"]
    from numpyesm import serverless

    assert callable(serverless.handler)
    command = json.loads(of("serve", "ENTRYPOINT")[-1]) + json.loads(of("serve", "CMD")[-1])
    assert command[0] == "numpyesm"
    parsed = build_parser().parse_args(command[1:])
    assert (parsed.host, parsed.port) == ("0.0.0.0", int(of("serve", "EXPOSE")[-1]))
    for rest in of("build", "RUN"):
        for call in re.findall(r"numpyesm ((?:warmup|convert|fetch)[^;&]*)", rest):
            build_parser().parse_args(call.replace('"', "").replace("$DTYPE", "fp16").split())


def test_the_health_check_asks_the_service() -> None:
    (check,) = of("serve", "HEALTHCHECK")
    command = json.loads(check[check.index("CMD") + 3 :])
    assert command[:2] == ["python", "-c"]
    ast.parse(command[2])
    assert f":{of('serve', 'EXPOSE')[-1]}/healthz" in command[2]
