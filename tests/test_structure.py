"""How the modules of numpyesm hang together. That none reads private attributes of another, ruff checks (SLF)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import numpyesm

ROOT = Path(numpyesm.__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in Path(numpyesm.__file__).parent.rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def imports(name: str) -> Iterator[str]:
    """Yield the modules, and the names of modules, that a module imports when it or its functions run."""
    todo: list[ast.AST] = [ast.parse(MODULES[name].read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        else:
            todo += ast.iter_child_nodes(node)


IMPORTS = {name: set(imports(name)) for name in MODULES}


def test_no_import_circle() -> None:
    """A name that is no module is in the one that holds it."""
    modules = {name: {one if one in MODULES else one.rpartition(".")[0] for one in IMPORTS[name]} for name in MODULES}
    TopologicalSorter({name: found & MODULES.keys() - {name} for name, found in modules.items()}).prepare()


def test_no_private_name_is_imported() -> None:
    assert not {one for found in IMPORTS.values() for one in found if re.search(r"(^|\.)_(?!_|version\.)", one)}
