"""Weights for machines without a network: `fetch --export DIR` on one that has it, `fetch --from DIR` on those.

The folder holds canonical files, `SHA256SUMS` (for `sha256sum -c`), and a note for each file of which model it is.
Several models and storages may lie in one folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from ..config import PRESETS
from ..errors import CheckpointError, WeightsNotFound
from ..files import atomic_write, file_sha256
from .cache import RemoteModel, is_commit
from .canonical import load_canonical, save_canonical
from .conversion import with_provenance
from .hub import fetch
from .integrity import SUMS_FILE, stated_sha256
from .load import find_in_folder, open_checkpoint

_NOTE = ".origin.json"


def export(
    name: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str = "fp32",
    progress: bool = True,
) -> Path:
    """Put a model that is in the cache, or is fetched into it, into a folder to be carried elsewhere.

    Returns
    -------
    Path
        The file in the folder.
    """
    model = RemoteModel.named(name, revision)
    source = fetch(name, revision=revision, dtype=dtype, progress=progress)
    checkpoint = load_canonical(source)
    commit = model.cached_commit() or ""
    if not is_commit(commit):  # of a branch: the cache names files by commit
        commit = source.stem.split("-")[0]
    stem = model.preset if model.is_pinned else f"{model.repository.replace('/', '--')}-{commit[:12]}"
    path = Path(folder) / f"{stem}{'' if dtype == 'fp32' else f'-{dtype}'}.safetensors"
    _copy(source, path)
    note = {
        "repository": model.repository,
        "commit": commit,
        "dtype": dtype,
        "model": checkpoint.config.name,
        "source": checkpoint.source,
        "source_sha256": checkpoint.source_sha256,
    }
    with atomic_write(path.with_name(path.name + _NOTE)) as file:
        file.write((json.dumps(note, indent=1, sort_keys=True) + "\n").encode())
    _add_sum(path)
    return path


def take_in(name: str, folder: str | os.PathLike[str], *, revision: str | None = None, dtype: str = "fp32") -> Path:
    """Put a model from a folder into the cache, where its name is looked for; never a network call.

    The folder is one that `export` filled, or holds an original checkpoint (fair-esm's `.pt` with its contact
    regression, or a Hugging Face folder), which is converted.

    Raises
    ------
    WeightsNotFound
        The folder does not have this model in this storage.
    CheckpointError
        A checksum is wrong, or it is another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsNotFound(f"{folder} is no folder; `numpyesm fetch {name} --export DIR` makes one")
    model = RemoteModel.named(name, revision)
    for note_path in sorted(folder.glob(f"*{_NOTE}")):
        note = _read_note(note_path)
        wanted = (model.repository, dtype)
        if (note["repository"], note["dtype"]) != wanted or not _is_revision(model, note["commit"]):
            continue
        path = note_path.with_name(note_path.name.removesuffix(_NOTE))
        _check(path)
        carried = load_canonical(path)
        if carried.synthetic:
            raise CheckpointError(f"{path} holds synthetic weights, which are never taken for {name}")
        _check_model(model, carried.config.name, path)
        target = model.cache_path(note["commit"], dtype)
        _copy(path, target)
        load_canonical(target)
        model.remember(note["commit"])
        return target
    return _convert(model, folder, name, dtype)


def _convert(model: RemoteModel, folder: Path, name: str, dtype: str) -> Path:
    """An original checkpoint in the folder, as the published model's conversion."""
    found = None if list(folder.glob(f"*{_NOTE}")) else find_in_folder(folder)
    if found is None or model.preset is None:
        held = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))[:6]) or "no exported model"
        raise WeightsNotFound(f"{folder} does not hold {name} as {dtype}; it holds {held}")
    opened = open_checkpoint(found)
    for file in opened.files:
        if stated_sha256(file) is not None:
            _check(file)
    if opened.checkpoint.synthetic:
        raise CheckpointError(f"{found} holds synthetic weights, which are never taken for {name}")
    _check_model(model, opened.checkpoint.config.name, found)
    target = model.cache_path(model.revision or "", dtype)
    save_canonical(target, replace(with_provenance(opened), source=found.name), precision=dtype)
    load_canonical(target)
    return target


def _is_revision(model: RemoteModel, commit: str) -> bool:
    """Whether an exported commit is what was asked for: that one, or any if no revision was named."""
    return model.revision is None or not is_commit(model.revision) or model.revision == commit


def _read_note(path: Path) -> dict[str, str]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    fields = ("repository", "commit", "dtype")
    if not isinstance(note, dict) or not all(isinstance(note.get(field), str) for field in fields):
        raise CheckpointError(f"{path} was not written by `numpyesm fetch --export`")
    if not is_commit(note["commit"]):  # it becomes part of a path
        raise CheckpointError(f"{path} names no commit")
    return {field: note[field] for field in fields}


def _check_model(model: RemoteModel, found: str, path: Path) -> None:
    if model.preset is not None and found != model.preset:
        raise CheckpointError(f"{path} holds {found}, not {model.preset} ({', '.join(PRESETS)} are the published ones)")


def _check(path: Path) -> None:
    stated = stated_sha256(path)
    if stated is None:
        raise CheckpointError(f"there is no checksum of {path.name} in {path.with_name(SUMS_FILE)}")
    if file_sha256(path) != stated:
        raise CheckpointError(f"{path} has a wrong checksum: it was damaged on the way; copy it again")


def _copy(source: Path, target: Path) -> None:
    try:
        with open(source, "rb") as file, atomic_write(target) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read ({error.strerror or error})") from error


def _add_sum(path: Path) -> None:
    """The file's line in SHA256SUMS; others stay."""
    sums = path.with_name(SUMS_FILE)
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
    kept = [line for line in lines if not re.search(rf"[ *](\./)?{re.escape(path.name)}$", line)]
    with atomic_write(sums) as file:
        file.write("".join(f"{line}\n" for line in sorted([*kept, f"{file_sha256(path)}  {path.name}"])).encode())
