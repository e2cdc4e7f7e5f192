"""The README's own lines: its Python runs, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from numpyesm import ESM2
from numpyesm.cli.parser import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")
def test_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, but for the weights, which are synthetic here."""
    original = ESM2.from_pretrained.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(ESM2, "from_pretrained", classmethod(lambda cls, _: original(cls, "synthetic:esm2-35m")))
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        result = names["r"]
        assert result.embeddings[12].shape == (480,)  # type: ignore[attr-defined]
        assert result.per_token_embeddings[6].shape == (20, 480)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", ["README.md", "weights/README.md", "docs/scaling.md"])
def test_commands_exist(page: str) -> None:
    lines = [
        line.split("  #")[0].strip()
        for block in re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        for line in block.splitlines()
    ]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("numpyesm ")]
    assert len(commands) >= 4
    for command in commands:
        build_parser().parse_args(command)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
