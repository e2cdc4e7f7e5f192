"""Download weights from the Hugging Face Hub, verify them, convert them, keep them in the cache.

A published model is pinned to one commit. Every file is checked against the SHA-256 that the Hub states for that
commit, and, where it is known, against the one written here, which no server can change.

The download goes through huggingface-hub's own transfer into a partial file of ours, because its cache throws partial
files away: here a second run goes on where the first was interrupted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from ..config import OFFICIAL_NAMES, PRESETS, preset_name
from ..errors import CheckpointError, InvalidOption, WeightsNotFound
from ..files import atomic_write, file_sha256
from .cache import RemoteModel, cache_dir, cached, is_commit
from .canonical import load_canonical, save_canonical
from .conversion import output_path, with_provenance
from .hugging_face import WEIGHT_FILES
from .load import open_checkpoint
from .tensor import PRECISION_DTYPES

# SHA-256 of their model.safetensors; that of 35M was not to be had when this was written.
KNOWN_SHA256 = {
    "esm2-8m": "24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189",
    "esm2-150m": "c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566",
    "esm2-650m": "a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0",
}
_FAIR_ESM_URL = "https://dl.fbaipublicfiles.com/fair-esm"
_TIMEOUT = 10  # seconds to the first answer of the Hub


def is_offline() -> bool:
    """Whether the user forbids network calls; what is not clearly a no (`y`, `2`) forbids them."""
    names = ("NUMPYESM_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off", "n") for name in names)


def fetch(
    name: str = "esm2-35m",
    *,
    revision: str | None = None,
    dtype: str = "fp32",
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Download a model from the Hugging Face Hub and convert it; at once if it is there already.

    Parameters
    ----------
    name : str
        A preset name, or a Hub id `organisation/name`.
    revision : str, optional
        Commit, tag or branch. By default the pinned commit of a published model; of others `main`, as it was when it
        was first fetched.
    dtype : {'fp32', 'fp16', 'bf16', 'int8'}
        Of the matrices.
    output : path, optional
        A `.safetensors` file or a folder, instead of the cache.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    Path
        The canonical file.

    Raises
    ------
    WeightsNotFound
        If the Hub cannot be reached or has no such model; the message names the ways out.
    CheckpointError
        If what was downloaded has a wrong checksum or is not an ESM-2 model.
    """
    if dtype not in PRECISION_DTYPES:
        raise InvalidOption(f"dtype is {dtype!r}, expected one of {', '.join(PRECISION_DTYPES)}")
    model = RemoteModel.named(name, revision)
    found = cached(name, revision=revision, dtype=dtype)
    if found is not None and _opens(found):  # a damaged file is fetched anew
        return found if output is None else _copy(found, output_path(output, load_canonical(found), dtype))
    if is_offline():
        raise WeightsNotFound(
            f"{name} is not in the cache as {dtype}, and NUMPYESM_OFFLINE or HF_HUB_OFFLINE forbids to download it; "
            + ways_out(name)
        )
    with _network_errors(model):
        listing = _listing(model)
    if output is None:
        cache_path = model.cache_path(listing.commit, dtype)
        if cache_path.is_file() and _opens(cache_path):  # of a branch that points to a known commit
            model.remember(listing.commit)
            return cache_path
    folder = cache_dir() / "downloads" / f"{model.repository.replace('/', '--')}-{listing.commit[:12]}"
    _make_folder(folder)
    with _lock(folder.with_suffix(".lock")), _progress_bars(progress):
        if output is None and cache_path.is_file() and _opens(cache_path):  # another process was first
            return cache_path
        _make_folder(folder)
        for file in listing.files:
            _download(model, listing.commit, file, folder)
        opened = open_checkpoint(folder)
        checkpoint = replace(with_provenance(opened), source=f"{model.repository}@{listing.commit[:12]}")
        if model.preset is not None and checkpoint.config != PRESETS[model.preset]:
            raise CheckpointError(f"{model.repository} on the Hub is not {model.preset} but {checkpoint.config.name}")
        path = cache_path if output is None else output_path(output, checkpoint, dtype)
        save_canonical(path, checkpoint, precision=dtype)
        if output is None:
            model.remember(listing.commit)
        del opened, checkpoint  # their maps would keep Windows from deleting the files
        shutil.rmtree(folder, ignore_errors=True)
    return path


def ways_out(name: str = "esm2-35m") -> str:
    """What a user without a network can do, as the end of a sentence."""
    preset = preset_name(name)
    official = OFFICIAL_NAMES.get(preset or "", "")
    ways = [
        f"run `numpyesm fetch {name} -o DIR` on a connected machine, copy the file here, and point NUMPYESM_WEIGHTS to "
        "it or put it into weights/",
    ]
    if official:
        ways.append(
            f"or download {_FAIR_ESM_URL}/models/{official}.pt and "
            f"{_FAIR_ESM_URL}/regression/{official}-contact-regression.pt and run "
            f"`numpyesm convert {official}.pt -o weights/{preset}.safetensors`"
        )
    ways.append(
        f"to try things out on random weights, ask for 'synthetic{f':{preset}' if preset else ''}' by name "
        "(its numbers mean nothing)"
    )
    return "ways out: " + "; ".join(ways)


@dataclass(frozen=True)
class _File:
    name: str
    size: int | None
    sha256: str | None  # of a large file (LFS)
    git_sha1: str | None  # of a small one


@dataclass(frozen=True)
class _Listing:
    commit: str
    files: list[_File]


