"""Files: write them whole or not at all, name them after records, identify and hash them. Errors are OSErrors."""

from __future__ import annotations

import mmap
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import NumpyesmError

_AnyPath = str | os.PathLike[str]

_LONGEST_STEM = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._=+@,-]+")
_WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
_STANDARD_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"(?:/dev|/proc/self)/fd/(\d+)")


class WriteError(OSError):
    """A file that cannot be written: no permission, a full disk, a folder of that name."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written ({self.strerror})"


@contextmanager
def atomic_write(path: _AnyPath) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for bytes, and rename it to `path` if the block ends without an error.

    Missing parent folders are made. A symbolic link stays: the file that it points to is replaced. Pipes, devices and
    `/dev/stdout` are written directly. WriteError: the file cannot be written. `BrokenPipeError`, and errors about
    other files, pass unchanged.
    """
    name = os.fspath(path)
    target = Path(os.path.realpath(name)) if os.path.islink(name) else Path(name)
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        direct = _open_directly(name)
        if direct is not None:
            with direct:
                yield direct
            return
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        with suppress(FileExistsError):  # it is a file: opening says so
            target.parent.mkdir(parents=True, exist_ok=True)
        # The same folder, because os.replace is atomic only within one file system. Not tempfile.mkstemp, which makes
        # files that only their owner can read.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:  # also KeyboardInterrupt
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        about = {None, name, str(target), str(temporary), str(target.parent)}
        if isinstance(error, BrokenPipeError | NumpyesmError) or error.filename not in about:
            raise
        raise WriteError(error.errno, error.strerror or str(error), name) from error


def _open_directly(name: str) -> BinaryIO | None:
    """Open what cannot be replaced as a whole: a descriptor of this process, a pipe, a device. None for files."""
    match = _DESCRIPTOR.fullmatch(name)
    descriptor = int(match[1]) if match else _STANDARD_STREAMS.get(name)
    if descriptor is not None and os.name == "posix":
        sys.stdout.flush()
        return os.fdopen(os.dup(descriptor), "wb")  # opening the name again would truncate a redirected file
    return open(name, "wb") if is_stream(name) and os.path.exists(name) else None


def is_stream(name: str) -> bool:
    """Whether a name is that of a pipe, a device or a descriptor of this process: /dev/stdout, /dev/null, a FIFO."""
    if name in _STANDARD_STREAMS or _DESCRIPTOR.fullmatch(name):
        return True  # even if it is redirected to a file
    return os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name)


def sync_folder(folder: _AnyPath) -> None:
    """Make the names in a folder survive a power cut."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class MappedFile(mmap.mmap):
    """A file mapped read-only, which knows whether it has been overwritten in place since."""

    path: str
    identity: tuple[int, ...]

    @classmethod
    def open(cls, file: BinaryIO) -> MappedFile:
        """Map an open file."""
        mapped = cls(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.path, mapped.identity = os.path.abspath(file.name), identity(file.fileno())
        return mapped

    def release(self) -> None:
        """Drop the pages of the file from memory; they are read again when they are used."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self.madvise(mmap.MADV_DONTNEED)

    @property
    def overwritten(self) -> bool:
        """Whether the content changed. A file that was removed or replaced by another is still mapped as it was."""
        try:
            now = identity(self.path)
        except OSError:
            return False
        return now != self.identity and now[:2] == self.identity[:2]


def identity(file: _AnyPath | int) -> tuple[int, ...]:
    """Return what changes when a file is replaced (device, inode) or overwritten in place (size, time)."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def release_pages(arrays: Iterable[Any]) -> int:
    """Drop from memory the pages of the mapped files that these arrays are views of; return the arrays' bytes there."""
    views = [(array, mapped) for array in arrays if (mapped := _mapped(array)) is not None]
    for mapped in {mapped for _, mapped in views}:
        mapped.release()
    return sum(array.nbytes for array, _ in views)


def overwritten_files(arrays: Iterable[Any]) -> list[str]:
    """Name the files that these arrays are views of and that were overwritten in place since they were mapped."""
    files = {mapped for array in arrays if (mapped := _mapped(array)) is not None}
    return sorted(mapped.path for mapped in files if mapped.overwritten)


def _mapped(array: Any) -> MappedFile | None:
    base = array
    while base is not None and not isinstance(base, MappedFile):
        base = getattr(base, "obj", None) if isinstance(base, memoryview) else getattr(base, "base", None)
    return base


def same_file(one: _AnyPath, other: _AnyPath) -> bool:
    """Whether both names mean one existing file; False for what cannot be a name (too long, a null byte)."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def file_sha256(*paths: _AnyPath, start: int = 0) -> str:
    """SHA-256 in hexadecimal of a file, or of several concatenated, each from its byte `start`."""
    import hashlib  # loads OpenSSL, which takes longer than opening a model

    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def safe_stem(id: str) -> str:
    """Turn an id into a file name, without its ending, that is valid on every system."""
    stem = _UNSAFE.sub("_", id).strip("._")[:_LONGEST_STEM] or "record"
    return f"_{stem}" if _WINDOWS_DEVICES.match(stem) or stem.startswith("-") else stem
