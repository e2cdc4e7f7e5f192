"""Open weights of any kind from a local path. Files are recognised by content, not by extension."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, WeightsNotFound, warn
from ..printable import listed, quoted
from . import hugging_face
from .cache import source_name
from .canonical import checkpoint_from, is_canonical
from .checkpoint import Checkpoint
from .integrity import verify_at_load, verify_data, verify_files
from .reading import reading
from .recognise import find_model, named_tensors, refuse_learned_positions
from .safetensors_file import looks_like_safetensors, read_safetensors
from .synthetic import is_synthetic_spec, synthetic_checkpoint
from .tensor import StoredTensor

# The readers of foreign formats are imported where they are used: opening a canonical file stays quick.

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# What training leaves beside weights, under the same endings.
_TRAINING_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)[^/]*|.*-contact-regression\.pt"
)
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")
# How files begin that people pass by mistake.
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
    """A checkpoint and the files it came from."""

    checkpoint: Checkpoint
    files: tuple[Path, ...]  # all that were read
    weight_files: tuple[Path, ...]  # whose SHA-256 is the provenance of the checkpoint
    checksums: int = 0  # that were verified


def load_checkpoint(path: str | os.PathLike[str], *, regression: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Load the weights at a local path, or make synthetic ones.

    Parameters
    ----------
    path : str or path
        A canonical file, a checkpoint of fair-esm, transformers or a training script, a Hugging Face folder, or a
        folder with one of these; or the string `synthetic[:name[:seed]]`.
    regression : path, optional
        The contact regression of a fair-esm checkpoint, if it is not beside it.

    Raises
    ------
    WeightsNotFound
        If nothing is there.
    CheckpointError
        If what is there is damaged, of another model, or no checkpoint.

    Warns
    -----
    UserWarning
        If the checkpoint holds more than the model (a head of another kind, say), which is left out; if one of fair-esm
        has no contact regression; if there is an adapter beside the weights, which is not applied.
    """
    return open_checkpoint(path, regression=regression, verify=verify_at_load()).checkpoint


def open_checkpoint(
    path: str | os.PathLike[str], *, regression: str | os.PathLike[str] | None = None, verify: bool = True
) -> Opened:
    """Do as `load_checkpoint`, and say which files were read; verify the checksums in and beside them."""
    if isinstance(path, str) and is_synthetic_spec(path):
        _refuse_regression(path, regression)
        return Opened(synthetic_checkpoint(path), (), ())
    place = Path(path)
    if regression is not None and not Path(regression).is_file():
        raise WeightsNotFound(f"the contact regression {regression} does not exist")
    files = [place]
    if place.is_dir():
        place = _in_folder(place)
        files = hugging_face.weight_files(place) if place.is_dir() else [place]
    beside = [place / "config.json"] if place.is_dir() else []
    checksums = verify_files([*files, *beside]) if verify else 0
    contents = [read_weights(file) for file in files]
    content, metadata = contents[0]
    if is_canonical(metadata):
        checkpoint = checkpoint_from(content, metadata, files[0])
        _refuse_regression(place, regression)
        if verify and "data_sha256" in metadata:
            verify_data(files[0], metadata["data_sha256"])
            checksums += 1
        return Opened(checkpoint, tuple(files), tuple(files), checksums)
    checkpoint, beside = _convert(place, files, [content for content, _ in contents], regression)
    if verify:
        checksums += verify_files(beside)
    return Opened(checkpoint, (*files, *beside), tuple(files), checksums)


def find_in_folder(folder: Path) -> Path | None:
    """Return the one file in a folder that can be opened, or the folder itself if it is a Hugging Face one.

    None if there is neither; CheckpointError if there are several.
    """
    if hugging_face.weight_files(folder):
        return folder
    with reading(folder):
        names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in WEIGHT_SUFFIXES and entry.is_file())
    names = [name for name in names if not name.startswith(".") and not _TRAINING_STATE.fullmatch(name)]
    names = [name for name in names if name not in hugging_face.ADAPTER_FILES] or names
    if len(names) > 1:
        raise CheckpointError(f"{folder} holds several checkpoints ({listed(names)}): name one of them")
    return folder / names[0] if names else None


def _in_folder(folder: Path) -> Path:
    """Do as `find_in_folder`; if there is nothing to open, say in a WeightsNotFound what is there instead."""
    if found := find_in_folder(folder):
        return found
    names = sorted(entry.name for entry in folder.iterdir())
    if unfinished := [name for name in names if name.endswith(_UNFINISHED)]:
        raise WeightsNotFound(f"the folder {folder} holds only an unfinished download ({unfinished[0]})")
    if others := [name for name in names if name in ("tf_model.h5", "flax_model.msgpack", "model.onnx")]:
        raise WeightsNotFound(f"the folder {folder} holds weights for another framework only ({others[0]})")
    raise WeightsNotFound(f"the folder {folder} holds no weights (*{', *'.join(WEIGHT_SUFFIXES)})")


