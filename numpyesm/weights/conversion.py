"""Convert any weights to one canonical file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..errors import InvalidOption
from ..files import file_sha256, safe_stem, same_file
from .adapter import merged, read_adapter
from .cache import check_model, check_official, file_name
from .canonical import check_dtype, save_canonical
from .checkpoint import Checkpoint
from .hugging_face import files_of
from .load import Opened, load_checkpoint, open_checkpoint
from .reading import reading
from .synthetic import is_synthetic_spec


class Conversion(NamedTuple):
    """The canonical file that `convert` has written, and what is in it."""

    path: Path
    checkpoint: Checkpoint


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "fp32",
    regression: str | os.PathLike[str] | None = None,
    layers: int | None = None,
    adapter: Path | None = None,
    name: str = "",
    progress: bool = False,
) -> Conversion:
    """Convert weights to a canonical file.

    Parameters
    ----------
    source : str or path
        Whatever `load_checkpoint` opens, also a canonical file to change its dtype, or `synthetic[:name[:seed]]`.
    output : str or path
        A `.safetensors` file, or a folder for `<model>.safetensors`, or `<model>-<source>.safetensors` of what was
        fine-tuned. Written atomically.
    dtype : {'fp32', 'fp16', 'bf16', 'int8'}
        Storage of the matrices; everything else is float32.
    regression : path, optional
        The contact regression of a fair-esm checkpoint, if it is not beside it.
    layers : int, optional
        Keep only this many of the first layers, without the heads: a smaller, faster file with the same embeddings.
    adapter : Path, optional
        A folder of peft, to be merged in.
    name : str
        What the user called the source: if it is a published model, no other will do.
    progress : bool
        Show a progress bar on stderr, if it takes longer than a second.

    Raises
    ------
    CheckpointError, WeightsNotFound, InvalidOption
        If the source cannot be read, its numbers do not fit the dtype, or the output would replace the source.
    """
    check_target(output, dtype)
    _announce(Path(source), progress)
    if not is_synthetic_spec(os.fspath(source)):
        check_official(Path(source))
    opened = open_checkpoint(source, regression=regression)
    check_model(opened.checkpoint.config, name, os.fspath(source))
    if adapter is not None:
        made = merged(opened.checkpoint, read_adapter(adapter), os.fspath(source))
        theirs = files_of(adapter)
        opened = replace(
            opened,
            checkpoint=made,
            files=(*opened.files, *theirs),
            weight_files=(*opened.weight_files, *theirs),
        )
    if layers is not None:
        opened = replace(opened, checkpoint=opened.checkpoint.first_layers(layers))
    path = write(opened, output, dtype, progress)
    return Conversion(path, load_checkpoint(path))


def check_target(output: str | os.PathLike[str], dtype: str) -> None:
    """Raise InvalidOption unless a canonical file of this dtype can be written at `output`, or into it."""
    check_dtype(dtype)
    if Path(output).suffix not in ("", ".safetensors") and not Path(output).is_dir():
        raise InvalidOption(f"the output {output} must be a .safetensors file or a folder")


def write(opened: Opened, output: str | os.PathLike[str], dtype: str, progress: bool) -> Path:
    """Write a canonical file, with its provenance, at the path that is returned; see `convert`."""
    checkpoint, path = opened.checkpoint, Path(output)
    if path.suffix != ".safetensors" or path.is_dir():
        path /= file_name(_name(checkpoint), dtype)
    if any(same_file(file, path) for file in opened.files):
        raise InvalidOption(f"{path} is the source itself: choose another output")
    checkpoint = _with_provenance(opened, dtype)
    with _progress_bar(path, progress) as advance:
        save_canonical(path, checkpoint, precision=dtype, progress=advance)
    return path


def _name(checkpoint: Checkpoint) -> str:
    """Name a file: by a published model only what may be one, because files are found by that name."""
    model = checkpoint.config.name
    if checkpoint.synthetic:
        return f"synthetic-{model}"
    tuned = checkpoint.base is not None or checkpoint.config.classifier is not None
    return f"{model}-{safe_stem(checkpoint.source.rpartition(' + ')[2])}" if tuned else model


@contextmanager
def _progress_bar(path: Path, show: bool) -> Iterator[Callable[[int, int], None]]:
    """What `save_canonical` calls as it writes: shows a bar after a second, a line every ten seconds in a log.

    Layers take equally long. What is written before them takes no time, and would spoil the estimate.
    """
    from tqdm import tqdm  # comes with huggingface-hub

    every = 0.1 if sys.stderr.isatty() else 10
    with tqdm(
        desc=path.name,
        unit="B",
        unit_scale=True,
        delay=1,
        mininterval=every,
        maxinterval=every,
        smoothing=0,
        disable=not show,
    ) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            if 100 * done >= total:
                bar.update(done - bar.n)

        yield advance


def _with_provenance(opened: Opened, dtype: str) -> Checkpoint:
    """Add the SHA-256 of the source files; a canonical source keeps the provenance that it states."""
    checkpoint = opened.checkpoint
    if checkpoint.metadata:
        note = f" (through {checkpoint.precision})"
        rounded = checkpoint.precision not in ("fp32", dtype) and not checkpoint.source.endswith(note)
        return replace(checkpoint, source=checkpoint.source + note) if rounded else checkpoint
    if not opened.weight_files:
        return checkpoint
    with reading(opened.weight_files[0]):
        return replace(checkpoint, source_sha256=file_sha256(*opened.weight_files))


def _announce(source: Path, show: bool) -> None:
    """Say that a large file is being read and checked, which can take half a minute or more."""
    size = sum(file.stat().st_size for file in ([source] if source.is_file() else source.glob("*")) if file.is_file())
    if show and size > 1 << 30:
        sys.stderr.write(f"numpyesm: reading and checking {source} ({size / 1e9:.1f} GB) ...\n")
