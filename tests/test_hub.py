"""`fetch` against a small Hugging Face Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from test_adapters import write as write_adapter

from numpyesm.config import PRESETS
from numpyesm.errors import CheckpointError, WeightsNotFound
from numpyesm.weights import fetch, load_checkpoint, open_weights
from numpyesm.weights.cache import PINNED_COMMITS

pytest.importorskip("huggingface_hub")
mk = pytest.importorskip("make_checkpoints")
pytestmark = pytest.mark.usefixtures("quick_calibration")

FIRST, SECOND = "a" * 40, "b" * 40
REPOSITORY = "someone/esm2_t6_8M_like"


@dataclass
class FakeHub:
    """A small Hub on loopback. Repositories are {name: {commit: folder}}; `main` is the last commit.

    `slow` names files that trickle, `corrupt` those that are served with a changed byte under the right checksum.
    """

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    slow: set[str] = field(default_factory=set)
    corrupt: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path

    def __enter__(self) -> FakeHub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def transfers(self, file: str) -> int:
        """How often a file was downloaded."""
        return sum(method == "GET" and path.endswith(file) for method, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        listing, parts = path.startswith("/api/models/"), path.removeprefix("/api/models").strip("/").split("/")
        commits = self.hub.repositories.get("/".join(parts[:2]))
        if commits is None:
            return self.fail("RepoNotFound")
        revision = parts[3] if len(parts) > 3 else "main"  # behind `revision` or `resolve`
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self.fail("RevisionNotFound")
        if listing:
            files = [{"rfilename": file.name} for file in sorted(commits[commit].iterdir())]
            return self.reply(json.dumps({"id": "/".join(parts[:2]), "sha": commit, "siblings": files}).encode())
        file = commits[commit] / parts[-1]
        return self.send_file(file, commit) if file.is_file() else self.fail("EntryNotFound")

    do_HEAD = do_GET

    def send_file(self, file: Path, commit: str) -> None:
        content = bytearray(file.read_bytes())
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if file.name in self.hub.corrupt:
            content[-1] ^= 0xFF
        headers = {"X-Repo-Commit": commit, "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        self.reply(bytes(content), headers=headers, pause=0.02 if file.name in self.hub.slow else 0)

    def reply(self, content: bytes, status: int = 200, headers: Mapping[str, str] = {}, pause: float = 0) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        step = len(content) // 64 + 1
        with suppress(OSError):  # the client was killed
            for begin in range(0, len(content) if self.command == "GET" else 0, step):
                self.wfile.write(content[begin : begin + step])
                time.sleep(pause)

    def fail(self, code: str) -> None:
        self.reply(b"{}", 404, headers={"X-Error-Code": code})


def write_model(folder: Path, value: float = 0.5) -> Path:
    """A Hugging Face folder with all numbers the same, and a file that nobody needs."""
    model = mk.fair_esm_model()
    for parameter in model.parameters():
        parameter.data.fill_(value)
    mk.write_hugging_face(folder, mk.hugging_face_state(model))
    (folder / "README.md").write_text("not wanted")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for variable in os.environ:  # a user's own settings must not reach the test
        if variable.startswith(("HF_", "NUMPYESM_", "TRANSFORMERS_")):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setenv("NUMPYESM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeHub({REPOSITORY: {FIRST: write_model(tmp_path / "served")}}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_fetch_converts_caches_and_then_needs_no_network(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # shows the bar though stderr is no terminal
    path = fetch(REPOSITORY)
    assert path == tmp_path / "cache" / "hub" / REPOSITORY.replace("/", "--") / f"{FIRST}.safetensors"
    assert "model.safetensors" in capfd.readouterr().err  # the progress bar
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == mk.TINY
    assert checkpoint.source == f"{REPOSITORY}@{FIRST[:12]}"
    assert not any("README" in request[1] for request in hub.requests)

    hub.requests.clear()
    assert fetch(REPOSITORY) == path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(REPOSITORY) == path
    narrow = fetch(REPOSITORY, dtype="bf16", progress=False)  # from huggingface-hub's cache
    assert hub.requests == []
    assert narrow.name == f"{FIRST}-bf16.safetensors"
    assert load_checkpoint(narrow).precision == "bf16"
    copy = fetch(REPOSITORY, output=tmp_path / "out" / "x.safetensors")
    assert copy.read_bytes() == path.read_bytes()
    assert capfd.readouterr().err == ""


def test_a_fetched_file_is_copied_and_used_without_a_network(run, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMPYESM_OFFLINE", "0")  # which `run` sets
    done = run("fetch", REPOSITORY, "--dtype", "int8", "-o", "a stick", bare=True)
    assert done.out.decode() == "a stick/custom-int8.safetensors\n"
    assert "NUMPYESM_WEIGHTS='a stick/custom-int8.safetensors'" in done.err
    Path(done.out.decode().strip()).rename("copy.safetensors")
    hub.requests.clear()
    assert run("encode", "MKT", "--weights", "copy.safetensors", "--backend", "numpy").code == 0
    assert hub.requests == []


def test_revisions(hub, tmp_path):
    hub.repositories[REPOSITORY][SECOND] = write_model(tmp_path / "newer", value=0.25)
    target = tmp_path / "out" / "x.safetensors"
    assert fetch(REPOSITORY, output=target) == target
    assert load_checkpoint(target).array("final_norm.bias")[0] == 0.25
    assert fetch(REPOSITORY).name == f"{SECOND}.safetensors"
    older = fetch(REPOSITORY, revision=FIRST)
    assert older.name == f"{FIRST}.safetensors"
    assert load_checkpoint(older).array("final_norm.bias")[0] == 0.5
    with pytest.raises(WeightsNotFound, match=r"the Hub has no .* at revision no-such-branch"):
        fetch(REPOSITORY, revision="no-such-branch")


def test_shards(hub, tmp_path):
    """The index is fetched first, and says which files are."""
    folder = mk.write_hugging_face(tmp_path / "shards", mk.hugging_face_state(mk.MODEL), shard_size=60_000)
    hub.repositories[REPOSITORY] = {FIRST: folder}
    (folder / "model-00004-of-00004.safetensors").touch()
    second = (folder / "model-00002-of-00003.safetensors").rename(tmp_path / "second")
    with pytest.raises(WeightsNotFound, match="the Hub has no"):
        fetch(REPOSITORY)
    second.rename(folder / "model-00002-of-00003.safetensors")
    mk.expect_same_model(load_checkpoint(fetch(REPOSITORY)), mk.MODEL)
    assert not hub.transfers("model-00004-of-00004.safetensors")


def test_an_adapter_is_kept_as_it_is_and_its_base_is_fetched(hub, tmp_path, monkeypatch):
    query = "base_model.model.esm.encoder.layer.0.attention.self.query"
    factors = {f"{query}.lora_A.weight": np.ones((2, 40)), f"{query}.lora_B.weight": np.ones((40, 2))}
    folder = write_adapter(tmp_path / "lora", factors, REPOSITORY, r=2, lora_alpha=2)
    hub.repositories["someone/lora"] = {FIRST: folder}
    for offline in ("", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert fetch("someone/lora").name == FIRST
        assert open_weights("someone/lora").array("layers.0.qkv.weight")[0, ::40].tolist() == [2.5, 0.5, 0.5]


@pytest.mark.slow
def test_two_processes_at_once_download_once(hub):
    hub.slow.add("model.safetensors")
    command = [sys.executable, "-c", f"from numpyesm.weights import fetch; print(fetch({REPOSITORY!r}))"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert first == second
    load_checkpoint(first.strip())
    assert hub.transfers("model.safetensors") == 1


def test_corrupted_weights_are_refused_and_deleted(hub, tmp_path):
    hub.corrupt.add("model.safetensors")
    message = f"the download of {REPOSITORY} is damaged or was tampered with, and has been deleted"
    with pytest.raises(CheckpointError, match=message):
        fetch(REPOSITORY)
    assert not [path for path in tmp_path.rglob("*.safetensors") if path.parent != tmp_path / "served"]
    hub.corrupt.clear()
    load_checkpoint(fetch(REPOSITORY))


def test_official_names(hub, tmp_path, monkeypatch):
    """35M has no checksum in our code; that of 8M is another than the Hub's here."""
    for preset, official in (("esm2-8m", "esm2_t6_8M_UR50D"), ("esm2-35m", "esm2_t12_35M_UR50D")):
        hub.repositories[f"facebook/{official}"] = {PINNED_COMMITS[preset]: tmp_path / "served"}
    with pytest.raises(CheckpointError, match="facebook/esm2_t6_8M_UR50D is damaged or was tampered with"):
        fetch("esm2-8m")
    with pytest.raises(CheckpointError, match="is not esm2-35m but custom"):
        fetch()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    monkeypatch.setitem(PRESETS, "esm2-35m", mk.TINY)
    assert fetch() == tmp_path / "cache" / "esm2-35m.safetensors"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("facebook/esm2_t12_35M_UR50D") == tmp_path / "cache" / "esm2-35m.safetensors"


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = r"cannot be reached for facebook/esm2_t12_35M_UR50D.*what you can do.*dl\.fbaipublicfiles\.com"
    with pytest.raises(WeightsNotFound, match=message):
        fetch("esm2-35m")


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'file'}.* HF_HOME names another cache"):
        fetch(REPOSITORY)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "the Hub has no someone/else"),
        (["README.md"], r"someone/else on the Hub has no model\.safetensors"),
        (["adapter_config.json", "config.json"], "someone/else is a PEFT adapter"),
    ],
)
def test_repositories_that_are_no_model(hub, tmp_path, files, message):
    if files is not None:
        (tmp_path / "else").mkdir()
        for file in files:
            (tmp_path / "else" / file).write_text("{}")
        hub.repositories["someone/else"] = {FIRST: tmp_path / "else"}
    with pytest.raises((CheckpointError, WeightsNotFound), match=message):
        fetch("someone/else")
