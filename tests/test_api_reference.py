"""docs/api.md is what the docstrings say, has every public name, and its signatures are those that Python sees."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import numpyesm

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_api_reference", ROOT / "tools" / "build_api_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


tool = load_tool()
NAMES = [name for section in tool.SECTIONS for name in section.names]


def test_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "build_api_reference.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_check_sees_a_difference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tool, "PAGE", tmp_path / "api.md")
    assert tool.main(["--check"]) == 1
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
    (tmp_path / "api.md").write_text(PAGE.read_text().replace("Load a model.", "Load it."))
    assert tool.main(["--check"]) == 1


def test_every_public_name_is_there() -> None:
    text = PAGE.read_text()
    for name in numpyesm.__all__:
        if name != "__version__":
            assert re.search(rf"^### numpyesm(\.\w+)*\.{name}$", text, re.MULTILINE), name
    for name, member in vars(numpyesm.ESM2).items():
        if not name.startswith("_") and (callable(member) or isinstance(member, property | classmethod)):
            assert f"#### ESM2.{name}\n" in text, name
    for module in ("numpyesm.bulk", "numpyesm.errors"):
        imported = pytest.importorskip(module)
        public = getattr(imported, "__all__", [n for n, v in vars(imported).items() if inspect.isclass(v)])
        for name in public:
            assert re.search(rf"^### numpyesm(\.\w+)*\.{name}$", text, re.MULTILINE), name


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name.module}.{name.name}")
def test_names_are_what_python_has(name: object) -> None:
    """Importable from where the page says, with the parameters that it names."""
    try:
        value = getattr(importlib.import_module(name.module), name.name)  # type: ignore[attr-defined]
    except ImportError as error:
        pytest.skip(str(error))
    documented = tool.find(name)
    doc = inspect.getdoc(value)
    assert doc is not None
    assert documented.name in (value.__name__, "handle")
    if inspect.isclass(value) and issubclass(value, Warning | Exception):
        return  # shown with their bases
    shown = tool.entry(name)
    for parameter in inspect.signature(value).parameters.values():
        if not parameter.name.startswith("_"):
            assert re.search(rf"[(\s*]{parameter.name}[:=,)]", shown), parameter.name


def test_docstring_sections() -> None:
    text = """One line.

    More, with `code`.

    Parameters
    ----------
    a, b : int
        Both,
        of two lines.
    c
        Without a type.

    Returns
    -------
    list of int
        In order.

    Raises
    ------
    ValueError
        Not so.
    """
    assert tool.markdown(text) == (
        "One line.\n\nMore, with `code`.\n\n**Parameters**\n\n- `a`, `b` (int): Both, of two lines.\n"
        "- `c`: Without a type.\n\n**Returns**\n\n- list of int: In order.\n\n**Raises**\n\n- `ValueError`: Not so."
    )
