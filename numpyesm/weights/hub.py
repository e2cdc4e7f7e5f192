"""Fetch weights: huggingface-hub downloads them into its own cache, they are verified, and converted into ours.

A published model is pinned to one commit. huggingface-hub names each large file by the SHA-256 that the Hub states for
it, which is compared with the content, and so is the sum written here, where it is known, which no server can change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

from ..config import PRESETS
from ..errors import CheckpointError, InvalidOption, WeightsNotFound
from ..files import file_sha256
from .cache import PINNED_SHA256, RemoteModel, check_official, hub_folder, is_commit, ways_out
from .conversion import check_target, write
from .hugging_face import ADAPTER_FILES, WEIGHT_FILES, adapter_file, files_of, weight_files, weight_map
from .load import Opened, open_checkpoint

_TIMEOUT = 10  # seconds to the first answer of the Hub
_ABSENT = {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"}


def is_offline() -> bool:
    """Whether the user forbids network calls; anything that is not clearly a no (`y`, `2`) does."""
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
    """Download a model from the Hugging Face Hub and convert it, unless that was done before.

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
        The canonical file; of an adapter, the folder as it was downloaded.

    Raises
    ------
    WeightsNotFound
        If the Hub cannot be reached or has no such model; the message says what can be done.
    CheckpointError
        If what was downloaded has the wrong checksum or is not an ESM-2 model.
    """
    check_target("" if output is None else output, dtype)
    model = RemoteModel.named(name, revision)
    found = model.cached(dtype)
    if found is not None and (opened := _opened(found)):  # a damaged file is fetched again
        return found if output is None else write(opened, output, dtype, progress)
    snapshot = model.snapshot(model.cached_commit()) or _download(model, progress)
    _verify(model, snapshot)
    commit = snapshot.name
    path = model.cache_path(commit, dtype)
    if adapter_file(snapshot) is not None:  # small, and its base is a model of its own
        if output is not None:
            raise InvalidOption(f"{name} is an adapter: `numpyesm convert BASE --adapter {name} -o FILE` merges it")
        path = snapshot
    elif output is not None or not _opened(path):  # else a branch points to a known commit
        opened = open_checkpoint(snapshot)
        if opened.checkpoint.config != PRESETS.get(model.name, opened.checkpoint.config):
            raise CheckpointError(
                f"{model.repository} on the Hub is not {model.name} but {opened.checkpoint.config.name}"
            )
        path = write(opened, output or path, dtype, progress)
    if output is None:
        model.remember(commit)
    return path


def _download(model: RemoteModel, progress: bool) -> Path:
    """The folder in huggingface-hub's cache, after its own download."""
    if is_offline():
        raise WeightsNotFound(
            f"{model.name} is not in the cache, and NUMPYESM_OFFLINE or HF_HUB_OFFLINE forbids downloading it; "
            + ways_out(model.name)
        )
    from huggingface_hub import HfApi, hf_hub_download

    endpoint = os.environ.get("HF_ENDPOINT") or None  # huggingface-hub looks only when it is imported
    with _network_errors(model), _progress_bars(progress):
        revision = model.revision or "main"
        info = HfApi(endpoint=endpoint).model_info(model.repository, revision=revision, timeout=_TIMEOUT)
        commit = str(info.sha)
        if not is_commit(commit) or (is_commit(revision) and commit != revision):
            raise CheckpointError(
                f"the Hub answers for commit {commit[:40]!r} of {model.repository}, not for {revision}"
            )
        download = partial(
            hf_hub_download, model.repository, revision=commit, cache_dir=hub_folder(), endpoint=endpoint
        )
        for name in _wanted(model, [sibling.rfilename for sibling in info.siblings or []]):
            path = Path(download(name))
        if path.name.endswith(".index.json"):
            for shard in sorted(set(weight_map(path).values())):
                download(shard)
    return path.parent


def _wanted(model: RemoteModel, names: list[str]) -> list[str]:
    """What is needed of the files in a repository; the weights, or the index of their shards, come last."""
    weights = next((name for name in WEIGHT_FILES if name in names), None)
    # That an adapter is not applied is said where the folder is opened.
    beside = [name for name in ("config.json", "adapter_config.json") if name in names]
    if weights is None and "adapter_config.json" in beside:
        weights = next((name for name in ADAPTER_FILES if name in names), None)
        if weights is None:
            raise CheckpointError(f"{model.repository} is a PEFT adapter without {ADAPTER_FILES[0]}")
    elif weights is None or "config.json" not in beside:
        missing = "config.json" if weights else " or ".join(WEIGHT_FILES[::2])
        raise CheckpointError(f"{model.repository} on the Hub has no {missing}")
    return [*beside, weights]


def _verify(model: RemoteModel, snapshot: Path) -> None:
    """Compare checksums; a download that is wrong is deleted, so that the next run does not find it."""
    digest = PINNED_SHA256.get(model.name) if model.is_pinned else None
    try:
        check_official(snapshot)
        if digest is not None and [file_sha256(file) for file in weight_files(snapshot)] != [digest]:
            raise CheckpointError(f"{snapshot} does not hold the published weights of {model.name}")
    except CheckpointError as error:
        for file in files_of(snapshot):
            for path in (Path(os.path.realpath(file)), file):
                path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{error}: the download of {model.repository} is damaged or was tampered with, and has been deleted"
        ) from error


@contextmanager
def _network_errors(model: RemoteModel) -> Iterator[None]:
    """Turn any failure of the Hub, or of the connection to it, into one sentence.

    What huggingface-hub raises depends on its version and its HTTP library (requests, httpx), so everything is caught.
    """
    try:
        yield
    except (CheckpointError, WeightsNotFound):
        raise
    except Exception as error:
        kind = type(error).__name__
        advice = ways_out(model.name)
        if kind in _ABSENT:
            at = f" at revision {model.revision}" if model.revision else ""
            raise WeightsNotFound(f"the Hub has no {model.repository}{at}, or it is private; {advice}") from error
        if kind == "GatedRepoError":
            raise WeightsNotFound(f"{model.repository} is gated: ask for access on the Hub and log in") from error
        if isinstance(error, OSError) and error.filename:  # not of the network: a full disk, a folder without access
            raise CheckpointError(
                f"{error.filename} cannot be written ({error.strerror}); HF_HOME names another cache"
            ) from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = "".join(str(error).splitlines()[:1])[:120]
        reason = f"it answers {status}" if status else f"{kind}: {said}".rstrip(": ")
        raise WeightsNotFound(
            f"the Hugging Face Hub cannot be reached for {model.repository} ({reason}); {advice}"
        ) from error


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    # Public, but exported in a way that type checkers do not follow.
    utils = import_module("huggingface_hub.utils")
    hide = not show and not utils.are_progress_bars_disabled()
    if hide:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            utils.enable_progress_bars()


def _opened(path: Path) -> Opened | None:
    """The canonical file at a path; None if there is none, or a damaged one, or random numbers."""
    try:
        opened = open_checkpoint(path)
    except (CheckpointError, WeightsNotFound):
        return None
    return None if opened.checkpoint.synthetic else opened
