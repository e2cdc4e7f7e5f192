"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it takes the name `path` only if the block ends well.

    Raises
    ------
    CheckpointError
        If the file cannot be written (no permission, disk full).
    """
    path = Path(path)
    if path.is_symlink():  # the file behind the link is what is replaced
        path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as device:  # a pipe or a device has no whole to appear at once
            yield device
        return
    # Same folder: os.replace is atomic only within one file system. The dot keeps it out of every search.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        # Not tempfile.mkstemp, which makes files that only their owner can read.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # Ctrl-C too: nothing half-written may stay
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error})") from error
