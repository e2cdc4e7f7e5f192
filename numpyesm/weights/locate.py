"""From what a user calls a model to the weights: name, Hub id, path or synthetic.

A published model is looked for in NUMPYESM_WEIGHTS, then `weights/` (of the current folder, then of a source checkout),
then our cache, then the caches of huggingface-hub and torch.hub, then on the Hub. What the user named is used or is an
error, never passed over. Synthetic weights are not taken for a published model, even if their file has its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from weakref import WeakValueDictionary

from ..config import OFFICIAL_NAMES, PRESETS, ModelConfig, preset_name
from ..errors import CheckpointError, InvalidOption, WeightsNotFound
from ..files import identity
from ..threads import Lock
from .cache import (
    VARIABLE,
    RemoteModel,
    cache_dir,
    check_model,
    check_official,
    file_name,
    is_hub_id,
    torch_hub_folder,
    ways_out,
)
from .canonical import is_canonical
from .checkpoint import Checkpoint
from .hugging_face import adapter_file, weight_files
from .load import WEIGHT_SUFFIXES, find_in_folder, load_checkpoint
from .safetensors_file import read_safetensors_metadata
from .synthetic import is_synthetic_spec, parse_synthetic
from .tensor import PRECISION_DTYPES

_DEFAULT = "esm2-35m"
# Bases of adapters, while some model uses them.
_bases: WeakValueDictionary[tuple[object, ...], Checkpoint] = WeakValueDictionary()
_lock = Lock()


def open_weights(
    spec: str | os.PathLike[str],
    *,
    allow_download: bool = True,
    adapter: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Load the weights that `spec` names, wherever they are.

    Parameters
    ----------
    spec : str or path
        A preset name, a Hub id, a path, or `synthetic[:name[:seed]]`.
    allow_download : bool
        Whether to ask the Hub for what is not on this machine.
    adapter : str or path, optional
        A folder of peft or a Hub id, to be merged in.

    Raises
    ------
    WeightsNotFound, CheckpointError, InvalidOption
        One sentence each; WeightsNotFound says what can be done.
    """
    found = resolve(spec, allow_download=allow_download)
    place = None if adapter is None else Path(resolve(adapter, allow_download=allow_download))
    return load_found(spec, found, adapter=place)


def load_found(spec: str | os.PathLike[str], found: Path | str, *, adapter: Path | None = None) -> Checkpoint:
    """Load what `resolve(spec)` found, and refuse another model than the one that `spec` names.

    An adapter is merged into what is found; one that is found itself, into the base that it names.
    """
    if isinstance(found, Path) and adapter_file(found) is not None:
        if adapter is not None:
            raise InvalidOption(f"{found} is itself an adapter, into which {adapter} cannot be merged: name a base")
        base, place = resolve_base(found)
        checkpoint = load_found(base, place, adapter=found)
        check_model(checkpoint.config, spec, found)
        return checkpoint
    if adapter is not None:
        from .adapter import merged, read_adapter  # not for canonical files

        return merged(_shared_base(spec, found), read_adapter(adapter), os.fspath(spec))
    if isinstance(found, Path):
        check_official(found)
    checkpoint = load_checkpoint(found)
    check_model(checkpoint.config, spec, found)
    return checkpoint


def resolve_base(folder: Path) -> tuple[str, Path | str]:
    """Find the base that an adapter names, at the revision of the Hub that it names: -> its name, its place."""
    from .adapter import base_of

    base, revision = base_of(folder)
    try:
        return base, resolve(base, revision=revision)
    except WeightsNotFound as error:
        of = f"{base}@{revision}" if revision else base
        raise WeightsNotFound(f"{folder} is an adapter for {of}; name the base yourself: {error}") from error


def _shared_base(spec: str | os.PathLike[str], found: Path | str) -> Checkpoint:
    """Load a base of adapters once for all models of this process that are made from it."""
    key = (os.fspath(spec), *state_of(found))
    with _lock:
        checkpoint = _bases.get(key)
        if checkpoint is None:
            checkpoint = _bases[key] = load_found(spec, found)
    return checkpoint


def state_of(found: Path | str) -> tuple[object, ...]:
    """What differs as soon as what `resolve` found is another file, or was replaced or overwritten."""
    if isinstance(found, str):
        return (found,)
    adapter = adapter_file(found)
    files = weight_files(found) or [adapter or found]
    beside = [file for file in (found / "config.json",) if file.is_file()]
    states = tuple(identity(file) for file in (*files, *beside))
    return (str(found.absolute()), *states, *(() if adapter is None else state_of(resolve_base(found)[1])))


