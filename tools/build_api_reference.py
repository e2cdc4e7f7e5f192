"""Write docs/api.md from the signatures and docstrings of the public names.

The sources are read, not imported: what the page says does not depend on which extras are installed.

    python tools/build_api_reference.py            write the page
    python tools/build_api_reference.py --check    exit code 1 if it is not what would be written
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True)
class Name:
    """A public name, the module that it is imported from, and the place of its definition below `numpyesm/`."""

    module: str
    name: str
    source: str
    attribute: str = ""  # within the source, where it is not `name`


@dataclass(frozen=True)
class Section:
    """Names under one heading."""

    title: str
    text: str
    names: tuple[Name, ...]


def _names(module: str, source: str, *names: str) -> tuple[Name, ...]:
    return tuple(Name(module, name, source) for name in names)


SECTIONS = (
    Section("The model", "", _names("numpyesm", "model.py", "ESM2")),
    Section(
        "Results",
        "",
        (
            *_names("numpyesm", "results.py", "EncodeResult", "PredictResult"),
            *_names("numpyesm.scoring", "scoring/scan.py", "MutationScan"),
            *_names("numpyesm", "config.py", "ModelConfig"),
        ),
    ),
    Section(
        "Errors and warnings",
        "All errors are `NumpyesmError`, and also what Python calls such a thing: `ValueError`, `FileNotFoundError` …",
        (
            *_names(
                "numpyesm",
                "errors.py",
                *("NumpyesmError", "InvalidSequence", "InvalidMutation", "InvalidOption", "CheckpointError"),
                *("WeightsNotFound", "NotEnoughMemory", "MissingHead", "MissingExtra"),
            ),
            *_names("numpyesm.errors", "errors.py", "BulkError"),
            *_names("numpyesm", "model.py", "SyntheticWeightsWarning"),
        ),
    ),
    Section(
        "Mutations",
        "`ESM2.score_mutations` and `ESM2.scan_mutations` do the work; see [scoring](scoring.md).",
        (
            *_names("numpyesm.scoring", "scoring/notation.py", "Substitution", "parse_mutant"),
            *_names("numpyesm.scoring", "scoring/correlation.py", "spearman"),
        ),
    ),
    Section(
        "FASTA and bulk embedding",
        "`pip install 'numpyesm[bulk]'` for Parquet and HDF5; see [scaling](scaling.md).",
        (
            *_names("numpyesm.bulk", "bulk/job.py", "embed_fasta", "Summary"),
            *_names("numpyesm.bulk", "bulk/progress.py", "Progress", "BarProgress", "JsonProgress"),
            *_names("numpyesm.fasta", "fasta.py", "read_fasta", "Record"),
        ),
    ),
    Section(
        "Weights",
        "",
        (
            *_names("numpyesm.weights", "weights/hub.py", "fetch"),
            *_names("numpyesm.weights", "weights/conversion.py", "convert", "Conversion"),
            *_names("numpyesm.weights", "weights/load.py", "load_checkpoint"),
            *_names("numpyesm.weights", "weights/canonical.py", "save_canonical", "load_canonical"),
            *_names("numpyesm.weights", "weights/locate.py", "find_local", "resolve"),
            *_names("numpyesm.weights", "weights/cache.py", "cache_dir"),
            *_names("numpyesm.weights", "weights/checkpoint.py", "Checkpoint"),
        ),
    ),
    Section(
        "In place of fair-esm",
        "See [from fair-esm](from-fair-esm.md).",
        (
            *_names(
                "numpyesm.compat.fair_esm.pretrained",
                "compat/fair_esm/pretrained.py",
                *("load_model_and_alphabet", "load_model_and_alphabet_local", "load_model_and_alphabet_hub"),
                *("esm2_t6_8M_UR50D", "esm2_t12_35M_UR50D", "esm2_t30_150M_UR50D", "esm2_t33_650M_UR50D"),
            ),
            *_names("numpyesm.compat.fair_esm", "compat/fair_esm/model.py", "ESM2"),
            *_names(
                "numpyesm.compat.fair_esm",
                "compat/fair_esm/data.py",
                *("Alphabet", "BatchConverter", "FastaBatchedDataset"),
            ),
            *_names("numpyesm.compat.extract", "compat/extract.py", "load"),
        ),
    ),
    Section(
        "scikit-learn",
        "`pip install 'numpyesm[sklearn]'`.",
        _names("numpyesm.sklearn", "sklearn.py", "ESM2Embedder"),
    ),
    Section(
        "Service and serverless",
        "`numpyesm serve` is the usual way; see [the service](service.md). On AWS Lambda the handler is "
        "`numpyesm.serverless.handler`.",
        (
            *_names("numpyesm.service.app", "service/app.py", "Service"),
            *_names("numpyesm.service.settings", "service/settings.py", "Settings"),
            *_names("numpyesm.service.server", "service/server.py", "Server"),
            Name("numpyesm.serverless", "handler", "serverless/function.py", "Function.handle"),
        ),
    ),
    Section(
        "Compiled kernels",
        "`pip install 'numpyesm[fast]'`.",
        _names("numpyesm.kernels.numba_.warmup", "kernels/numba_/warmup.py", "warmup"),
    ),
)


def find(name: Name) -> Definition:
    """The definition of a public name."""
    body = ast.parse((ROOT / "numpyesm" / name.source).read_text(encoding="utf-8")).body
    found: Definition | None = None
    for part in (name.attribute or name.name).split("."):
        found = next(node for node in body if isinstance(node, Definition) and node.name == part)
        body = found.body
    assert found is not None
    return found


def signature(shown: str, function: Function, *, method: bool) -> str:
    """A call as one would write it, with types; on lines of their own where one is too long."""
    a = function.args
    parts: list[str] = []
    positional = [*a.posonlyargs, *a.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(a.defaults)), *a.defaults]
    for argument, default in list(zip(positional, defaults, strict=True))[method:]:
        parts.append(_parameter(argument, default))
    if a.vararg:
        parts.append("*" + _parameter(a.vararg, None))
    elif any(not argument.arg.startswith("_") for argument in a.kwonlyargs):
        parts.append("*")
    parts += [
        _parameter(argument, default)
        for argument, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)
        if not argument.arg.startswith("_")
    ]
    if a.kwarg:
        parts.append("**" + _parameter(a.kwarg, None))
    returned = f" -> {ast.unparse(function.returns)}" if function.returns and function.name != "__init__" else ""
    return _call(shown, parts, returned)


def _call(shown: str, parts: list[str], returned: str = "") -> str:
    line = f"{shown}({', '.join(parts)}){returned}"
    if len(line) <= 100:
        return line
    return f"{shown}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returned}"


def _construction(definition: ast.ClassDef) -> str:
    """How an instance is made: by its `__init__`, else from its fields (a dataclass or a named tuple)."""
    made = next((node for node in definition.body if isinstance(node, Function) and node.name == "__init__"), None)
    if made is not None:
        return signature(definition.name, made, method=True)
    fields = [node for node in definition.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    parts = [_parameter(ast.arg(ast.unparse(field.target), field.annotation), field.value) for field in fields]
    return _call(definition.name, [part for part in parts if not part.startswith("_")])


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg
    if argument.annotation is not None:
        text += f": {ast.unparse(argument.annotation)}"
    if default is not None:
        value = _value(default)
        text += f" = {value}" if argument.annotation is not None else f"={value}"
    return text


def _value(default: ast.expr) -> str:
    """A default as it reads best: a named number as the number, what must be computed as `...`."""
    if isinstance(default, ast.Name) and default.id in _constants():
        return _constants()[default.id]
    computed = any(isinstance(node, ast.Call | ast.Subscript) for node in ast.walk(default))
    return "..." if computed or isinstance(default, ast.Name) else ast.unparse(default)


@functools.cache
def _constants() -> dict[str, str]:
    """Numbers and strings that have a name at the top of some module."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "numpyesm").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                found |= {ast.unparse(target): ast.unparse(node.value) for target in node.targets}
    return found


