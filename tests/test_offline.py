"""Machines without a network: no socket is opened, weights are copied as one file, checksums are verified."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from test_hub import FIRST, REPOSITORY, TINY, write_model

from numpyesm.errors import CheckpointError, InvalidOption
from numpyesm.files import file_sha256
from numpyesm.weights import convert, load_canonical, load_checkpoint
from numpyesm.weights.hub import is_offline
from numpyesm.weights.integrity import SUMS_FILE
from numpyesm.weights.load import open_checkpoint

ROOT = Path(__file__).parents[1]

# Python runs this file at its start, before any of our code: any socket ends the process with a name for it.
NO_SOCKETS = """
import socket, sys
class Refused(BaseException): pass
def refuse(*args, **kwargs):
    print("A SOCKET WAS OPENED", args, file=sys.stderr, flush=True)
    raise Refused
class Refusing(socket.socket):  # a class still: ssl makes another of it
    __init__ = refuse
socket.socket = Refusing
socket.create_connection = socket.getaddrinfo = refuse
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NUMPYESM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NUMPYESM_WEIGHTS", raising=False)
    monkeypatch.delenv("NUMPYESM_VERIFY", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return convert("synthetic:esm2-8m:3", tmp_path_factory.mktemp("weights") / "w.safetensors").path


def isolated(tmp_path: Path, *arguments: str, prefix: tuple[str, ...] = (), **variables: str):
    """The command line with every socket forbidden."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_SOCKETS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "NUMPYESM_WEIGHTS"))}
    environment |= {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "HF_ENDPOINT": "http://127.0.0.1:9", **variables}
    command = [*prefix, sys.executable, "-m", "numpyesm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200)


def test_the_trap_catches_a_download(tmp_path) -> None:
    """Allowed to, `fetch` does open a socket: the tests below can fail."""
    done = isolated(tmp_path, "fetch", "esm2-8m")
    assert done.returncode != 0
    assert "A SOCKET WAS OPENED" in done.stderr


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
def test_offline_nothing_asks_the_network(tmp_path, variable, arguments) -> None:
    done = isolated(tmp_path, *arguments, **{variable: "1"})
    assert "SOCKET" not in done.stderr, done.stderr
    assert done.returncode == 1
    assert "forbids to download" in done.stderr
    assert "point NUMPYESM_WEIGHTS to it" in done.stderr  # the way out
    assert "Traceback" not in done.stderr


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
def test_work_on_local_weights_opens_no_socket(tmp_path, weights, arguments) -> None:
    """Not even without the variables."""
    done = isolated(tmp_path, *arguments, "--weights", str(weights), "--backend", "numpy")
    assert done.returncode == 0, done.stderr
    assert "SOCKET" not in done.stderr


def _can_unshare() -> bool:
    try:
        return subprocess.run(["unshare", "-rn", "true"], capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _can_unshare(), reason="this kernel lets no network namespace be made")
def test_in_a_namespace_without_a_network(tmp_path, fetched) -> None:
    done = isolated(
        tmp_path, "encode", "MKT", "--weights", str(fetched), "--backend", "numpy", prefix=("unshare", "-rn")
    )
    assert done.returncode == 0, done.stderr
    done = isolated(tmp_path, "fetch", "esm2-8m", prefix=("unshare", "-rn"), NUMPYESM_OFFLINE="1")
    assert done.returncode == 1


# -- one file that is copied -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fetched(tmp_path_factory) -> Path:
    """What `fetch -o` writes, from a Hub on loopback."""
    folder = tmp_path_factory.mktemp("fetched")
    with FakeHub({REPOSITORY: {FIRST: write_model(folder / "served", TINY)}}) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "NUMPYESM_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"),
            "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "numpyesm", "fetch", REPOSITORY, "--dtype", "int8", "-o", folder / "a stick"],
            capture_output=True, text=True, env=environment, timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path == folder / "a stick" / "custom-int8.safetensors"
    assert f"NUMPYESM_WEIGHTS='{path}'" in done.stderr
    return path


def test_a_fetched_file_is_copied_and_used_without_a_network(fetched, tmp_path) -> None:
    copy = shutil.copy(fetched, tmp_path / "copy.safetensors")
    done = isolated(tmp_path, "encode", "MKT", "--weights", copy, "--backend", "numpy", NUMPYESM_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["results"][0]["embeddings"][0]["embedding"]) == TINY.embed_dim


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


def flip(path: Path, target: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 0x10
    target.write_bytes(content)
    return target


def test_a_flipped_bit_is_found_where_checksums_are_asked_for(weights, tmp_path, monkeypatch) -> None:
    damaged = flip(weights, tmp_path / "damaged.safetensors")
    load_checkpoint(damaged)
    for verify in (open_checkpoint, lambda path: convert(path, tmp_path / "out.safetensors")):
        with pytest.raises(CheckpointError, match="corrupted"):
            verify(damaged)
    monkeypatch.setenv("NUMPYESM_VERIFY", "1")
    for load in (load_checkpoint, load_canonical):
        with pytest.raises(CheckpointError, match="corrupted"):
            load(damaged)
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
    assert "its SHA-256 is not the one that stands beside it" in done.err


@pytest.mark.parametrize("name", [SUMS_FILE, "w.safetensors.sha256"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_a_list_of_checksums_that_is_no_file(run, weights, tmp_path, name, make) -> None:
    """Opening a FIFO would wait for ever."""
    shutil.copy(weights, tmp_path / "w.safetensors")
    make(tmp_path / name)
    done = run("verify", "--weights", "w.safetensors", "--backend", "numpy")
    assert done.code == 1
    assert f"{name} should list checksums, and is no regular file" in done.err


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
    with pytest.raises(CheckpointError, match=rf"{place} states no SHA-256 for w\.safetensors"):
        open_checkpoint(path)
