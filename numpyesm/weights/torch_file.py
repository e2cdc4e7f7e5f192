"""Read what `torch.save` wrote, without torch: a zip archive of one pickle and one entry for each storage.

<any>/data.pkl      the object; tensors in it are (storage key, offset, shape, strides)
<any>/data/<key>    the bytes of one storage
<any>/byteorder     "little" or "big"; absent in older files, which are little
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..files import MappedFile
from ..printable import quoted
from .reading import map_file, view_of
from .safe_pickle import Inert, Name, builder, read_pickle
from .tensor import ALL_DTYPES, StoredTensor

_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
# Newer dtypes have no storage of their own: `_rebuild_tensor_v3` names them beside an untyped one.
_UNTYPED = {"uint64": "U64", "uint32": "U32", "uint16": "U16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
# The pickle of ESM-2 650M has 70 kB. What a pickle builds can be 200 times its size.
_MAX_PICKLE = 4 << 20
# The first thing in the format before torch 1.6: a pickled magic number.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_RESAVE = "re-save it with torch >= 1.6: torch.save(torch.load(old), new)"
_LOCAL_HEADER = 30  # bytes in front of a zip entry's name; the last four are the lengths of name and extra field
# Trained numbers deflate to 0.9 of their size, the pickle beside them to a tenth of its own few kilobytes.
_MAX_TOTAL_RATIO = 3
_FREE_ROOM = 1 << 20


def looks_like_torch(head: bytes) -> bool:
    """Whether a file that begins like this is a zip archive, or of the format before torch 1.6."""
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06") or _is_legacy(head)


def _is_legacy(head: bytes) -> bool:
    return head[2 : 2 + len(_LEGACY_MAGIC)] == _LEGACY_MAGIC or head[257:262] == b"ustar"


def read_torch(path: str | os.PathLike[str]) -> Any:
    """The object in a `.pt`, `.pth` or `.bin` file: plain containers whose StoredTensors are views of the mapped file.

    CheckpointError if it is truncated, corrupted, of an older format, or not written by torch.
    """
    return _TorchArchive(Path(path)).load()


class _ZipEntries:
    """The entries of a zip archive by name, with every size and checksum verified.

    Checkpoints are stored without compression, so a view of the mapped file is all that is needed; compressed entries
    are inflated within bounds.
    """

    def __init__(self, path: Path, mapped: MappedFile | bytes) -> None:
        self.path = path
        self.mapped = mapped
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        # zipfile raises almost anything for a damaged directory.
        except (zipfile.BadZipFile, ValueError, OSError, LookupError, struct.error, NotImplementedError) as error:
            raise CheckpointError(f"{path} is truncated or corrupted: its zip directory cannot be read") from error
        self.infos = {info.filename: info for info in infos}
        if len(self.infos) != len(infos):
            raise CheckpointError(f"{path} is corrupted: a zip entry appears twice")
        self.unread = len(mapped)
        self.inflatable = _FREE_ROOM + _MAX_TOTAL_RATIO * len(mapped)

    def read(self, name: str) -> memoryview:
        """The bytes of an entry: a view of the file if they are stored, else inflated."""
        info = self.infos[name]
        if info.flag_bits & 0x1:
            raise CheckpointError(f"{self.path} is encrypted")
        start = info.header_offset + _LOCAL_HEADER
        if not _LOCAL_HEADER <= start <= len(self.mapped):
            raise CheckpointError(f"{self.path} is truncated or corrupted: a zip entry is outside the file")
        start += sum(struct.unpack_from("<HH", self.mapped, start - 4))
        # Entries inside one another would make a small archive take forever to check.
        self.unread -= info.compress_size
        if self.unread < 0:
            raise CheckpointError(f"{self.path} is corrupted: its zip entries overlap")
        data = memoryview(self.mapped)[start : start + info.compress_size]
        if info.compress_type == zipfile.ZIP_DEFLATED:
            data = self.inflated(name, data, info.file_size)
        elif info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path} has zip entry {quoted(name)} packed by an unusual method")
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise CheckpointError(f"{self.path} is corrupted: zip entry {quoted(name)} has a wrong checksum")
        if isinstance(self.mapped, MappedFile):  # else reading the checksums would leave the whole file in memory
            self.mapped.release()
        return data

    def inflated(self, name: str, data: memoryview, size: int) -> memoryview:
        if size > self.inflatable:
            raise CheckpointError(f"{self.path} has zip entry {quoted(name)} of an implausible size ({size} bytes)")
        self.inflatable -= size
        try:
            # The limit holds even if the header lied.
            return memoryview(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1))
        except zlib.error as error:
            raise CheckpointError(f"{self.path} is corrupted: zip entry {quoted(name)} cannot be unpacked") from error


class _Storage:
    """The numbers that tensors are cut from."""

    def __init__(self, dtype: str, values: npt.NDArray[Any]) -> None:
        self.dtype = dtype
        self.values = values

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("state is set on a storage")


class _TorchTensor(StoredTensor):
    """A tensor that the file cannot change once it is built: a pickle sets attributes through `__setstate__`."""

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("state is set on a tensor")

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredTensor, (self.raw, self.dtype, self.scale)


class _TorchArchive:
    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = map_file(path)
        if _is_legacy(mapped[:512]):
            raise CheckpointError(f"{path} is in the format of torch before 1.6; {_RESAVE}")
        self.entries = _ZipEntries(path, mapped)
        names = self.entries.infos.keys()
        top = [name for name in names if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)]
        if len(top) != 1:
            raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote (it has no data.pkl)")
        self.prefix = prefix = top[0].removesuffix("data.pkl")
        self.storages: dict[str, _Storage] = {}
        if f"{prefix}constants.pkl" in names:
            raise CheckpointError(f"{path} is a TorchScript program, not a checkpoint; save its state_dict() instead")
        if f"{prefix}byteorder" in names and bytes(self.entries.read(f"{prefix}byteorder")) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine; re-save it on a little-endian one")
        if self.entries.infos[top[0]].file_size > _MAX_PICKLE:
            raise CheckpointError(f"{path} holds much more than a model's weights; save only its state_dict()")

    def load(self) -> Any:
        parameter = builder(lambda data, *_: data)
        builders = {
            ("torch._utils", "_rebuild_tensor_v2"): builder(lambda *args: self.tensor(*args[:4])),
            ("torch._utils", "_rebuild_tensor_v3"): builder(lambda *args: self.tensor(*args[:4], *args[6:7])),
            ("torch._utils", "_rebuild_parameter"): parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): parameter,
        }
        known = set(builders.values())

        def rebuild_from_type(function: Any, type_: Any, arguments: Any, *_: Any) -> Any:
            return function(*arguments) if isinstance(function, Name) and function in known else Inert(function)

        return read_pickle(
            bytes(self.entries.read(f"{self.prefix}data.pkl")),
            origin=f"the pickle in {self.path}",
            builders=builders | {("torch._tensor", "_rebuild_from_type_v2"): builder(rebuild_from_type)},
            persistent_load=self.storage,
        )

    def storage(self, identity: Any) -> _Storage | Inert:
        """The storage of a persistent id ('storage', type, key, device, number of elements)."""
        match identity:
            case "storage", Name() as kind, str(key), _, int(count), *_:
                dtype = _STORAGES.get(kind.name)
            case _:
                raise self.corrupted("a storage is named in an unknown way")
        if dtype is None or kind.module not in ("torch", "torch.storage", "torch.cuda"):
            return Inert(kind)  # complex or quantised numbers: no weights of ours, refused where one is used
        if key not in self.storages:
            name = f"{self.prefix}data/{key}"
            if name not in self.entries.infos:
                raise self.corrupted(f"storage {quoted(key)} is missing")
            data = self.entries.read(name)
            if len(data) % ALL_DTYPES[dtype].itemsize:
                raise self.corrupted(f"storage {quoted(key)} has another size than its tensors need")
            self.storages[key] = _Storage(dtype, view_of(data, ALL_DTYPES[dtype]))
        storage = self.storages[key]
        if storage.dtype != dtype or storage.values.size != count:
            raise self.corrupted(f"storage {quoted(key)} has another size than its tensors need")
        return storage

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> Any:
        """A tensor as a view into its storage."""
        if not isinstance(storage, _Storage):
            return Inert()
        if not _naturals(shape) or not _naturals(strides) or not _naturals((offset,)) or len(shape) != len(strides):
            raise self.corrupted("the shape of a tensor is impossible")
        values, kind = storage.values, storage.dtype
        if isinstance(dtype, Name):
            if dtype.name not in _UNTYPED:
                return Inert(dtype)
            kind = _UNTYPED[dtype.name]
            values = values.view(ALL_DTYPES[kind])
        elements = math.prod(shape)
        last = offset + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        # More elements than the storage has would be a tensor that repeats itself: a small file could fill the memory.
        if len(shape) > 8 or elements > values.size or (elements and last >= values.size):
            raise self.corrupted("a tensor reaches beyond its storage")
        if not elements:
            return _TorchTensor(np.empty(tuple(min(extent, 1) for extent in shape), values.dtype), kind)
        step = values.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            values[offset:], shape, tuple(stride * step for stride in strides), writeable=False
        )
        return _TorchTensor(view, kind)

    def corrupted(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is corrupted: {what}")


def _naturals(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
