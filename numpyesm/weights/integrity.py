"""Checksums in a weights file, and in the files beside it.

They are verified when weights are converted or fetched and by `numpyesm verify`; when they are loaded only with
NUMPYESM_VERIFY=1, because hashing takes longer than mapping a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from ..errors import CheckpointError, InvalidOption
from ..files import file_sha256
from .checkpoint import Checkpoint
from .reading import reading
from .tensor import bytes_of

SUMS_FILE = "SHA256SUMS"
_VARIABLE = "NUMPYESM_VERIFY"
_MAX_SUMS = 1 << 20  # bytes of a list of checksums


def verify_at_load() -> bool:
    """Whether the user asks for checksums at load, by NUMPYESM_VERIFY=1; InvalidOption if it is neither 0 nor 1."""
    value = os.environ.get(_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise InvalidOption(f"{_VARIABLE}={value!r}: expected 1 (verify checksums at each load) or 0")
    return value == "1"


def verify_files(files: Iterable[Path]) -> int:
    """Compare files with the checksums beside them, in `<name>.sha256` or `SHA256SUMS`; return how many had one.

    CheckpointError if one differs, or a list of checksums cannot be read.
    """
    verified = 0
    for file in files:
        stated = stated_sha256(file)
        if stated is None:
            continue
        with reading(file):
            found = file_sha256(file)
        if found != stated:
            raise CheckpointError(f"{file} is corrupted: its SHA-256 is not the one stated beside it")
        verified += 1
    return verified


def verify_data(path: Path, data_sha256: str) -> None:
    """Compare all that is behind the header of a safetensors file with a checksum; CheckpointError if they differ."""
    with reading(path):
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        found = file_sha256(path, start=start)
    if found != data_sha256:
        raise CheckpointError(f"{path} is corrupted: its tensors do not match its checksum")


def weights_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 of the tensors by name, as they are used: the same for every file that holds the same numbers."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        for array in (tensor.raw, tensor.scale):
            if array is not None:
                digest.update(bytes_of(array))
    return digest.hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of the beginning of each tensor: milliseconds instead of seconds, and enough to tell two models apart."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + bytes_of(tensor.raw.flat[:256]))
    return digest.hexdigest()


def stated_sha256(path: Path) -> str | None:
    """Return the checksum beside a file, as `sha256sum` writes it (`--tag` too); None if there is none.

    `<name>.sha256` is about this file, whatever name it states; `SHA256SUMS` where it names it.
    """
    for sums in (path.with_name(path.name + ".sha256"), path.with_name(SUMS_FILE)):
        if not os.path.lexists(sums):
            continue
        lines = [_read_sum(line) for line in _read_sums(sums).splitlines() if line.strip()]
        found = [digest for digest, name in lines if _names(name, path)]
        if not found and sums.name != SUMS_FILE:
            found = [lines[0][0] if len(lines) == 1 else ""]
        if found:
            if not re.fullmatch("[0-9a-f]{64}", found[0].lower()):
                raise CheckpointError(f"{sums} does not state a SHA-256 for {path.name}")
            return found[0].lower()
    return None


def _read_sums(path: Path) -> str:
    if not path.is_file():  # opening a FIFO would wait for a writer
        raise CheckpointError(f"{path} should list checksums, but is not a regular file")
    with reading(path), open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read(_MAX_SUMS)


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
