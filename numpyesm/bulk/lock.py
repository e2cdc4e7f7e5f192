"""One run on an output at a time: a lock that the system releases when the process dies, however it dies."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from ..errors import BulkError
from ..extras import require
from .journal import FILE as JOURNAL

LOCK = "lock"
# A run that ends may remove the folder between any two steps of a run that begins.
_ATTEMPTS = 1000


class FolderLock:
    """Holds `folder/lock` within a `with` block, and at its end removes the folder if nothing else is in it.

    On NFS the lock reaches other machines if the server supports it (Linux does by default). On file systems without
    locks, such as Lustre mounted without `flock`, filelock warns and marks the file instead.

    Raises
    ------
    BulkError
        If another run holds it, or the folder is not one of ours: what is in it would be removed at the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / LOCK
        self._lock = require("filelock", "bulk embedding", "bulk").FileLock(self._path, timeout=0)

    def __enter__(self) -> FolderLock:
        for left in reversed(range(_ATTEMPTS)):
            names = self._names()
            if names and not names & {LOCK, JOURNAL}:
                raise BulkError(
                    f"{self.folder} was not made by numpyesm embed, which needs that name: choose another output"
                )
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
                break
            except (FileNotFoundError, FileExistsError):
                if not left:
                    raise
            except TimeoutError:
                holder = ""
                with suppress(OSError):
                    holder = self._path.read_text(errors="replace")[:200].strip()
                raise BulkError(
                    f"another run is working on this output ({holder or 'unknown process'}); "
                    f"{self.folder} is its folder"
                ) from None
        with suppress(OSError):  # Windows locks the text, too
            self._path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self._names() <= {LOCK}:
            if os.name == "nt":  # an open file cannot be removed there
                self._lock.release()
            # The lock goes last, so that nobody enters a folder that is going away.
            self._path.unlink(missing_ok=True)
            with suppress(OSError):  # another run is already making its lock in it
                self.folder.rmdir()
        self._lock.release()

    def empty(self) -> None:
        """Remove what is in the folder but the lock."""
        # The journal first: without it the rest is nothing, should this be interrupted.
        for name in sorted(self._names() - {LOCK}, key=lambda name: not name.startswith(JOURNAL)):
            entry = self.folder / name
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _names(self) -> set[str]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return set(os.listdir(self.folder))
        return set()
