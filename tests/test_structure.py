"""How the modules of numpyesm hang together. That none reads private attributes of another, ruff checks (SLF).

And what a fresh process loads. How much memory it takes is in test_small_memory.py.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
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


def test_what_is_loaded(small_file: str) -> None:
    """By the import: NumPy and the standard library; by a file, computing and fair-esm's look-alike: little more."""
    # Editable installs put finders of their own into sys.modules.
    code = f"""
import sys, json, warnings
warnings.simplefilter("ignore")
before = set(sys.modules)
import numpyesm
print(json.dumps(list({{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names))))
model = numpyesm.ESM2.from_pretrained({small_file!r}, backend="numpy")
model.encode(["MKT"], include=["mean", "contacts", "logits"])
import numpyesm.compat.fair_esm, numpyesm.compat.extract
print(json.dumps(list(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    imported, used = map(json.loads, done.stdout.splitlines())
    # numpy 1 loads numpy.random at once, and Cython leaves its name behind.
    assert {name for name in imported if not name.startswith("_")} <= {"numpy", "numpyesm", "cython_runtime"}
    assert {"huggingface_hub", "numba", "torch", "scipy", "matplotlib", "httpx"}.isdisjoint(used)
    assert {"numpyesm.weights.torch_file", "numpyesm.weights.hub"}.isdisjoint(used)
