"""Machines without a network: no socket is opened, weights are carried in folders, checksums are verified at load."""

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

from numpyesm.errors import CheckpointError, InvalidOption, WeightsNotFound
from numpyesm.weights import convert, load_checkpoint
from numpyesm.weights.cache import PINNED_COMMITS, RemoteModel
from numpyesm.weights.carry import export, take_in
from numpyesm.weights.hub import is_offline
from numpyesm.weights.integrity import SUMS_FILE, stated_sha256

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


def run(tmp_path: Path, *arguments: str, prefix: tuple[str, ...] = (), **variables: str):
    """The command line with every socket forbidden."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_SOCKETS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "NUMPYESM_WEIGHTS"))}
    environment |= {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "HF_ENDPOINT": "http://127.0.0.1:9", **variables}
    command = [*prefix, sys.executable, "-m", "numpyesm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200)


def test_the_trap_catches_a_download(tmp_path) -> None:
    """Allowed to, `fetch` does open a socket: the tests below can fail."""
    done = run(tmp_path, "fetch", "esm2-8m")
    assert done.returncode != 0
    assert "A SOCKET WAS OPENED" in done.stderr


@pytest.mark.parametrize("variable", ["NUMPYESM_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize(
    "arguments",
    [("fetch", "esm2-8m"), ("fetch", "someone/else"), ("fetch", "esm2-8m", "--export", "there"),
     ("encode", "MKT"), ("encode", "MKT", "--weights", "someone/else")],
    ids=["fetch", "hub-id", "export", "encode", "encode-hub-id"],
)  # fmt: skip
def test_offline_nothing_asks_the_network(tmp_path, variable, arguments) -> None:
    done = run(tmp_path, *arguments, **{variable: "1"})
    assert "SOCKET" not in done.stderr, done.stderr
    assert done.returncode == 1
    assert "forbids to download" in done.stderr
    assert "--from DIR" in done.stderr  # the way out
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


def test_work_on_local_weights_opens_no_socket(tmp_path, weights) -> None:
    """Not even without the variables."""
    for arguments in (
        ("encode", "MKT"),
        ("predict", "M<mask>"),
        ("log-prob", "MKT"),
        ("contacts", "MKTAYIAK"),
        ("info",),
    ):
        done = run(tmp_path, *arguments, "--weights", str(weights), "--backend", "numpy")
        assert done.returncode == 0, done.stderr
        assert "SOCKET" not in done.stderr


def _can_unshare() -> bool:
    try:
        return subprocess.run(["unshare", "-rn", "true"], capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _can_unshare(), reason="this kernel lets no network namespace be made")
def test_in_a_namespace_without_a_network(tmp_path, weights, hub_folder) -> None:
    done = run(
        tmp_path, "fetch", REPOSITORY, "--from", str(hub_folder), prefix=("unshare", "-rn"), NUMPYESM_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr
    done = run(tmp_path, "encode", "MKT", "--weights", REPOSITORY, "--backend", "numpy", prefix=("unshare", "-rn"))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["results"][0]["embeddings"][0]["embedding"]) == TINY.embed_dim
    done = run(tmp_path, "fetch", "esm2-8m", prefix=("unshare", "-rn"), NUMPYESM_OFFLINE="1")
    assert done.returncode == 1


# -- carrying ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory) -> Path:
    """What `fetch --export` leaves, from a Hub on loopback."""
    folder = tmp_path_factory.mktemp("carried")
    with FakeHub({REPOSITORY: {FIRST: write_model(folder / "served", TINY)}}) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "NUMPYESM_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        for dtype in ("fp32", "int8"):
            done = subprocess.run(
                [sys.executable, "-m", "numpyesm", "fetch", REPOSITORY, "--dtype", dtype, "--export", folder / "out"],
                capture_output=True, text=True, env=environment, timeout=200,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert Path(done.stdout.strip()).parent == folder / "out"
    return folder / "out"


def test_an_export_can_be_checked_with_sha256sum(hub_folder) -> None:
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=hub_folder, capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stdout.count("OK") == 2
    assert all(stated_sha256(path) for path in hub_folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_an_export_is_taken_in_and_found_by_its_name(hub_folder, monkeypatch, dtype) -> None:
    monkeypatch.setenv("NUMPYESM_OFFLINE", "1")
    path = take_in(REPOSITORY, hub_folder, dtype=dtype)
    assert load_checkpoint(path).precision == dtype
    assert load_checkpoint(path).config == TINY
    if dtype == "fp32":
        from numpyesm.weights import resolve

        assert resolve(REPOSITORY) == path  # without a question to the Hub what `main` is


def test_a_published_model_is_carried(weights, tmp_path, monkeypatch, cache) -> None:
    cache.mkdir()
    genuine = tmp_path / "genuine.safetensors"
    _as_genuine(weights, genuine)
    target = RemoteModel.named("esm2-8m", None).cache_path(PINNED_COMMITS["esm2-8m"], "fp32")
    shutil.copy(genuine, target)
    monkeypatch.setenv("NUMPYESM_OFFLINE", "1")
    exported = export("esm2-8m", tmp_path / "stick", progress=False)
    assert exported.name == "esm2-8m.safetensors"
    monkeypatch.setenv("NUMPYESM_CACHE", str(tmp_path / "other"))
    done = run(tmp_path, "fetch", "esm2-8m", "--from", str(tmp_path / "stick"), NUMPYESM_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == exported.read_bytes()
    done = run(tmp_path, "encode", "MKT", "--weights", "esm2-8m", "--backend", "numpy", NUMPYESM_OFFLINE="1")
    assert done.returncode == 0, done.stderr


def _as_genuine(synthetic: Path, target: Path) -> None:
    """The same numbers without the note that they are synthetic."""
    from dataclasses import replace

    from numpyesm.weights import save_canonical

    save_canonical(target, replace(load_checkpoint(synthetic), synthetic=False, metadata={}, source="test"))


def test_an_original_checkpoint_is_taken_in(weights, tmp_path, cache) -> None:
    _as_genuine(weights, tmp_path / "in" / "esm2.safetensors")
    path = take_in("esm2-8m", tmp_path / "in", dtype="fp16")
    assert path.parent == cache
    assert load_checkpoint(path).precision == "fp16"


def test_synthetic_weights_are_not_taken_in_for_real_ones(weights, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(weights, tmp_path / "in")
    with pytest.raises(CheckpointError, match="synthetic"):
        take_in("esm2-8m", tmp_path / "in")


def test_damage_on_the_way_is_found(hub_folder, tmp_path) -> None:
    folder = shutil.copytree(hub_folder, tmp_path / "copy")
    (path,) = (p for p in folder.glob("*.safetensors") if "int8" not in p.name)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged on the way"):
        take_in(REPOSITORY, folder)
    assert load_checkpoint(take_in(REPOSITORY, folder, dtype="int8")).precision == "int8"
    (folder / SUMS_FILE).unlink()
    with pytest.raises(CheckpointError, match="no checksum"):
        take_in(REPOSITORY, folder, dtype="int8")


def test_what_is_not_in_the_folder_is_named(hub_folder, tmp_path) -> None:
    with pytest.raises(WeightsNotFound, match="does not hold esm2-35m as fp32; it holds someone--"):
        take_in("esm2-35m", hub_folder)
    with pytest.raises(WeightsNotFound, match="does not hold"):
        take_in(REPOSITORY, hub_folder, dtype="bf16")
    with pytest.raises(WeightsNotFound, match="no folder"):
        take_in("esm2-35m", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsNotFound, match="no exported model"):
        take_in("esm2-35m", tmp_path / "empty")


def test_a_note_cannot_lead_out_of_the_cache(hub_folder, tmp_path) -> None:
    folder = shutil.copytree(hub_folder, tmp_path / "copy")
    for note in folder.glob("*.origin.json"):
        note.write_text(note.read_text().replace(FIRST, "../../../../tmp/x"))
    with pytest.raises(CheckpointError, match="names no commit"):
        take_in(REPOSITORY, folder)


def test_options_that_exclude_each_other(tmp_path) -> None:
    done = run(tmp_path, "fetch", "--export", "a", "--from", "b")
    assert done.returncode == 2
    assert "exclude each other" in done.stderr


@pytest.mark.parametrize("option", ["--export", "--from"])
def test_an_empty_folder_name_is_no_download(tmp_path, option) -> None:
    """`--from "$STICK"` where STICK is not set."""
    done = run(tmp_path, "fetch", "esm2-8m", option, "")
    assert done.returncode == 2
    assert "need the name of a folder" in done.stderr
    assert "SOCKET" not in done.stderr


# -- checksums at load ---------------------------------------------------------------------------------------------


def flip(path: Path, target: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 0x10
    target.write_bytes(content)
    return target


def test_a_flipped_bit_is_found_at_load(weights, tmp_path, cache, monkeypatch) -> None:
    damaged = flip(weights, tmp_path / "damaged.safetensors")
    for _ in range(2):  # a file that was wrong is not noted as seen
        with pytest.raises(CheckpointError, match="corrupted"):
            load_checkpoint(damaged)
    monkeypatch.setenv("NUMPYESM_VERIFY", "never")
    load_checkpoint(damaged)
    monkeypatch.setenv("NUMPYESM_VERIFY", "sometimes")
    with pytest.raises(InvalidOption, match="NUMPYESM_VERIFY"):
        load_checkpoint(damaged)


def test_a_file_is_hashed_once_and_again_when_it_has_changed(weights, tmp_path, monkeypatch) -> None:
    hashed = []
    from numpyesm.weights import integrity

    real = integrity._sha256
    monkeypatch.setattr(integrity, "_sha256", lambda *a: hashed.append(a) or real(*a))
    copy = tmp_path / "copy.safetensors"
    shutil.copy(weights, copy)
    for _ in range(3):
        load_checkpoint(copy)
    assert len(hashed) == 1
    flip(weights, copy)
    with pytest.raises(CheckpointError, match="corrupted"):
        load_checkpoint(copy)
    shutil.copy(weights, copy)
    load_checkpoint(copy)
    assert len(hashed) == 3
    monkeypatch.setenv("NUMPYESM_VERIFY", "always")
    load_checkpoint(copy)
    assert len(hashed) == 4


def test_without_a_writable_cache_it_is_hashed_each_time(weights, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMPYESM_CACHE", str(tmp_path / "file" / "cache"))
    load_checkpoint(weights)
    with pytest.raises(CheckpointError, match="corrupted"):
        load_checkpoint(flip(weights, tmp_path / "damaged.safetensors"))


@pytest.mark.parametrize("place", ["SHA256SUMS", "w.safetensors.sha256"])
def test_a_checksum_beside_the_file_counts(weights, tmp_path, place) -> None:
    path = tmp_path / "w.safetensors"
    shutil.copy(weights, path)
    from numpyesm.files import file_sha256

    right = file_sha256(path)
    (tmp_path / place).write_text(f"{right} *w.safetensors\n")
    load_checkpoint(path)
    for form in ("  w.safetensors", "  ./w.safetensors", " *./w.safetensors"):
        (tmp_path / place).write_text(f"{'0' * 64}{form}\n")
        with pytest.raises(CheckpointError, match="checksum"):
            load_checkpoint(path)
    (tmp_path / place).write_text("what?  w.safetensors\n")
    with pytest.raises(CheckpointError, match="states no SHA-256"):
        load_checkpoint(path)
    (tmp_path / place).write_text(f"{right}  another.safetensors\n")
    load_checkpoint(path)


@pytest.mark.parametrize(
    ("place", "form"),
    [
        ("SHA256SUMS", "SHA256 (w.safetensors) = {}"),  # sha256sum --tag, and BSD
        ("w.safetensors.sha256", "SHA256 (w.safetensors) = {}"),
        ("w.safetensors.sha256", "SHA256(w.safetensors)= {}"),  # openssl
        ("SHA256SUMS", "{}  weights/w.safetensors"),  # made from the folder above
        ("w.safetensors.sha256", "{}  weights/w.safetensors"),
        ("w.safetensors.sha256", "{}  before-it-was-renamed.safetensors"),
        ("w.safetensors.sha256", "{}"),
        ("SHA256SUMS", "\ufeff{}  w.safetensors\r\n"),
    ],
)
def test_checksums_of_other_programs_count(weights, tmp_path, place, form) -> None:
    from numpyesm.files import file_sha256

    folder = tmp_path / "weights"
    folder.mkdir()
    path = folder / "w.safetensors"
    shutil.copy(weights, path)
    (folder / place).write_text(form.format(file_sha256(path)), encoding="utf-8")
    load_checkpoint(path)
    (folder / place).write_text(form.format("0" * 64), encoding="utf-8")
    with pytest.raises(CheckpointError, match="its checksum is not the stated"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", ["", "\n", "nothing", f"{'0' * 64}  a\n{'0' * 64}  b\n"])
def test_a_checksum_file_that_says_nothing_is_no_checksum(weights, tmp_path, content) -> None:
    """Of this file by its name: that it cannot be read must not pass for a check."""
    path = tmp_path / "w.safetensors"
    shutil.copy(weights, path)
    (tmp_path / "w.safetensors.sha256").write_text(content)
    with pytest.raises(CheckpointError, match=r"w\.safetensors\.sha256 states no SHA-256 for w\.safetensors"):
        load_checkpoint(path)


def test_sums_of_other_folders_are_not_this_ones(weights, tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    shutil.copy(weights, path)
    (tmp_path / SUMS_FILE).write_text(f"{'0' * 64}  older/w.safetensors\n{'0' * 64}  xw.safetensors\n\n")
    load_checkpoint(path)
