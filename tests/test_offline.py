"""Machines without a network: no socket is opened, weights are copied as one file, checksums are verified."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest

from numpyesm.errors import CheckpointError, InvalidOption
from numpyesm.files import file_sha256
from numpyesm.weights import convert, load_checkpoint
from numpyesm.weights.hub import is_offline
from numpyesm.weights.integrity import SUMS_FILE
from numpyesm.weights.load import open_checkpoint


class SocketOpened(BaseException):
    """Not an Exception, which somebody could catch."""


@pytest.fixture
def no_sockets(monkeypatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise SocketOpened(args)

    monkeypatch.setattr(socket, "socket", type("Refusing", (socket.socket,), {"__init__": refuse}))
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture
def weights(small_file, tmp_path) -> Path:
    return Path(shutil.copy(small_file, tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("variable", "arguments"),
    [
        ("NUMPYESM_OFFLINE", ("fetch", "esm2-8m")),
        ("HF_HUB_OFFLINE", ("fetch", "someone/else")),
        ("HF_HUB_OFFLINE", ("fetch", "esm2-8m", "-o", "there")),
        ("NUMPYESM_OFFLINE", ("encode", "MKT")),
        ("HF_HUB_OFFLINE", ("encode", "MKT", "--weights", "someone/else")),
    ],
)
def test_offline_nothing_asks_the_network(run, no_sockets, tmp_path, monkeypatch, variable, arguments) -> None:
    monkeypatch.setenv("NUMPYESM_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("numpyesm.weights.locate.checkout_folders", list)
    with pytest.raises(SocketOpened):  # it would, if it were allowed to
        run(*arguments, bare=True)
    monkeypatch.setenv(variable, "1")
    done = run(*arguments, bare=True)
    assert done.code == 1
    assert "forbids downloading" in done.err
    assert "point NUMPYESM_WEIGHTS to it" in done.err  # the way out


@pytest.mark.parametrize(
    ("value", "forbidden"),
    [("1", True), ("TRUE", True), (" yes ", True), ("y", True), ("2", True), ("", False), ("0", False), ("No", False)],
)
def test_what_is_not_a_no_forbids(monkeypatch, value, forbidden) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NUMPYESM_OFFLINE", value)
    assert is_offline() is forbidden


@pytest.mark.parametrize("arguments", [("encode", "MKT"), ("predict", "M<mask>"), ("info",)])
def test_work_on_local_weights_opens_no_socket(run, no_sockets, monkeypatch, arguments) -> None:
    """Not even without the variables."""
    monkeypatch.delenv("NUMPYESM_OFFLINE")
    assert run(*arguments).code == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *((f"{command} --weights=", "--weights") for command in ("encode MKT", "verify", "info", "score MKT x.csv")),
        ("fetch ''", "not an empty text"),
        ("fetch esm2-8m -o ''", "not an empty text"),
        ("fetch esm2-8m --revision=", "not an empty text"),
        ("convert '' -o x", "not an empty text"),
        ("convert synthetic:esm2-8m -o ''", "not an empty text"),
        ("convert synthetic:esm2-8m -o x --regression=", "not an empty text"),
        ("serve --model mine=", "'mine=': expected SLUG=WEIGHTS"),
        ("serve --model=", "expected SLUG=WEIGHTS"),
        ("serve --api-keys-file=", "not an empty text"),
    ],
)
def test_what_is_named_and_empty_is_wrong_use(run, tmp_path, command, message) -> None:
    """`-o "$STICK"` where STICK is not set must become neither a default nor a download."""
    done = run(*shlex.split(command), bare=True)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "x").exists()


# -- checksums -------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_where_checksums_are_asked_for(small_file, weights, tmp_path, monkeypatch) -> None:
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 0x10
    weights.write_bytes(content)
    load_checkpoint(weights)
    for verify in (open_checkpoint, lambda path: convert(path, tmp_path / "out.safetensors")):
        with pytest.raises(CheckpointError, match="corrupted"):
            verify(weights)
    monkeypatch.setenv("NUMPYESM_VERIFY", "1")
    with pytest.raises(CheckpointError, match="corrupted"):
        load_checkpoint(weights)
    load_checkpoint(small_file)
    monkeypatch.setenv("NUMPYESM_VERIFY", "sometimes")
    with pytest.raises(InvalidOption, match="NUMPYESM_VERIFY"):
        load_checkpoint(weights)


def test_verify_compares_every_checksum(run, weights) -> None:
    verify = ("verify", "--weights", weights.name)
    sums = weights.with_name(SUMS_FILE)
    sums.write_text(f"{file_sha256(weights)}  w.safetensors\n")
    assert "2 checksums verified" in run(*verify).err
    sums.write_text(f"{'0' * 64}  w.safetensors\n")
    done = run(*verify)
    assert (done.code, done.out) == (1, b"")
    assert "its SHA-256 is not the one stated beside it" in done.err


OWN, ALL = "w.safetensors.sha256", SUMS_FILE


@pytest.mark.parametrize("name", [ALL, OWN])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_a_list_of_checksums_that_is_no_file(weights, name, make) -> None:
    """Opening a FIFO would wait for ever."""
    make(weights.with_name(name))
    with pytest.raises(CheckpointError, match=f"{name} should list checksums, but is not a regular file"):
        open_checkpoint(weights)


WRONG, UNREADABLE = "its SHA-256 is not", r"does not state a SHA-256 for w\.safetensors"


@pytest.mark.parametrize(
    ("place", "form", "outcome"),
    [
        (OWN, "{} *w.safetensors\n", WRONG),
        (ALL, "{} *w.safetensors\n", WRONG),
        (ALL, "{}  ./w.safetensors\n", WRONG),
        (ALL, "SHA256 (w.safetensors) = {}", WRONG),  # sha256sum --tag, and BSD
        (OWN, "SHA256 (w.safetensors) = {}", WRONG),
        (OWN, "SHA256(w.safetensors)= {}", WRONG),  # openssl
        (ALL, "{}  weights/w.safetensors", WRONG),  # made from the folder above
        (OWN, "{}  before-it-was-renamed.safetensors", WRONG),
        (OWN, "{}", WRONG),
        (ALL, "\ufeff{}  w.safetensors\r\n", WRONG),
        # Of other files.
        (ALL, "{}  another.safetensors\n", None),
        (ALL, "{0}  older/w.safetensors\n{0}  xw.safetensors\n\n", None),
        # Of this file by its name: that it cannot be read must not pass for a check.
        (ALL, "what?  w.safetensors\n", UNREADABLE),
        (OWN, "what?  w.safetensors\n", UNREADABLE),
        (OWN, "", UNREADABLE),
        (OWN, "nothing", UNREADABLE),
        (OWN, "{0}  a\n{0}  b\n", UNREADABLE),
    ],
)
def test_a_checksum_beside_the_file(small_file, tmp_path, place, form, outcome) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    path = Path(shutil.copy(small_file, folder / "w.safetensors"))
    for digest, message in ((file_sha256(path), None if outcome is WRONG else outcome), ("0" * 64, outcome)):
        (folder / place).write_text(form.format(digest), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message) if message else nullcontext():
            open_checkpoint(path)
