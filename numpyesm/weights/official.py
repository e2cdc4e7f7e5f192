"""Find official files that other programs have downloaded, in the caches of huggingface-hub and torch.hub.

huggingface-hub names each large file by its SHA-256, which is verified. torch.hub states none, but a `.pt` file
contains a checksum of each tensor, which its reader verifies; that of 35M is compared with the published one.
"""

from __future__ import annotations

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path

from ..config import OFFICIAL_NAMES, preset_name
from ..errors import CheckpointError
from ..files import file_sha256
from .cache import user_cache
from .hugging_face import adapter_file, files_of, weight_files

_FAIR_ESM_URL = "https://dl.fbaipublicfiles.com/fair-esm"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Of fair-esm's files and of the Hub's; those of the other models were not available.
_PUBLISHED = {"esm2_t12_35M_UR50D.pt": "7f21e80e61d16a71735163ef555d3009afb0c98da74c48e29df08606973cc55e"}
PINNED_SHA256 = {  # of model.safetensors at the pinned commit
    "esm2-8m": "24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189",
    "esm2-150m": "c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566",
    "esm2-650m": "a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0",
}


def hub_snapshot(repository: str, commit: str | None = None) -> Path | None:
    """Return a repository's folder in the cache of huggingface-hub, if it holds weights and a configuration.

    `commit` is preferred; next comes what `main` was at the last download, then any other.
    """
    folder = snapshot_folder(repository, "").parent
    commits = [] if commit is None else [commit]
    with suppress(OSError, ValueError):  # a download of one commit does not write it
        commits.append((folder / "refs" / "main").read_text().strip())
    with suppress(OSError):
        commits += sorted(os.listdir(folder / "snapshots"))
    return next((found for one in commits if is_whole(found := folder / "snapshots" / one)), None)


def snapshot_folder(repository: str, commit: str) -> Path:
    """Return where huggingface-hub keeps one commit of a repository."""
    return hub_folder() / f"models--{repository.replace('/', '--')}" / "snapshots" / commit


def is_whole(snapshot: Path) -> bool:
    """Whether all files are there, not only the tokenizer or some of the shards."""
    try:
        whole = (snapshot / "config.json").is_file() and bool(weight_files(snapshot))
        return whole or adapter_file(snapshot) is not None
    except CheckpointError:
        return False


def source_name(place: Path) -> str:
    """Return what to call the source of weights: `organisation/name@commit` of a snapshot, else the file's name."""
    if place.parent.name == "snapshots" and place.parents[1].name.startswith("models--"):
        return f"{place.parents[1].name.removeprefix('models--').replace('--', '/', 1)}@{place.name[:12]}"
    return place.name


def check_official(place: Path) -> None:
    """Verify weights in the cache of huggingface-hub or torch.hub, if their SHA-256 is known.

    CheckpointError if a file of huggingface-hub differs from the SHA-256 that it is named by; a warning if one of
    torch.hub is not the published one, though it has its name.
    """
    published = _PUBLISHED.get(place.name) if place.parent == torch_hub_folder() else None
    if published is not None and file_sha256(place) != published:
        warnings.warn(f"{place} does not have the SHA-256 of the published file of this name", stacklevel=4)
    for file in files_of(place):
        blob = Path(os.path.realpath(file))
        if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and file_sha256(blob) != blob.name:
            raise CheckpointError(f"{file} is corrupted: its checksum is not the one that names it in the cache")


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
