"""One run on an output at a time: a lock that the system takes away when the process dies, however it dies."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path

from ..errors import BulkError, MissingExtra
from .journal import FILE as JOURNAL

LOCK = "lock"


class FolderLock:
    """Holds `folder/lock` for as long as the process lives or until `release`.

    On NFS the lock reaches other machines if the server supports it (Linux does by default). On file systems without
    locks, such as Lustre mounted without `flock`, filelock warns and marks the file instead.

    Raises
    ------
    BulkError
        If another run holds it, or the folder is not one of ours: what is in it would be removed at the end.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from filelock import FileLock, Timeout
        except ImportError as error:
            raise MissingExtra("bulk embedding needs filelock: pip install 'numpyesm[bulk]'") from error
        self.folder = folder
        path = folder / LOCK
        self._lock = FileLock(path, timeout=0)
        while True:
            _refuse_foreign(folder)
            # A run that ends now may remove the folder behind any of these steps.
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                if _is_something_else(folder):
                    raise
                continue
            try:
                self._lock.acquire()
                break
            except (FileNotFoundError, FileExistsError):
                continue
            except Timeout:
                holder = ""
                with suppress(OSError):
                    holder = path.read_text(errors="replace")[:200].strip()
                raise BulkError(
                    f"another run is working on this output ({holder or 'unknown process'}); {folder} is its folder"
                ) from None
        with suppress(OSError):  # Windows locks the text, too
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    @property
    def held(self) -> bool:
        """Whether the lock is still ours."""
        return bool(self._lock.is_locked)

    def release(self) -> None:
        """Let the next run in."""
        self._lock.release()

    def empty(self) -> None:
        """Remove what is in the folder but the lock."""
        # The journal first: without it the rest is nothing, should this be interrupted.
        for entry in sorted(self.folder.iterdir(), key=lambda entry: not entry.name.startswith(JOURNAL)):
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def remove_folder(self) -> None:
        """Remove the folder and let go: the lock last, so that nobody enters a folder that is going away."""
        self.empty()
        if os.name == "nt":  # an open file cannot be removed there
            self.release()
        (self.folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # another run is already making its lock in it
            self.folder.rmdir()
        self.release()


def _refuse_foreign(folder: Path) -> None:
    names: set[str] = set()
    with suppress(FileNotFoundError, NotADirectoryError):
        names = {entry.name for entry in folder.iterdir()}
    if names and not names & {LOCK, JOURNAL}:
        raise BulkError(f"{folder} is not of numpyesm embed, which needs that name: choose another output")


def _is_something_else(folder: Path) -> bool:
    """Whether the name belongs to a file, or to a link that leads nowhere; asked once, as others may change it."""
    try:
        return not stat.S_ISDIR(folder.stat().st_mode)
    except FileNotFoundError:
        return folder.is_symlink()
