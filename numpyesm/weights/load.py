"""Open weights of any kind from a local path. What a file is is told from its content, not from its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, WeightsNotFound
from .canonical import checkpoint_from, is_canonical
from .checkpoint import Checkpoint
from .integrity import verify_data, verify_file
from .safetensors_file import looks_like_safetensors, read_safetensors
from .synthetic import is_synthetic_spec, synthetic_from_spec

# The readers of foreign formats are imported where they are used: opening a canonical file stays quick.

_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# How some files begin that people hand in by mistake.
_SIGNATURES = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"BZh", "bzip2-compressed; unpack it first"),
    (b"\xfd7zXZ", "xz-compressed; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it first"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer: the weights themselves were not downloaded (git lfs pull)"),
    (b"<", "a web page or XML"),
    (b"\x08", "perhaps an ONNX model"),
)


@dataclass(frozen=True)
class Opened:
    """A checkpoint and the files it came from.

    Attributes
    ----------
    checkpoint : Checkpoint
    files : tuple of Path
        All files that were read; the first are the weights.
    weight_files : tuple of Path
        Those among them whose content the checkpoint's provenance is the hash of.
    """

    checkpoint: Checkpoint
    files: tuple[Path, ...]
    weight_files: tuple[Path, ...]


def load_checkpoint(path: str | os.PathLike[str], *, regression: str | os.PathLike[str] | None = None) -> Checkpoint:
    """The weights at a local path, or synthetic ones.

    Parameters
    ----------
    path : str or path
        A canonical file, a fair-esm checkpoint, a Hugging Face weights file or folder, or a folder with one of these;
        or the string `synthetic[:name[:seed]]`.
    regression : path, optional
        The contact regression of a fair-esm checkpoint, if it is not beside it.

    Raises
    ------
    WeightsNotFound
        If nothing is there.
    CheckpointError
        If what is there is damaged, of another model, or no checkpoint.
    """
    if isinstance(path, str) and is_synthetic_spec(path):
        return synthetic_from_spec(path)
    return open_checkpoint(path, regression=regression).checkpoint


def open_checkpoint(path: str | os.PathLike[str], *, regression: str | os.PathLike[str] | None = None) -> Opened:
    """As `load_checkpoint`, and says which files were read."""
    path = Path(path)
    if regression is not None and not Path(regression).is_file():
        raise WeightsNotFound(f"the contact regression {regression} does not exist")
    if path.is_dir():
        return _open_folder(path, regression)
    head = _head(path)
    verify_file(path)
    if looks_like_safetensors(head):
        return _open_safetensors(path, regression)
    from .torch_file import is_legacy_torch, is_torch_zip, read_torch

    if is_torch_zip(head) or is_legacy_torch(head):
        return _open_torch(path, read_torch(path), regression)
    raise CheckpointError(f"{path} is no checkpoint: {_describe(head, path)}")


def find_in_folder(folder: Path) -> Path | None:
    """The one thing in a folder that can be opened, or the folder itself if it is a Hugging Face one; None if empty.

    Raises
    ------
    CheckpointError
        If there are several.
    """
    from .hugging_face import weight_files

    if weight_files(folder) or (folder / "adapter_config.json").is_file():
        return folder
    try:
        files = sorted(
            entry
            for entry in folder.iterdir()
            if entry.suffix in _WEIGHT_SUFFIXES
            and not entry.name.startswith(".")
            and not entry.name.endswith("-contact-regression.pt")
            and entry.is_file()
        )
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror or error})") from error
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise CheckpointError(f"{folder} holds several checkpoints ({names}): name one of them")
    return files[0] if files else None


def _open_folder(folder: Path, regression: str | os.PathLike[str] | None) -> Opened:
    found = find_in_folder(folder)
    if found is None:
        raise WeightsNotFound(f"the folder {folder} holds no weights (*{', *'.join(_WEIGHT_SUFFIXES)})")
    if found != folder:
        return open_checkpoint(found, regression=regression)
    from .hugging_face import read_hugging_face, weight_files

    files = tuple(weight_files(folder))
    for file in (*files, folder / "config.json"):
        verify_file(file)
    checkpoint = read_hugging_face(folder)
    return Opened(_refuse_regression(checkpoint, folder, regression), files, files)


def _open_safetensors(path: Path, regression: str | os.PathLike[str] | None) -> Opened:
    tensors, metadata = read_safetensors(path)
    if is_canonical(metadata):
        checkpoint = _refuse_regression(checkpoint_from(tensors, metadata, path), path, regression)
        verify_data(path, metadata.get("data_sha256"))
        return Opened(checkpoint, (path,), (path,))
    from .fair_esm import from_fair_esm, is_fair_esm
    from .hugging_face import is_hugging_face, read_hugging_face

    if not is_hugging_face(tensors) and is_fair_esm(tensors):
        return _fair_esm_opened(from_fair_esm(tensors, path, regression), path, regression)
    return Opened(_refuse_regression(read_hugging_face(path), path, regression), (path,), (path,))


def _open_torch(path: Path, content: object, regression: str | os.PathLike[str] | None) -> Opened:
    from .fair_esm import from_fair_esm, is_fair_esm, state_dict
    from .hugging_face import is_hugging_face, read_hugging_face
    from .safe_pickle import Inert

    tensors = state_dict(content)
    if is_hugging_face(tensors):
        return Opened(_refuse_regression(read_hugging_face(path), path, regression), (path,), (path,))
    if isinstance(content, Inert) and not tensors:
        kind = str(type(content))[:80]
        raise CheckpointError(
            f"{path} holds a pickled Python object ({kind}), not a checkpoint; save its state_dict() instead"
        )
    if not tensors and not is_fair_esm(content):
        raise CheckpointError(f"{path} was written by torch, but holds no model weights")
    return _fair_esm_opened(from_fair_esm(content, path, regression), path, regression)


def _fair_esm_opened(checkpoint: Checkpoint, path: Path, regression: str | os.PathLike[str] | None) -> Opened:
    from .fair_esm import regression_path

    beside = Path(regression) if regression is not None else regression_path(path)
    files = (path, beside) if beside.is_file() else (path,)
    return Opened(checkpoint, files, (path,))


def _refuse_regression(checkpoint: Checkpoint, path: Path, regression: str | os.PathLike[str] | None) -> Checkpoint:
    if regression is not None:
        raise CheckpointError(
            f"{path} is not a fair-esm checkpoint: the contact regression {regression} does not go with it"
        )
    return checkpoint


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError as error:
        raise WeightsNotFound(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    if not head:
        raise CheckpointError(f"{path} is empty")
    return head


def _describe(head: bytes, path: Path) -> str:
    for signature, description in _SIGNATURES:
        if head.startswith(signature):
            return f"it is {description}"
    if path.suffix == ".safetensors":
        return "it is no safetensors file, or a damaged one"
    if head[:1] == b"\x80":
        return "it is a Python pickle, not a file that torch.save wrote"
    if _is_text(head):
        return "it is a text file"
    return "it is neither a safetensors file nor one that torch.save wrote"


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r" for byte in head) and b"\x7f" not in head
