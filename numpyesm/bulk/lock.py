"""One run on an output at a time: a lock that the system takes away when the process dies, however it dies."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..errors import BulkError


class FolderLock:
    """Holds `folder/lock` for as long as the process lives or until `release`.

    On NFS the lock reaches other machines if the server supports it (Linux does by default). On a file system without
    locks, such as Lustre mounted without `flock`, a warning says so and nothing is held.

    Raises
    ------
    BulkError
        If another run holds it, or the folder is not one of ours: what is in it would be removed at the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "lock"
        while True:
            _refuse_foreign(folder)
            # A run that just ended may have removed the folder behind any of these steps.
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                if _is_something_else(folder):
                    raise
                continue
            try:
                self._file: IO[str] = open(path, "a+")  # noqa: SIM115
            except FileNotFoundError:
                continue
            try:
                _lock(self._file)
            except BlockingIOError:
                self._file.seek(0)
                holder = self._file.read(200).strip() or "unknown process"
                self._file.close()
                raise BulkError(f"another run is working on this output ({holder}); {folder} is its folder") from None
            try:
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
                    break
            except FileNotFoundError:
                pass
            self._file.close()  # it was removed between opening and locking: it protects nothing
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    @property
    def held(self) -> bool:
        """Whether the lock is still ours."""
        return not self._file.closed

    def release(self) -> None:
        """Let the next run in."""
        self._file.close()

    def remove_folder(self) -> None:
        """Remove the folder and let go: the lock last, so that nobody enters a folder that is going away."""
        # The journal first: without it the rest is nothing, should this be interrupted.
        for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name != "journal.sqlite"):
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if os.name == "nt":  # an open file cannot be removed there
            self._file.close()
        (self.folder / "lock").unlink(missing_ok=True)
        with suppress(OSError):  # another run is already making its lock in it
            self.folder.rmdir()
        self.release()


def _refuse_foreign(folder: Path) -> None:
    names: set[str] = set()
    with suppress(FileNotFoundError, NotADirectoryError):
        names = {entry.name for entry in folder.iterdir()}
    if names and not names & {"lock", "journal.sqlite"}:
        raise BulkError(f"{folder} is not of numpyesm embed, which needs that name: choose another output")


def _is_something_else(folder: Path) -> bool:
    """Whether the name belongs to a file or to a link that leads nowhere; asked once, as others may change it."""
    try:
        return not stat.S_ISDIR(folder.stat().st_mode)
    except FileNotFoundError:
        return folder.is_symlink()


def _lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            file.seek(1 << 30)  # a byte that nobody reads
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError as error:
            raise BlockingIOError from error
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        warnings.warn(
            f"{file.name} cannot be locked on this file system ({error.strerror}): "
            "take care yourself that no second run has the same output",
            stacklevel=3,
        )