def resolve(spec: str | os.PathLike[str], *, allow_download: bool = True, revision: str | None = None) -> Path | str:
    """Find the weights that `spec` names, downloading them if need be.

    A Hub id that is no published model may be wanted at a `revision`: no other will do then.

    Returns
    -------
    Path or str
        For `load_checkpoint`: a path, or `synthetic:name:seed`.
    """
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        raise InvalidOption(f"{spec!r} names no weights: expected a model name, a Hub id, a file or a folder")
    if not isinstance(spec, str):
        return _existing(Path(spec))
    if is_synthetic_spec(spec):
        return "synthetic:{}:{}".format(*parse_synthetic(spec))
    name = preset_name(spec)
    if name is not None:
        if found := find_local(name):
            if metadata := _canonical_metadata(found):  # `load_found` checks the other kinds when it has read them
                check_model(ModelConfig.from_json(metadata.get("config", "")), name, found)
            return found
    else:
        path = Path(spec).expanduser()
        if path.exists() or spec.endswith(WEIGHT_SUFFIXES) or not is_hub_id(spec):
            return _existing(path, bare_name=spec)
        model = RemoteModel.named(spec, revision)
        rounded = (model.cached(dtype) for dtype in PRECISION_DTYPES if dtype != "fp32")
        if found := model.cached() or model.any_snapshot() or next(filter(None, rounded), None):
            return found
    if not allow_download:
        raise WeightsNotFound(f"no weights of {name or spec} were found on this machine; {ways_out(name or spec)}")
    from .hub import fetch  # loads every reader

    return fetch(name or spec, revision=None if name else revision)


def default_weights() -> str | Path:
    """Return what to load if nothing is named: what NUMPYESM_WEIGHTS holds, whatever model that is, or esm2-35m."""
    return _chosen(os.environ[VARIABLE], _DEFAULT) if VARIABLE in os.environ else _DEFAULT


def find_local(name: str) -> Path | None:
    """Find the weights of a published model on this machine, without a network call; None if there are none.

    Parameters
    ----------
    name : str
        A preset name, or its official one.

    Raises
    ------
    WeightsNotFound, CheckpointError, InvalidOption
        If this is not a published model, or NUMPYESM_WEIGHTS names nothing usable (it is never passed over).
    """
    preset = preset_name(name)
    if preset is None:
        raise WeightsNotFound(f"{name!r} is not a published model: {', '.join(PRESETS)}")
    if VARIABLE in os.environ:
        return _chosen(os.environ[VARIABLE], preset)
    for folder in (Path.cwd() / "weights", *checkout_folders(), cache_dir()):
        if found := _in_folder(folder, preset):
            return found
    path = torch_hub_folder() / f"{OFFICIAL_NAMES[preset]}.pt"
    return RemoteModel.named(preset).any_snapshot() or (path if path.is_file() else None)


def _chosen(value: str, preset: str) -> Path:
    """Return what NUMPYESM_WEIGHTS names: a file, the folder of a model, or one of several models."""
    if not value:
        raise InvalidOption(f"{VARIABLE} is set but empty: set it to a file or a folder, or unset it")
    path = Path(value).expanduser()
    if not path.exists():
        raise WeightsNotFound(f"{VARIABLE} points to {path}, which does not exist")
    if path.is_file() or adapter_file(path) is not None:
        return path
    try:
        found = _in_folder(path, preset) or find_in_folder(path)
    except CheckpointError as error:
        raise CheckpointError(f"{VARIABLE}: {error}, or give one the name {preset}.safetensors") from error
    if found is None:
        raise WeightsNotFound(f"{VARIABLE} points to the folder {path}, which holds no weights")
    return found


def _in_folder(folder: Path, preset: str) -> Path | None:
    official = OFFICIAL_NAMES[preset]
    exact = (file_name(preset), file_name(official), f"{official}.pt", official, preset)
    rounded = (file_name(preset, dtype) for dtype in PRECISION_DTYPES if dtype != "fp32")
    for path in (folder / name for name in (*exact, *rounded)):
        if path.is_dir() and find_in_folder(path):
            return path
        if path.is_file() and _canonical_metadata(path).get("synthetic") != "true":
            return path
    return None


def _canonical_metadata(path: Path) -> dict[str, str]:
    """The metadata of a canonical file; empty for other files, and for a damaged one, which opening will report."""
    try:
        metadata = read_safetensors_metadata(path) if path.suffix == ".safetensors" else {}
    except CheckpointError:
        return {}
    return metadata if is_canonical(metadata) else {}


def checkout_folders() -> list[Path]:
    """`weights/` beside the package, if this is a source checkout and not an installed package."""
    root = Path(__file__).resolve().parents[2]
    return [root / "weights"] if (root / "pyproject.toml").is_file() else []


def _existing(path: Path, bare_name: str = "") -> Path:
    if path.exists():
        return path
    if bare_name and "/" not in bare_name and "\\" not in bare_name and not bare_name.endswith(WEIGHT_SUFFIXES):
        raise WeightsNotFound(
            f"{bare_name!r} is not a known model ({', '.join(PRESETS)}, synthetic), a Hub id, a file or a folder"
        )
    raise WeightsNotFound(f"{path} does not exist")
