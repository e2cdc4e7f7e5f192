"""Checksums at load: those that a file states of itself, and those that stand beside it.

A file is hashed when it is first seen, and again whenever its size, date or inode has changed; that it was right is
noted in the cache. `NUMPYESM_VERIFY=always` trusts no note, `never` hashes nothing (a Lambda package, whose bytes AWS
has checked itself). Where no note can be kept, files are hashed each time: some 80 ms for 134 MB.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from contextlib import suppress
from pathlib import Path, PurePath

from ..errors import CheckpointError, InvalidOption
from .cache import cache_dir

MODES = ("once", "always", "never")
SUMS_FILE = "SHA256SUMS"
_PIECE = 1 << 20
_MAX_NOTES = 256


def verify_data(path: Path, data_sha256: str | None) -> None:
    """Compare a canonical file's tensors with the checksum in its metadata, if there is one.

    Raises
    ------
    CheckpointError
        If they differ.
    """
    if data_sha256:
        _verify(path, data_sha256, from_data=True)


def verify_file(path: Path) -> None:
    """Compare a file with the checksum beside it: in `<name>.sha256`, or in `SHA256SUMS`. None there: nothing to do.

    Raises
    ------
    CheckpointError
        If they differ.
    """
    stated = stated_sha256(path)
    if stated is not None:
        _verify(path, stated, from_data=False)


def stated_sha256(path: Path) -> str | None:
    """The checksum that stands beside a file, as `sha256sum` writes it (`--tag` too).

    `<name>.sha256` is about this file, whatever name it states; `SHA256SUMS` where it names it.
    """
    for sums in (path.with_name(path.name + ".sha256"), path.with_name(SUMS_FILE)):
        try:
            with open(sums, encoding="utf-8-sig", errors="replace") as file:
                lines = [_read_sum(line) for line in file.read(1 << 20).splitlines() if line.strip()]
        except OSError:
            continue
        found = [digest for digest, name in lines if _names(name, path)]
        if not found and sums.name != SUMS_FILE:
            found = [digest for digest, _ in lines]
            if len(found) != 1:
                raise CheckpointError(f"{sums} states no SHA-256 for {path.name}")
        if found:
            digest = found[0].lower()
            if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                raise CheckpointError(f"{sums} states no SHA-256 for {path.name}")
            return digest
    return None


def _read_sum(line: str) -> tuple[str, str]:
    """(digest, name) of `digest  name`, `digest *name` or `SHA256 (name) = digest`."""
    if tagged := re.fullmatch(r"SHA2?-?256 ?\((.*)\) ?= ?(\S+)", line.strip()):
        return tagged[2], tagged[1]
    digest, _, name = line.strip().partition(" ")
    return digest, name.lstrip(" *")


def _names(name: str, path: Path) -> bool:
    """Whether it is this file's name, or the end of its path: sums are also made from a folder above."""
    parts = PurePath(name).parts
    return bool(parts) and path.absolute().parts[-len(parts) :] == parts


def note_verified(path: Path, digest: str, *, from_data: bool = True) -> None:
    """Remember that a file is right, as one that was just written."""
    note = _note(path, digest, from_data)
    if note is None:
        return
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        for older in note.parent.glob(note.name.split("-")[0] + "-*"):
            older.unlink(missing_ok=True)
        others = list(note.parent.iterdir())
        if len(others) >= _MAX_NOTES:  # of files long gone; whatever is not, is hashed once more
            for other in others:
                other.unlink(missing_ok=True)
        note.touch()


def _verify(path: Path, digest: str, *, from_data: bool) -> None:
    mode = os.environ.get("NUMPYESM_VERIFY", "") or "once"
    if mode not in MODES:
        raise InvalidOption(f"NUMPYESM_VERIFY={mode!r}: allowed are {', '.join(MODES)}")
    note = _note(path, digest, from_data) if mode == "once" else None
    if mode == "never" or (note is not None and note.exists()):
        return
    if _sha256(path, from_data) != digest:
        what = "its tensors do not have the checksum that it states" if from_data else "its checksum is not the stated"
        raise CheckpointError(f"{path} is corrupted: {what}")
    if mode == "once":
        note_verified(path, digest, from_data=from_data)


def _note(path: Path, digest: str, from_data: bool) -> Path | None:
    """An empty file whose name says which file was right, in which state."""
    try:
        state = path.stat()
        place = zlib.crc32(os.fsencode(path.resolve()))
    except OSError:
        return None
    # Not hashlib: loading OpenSSL for a name would cost more than reading it.
    kind = "data" if from_data else "file"
    name = f"{place:08x}{kind}-{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}-{state.st_ino}-{digest[:32]}"
    return cache_dir() / "verified" / name


def _sha256(path: Path, from_data: bool) -> str:
    import hashlib  # loads OpenSSL: not when the file is known

    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            if from_data:
                (length,) = struct.unpack("<Q", file.read(8))
                file.seek(8 + length)
            while piece := file.read(_PIECE):
                digest.update(piece)
    except (OSError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    return digest.hexdigest()