def markdown(docstring: str) -> str:
    """A NumPy-style docstring: its text as it is, its sections as lists."""
    pieces = re.split(r"^([A-Z][A-Za-z ]+)\n-{3,}\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    out = [pieces[0].strip()]
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        out.append(f"**{title}**")
        if title == "Examples":
            out.append(f"```pycon\n{body.strip()}\n```")
        elif title in ("Notes", "See Also"):
            out.append(body.strip())
        else:
            out.append("\n".join(_entry(title, *entry) for entry in _entries(body)))
    return "\n\n".join(out)


def _entries(body: str) -> list[tuple[str, str]]:
    """(first line, description) of each entry of a section."""
    entries: list[tuple[str, list[str]]] = []
    for line in body.splitlines():
        if line.strip() and not line.startswith(" "):
            entries.append((line.strip(), []))
        elif entries:
            entries[-1][1].append(line.strip())
    return [(head, " ".join(line for line in lines if line)) for head, lines in entries]


def _entry(title: str, head: str, text: str) -> str:
    name, colon, kind = head.partition(" : ")
    if title in ("Returns", "Yields") and not colon:
        shown = name
    else:
        shown = ", ".join(f"`{part}`" for part in name.split(", ")) + (f" ({kind})" if kind else "")
    return f"- {shown}: {text}" if text else f"- {shown}"


def _decorators(function: Function) -> set[str]:
    return {ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list}


def _members(definition: ast.ClassDef) -> list[str]:
    """Public methods and properties that have something to say."""
    out: list[str] = []
    for node in definition.body:
        if not isinstance(node, Function) or not (doc := ast.get_docstring(node)):
            continue
        kinds = _decorators(node)
        if (node.name.startswith("_") and node.name != "__call__") or "setter" in kinds:
            continue
        name = f"{definition.name}.{node.name}"
        if kinds & {"property", "cached_property"}:
            kind = f" ({ast.unparse(node.returns)})" if node.returns else ""
            out.append(f"#### {name}\nProperty{kind}. {markdown(doc)}")
            continue
        shown = definition.name if node.name == "__call__" else name
        call = signature(shown, node, method="staticmethod" not in kinds)
        out.append(f"#### {name}\n```python\n{call}\n```\n{markdown(doc)}")
    return out


def entry(name: Name) -> str:
    """One name's part of the page."""
    definition = find(name)
    doc = ast.get_docstring(definition)
    if not doc:
        raise SystemExit(f"{name.source}: {name.name} has no docstring")
    head = f"### {name.module}.{name.name}"
    if not isinstance(definition, ast.ClassDef):
        call = signature(name.name, definition, method="." in name.attribute)
        return f"{head}\n```python\n{call}\n```\n{markdown(doc)}"
    bases = [ast.unparse(base) for base in definition.bases]
    is_error = bool(bases) and bases[0].endswith(("Error", "Exception", "Warning"))
    call = f"class {definition.name}({', '.join(bases)})" if is_error else _construction(definition)
    parts = [f"{head}\n```python\n{call}\n```\n{markdown(doc)}"]
    if not is_error:
        parts += _members(definition)
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    out = [
        "<!-- Written by tools/build_api_reference.py from the docstrings: change those, and run it again. -->",
        "# API reference",
        "Shapes: L residues of a sequence, D the model's width. What is not here is not public and may change.",
        "\n".join(f"- [{section.title}](#{_anchor(section.title)})" for section in SECTIONS),
    ]
    for section in SECTIONS:
        out.append(f"## {section.title}")
        if section.text:
            out.append(section.text)
        out += [entry(name) for name in section.names]
    return "\n\n".join(out) + "\n"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description="Write docs/api.md from the docstrings.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    checking = parser.parse_args(arguments).check
    text = page()
    if not checking:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/api.md is not what tools/build_api_reference.py writes: run it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
