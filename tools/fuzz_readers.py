"""Feed damaged files to the readers of safetensors, torch's pickles, FASTA: no crash, no hang, no memory eaten.

    python tools/fuzz_readers.py --minutes 10

Valid files are made, then mutated: bits, bytes, blocks, lengths, numbers in headers, cuts, splices. Each case runs in a
child process with limits of its own; a case fails if the reader raises anything but its own errors, takes longer than
`--seconds`, or allocates more than four times the file's size (and `SLACK`). What fails is kept in `--keep` and named.
Equal seeds give equal cases.
"""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import io
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

READERS = ("safetensors", "torch", "pickle", "fasta")
# What a reader may take beside four times the file: tables, messages, the first import of a module.
SLACK = 8 << 20
FACTOR = 4
_ADDRESS_SPACE = 4 << 30
_INTERESTING = (
    0,
    1,
    -1,
    7,
    8,
    127,
    128,
    255,
    256,
    32767,
    65535,
    1 << 31,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 48,
    1 << 63,
)


class TooSlow(BaseException):
    """A case took too long."""


class Finding(Exception):
    """What is wrong with a reader."""


# -- valid files ---------------------------------------------------------------------------------------------------


def seeds(reader: str, folder: Path) -> list[bytes]:
    """Contents of valid files, small and of several kinds."""
    return {"safetensors": _safetensors, "torch": _torch, "pickle": _pickles, "fasta": _fasta}[reader](folder)


def _safetensors(folder: Path) -> list[bytes]:
    import numpy as np

    from numpyesm.config import ModelConfig
    from numpyesm.weights.canonical import save_canonical
    from numpyesm.weights.safetensors_file import write_safetensors
    from numpyesm.weights.synthetic import random_checkpoint
    from numpyesm.weights.tensor import StoredTensor

    found = []
    for dtype in ("fp32", "int8", "bf16"):
        save_canonical(folder / "c.safetensors", random_checkpoint(ModelConfig(1, 40, 20, 160), 1), precision=dtype)
        found.append((folder / "c.safetensors").read_bytes())
    plain = {f"esm.{i}": StoredTensor(np.ones((i, 3), np.float32)) for i in range(4)}
    write_safetensors(folder / "p.safetensors", plain, {"format": "pt"})
    return [*found, (folder / "p.safetensors").read_bytes(), struct.pack("<Q", 2) + b"{}"]


def _torch_pickle(tensors: dict[str, tuple[int, ...]], protocol: int) -> bytes:
    """data.pkl of a state dict, written opcode by opcode, so that torch is not needed."""

    def text(value: str) -> bytes:
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    out = (
        b"\x80"
        + bytes([protocol])
        + b"}q\x00("
        + text("args")
        + b"}"
        + text("model")
        + b"ccollections\nOrderedDict\n)R("
    )
    for index, (name, shape) in enumerate(tensors.items()):
        count = 1
        for extent in shape:
            count *= extent
        strides: list[int] = []
        stride = 1
        for extent in reversed(shape):
            strides.insert(0, stride)
            stride *= extent
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += text("storage") + b"ctorch\nFloatStorage\n" + text(str(index)) + text("cpu") + number(count) + b"tQ"
        out += number(0) + b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, strides)) + b"t"
        out += b"\x89ccollections\nOrderedDict\n)RtR"
    return out + b"uu."


