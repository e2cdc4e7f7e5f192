"""Machines without a network: no socket is opened, weights are copied as one file, checksums are verified."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
from test_hub import REPOSITORY, hub, mk  # noqa: F401 - a fixture

from numpyesm.errors import CheckpointError, InvalidOption
from numpyesm.files import file_sha256
from numpyesm.weights import convert, load_checkpoint, save_canonical
from numpyesm.weights.hub import is_offline
from numpyesm.weights.integrity import SUMS_FILE
from numpyesm.weights.load import open_checkpoint
from numpyesm.weights.synthetic import random_checkpoint

pytestmark = pytest.mark.usefixtures("quick_calibration")


class SocketOpened(BaseException):
    """Not an Exception, which somebody could catch."""


@pytest.fixture
def no_sockets(monkeypatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise SocketOpened(args)

    monkeypatch.setattr(socket, "socket", type("Refusing", (socket.socket,), {"__init__": refuse}))
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_canonical(path, random_checkpoint(mk.TINY))
    return path


def test_the_trap_catches_a_download(run, no_sockets, monkeypatch) -> None:
    """Allowed to, `fetch` does open a socket: the tests below can fail."""
    monkeypatch.setenv("NUMPYESM_OFFLINE", "0")
    with pytest.raises(SocketOpened):
        run("fetch", "esm2-8m", bare=True)


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
def test_work_on_local_weights_opens_no_socket(run, no_sockets, weights, monkeypatch, arguments) -> None:
    """Not even without the variables."""
    monkeypatch.delenv("NUMPYESM_OFFLINE")
    assert run(*arguments, "--weights", str(weights), "--backend", "numpy").code == 0


def test_a_fetched_file_is_copied_and_used_without_a_network(run, hub, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("NUMPYESM_OFFLINE", "0")
    done = run("fetch", REPOSITORY, "--dtype", "int8", "-o", "a stick", bare=True)
    assert done.out.decode() == "a stick/custom-int8.safetensors\n"
    assert "NUMPYESM_WEIGHTS='a stick/custom-int8.safetensors'" in done.err
    shutil.copy(done.out.decode().strip(), "copy.safetensors")
    hub.requests.clear()
    assert run("encode", "MKT", "--weights", "copy.safetensors", "--backend", "numpy").code == 0
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fetch", ""), "not an empty text"),
        (("fetch", "esm2-8m", "-o", ""), "not an empty text"),
        (("fetch", "esm2-8m", "--revision", ""), "not an empty text"),
        (("convert", "", "-o", "x"), "not an empty text"),
        (("convert", "synthetic:esm2-8m", "-o", ""), "not an empty text"),
        (("convert", "synthetic:esm2-8m", "-o", "x", "--regression", ""), "not an empty text"),
        (("serve", "--model", "mine="), "'mine=': expected SLUG=WEIGHTS"),
        (("serve", "--model", ""), "expected SLUG=WEIGHTS"),
        (("serve", "--api-keys-file", ""), "not an empty text"),
    ],
)
def test_what_is_named_and_empty_is_wrong_use(run, tmp_path, arguments, message) -> None:
    """`-o "$STICK"` where STICK is not set must become neither a default nor a download."""
    done = run(*arguments, bare=True)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "x").exists()


# -- checksums -------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_where_checksums_are_asked_for(weights, tmp_path, monkeypatch) -> None:
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 0x10
    damaged.write_bytes(content)
    load_checkpoint(damaged)
    for verify in (open_checkpoint, lambda path: convert(path, tmp_path / "out.safetensors")):
        with pytest.raises(CheckpointError, match="corrupted"):
            verify(damaged)
    monkeypatch.setenv("NUMPYESM_VERIFY", "1")
    with pytest.raises(CheckpointError, match="corrupted"):
        load_checkpoint(damaged)
    load_checkpoint(weights)
    monkeypatch.setenv("NUMPYESM_VERIFY", "sometimes")
    with pytest.raises(InvalidOption, match="NUMPYESM_VERIFY"):
        load_checkpoint(damaged)


def test_verify_compares_every_checksum(run, weights, tmp_path) -> None:
    shutil.copy(weights, tmp_path / "w.safetensors")
    verify = ("verify", "--weights", "w.safetensors", "--backend", "numpy")
    (tmp_path / SUMS_FILE).write_text(f"{file_sha256(weights)}  w.safetensors\n")
    assert "2 checksums verified" in run(*verify).err
    (tmp_path / SUMS_FILE).write_text(f"{'0' * 64}  w.safetensors\n")
    done = run(*verify)
    assert (done.code, done.out) == (1, b"")
    assert "its SHA-256 is not the one stated beside it" in done.err


@pytest.mark.parametrize("name", [SUMS_FILE, "w.safetensors.sha256"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_a_list_of_checksums_that_is_no_file(weights, tmp_path, name, make) -> None:
    """Opening a FIFO would wait for ever."""
    path = Path(shutil.copy(weights, tmp_path / "w.safetensors"))
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} should list checksums, but is not a regular file"):
        open_checkpoint(path)


OWN, ALL = "w.safetensors.sha256", SUMS_FILE


@pytest.mark.parametrize(
    ("place", "form", "counts"),
    [
        (OWN, "{} *w.safetensors\n", True),
        (ALL, "{} *w.safetensors\n", True),
        (ALL, "{}  ./w.safetensors\n", True),
        (OWN, "{} *./w.safetensors\n", True),
        (ALL, "SHA256 (w.safetensors) = {}", True),  # sha256sum --tag, and BSD
        (OWN, "SHA256 (w.safetensors) = {}", True),
        (OWN, "SHA256(w.safetensors)= {}", True),  # openssl
        (ALL, "{}  weights/w.safetensors", True),  # made from the folder above
        (OWN, "{}  weights/w.safetensors", True),
        (OWN, "{}  before-it-was-renamed.safetensors", True),
        (OWN, "{}", True),
        (ALL, "\ufeff{}  w.safetensors\r\n", True),
        # Of other files.
        (ALL, "{}  another.safetensors\n", False),
        (ALL, "{0}  older/w.safetensors\n{0}  xw.safetensors\n\n", False),
    ],
)
def test_a_checksum_beside_the_file_counts(weights, tmp_path, place, form, counts) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    path = Path(shutil.copy(weights, folder / "w.safetensors"))
    (folder / place).write_text(form.format(file_sha256(path)), encoding="utf-8")
    open_checkpoint(path)
    (folder / place).write_text(form.format("0" * 64), encoding="utf-8")
    if counts:
        with pytest.raises(CheckpointError, match="its SHA-256 is not"):
            open_checkpoint(path)
    else:
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("place", "content"),
    [
        (ALL, "what?  w.safetensors\n"),
        (OWN, "what?  w.safetensors\n"),
        (OWN, ""),
        (OWN, "nothing"),
        (OWN, f"{'0' * 64}  a\n{'0' * 64}  b\n"),
    ],
)
def test_a_checksum_file_that_says_nothing_is_no_checksum(weights, tmp_path, place, content) -> None:
    """Of this file by its name: that it cannot be read must not pass for a check."""
    path = Path(shutil.copy(weights, tmp_path / "w.safetensors"))
    (tmp_path / place).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{place} does not state a SHA-256 for w\.safetensors"):
        open_checkpoint(path)
