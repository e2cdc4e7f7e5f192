"""How the modules of numpyesm hang together, read from their own source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpyesm

ROOT = Path(numpyesm.__file__).parent
FILES = {".".join(("numpyesm", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
NAMED_TUPLE = {"_asdict", "_replace", "_fields"}  # public in spite of their names
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name: str) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield (module, name taken from it, name it has here) for every import that runs, wherever it stands."""
    todo: list[ast.AST] = [TREES[name]]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                whole = inner in MODULES
                yield (inner, None, alias.asname or alias.name) if whole else (module, alias.name, alias.asname)
        else:
            todo += ast.iter_child_nodes(node)


def test_no_import_circle() -> None:
    left = {name: {module for module, _, _ in imports(name)} & MODULES.keys() - {name} for name in MODULES}
    while True:
        needed = set().union(*left.values())
        # Who imports none of those that are left, or is imported by none of them, is in no circle.
        left_over = {
            name: needs & left.keys() for name, needs in left.items() if needs & left.keys() and name in needed
        }
        if left_over == left:
            break
        left = left_over
    assert not left, f"these import each other: {left}"


def test_no_private_name_of_another_module() -> None:
    """Neither imported, nor read from an imported module, nor an attribute of an object that is not `self` or `cls`."""
    found: list[str] = []
    for name, tree in TREES.items():
        taken = list(imports(name))
        found += [f"{name}: {module}.{what}" for module, what, _ in taken if what and is_private(what)]
        found += [f"{name}: {module}" for module, _, _ in taken if is_private(module.rpartition(".")[2])]
        own = defined_attributes(tree) | NAMED_TUPLE
        others = {here for module, _, here in taken if not module.startswith("numpyesm")}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                if isinstance(node.value, ast.Name) and node.value.id in others:
                    continue
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_version"


def defined_attributes(tree: ast.Module) -> set[str]:
    """Private attributes and methods that a module itself makes: `self._x = …`, `def _x`, `_x: int` in a class."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