def _torch(folder: Path) -> list[bytes]:
    tensors = {
        "encoder.sentence_encoder.embed_tokens.weight": (33, 8),
        "encoder.layers.0.fc1.weight": (8, 4),
        "b": (5,),
    }
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("archive/data.pkl", _torch_pickle(tensors, 2))
            archive.writestr("archive/byteorder", "little")
            for index, shape in enumerate(tensors.values()):
                size = 4
                for extent in shape:
                    size *= extent
                archive.writestr(f"archive/data/{index}", bytes(range(256)) * (size // 256) + bytes(size % 256))
            archive.writestr("archive/version", "3\n")
        found.append(file.getvalue())
    return found


def _pickles(folder: Path) -> list[bytes]:
    value = {
        "a": [1, 2.5, None, True, "text", b"bytes", (1, 2, 3), {"x": {1, 2}}, frozenset("ab"), 1 << 70, -5],
        "layers": [{"weight": list(range(30)), "name": f"layer.{i}"} for i in range(10)],
    }
    return [pickle.dumps(value, protocol) for protocol in range(6)] + [
        _torch_pickle({"w": (3, 4), "v": (2,)}, 2)[:-1] + b"."
    ]


def _fasta(folder: Path) -> list[bytes]:
    letters = random.Random(0)
    records = "".join(
        f">p{i} some description\n"
        + "\n".join("".join(letters.choices("ACDEFGHIKLMNPQRSTVWY", k=60)) for _ in range(i))
        + "\n"
        for i in range(1, 9)
    )
    plain = [
        records.encode(),
        records.lower().replace("\n", "\r\n").encode(),
        b"MKT\nMKV*\n",
        b">x\nMK<mask>T\n;c\n>y\nA A\n",
    ]
    return [
        *plain,
        gzip.compress(records.encode()),
        gzip.compress(b">a\nMK\n") + gzip.compress(b"TT\n"),
        b"\xef\xbb\xbf>a\nMKT\n",
    ]


# -- mutations -----------------------------------------------------------------------------------------------------


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """One to eight changes, of any kind."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        rng.choice(_MUTATIONS)(changed, others, rng)
        del changed[1 << 21 :]
    if rng.random() < 0.3 and changed[:2] == b"PK":
        changed = _with_right_sums(changed)
    return bytes(changed)


def _at(data: bytearray, rng: random.Random) -> int:
    # Most of what a reader decides by stands in the first kilobytes, or at the very end.
    size = len(data)
    return rng.choice((rng.randrange(size + 1), rng.randrange(min(size, 4096) + 1), max(0, size - rng.randrange(300))))


def _flip(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    if data:
        data[min(_at(data, rng), len(data) - 1)] ^= 1 << rng.randrange(8)


def _set(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    if data:
        data[min(_at(data, rng), len(data) - 1)] = rng.choice(
            (0, 255, 10, 34, 40, 46, 62, 91, 123, 125, rng.randrange(256))
        )


def _number(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    where = _at(data, rng)
    data[where : where + size] = (rng.choice(_INTERESTING) % (1 << 8 * size)).to_bytes(
        size, rng.choice(("little", "big"))
    )


def _digits(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    """Another number where digits stand."""
    places = [i for i in range(min(len(data), 1 << 14)) if 48 <= data[i] <= 57]
    if places:
        where = rng.choice(places)
        data[where : where + rng.randrange(1, 4)] = str(rng.choice(_INTERESTING)).encode()


def _cut(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    start = _at(data, rng)
    del data[start : rng.choice((len(data), start + rng.randrange(64)))]


def _repeat(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    start = _at(data, rng)
    piece = bytes(data[start : start + rng.choice((1, 2, 16, 200))])
    data[start:start] = piece * rng.choice((2, 10, 1000, 100_000 // max(1, len(piece))))


def _splice(data: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    other = rng.choice(others)
    start = rng.randrange(len(other) + 1)
    where = _at(data, rng)
    data[where : where + rng.choice((0, 50))] = other[start : start + rng.choice((8, 100, 5000))]


def _swap(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    a, b, size = _at(data, rng), _at(data, rng), rng.randrange(1, 64)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


_MUTATIONS: tuple[Callable[[bytearray, Sequence[bytes], random.Random], None], ...] = (
    _flip, _set, _number, _digits, _cut, _repeat, _splice, _swap
)  # fmt: skip


def _with_right_sums(data: bytearray) -> bytearray:
    """A zip archive anew with what can still be read of it, so that damage inside is not hidden behind a checksum."""
    file = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(bytes(data))) as old, zipfile.ZipFile(file, "w") as new:
            for info in old.infolist():
                start = info.header_offset + 30 + len(info.filename)
                new.writestr(info.filename, bytes(data[start : start + min(info.compress_size, 1 << 20)]))
    except Exception:
        return data
    return bytearray(file.getvalue())


# -- one case ------------------------------------------------------------------------------------------------------


def read(reader: str, path: Path) -> None:
    """Read a file and everything in it; only the package's own errors may come out, and are swallowed."""
    from numpyesm.errors import NumpyesmError
    from numpyesm.fasta import read_fasta
    from numpyesm.weights.load import load_checkpoint
    from numpyesm.weights.pickle_reader import read_pickle
    from numpyesm.weights.safetensors_file import read_safetensors
    from numpyesm.weights.torch_file import read_torch

    def each_tensor() -> None:
        for tensor in read_safetensors(path)[0].values():
            tensor.raw.reshape(-1)[:1].sum()

    def each_record() -> None:
        for record in read_fasta(path):
            assert record.sequence

    calls: dict[str, list[Callable[[], object]]] = {
        "safetensors": [each_tensor, lambda: load_checkpoint(path)],
        "torch": [lambda: read_torch(path), lambda: load_checkpoint(path)],
        "pickle": [lambda: read_pickle(path.read_bytes())],
        "fasta": [each_record],
    }
    for call in calls[reader]:
        try:
            call()
        except NumpyesmError as error:
            if len(str(error)) > 20_000:
                raise Finding("a message without end") from error


def check(reader: str, path: Path, seconds: float) -> None:
    """Read a file within its limits.

    Raises
    ------
    Finding
    """
    size = path.stat().st_size

    def ring(_: int, __: FrameType | None) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of the CPU: a busy machine is no hang
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        read(reader, path)
    except Finding:
        raise
    except TooSlow:
        raise Finding(f"took longer than {seconds} s of the CPU") from None
    except BaseException as error:
        raise Finding(f"raised {type(error).__name__}: {str(error)[:200]}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    taken = tracemalloc.get_traced_memory()[1] - before
    if taken > FACTOR * size + SLACK:
        raise Finding(f"allocated {taken} bytes for a file of {size}")


def child(reader: str, seed: int, first: int, until: float, most: int, seconds: float, folder: Path) -> int:
    """Cases `first`, `first + 1` ... until the time is up; the case in hand lies in `folder` if this process dies."""
    import resource

    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    valid = seeds(reader, folder)
    path = folder / "case"
    for content in valid:  # what is imported or compiled once is not the first case's fault
        path.write_bytes(content)
        read(reader, path)
    tracemalloc.start()
    number = first
    while time.time() < until and number - first < most:
        rng = random.Random(f"{seed} {reader} {number}")
        path.write_bytes(mutate(rng.choice(valid), valid, rng))
        (folder / "number").write_text(str(number))
        try:
            check(reader, path, seconds)
        except Finding as finding:
            print(json.dumps({"number": number, "finding": str(finding)}), flush=True)
            return 3
        number += 1
    print(json.dumps({"number": number}), flush=True)
    return 0


# -- all of them ---------------------------------------------------------------------------------------------------


def fuzz(
    readers: Sequence[str], minutes: float, seed: int, keep: Path, seconds: float = 5.0, most: int = 1 << 60
) -> list[str]:
    """Share the time among the readers; returns what was found."""
    found: list[str] = []
    for reader in readers:
        until = time.time() + minutes * 60 / len(readers)
        number = 0
        while time.time() < until and number < most and len(found) < 50:
            with tempfile.TemporaryDirectory(prefix="numpyesm-fuzz-") as name:
                folder = Path(name)
                arguments = [reader, seed, number, until, most - number, seconds, folder]
                command = [sys.executable, __file__, "--child", *map(str, arguments)]
                environment = os.environ | {"NUMPYESM_VERIFY": "always", "PYTHONMALLOC": "malloc"}
                try:
                    done = subprocess.run(
                        command, capture_output=True, text=True, env=environment, timeout=until - time.time() + 60
                    )
                    said = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
                    problem = said.get("finding") or ("" if done.returncode == 0 else f"died: {done.stderr[-1500:]}")
                except subprocess.TimeoutExpired:
                    said, problem = {}, "hangs where no alarm reaches"
                reached = (folder / "number").read_text() if (folder / "number").exists() else str(number)
                if problem:
                    case = int(said.get("number", reached))
                    keep.mkdir(parents=True, exist_ok=True)
                    kept = keep / f"{reader}-{seed}-{case}"
                    kept.write_bytes((folder / "case").read_bytes() if (folder / "case").exists() else b"")
                    found.append(f"{kept}: {problem}")
                    print(found[-1], file=sys.stderr, flush=True)
                    number = case + 1
                else:
                    number = int(said["number"])
        print(f"{reader}: {number} cases", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if anything was found."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--child"]:
        reader, *numbers, folder = given[1:]
        first_seed, first, until, most, seconds = map(float, numbers)
        return child(reader, int(first_seed), int(first), until, int(most), seconds, Path(folder))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for all readers together (%(default)s)")
    parser.add_argument("--reader", action="append", choices=READERS, help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=None, help="(by the clock)")
    parser.add_argument("--cases", type=int, default=1 << 60, help="at most so many a reader")
    parser.add_argument("--seconds", type=float, default=5, help="for one case (%(default)s)")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="folder for what fails (%(default)s)")
    options = parser.parse_args(given)
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"seed {seed}", flush=True)
    found = fuzz(options.reader or READERS, options.minutes, seed, options.keep, options.seconds, options.cases)
    print(f"{len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
