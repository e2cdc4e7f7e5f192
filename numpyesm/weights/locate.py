"""From what a user calls a model to the weights: name, Hub id, path or synthetic.

A published model is looked for in NUMPYESM_WEIGHTS, then `weights/` (of the current folder, then of a source checkout),
then the cache, then on the Hub. Synthetic weights are never taken for a published name, even if their file lies there.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..config import OFFICIAL_NAMES, PRESETS, ModelConfig, preset_name
from ..errors import CheckpointError, InvalidOption, WeightsNotFound
from .cache import cache_dir, cached, is_hub_id
from .canonical import is_canonical
from .checkpoint import Checkpoint
from .load import find_in_folder, load_checkpoint
from .safetensors_file import read_safetensors_metadata
from .synthetic import is_synthetic_spec, parse_synthetic

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def open_weights(
    spec: str | os.PathLike[str],
    *,
    allow_download: bool = True,
    regression: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Checkpoint:
    """The weights that `spec` means.

    Parameters
    ----------
    spec : str or path
        A preset name, a Hub id, a path, or `synthetic[:name[:seed]]`.
    allow_download : bool
        Whether the Hub may be asked.
    regression : path, optional
        The contact regression of a fair-esm checkpoint, if it is not beside it.
    progress : bool
        Show a progress bar while downloading.

    Raises
    ------
    WeightsNotFound, CheckpointError, InvalidOption
        One sentence each; the first names the ways out.
    """
    return load_found(spec, resolve(spec, allow_download=allow_download, progress=progress), regression=regression)


def load_found(
    spec: str | os.PathLike[str], found: Path | str, *, regression: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """Load what `resolve(spec)` found, and refuse another model than the one that `spec` names."""
    checkpoint = load_checkpoint(found, regression=regression)
    name = preset_name(spec) if isinstance(spec, str) else None
    if name is not None:
        _check_model(checkpoint.config, name, found)
    return checkpoint


def resolve(spec: str | os.PathLike[str], *, allow_download: bool = True, progress: bool = True) -> Path | str:
    """Where the weights that `spec` means are, for `load_checkpoint`: downloaded if need be.

    A path, or the string `synthetic:name:seed` if `spec` asks for that.
    """
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        raise InvalidOption(f"{spec!r} names no weights: expected a model name, a Hub id, a file or a folder")
    if not isinstance(spec, str):
        return _existing(Path(spec))
    if is_synthetic_spec(spec):
        return str(parse_synthetic(spec))
    name = preset_name(spec)
    if name is not None:
        if found := find_local(name):
            if found.suffix == ".safetensors" and is_canonical(metadata := read_safetensors_metadata(found)):
                # Told from the header alone; `open_weights` checks the other kinds when it has read them.
                _check_model(ModelConfig.from_json(metadata.get("config", "")), name, found)
            return found
        if not allow_download:
            raise WeightsNotFound(f"no weights of {name} were found on this machine; {_ways_out(name)}")
        return _fetch(name, progress=progress)
    path = Path(spec).expanduser()
    if path.exists() or spec.endswith(_SUFFIXES) or not is_hub_id(spec):
        return _existing(path, bare_name=spec)
    if found := cached(spec):
        return found
    if not allow_download:
        raise WeightsNotFound(f"{spec} is neither a path nor in the cache; {_ways_out(spec)}")
    return _fetch(spec, progress=progress)


def find_local(name: str) -> Path | None:
    """Weights of a published model on this machine, or None; never a network call.

    Parameters
    ----------
    name : str
        A preset name, or its official one.

    Raises
    ------
    WeightsNotFound
        If NUMPYESM_WEIGHTS points to nothing.
    """
    preset = preset_name(name)
    if preset is None:
        raise WeightsNotFound(f"{name!r} is not a published model: {', '.join(PRESETS)}")
    if chosen := os.environ.get("NUMPYESM_WEIGHTS"):
        path = Path(chosen).expanduser()
        if not path.exists():
            raise WeightsNotFound(f"NUMPYESM_WEIGHTS points to {path}, which does not exist")
        if path.is_file():
            return path
        # A folder of several models, or one model's own folder.
        if found := _in_folder(path, preset) or _one_in_folder(path):
            return found
    for folder in (Path.cwd() / "weights", *_checkout_weights(), cache_dir()):
        if found := _in_folder(folder, preset):
            return found
    return None


def candidate_names(preset: str) -> list[str]:
    """What the weights of a published model may be called; exact ones before those that lost digits."""
    official = OFFICIAL_NAMES[preset]
    exact = [f"{preset}.safetensors", f"{official}.safetensors", f"{official}.pt", official, preset]
    return [*exact, *(f"{preset}{precision}.safetensors" for precision in ("-fp16", "-bf16", "-int8"))]


def _one_in_folder(folder: Path) -> Path | None:
    """The one checkpoint in a folder; None if there is none, or several to choose from."""
    try:
        return find_in_folder(folder)
    except CheckpointError:
        return None


def _in_folder(folder: Path, preset: str) -> Path | None:
    for name in candidate_names(preset):
        path = folder / name
        if path.is_dir() and _one_in_folder(path):
            return path
        if path.is_file() and not _is_synthetic(path):
            return path
    return None


def _is_synthetic(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        metadata = read_safetensors_metadata(path)
    except CheckpointError:
        return False  # damaged: let opening it say so
    return is_canonical(metadata) and metadata.get("synthetic") == "true"


def _checkout_weights() -> list[Path]:
    """`weights/` beside the package, if this is a source checkout and not an installed package."""
    root = Path(__file__).resolve().parents[2]
    return [root / "weights"] if (root / "pyproject.toml").is_file() else []


# The Hub's module loads every reader: only imported when it comes to that.


def _fetch(name: str, *, progress: bool) -> Path:
    from .hub import fetch

    return fetch(name, progress=progress)


def _ways_out(name: str) -> str:
    from .hub import ways_out

    return ways_out(name)


def _existing(path: Path, bare_name: str = "") -> Path:
    if path.exists():
        return path
    if bare_name and "/" not in bare_name and "\\" not in bare_name and not bare_name.endswith(_SUFFIXES):
        raise WeightsNotFound(
            f"{bare_name!r} is no known model ({', '.join(PRESETS)}, synthetic), no Hub id and no file or folder"
        )
    raise WeightsNotFound(f"{path} does not exist")


def _check_model(config: ModelConfig, name: str, found: Path | str) -> None:
    if config == PRESETS[name]:
        return
    # `find_local` returns the variable's own path or one inside it.
    chosen = os.environ.get("NUMPYESM_WEIGHTS")
    where = (
        f"{found} (from NUMPYESM_WEIGHTS)"
        if chosen and str(found).startswith(str(Path(chosen).expanduser()))
        else found
    )
    what = (
        config.name
        if config.name != "custom"
        else f"a model of {config.num_layers} layers and width {config.embed_dim}"
    )
    raise CheckpointError(f"{where} holds {what}, not the {name} that was asked for")
