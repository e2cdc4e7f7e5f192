"""The pages on scoring and on fair-esm: their Python runs, their commands exist."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest

from numpyesm import ESM2
from numpyesm.cli.parser import build_parser
from numpyesm.compat.extract import create_parser

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["scoring.md", "from-fair-esm.md"]


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As written, but for the weights, which are synthetic here."""
    if page == "from-fair-esm.md":
        pytest.importorskip("sklearn")
    original = ESM2.from_pretrained.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        ESM2, "from_pretrained", classmethod(lambda cls, _, **options: original(cls, "synthetic:esm2-35m", **options))
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(block, page, "exec"), names)
    if page == "scoring.md":
        assert names["scan"].scores.shape == (33, 20)  # type: ignore[attr-defined]
        assert names["scores"].shape == (3,)  # type: ignore[attr-defined]
    else:
        assert names["results"]["contacts"].shape == (4, 71, 71)  # type: ignore[index]
        assert len(names["sequence_representations"]) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    lines = [line.split("  #")[0].strip() for block in blocks(page, "console") for line in block.splitlines()]
    assert lines
    for line in lines:
        words = shlex.split(line)
        if words[0] == "numpyesm":
            build_parser().parse_args(words[1:])
        else:
            assert words[:3] == ["python", "-m", "numpyesm.compat.extract"]
            create_parser().parse_args(words[3:])
