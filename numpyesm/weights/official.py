"""Find official files that other programs have downloaded, in the caches of huggingface-hub and torch.hub.

huggingface-hub names each large file by its SHA-256, which is verified. torch.hub states no checksum, but a `.pt` file
contains one for each tensor, which its reader verifies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..config import OFFICIAL_NAMES
from ..errors import CheckpointError
from ..files import file_sha256
from .cache import PINNED_COMMITS
from .hugging_face import weight_files

_SHA256 = re.compile(r"[0-9a-f]{64}")


def official_files(preset: str) -> Path | None:
    """Return the official checkpoint of a preset, if another program has downloaded it."""
    name = OFFICIAL_NAMES[preset]
    found = hub_snapshot(f"facebook/{name}", PINNED_COMMITS.get(preset))
    if found is None and (path := torch_hub_folder() / f"{name}.pt").is_file():
        found = path
    return found


def hub_snapshot(repository: str, commit: str | None = None) -> Path | None:
    """Return the folder of a repository in the cache of huggingface-hub, if it holds weights and a configuration.

    Parameters
    ----------
    repository : str
        `organisation/name`.
    commit : str, optional
        The preferred one. Next comes what `main` was at the last download, then any other.
    """
    folder = hub_folder() / f"models--{repository.replace('/', '--')}"
    return next((snapshot for snapshot in _snapshots(folder, commit) if _is_whole(snapshot)), None)


def check_snapshot(place: Path) -> None:
    """Verify the weights in a snapshot against the SHA-256 in their names.

    Raises
    ------
    CheckpointError
        If they differ.
    """
    for file in weight_files(place) if place.is_dir() else [place]:
        blob = Path(os.path.realpath(file))
        if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and file_sha256(blob) != blob.name:
            raise CheckpointError(f"{file} is corrupted: it has another checksum than its name in the cache states")


def hub_folder() -> Path:
    """Return the cache of huggingface-hub, as its own variables place it."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if chosen := os.environ.get(variable):
            return Path(os.path.expandvars(chosen)).expanduser() / below
    return _user_cache() / "huggingface" / "hub"


def torch_hub_folder() -> Path:
    """Return where torch.hub keeps checkpoints, as its own variables place it."""
    chosen = os.environ.get("TORCH_HOME")
    return (Path(chosen).expanduser() if chosen else _user_cache() / "torch") / "hub" / "checkpoints"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _snapshots(folder: Path, commit: str | None) -> Iterator[Path]:
    if commit is not None:
        yield folder / "snapshots" / commit
    try:
        yield folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
        yield from sorted((folder / "snapshots").iterdir())
    except (OSError, ValueError):
        return


def _is_whole(snapshot: Path) -> bool:
    """Whether all files are there, not only the tokenizer or some of the shards."""
    try:
        return (snapshot / "config.json").is_file() and bool(weight_files(snapshot))
    except CheckpointError:
        return False