def read_weights(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a weights file of any format: its object, and its metadata if it has any."""
    with reading(path), open(path, "rb") as file:
        head = file.read(512)
    try:
        if looks_like_safetensors(head):
            return read_safetensors(path)
        from .torch_file import looks_like_torch, read_torch

        if looks_like_torch(head):
            return read_torch(path), {}
        raise CheckpointError(f"{path} is not a checkpoint: {_describe(head, path)}")
    except CheckpointError as error:
        if path.name.endswith(_UNFINISHED) or path.with_name(path.name + ".aria2").exists():
            raise CheckpointError(f"{path} is an unfinished download: let it finish, or start it again") from error
        raise


def _convert(
    place: Path, files: Sequence[Path], contents: Sequence[Any], regression: str | os.PathLike[str] | None
) -> tuple[Checkpoint, list[Path]]:
    """Convert the objects of foreign files; also return which files beside them were read."""
    from . import fair_esm
    from .assemble import assemble, deduce_config

    origin = str(place)
    model = find_model(_merged(place, files, contents), (fair_esm.NAMING, hugging_face.NAMING), origin)
    is_fair_esm = model.naming is fair_esm.NAMING
    folder = place if place.is_dir() else place.parent
    config = {} if is_fair_esm else hugging_face.read_config(folder / "config.json")
    refuse_learned_positions(model, config.get("position_embedding_type"), origin)
    beside: list[Path] = []
    classifier = None
    if is_fair_esm:
        stated = fair_esm.stated_shape(contents[0], origin)
        chosen = Path(regression or place.with_name(f"{place.stem}-contact-regression.pt"))
        beside = [chosen] if chosen.exists() else []
    else:
        _refuse_regression(place, regression)
        stated = hugging_face.stated_shape(config, origin)
        classifier = hugging_face.classifier_of(model, config, origin)
    for field, value in stated.items():
        if value is not None and type(value) is not int:
            raise CheckpointError(f"{origin}: its configuration does not give {field} as a number")
    shape = replace(deduce_config(model, stated["num_heads"], origin), classifier=classifier)
    for field, value in stated.items():
        if value not in (None, getattr(shape, field)):
            raise CheckpointError(f"{origin} has {field}={getattr(shape, field)}, its configuration says {value}")
    if classifier is None:
        model = model.without_classifier()
    if beside:
        found = fair_esm.regression_of(read_weights(chosen)[0], chosen, shape)
        model = replace(model, tensors=model.tensors | found)
    checkpoint = assemble(model, shape, origin, source_name(place))
    if is_fair_esm and not checkpoint.has_contact_head:
        warn(
            f"no contact regression for {place.name} ({chosen.name} is not beside it and none was given): "
            "the model cannot predict contacts"
        )
    if model.left_out:
        warn(f"{place.name} holds more than ESM-2; left out: {listed(quoted(name)[1:-1] for name in model.left_out)}")
    if (folder / "adapter_config.json").is_file():
        warn(f"{folder / 'adapter_config.json'} is beside the weights: its adapter is not applied")
    return checkpoint, beside


def _merged(place: Path, files: Sequence[Path], contents: Sequence[Any]) -> dict[str, StoredTensor]:
    """Return the named tensors of one file, or of all shards."""
    tensors: dict[str, StoredTensor] = {}
    for file, content in zip(files, contents, strict=True):
        found = named_tensors(content, str(file))
        if repeated := found.keys() & tensors.keys():
            raise CheckpointError(f"{place} has tensor {min(repeated)!r} in two of its files")
        tensors |= found
    if not tensors:
        raise CheckpointError(f"{place} {_without_tensors(contents[0])}")
    if len(files) > 1:
        hugging_face.check_complete(place, {str(key) for content in contents for key in content})
    return tensors


def _without_tensors(content: Any) -> str:
    from .safe_pickle import Inert

    if isinstance(content, dict | list | tuple | StoredTensor):
        return "holds no named tensors"
    kind = str(type(content))[:80] if isinstance(content, Inert) else type(content).__name__
    return f"holds a pickled Python object ({kind}), not a checkpoint; save its state_dict() instead"


def _refuse_regression(place: Path | str, regression: str | os.PathLike[str] | None) -> None:
    if regression is not None:
        raise CheckpointError(
            f"{place} is not a fair-esm checkpoint: the contact regression {regression} does not go with it"
        )


def _describe(head: bytes, path: Path) -> str:
    if not head:
        return "it is empty"
    for signature, description in _SIGNATURES:
        if head.startswith(signature):
            return f"it is {description}"
    if path.suffix == ".safetensors":
        return "it is not a safetensors file, or is damaged"
    if head[:1] == b"\x80":
        return "it is a Python pickle, not a file that torch.save wrote"
    if all(byte >= 32 or byte in b"\t\n\r" for byte in head) and b"\x7f" not in head:
        return "it is a text file"
    return "it is neither a safetensors file nor one that torch.save wrote"
