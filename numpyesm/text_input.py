"""Text files, compressed or not, in any common encoding."""

from __future__ import annotations

import codecs
import io
import zipfile
from importlib import import_module
from typing import BinaryIO, cast

from .errors import NumpyesmError

# First bytes, the standard library's module, the name.
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gzip"),
    (b"BZh", "bz2", "bzip2"),
    (b"\xfd7zXZ\0", "lzma", "xz"),
    (b"\x28\xb5\x2f\xfd", "compression.zstd", "zstd"),  # from Python 3.14 on
)
_BUFFER = 1 << 16
_ZIP = b"PK\x03\x04"
_NO_TEXT = (
    (b"PAR1", "a Parquet file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"%PDF", "a PDF"),
    (b"SQLite format 3", "an SQLite file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file"),
    (b"ABIF", "an ABI sequencer trace"),
    (b"BAM\1", "a BAM file"),
)
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class UnreadableFile(NumpyesmError, ValueError):
    """A file that is not text, or whose compressed data are damaged; the message names it."""


def encoding_of(head: bytes, name: str) -> str:
    """Recognise the encoding of a text by its beginning (by default UTF-8), or raise UnreadableFile."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    kind = next((f" ({kind})" for magic, kind in _NO_TEXT if head.startswith(magic)), "")
    if head[257:262] == b"ustar":
        kind = " (a tar archive)"
    if not kind:
        if b"\0" not in head:
            return "utf-8"
        if not any(head[1::2]):  # UTF-16 without its mark: every other byte of plain letters is 0
            return "utf-16-le"
        if not any(head[0::2]):
            return "utf-16-be"
    raise UnreadableFile(f"{name}: not a text file{kind}")


def decoded(stream: io.BufferedReader, name: str) -> io.TextIOWrapper:
    """Decode a stream: UTF-8, UTF-16 or UTF-32; bytes that are not UTF-8 are read as Latin-1."""
    encoding = encoding_of(stream.peek(512), name)
    errors = _AS_LATIN_1 if encoding.startswith("utf-8") else "replace"
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors)


def unpacked(stream: BinaryIO, name: str) -> io.BufferedReader:
    """Decompress an open stream: gzip, bzip2, xz or a zip archive of one file.

    UnreadableFile, at once or on any later read: an archive of several files, or compressed data that are damaged or
    end early.
    """
    plain = stream if hasattr(stream, "peek") else io.BufferedReader(cast(io.RawIOBase, stream))
    buffered = cast(io.BufferedReader, plain)
    head = buffered.peek(16)
    if head.startswith(_ZIP):
        return io.BufferedReader(_Decompressed(_zip_member(buffered, name), name, "zip"), _BUFFER)
    for magic, module, kind in _COMPRESSED:
        if head.startswith(magic):
            try:
                opened = import_module(module).open(buffered, "rb")
            except ImportError:
                raise UnreadableFile(f"{name}: compressed with {kind}, which this Python cannot read") from None
            return io.BufferedReader(_Decompressed(opened, name, kind), _BUFFER)
    return buffered


def _zip_member(stream: io.BufferedReader, name: str) -> BinaryIO:
    """Open the only file of an archive."""
    try:
        archive = zipfile.ZipFile(stream if stream.seekable() else io.BytesIO(stream.read()))
        members = [
            info for info in archive.infolist() if not (info.is_dir() or info.filename.startswith(("__MACOSX", ".")))
        ]
        if any(info.filename == "[Content_Types].xml" for info in members):
            raise UnreadableFile(f"{name}: not a text file (an Excel or Word file)")
        if len(members) != 1:
            raise UnreadableFile(f"{name}: a zip archive of {len(members)} files, expected one; unpack it first")
        return cast(BinaryIO, archive.open(members[0]))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, unusual methods
        raise UnreadableFile(f"{name}: the zip archive cannot be read ({error})") from error


class _Decompressed(io.RawIOBase):
    """A decompressing stream that turns the many kinds of errors into UnreadableFile."""

    def __init__(self, stream: BinaryIO, name: str, kind: str) -> None:
        self._stream = stream
        self._name = name
        self._kind = kind

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:  # zlib, lzma and zstd each have a class of their own
            if getattr(error, "errno", None):  # a failure of the disk, not of the data
                raise
            raise UnreadableFile(
                f"{self._name}: the {self._kind} data are damaged or cut short ({error or type(error).__name__})"
            ) from error
        buffer[: len(data)] = data
        return len(data)


def _latin_1(error: UnicodeError) -> tuple[str, int]:
    """Handle a decoding error: bytes that are not UTF-8 are Latin-1, as in species names of older databases."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("latin-1"), error.end


_AS_LATIN_1 = "numpyesm-latin-1"
codecs.register_error(_AS_LATIN_1, _latin_1)