def _listing(model: RemoteModel) -> _Listing:
    """One question to the Hub: which commit, which files, which checksums."""
    from huggingface_hub import HfApi

    revision = model.revision or "main"
    info = HfApi().model_info(model.repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    commit = str(info.sha)
    if not is_commit(commit) or (is_commit(revision) and commit != revision):
        raise CheckpointError(f"the Hub answers for commit {commit[:40]!r} of {model.repository}, not for {revision}")
    siblings = {str(sibling.rfilename): sibling for sibling in info.siblings or []}
    return _Listing(commit, [_file(siblings[name]) for name in _wanted(model, list(siblings))])


def _wanted(model: RemoteModel, names: list[str]) -> list[str]:
    weights = next((name for name in WEIGHT_FILES if name in names), None)
    adapter = [name for name in names if name == "adapter_config.json"]
    if adapter and weights is None:
        raise CheckpointError(f"{model.repository} is a PEFT adapter, not a whole model")
    if weights is None or "config.json" not in names:
        missing = "config.json" if weights else " or ".join(WEIGHT_FILES[::2])
        raise CheckpointError(f"{model.repository} on the Hub has no {missing}")
    wanted = ["config.json", weights, *adapter]  # that it is not applied is said where the folder is opened
    if weights.endswith(".index.json"):
        stem, suffix = ("model-", ".safetensors") if "safetensors" in weights else ("pytorch_model-", ".bin")
        wanted += [name for name in names if name.startswith(stem) and name.endswith(suffix) and "/" not in name]
    return wanted


def _file(sibling: Any) -> _File:
    lfs = sibling.lfs
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    size = lfs.get("size") if isinstance(lfs, dict) else sibling.size
    return _File(str(sibling.rfilename), size or sibling.size, sha256, sibling.blob_id)


def _download(model: RemoteModel, commit: str, file: _File, folder: Path) -> None:
    """One file, whole and verified, in `folder`; goes on with what an earlier run left."""
    target = folder / file.name
    if target.is_file():  # verified when it got this name
        return
    partial = folder / f"{file.name}.part"
    try:
        with open(partial, "ab") as stream:
            if file.size is not None and stream.tell() > file.size:
                stream.truncate(0)
            if stream.tell() == 0 or stream.tell() != file.size:
                with _network_errors(model):
                    _receive(model, commit, file, stream)
        _verify(model, file, partial)
        os.replace(partial, target)
    except OSError as error:
        if isinstance(error, WeightsNotFound):
            raise
        raise CheckpointError(f"{partial} cannot be written ({error.strerror or error})") from error


def _receive(model: RemoteModel, commit: str, file: _File, stream: BinaryIO) -> None:
    """Append what is missing; a connection that drops is taken up again as long as each one brings something."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get

    while True:
        have = stream.tell()
        try:
            http_get(
                hf_hub_url(model.repository, file.name, revision=commit),
                stream,
                resume_size=have,
                headers=_hub_utils().build_hf_headers(library_name="numpyesm"),
                expected_size=file.size,
                displayed_filename=file.name,
            )
            return
        except Exception:
            # Not every version of huggingface-hub takes up a dropped connection by itself.
            stream.flush()
            if stream.tell() <= have:
                raise


def _verify(model: RemoteModel, file: _File, path: Path) -> None:
    """Compare with what the Hub states and with what is known here; a bad file is deleted."""
    expected = {file.sha256} if file.sha256 else set()
    if model.is_pinned and file.name == "model.safetensors":
        expected |= {KNOWN_SHA256[model.preset]} if model.preset in KNOWN_SHA256 else set()
    if expected:
        good = expected == {file_sha256(path)}
    elif file.git_sha1:
        good = _git_sha1(path) == file.git_sha1
    else:
        path.unlink()
        raise CheckpointError(f"the Hub states no checksum for {file.name} of {model.repository}")
    if not good:
        path.unlink()
        raise CheckpointError(
            f"{file.name} of {model.repository} has a wrong checksum: the download is damaged or was tampered with, "
            "and has been deleted"
        )


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()  # only small files are without SHA-256
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def _network_errors(model: RemoteModel) -> Iterator[None]:
    """Any failure of the Hub or of the way to it, as one sentence.

    What huggingface-hub raises depends on its version and on its HTTP library (requests, httpx): all is caught.
    """
    try:
        yield
    except (CheckpointError, WeightsNotFound):
        raise
    except Exception as error:
        kind = type(error).__name__
        advice = ways_out(model.preset or model.repository)
        if kind in (
            "RepositoryNotFoundError",
            "RevisionNotFoundError",
            "EntryNotFoundError",
            "RemoteEntryNotFoundError",
        ):
            at = f" at revision {model.revision}" if model.revision else ""
            raise WeightsNotFound(f"the Hub has no {model.repository}{at}, or it is private; {advice}") from error
        if kind == "GatedRepoError":
            raise WeightsNotFound(f"{model.repository} is gated: ask for access on the Hub and log in") from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = (
            f"it answers {status}" if status else f"{kind}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        )
        raise WeightsNotFound(
            f"the Hugging Face Hub cannot be reached for {model.repository} ({reason.rstrip(': ')}); {advice}"
        ) from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process downloads, others wait and find the result."""
    with _hub_utils().WeakFileLock(path):
        yield


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    utils = _hub_utils()
    if show or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _hub_utils() -> Any:
    # Public, but exported in a way that type checkers do not follow.
    return import_module("huggingface_hub.utils")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made ({error.strerror or error}); set NUMPYESM_CACHE") from error


def _opens(path: Path) -> bool:
    """Whether it is whole, and no random numbers under a published name."""
    try:
        return not open_checkpoint(path).checkpoint.synthetic
    except CheckpointError:
        return False


def _copy(source: Path, target: Path) -> Path:
    with open(source, "rb") as file, atomic_write(target) as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
    return target
