"""Read what `torch.save` wrote, without torch: a zip archive of one pickle and one entry for each storage.

<any>/data.pkl      the object; tensors in it are (storage key, offset, shape, strides)
<any>/data/<key>    the bytes of one storage
<any>/byteorder     "little" or "big"; absent in older files, which are little
"""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..printable import quoted
from .reading import map_file, view_of
from .safe_pickle import Inert, Name, builder, read_pickle
from .tensor import ALL_DTYPES, StoredTensor
from .zip_entries import ZipEntries

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
_TORCH_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
# The pickle of ESM-2 650M has 70 kB. What a pickle builds can be 200 times its size.
_MAX_PICKLE = 4 << 20
# The first thing in the format before torch 1.6: a pickled magic number.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_RESAVE = "re-save it with torch >= 1.6: torch.save(torch.load(old), new)"


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


def is_torch_zip(head: bytes) -> bool:
    """Whether a file that begins like this is a zip archive, as `torch.save` writes."""
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def is_legacy_torch(head: bytes) -> bool:
    """Whether a file that begins like this was written by torch before 1.6, or in its format."""
    return head[2 : 2 + len(_LEGACY_MAGIC)] == _LEGACY_MAGIC or head[257:262] == b"ustar"


def read_torch(path: str | os.PathLike[str]) -> Any:
    """The object in a torch file: plain containers with StoredTensor leaves.

    Parameters
    ----------
    path : str or path
        A `.pt`, `.pth` or `.bin` file in torch's zip format. Tensors are views of the mapped file.

    Raises
    ------
    CheckpointError
        If it is truncated, corrupted, of an older format, or not written by torch.
    """
    path = Path(path)
    if is_legacy_torch(map_file(path)[:512]):
        raise CheckpointError(f"{path} is in the format of torch before 1.6; {_RESAVE}")
    entries = ZipEntries(path)
    prefix = _prefix(path, entries)
    if f"{prefix}constants.pkl" in entries.names:
        raise CheckpointError(f"{path} is a TorchScript program, not a checkpoint; save its state_dict() instead")
    if f"{prefix}byteorder" in entries.names and bytes(entries.read(f"{prefix}byteorder")) != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine; re-save it on a little-endian one")
    if entries.size(f"{prefix}data.pkl") > _MAX_PICKLE:
        raise CheckpointError(f"{path} holds much more than a model's weights; save only its state_dict()")
    return _TorchArchive(path, entries, prefix).load()


def _prefix(path: Path, entries: ZipEntries) -> str:
    pickles = [name for name in entries.names if name == "data.pkl" or name.endswith("/data.pkl")]
    top = [name for name in pickles if name.count("/") <= 1]
    if len(top) != 1:
        raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote (it has no data.pkl)")
    return top[0].removesuffix("data.pkl")


class _TorchArchive:
    def __init__(self, path: Path, entries: ZipEntries, prefix: str) -> None:
        self.path = path
        self.entries = entries
        self.prefix = prefix
        self.names = set(entries.names)
        self.storages: dict[tuple[str, str], _Storage] = {}

    def load(self) -> Any:
        tensor = builder(lambda *args: self.tensor(*args[:4]))
        parameter = builder(lambda data, *_: data)
        builders = {
            ("torch._utils", "_rebuild_tensor"): tensor,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_tensor_v3"): builder(
                lambda storage, offset, shape, strides, _, __, dtype, *___: self.tensor(
                    storage, offset, shape, strides, dtype
                )
            ),
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
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise self.corrupted("a storage is named in an unknown way")
        _, kind, key, _, count = identity[:5]
        if not isinstance(kind, Name) or not isinstance(key, str) or type(count) is not int:
            raise self.corrupted("a storage is named in an unknown way")
        dtype = _STORAGES.get(kind.name)
        if dtype is None or kind.module not in ("torch", "torch.storage", "torch.cuda"):
            return Inert(kind)  # complex or quantised numbers: no weights of ours, refused where one is used
        if (key, dtype) not in self.storages:
            self.storages[key, dtype] = self.read_storage(key, dtype)
        storage = self.storages[key, dtype]
        if storage.values.size != count:
            raise self.corrupted(f"storage {quoted(key)} has another size than its tensors need")
        return storage

    def read_storage(self, key: str, dtype: str) -> _Storage:
        name = f"{self.prefix}data/{key}"
        if name not in self.names:
            raise self.corrupted(f"storage {quoted(key)} is missing")
        data = self.entries.read(name)
        if len(data) % ALL_DTYPES[dtype].itemsize:
            raise self.corrupted(f"storage {quoted(key)} has another size than its tensors need")
        return _Storage(dtype, view_of(data, ALL_DTYPES[dtype]))

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> Any:
        """A tensor as a view into its storage."""
        if not isinstance(storage, _Storage):
            return Inert()
        if not _naturals(shape) or not _naturals(strides) or not _naturals((offset,)) or len(shape) != len(strides):
            raise self.corrupted("the shape of a tensor is impossible")
        values, kind = storage.values, storage.dtype
        if isinstance(dtype, Name):
            kind = _TORCH_DTYPES.get(dtype.name, "")
            if not kind:
                return Inert(dtype)
            if values.nbytes % ALL_DTYPES[kind].itemsize:
                raise self.corrupted("a storage has another size than its tensors need")
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
