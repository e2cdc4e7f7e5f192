"""Where fetched models are kept, and under which names. Nothing here uses the network."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..config import OFFICIAL_NAMES, PRESETS, preset_name
from ..errors import InvalidOption
from ..files import atomic_write

# The commit of "facebook/<official name>" that each preset means.
PINNED_COMMITS = {
    "esm2-8m": "c731040fcd8d73dceaa04b0a8e6329b345b0f5df",
    "esm2-35m": "6fbf070e65b0b7291e7bbcd451118c216cff79d8",
    "esm2-150m": "a695f6045e2e32885fa60af20c13cb35398ce30c",
    "esm2-650m": "08e4846e537177426273712802403f7ba8261b6c",
    "esm2-3b": "476b639933c8baad5ad09a60ac1a87f987b656fc",
    "esm2-15b": "5fbca39631164edc1d402a5aa369f982f72ee282",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_dir() -> Path:
    """Where downloaded weights are kept: NUMPYESM_CACHE, or the system's place for caches."""
    if chosen := os.environ.get("NUMPYESM_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "numpyesm"
    return user_cache() / "numpyesm"


def user_cache() -> Path:
    """Where the programs of this user keep their caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def file_name(name: str, dtype: str = "fp32") -> str:
    """What the canonical file of a model is called."""
    return f"{name}.safetensors" if dtype == "fp32" else f"{name}-{dtype}.safetensors"


def is_hub_id(spec: str) -> bool:
    """Whether `spec` has the form `organisation/name`."""
    return _HUB_ID.fullmatch(spec) is not None and ".." not in spec


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, which always means the same files."""
    return _COMMIT.fullmatch(revision) is not None


@dataclass(frozen=True)
class RemoteModel:
    """A repository at a revision, and where its conversions are kept."""

    name: str  # of the preset, or the repository
    repository: str
    revision: str | None

    @classmethod
    def named(cls, name: str, revision: str | None = None) -> RemoteModel:
        """The model of a preset name or a Hub id."""
        preset = preset_name(name)
        if preset is not None:
            return cls(preset, f"facebook/{OFFICIAL_NAMES[preset]}", revision or PINNED_COMMITS[preset])
        if not is_hub_id(name):
            raise InvalidOption(f"{name!r} is neither one of {', '.join(PRESETS)} nor a Hub id 'organisation/name'")
        return cls(name, name, revision)

    @property
    def is_pinned(self) -> bool:
        """Whether this is a published model. Another commit of one is a model of its own, with another file."""
        return self.revision == PINNED_COMMITS.get(self.name, "")

    @property
    def folder(self) -> Path:
        return cache_dir() / "hub" / self.repository.replace("/", "--")

    def cache_path(self, commit: str, dtype: str) -> Path:
        """The canonical file of one commit."""
        if self.is_pinned:
            return cache_dir() / file_name(self.name, dtype)
        return self.folder / file_name(commit, dtype)

    def cached(self, dtype: str = "fp32") -> Path | None:
        """The canonical file that an earlier `fetch` left in the cache."""
        commit = self.cached_commit()
        path = None if commit is None else self.cache_path(commit, dtype)
        return path if path is not None and path.is_file() else None

    def cached_commit(self) -> str | None:
        """The commit, if it is known without asking the Hub: a full hash, or what `main` was when first fetched."""
        commit = self.revision or ""
        if self.revision is None:
            with suppress(OSError, ValueError):
                commit = (self.folder / "main").read_text().strip()
        return commit if is_commit(commit) else None

    def remember(self, commit: str) -> None:
        """Note what `main` is, so that the next run needs no network."""
        if self.revision is None:
            with atomic_write(self.folder / "main") as file:
                file.write(commit.encode())
