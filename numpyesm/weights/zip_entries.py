"""Entries of a zip archive as views of the mapped file, with every size and checksum verified.

Checkpoints are stored without compression, so a view is all that is needed; compressed entries are inflated within
the bounds that their headers promise.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from pathlib import Path

from ..errors import CheckpointError
from ..files import MappedFile
from ..printable import quoted
from .reading import map_file

_LOCAL_HEADER = struct.Struct("<4sHHHHHLLLHH")
_MAX_DEFLATE_RATIO = 1032  # of the format itself: more is a lie
# Trained numbers deflate to 0.9 of their size, the pickle beside them to a tenth of its own few kilobytes.
_MAX_TOTAL_RATIO = 3
_FREE_ROOM = 1 << 20
_MAX_ENTRIES = 20_000  # ESM-2 650M has 600


class ZipEntries:
    """The entries of a zip archive by name.

    Parameters
    ----------
    path : Path
        The archive.

    Raises
    ------
    CheckpointError
        If it is truncated, corrupted, encrypted or compressed in a way other than deflate.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | bytes = map_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        # zipfile raises almost anything for a damaged directory.
        except (zipfile.BadZipFile, ValueError, OSError, LookupError, struct.error, NotImplementedError) as error:
            raise CheckpointError(f"{path} is truncated or corrupted: its zip directory cannot be read") from error
        if len(infos) > _MAX_ENTRIES:
            raise CheckpointError(f"{path} has {len(infos)} zip entries, too many for a checkpoint")
        self._infos = {info.filename: info for info in infos}
        if len(self._infos) != len(infos):
            raise CheckpointError(f"{path} is corrupted: a zip entry appears twice")
        self._read: dict[str, memoryview] = {}
        self._unread = len(self._map)
        self._inflatable = _FREE_ROOM + _MAX_TOTAL_RATIO * len(self._map)

    @property
    def names(self) -> list[str]:
        return list(self._infos)

    def size(self, name: str) -> int:
        """Size of an entry when unpacked."""
        return self._infos[name].file_size

    def read(self, name: str) -> memoryview:
        """The bytes of an entry: a view of the file if they are stored, else inflated."""
        if name not in self._read:
            self._read[name] = self._verified(name)
        return self._read[name]

    def _verified(self, name: str) -> memoryview:
        info = self._infos[name]
        if info.flag_bits & 0x1:
            raise CheckpointError(f"{self.path} is encrypted")
        start = self._data_start(info)
        if start + info.compress_size > len(self._map):
            raise CheckpointError(f"{self.path} is truncated: zip entry {quoted(name)} ends beyond the end of the file")
        # Entries inside one another would make a small archive take forever to check.
        self._unread -= info.compress_size
        if self._unread < 0:
            raise CheckpointError(f"{self.path} is corrupted: its zip entries overlap")
        data = memoryview(self._map)[start : start + info.compress_size]
        if info.compress_type == zipfile.ZIP_DEFLATED:
            data = self._inflate(name, data, info.file_size)
        elif info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path} has zip entry {quoted(name)} packed by an unusual method")
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise CheckpointError(f"{self.path} is corrupted: zip entry {quoted(name)} has a wrong checksum")
        if isinstance(self._map, MappedFile):  # else reading the checksums would leave the whole file in memory
            self._map.release()
        return data

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        """Where an entry's data begin: behind its local header, whose length the directory does not know."""
        offset = info.header_offset
        if not 0 <= offset <= len(self._map) - _LOCAL_HEADER.size:
            raise CheckpointError(f"{self.path} is truncated or corrupted: a zip entry is outside the file")
        fields = _LOCAL_HEADER.unpack_from(self._map, offset)
        name_length, extra_length = fields[-2:]
        name_start = offset + _LOCAL_HEADER.size
        name = self._map[name_start : name_start + name_length]
        if fields[0] != b"PK\x03\x04" or fields[3] != info.compress_type or name != _raw_name(info):
            raise CheckpointError(f"{self.path} is corrupted: its zip directory and its entries disagree")
        return int(name_start + name_length + extra_length)

    def _inflate(self, name: str, data: memoryview, size: int) -> memoryview:
        if size > _MAX_DEFLATE_RATIO * len(data) + 64 or size > self._inflatable:
            raise CheckpointError(f"{self.path} has zip entry {quoted(name)} of an implausible size ({size} bytes)")
        self._inflatable -= size
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            inflated = machine.decompress(data, size + 1)  # the limit holds even if the header lied
        except zlib.error as error:
            raise CheckpointError(f"{self.path} is corrupted: zip entry {quoted(name)} cannot be unpacked") from error
        return memoryview(inflated)


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
