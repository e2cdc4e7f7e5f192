"""Where models are kept, and under which names: in our cache, in those of huggingface-hub and of torch.hub.

Nothing here uses the network. huggingface-hub names each large file by its SHA-256, which is verified. torch.hub states
none, but a `.pt` file contains a checksum of each tensor, which its reader verifies; that of 35M is compared with the
published one.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..config import OFFICIAL_NAMES, PRESETS, ModelConfig, preset_name
from ..errors import CheckpointError, InvalidOption, warn
from ..files import atomic_write, file_sha256
from .hugging_face import adapter_file, files_of, weight_files

VARIABLE = "NUMPYESM_WEIGHTS"
# The commit of "facebook/<official name>" that each preset means.
PINNED_COMMITS = {
    "esm2-8m": "c731040fcd8d73dceaa04b0a8e6329b345b0f5df",
    "esm2-35m": "6fbf070e65b0b7291e7bbcd451118c216cff79d8",
    "esm2-150m": "a695f6045e2e32885fa60af20c13cb35398ce30c",
    "esm2-650m": "08e4846e537177426273712802403f7ba8261b6c",
    "esm2-3b": "476b639933c8baad5ad09a60ac1a87f987b656fc",
    "esm2-15b": "5fbca39631164edc1d402a5aa369f982f72ee282",
}
# Of fair-esm's files and of the Hub's; those of the other models were not available.
_PUBLISHED = {"esm2_t12_35M_UR50D.pt": "7f21e80e61d16a71735163ef555d3009afb0c98da74c48e29df08606973cc55e"}
PINNED_SHA256 = {  # of model.safetensors at the pinned commit
    "esm2-8m": "24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189",
    "esm2-150m": "c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566",
    "esm2-650m": "a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0",
}
_FAIR_ESM_URL = "https://dl.fbaipublicfiles.com/fair-esm"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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


def hub_folder() -> Path:
    """Return the cache of huggingface-hub, where its own variables place it."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if chosen := os.environ.get(variable):
            return Path(os.path.expandvars(chosen)).expanduser() / below
    return user_cache() / "huggingface" / "hub"


def torch_hub_folder() -> Path:
    """Return where torch.hub keeps checkpoints, according to its own variables."""
    chosen = os.environ.get("TORCH_HOME")
    return (Path(chosen).expanduser() if chosen else user_cache() / "torch") / "hub" / "checkpoints"


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
        path = self.cache_path(commit or "", dtype)
        return path if commit and path.is_file() else None

    def cached_commit(self) -> str | None:
        """The commit, if it is known without asking the Hub: a full hash, or what `main` was when first fetched."""
        commit = self.revision or ""
        if self.revision is None:
            with suppress(OSError, ValueError):
                commit = (self.folder / "main").read_text().strip()
        return commit if is_commit(commit) else None

    def snapshot(self, commit: str | None) -> Path | None:
        """The folder of a commit in the cache of huggingface-hub, if all files are there, not only some shards."""
        folder = self._snapshots / (commit or "none")
        try:
            whole = ((folder / "config.json").is_file() and weight_files(folder)) or adapter_file(folder)
        except CheckpointError:
            return None
        return folder if whole else None

    def any_snapshot(self) -> Path | None:
        """The same of the revision that is asked for or, unless users asked for it, of `main`, or of any other."""
        commits, asked_for = [self.revision], None if self.is_pinned else self.revision
        with suppress(OSError, ValueError):  # what a branch was at its last download; that of a commit writes nothing
            commits.append((self._snapshots.parent / "refs" / (asked_for or "main")).read_text().strip())
        with suppress(OSError):
            commits += [] if asked_for else sorted(os.listdir(self._snapshots))
        return next(filter(None, map(self.snapshot, commits)), None)

    @property
    def _snapshots(self) -> Path:
        return hub_folder() / f"models--{self.repository.replace('/', '--')}" / "snapshots"

    def remember(self, commit: str) -> None:
        """Note what `main` is, so that the next run needs no network."""
        if self.revision is None:
            with atomic_write(self.folder / "main") as file:
                file.write(commit.encode())


def source_name(place: Path) -> str:
    """Return what to call the source of weights: `organisation/name@commit` of a snapshot, else the file's name."""
    if place.parent.name == "snapshots" and place.parents[1].name.startswith("models--"):
        return f"{place.parents[1].name.removeprefix('models--').replace('--', '/', 1)}@{place.name[:12]}"
    return place.name


def check_official(place: Path) -> None:
    """Verify weights in the cache of huggingface-hub or torch.hub, if their SHA-256 is known.

    CheckpointError if a file of huggingface-hub differs from the SHA-256 that it is named by; a warning if one of
    torch.hub is not the published one, though it has its name, or if a snapshot is not of the pinned commit.
    """
    repository, _, commit = source_name(place).partition("@")
    if (preset := preset_name(repository)) is not None and not PINNED_COMMITS[preset].startswith(commit):
        warn(f"{source_name(place)} is another commit of {preset} than the pinned {PINNED_COMMITS[preset][:12]}")
    published = _PUBLISHED.get(place.name) if place.parent == torch_hub_folder() else None
    if published is not None and file_sha256(place) != published:
        warn(f"{place} does not have the SHA-256 of the published file of this name")
    for file in files_of(place):
        blob = Path(os.path.realpath(file))
        if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and file_sha256(blob) != blob.name:
            raise CheckpointError(f"{file} is corrupted: its checksum is not the one that names it in the cache")


def check_model(config: ModelConfig, spec: str | os.PathLike[str], found: Path | str) -> None:
    """Raise CheckpointError if `spec` is the name of another published model than the one that was found."""
    name = preset_name(spec) if isinstance(spec, str) else None
    if name is None or config == PRESETS[name]:
        return
    where = f"{found} (from {VARIABLE})" if VARIABLE in os.environ else found
    shape = f"a model of {config.num_layers} layers and width {config.embed_dim}"
    what = shape if config.name == "custom" else config.name
    raise CheckpointError(f"{where} holds {what}, not the {name} that was asked for")


def ways_out(name: str) -> str:
    """What a user without a network can do, as the end of a sentence."""
    preset, download, synthetic = preset_name(name), "", "synthetic"
    if preset is not None:
        official, synthetic = OFFICIAL_NAMES[preset], f"synthetic:{preset}"
        download = (
            f"or download {_FAIR_ESM_URL}/models/{official}.pt and "
            f"{_FAIR_ESM_URL}/regression/{official}-contact-regression.pt and run "
            f"`numpyesm convert {official}.pt -o weights/{preset}.safetensors`; "
        )
    return (
        f"what you can do: run `numpyesm fetch {name} -o DIR` on a connected machine, copy the file here, and point "
        f"NUMPYESM_WEIGHTS to it or put it into weights/; {download}"
        f"to try things out on random weights, ask for '{synthetic}' by name (its numbers mean nothing)"
    )
