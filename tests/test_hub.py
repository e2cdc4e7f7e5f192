"""`fetch` against a small Hugging Face Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from test_adapters import write as write_adapter

from numpyesm.config import PRESETS
from numpyesm.errors import CheckpointError, InvalidOption, WeightsNotFound
from numpyesm.weights import fetch, load_checkpoint, open_weights
from numpyesm.weights.cache import PINNED_COMMITS

pytest.importorskip("huggingface_hub")
mk = pytest.importorskip("make_checkpoints")
pytestmark = pytest.mark.usefixtures("quick_calibration")

FIRST, SECOND = "a" * 40, "b" * 40
REPOSITORY = "someone/esm2_t6_8M_like"


class Hub(ThreadingHTTPServer):
    """A small Hub on loopback."""

    repositories: dict[str, dict[str, Path]]  # by name and commit, the folder; `main` is the last commit
    corrupt: str = ""  # the file that is served with a changed byte under the right checksum
    requests: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        listing, parts = path.startswith("/api/models/"), path.removeprefix("/api/models").strip("/").split("/")
        commits = self.server.repositories.get("/".join(parts[:2]))
        if commits is None:
            return self.reply(404, {"X-Error-Code": "RepoNotFound"})
        revision = parts[3] if len(parts) > 3 else "main"  # behind `revision` or `resolve`
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        if listing:
            files = [{"rfilename": file.name} for file in sorted(commits[commit].iterdir())]
            answer = {"id": "/".join(parts[:2]), "sha": commit, "siblings": files}
            return self.reply(200, {}, json.dumps(answer).encode())
        file = commits[commit] / parts[-1]
        if not file.is_file():
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        etag, size = f'"{hashlib.sha256(content).hexdigest()}"', str(len(content))
        if file.name == self.server.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 0xFF])
        headers = {"X-Repo-Commit": commit, "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": size}
        return self.reply(200, headers, content)

    do_HEAD = do_GET

    def reply(self, status: int, headers: Mapping[str, str], content: bytes = b"{}") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


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
    with Hub(("127.0.0.1", 0), Handler) as running:
        running.repositories, running.requests = {REPOSITORY: {FIRST: write_model(tmp_path / "served")}}, []
        threading.Thread(target=running.serve_forever, args=[0.02], daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        yield running
        running.shutdown()


def test_fetch_converts_caches_and_then_needs_no_network(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # shows the bar though stderr is no terminal
    path = fetch(REPOSITORY)
    assert path == tmp_path / "cache" / "hub" / REPOSITORY.replace("/", "--") / f"{FIRST}.safetensors"
    assert "model.safetensors" in capfd.readouterr().err  # the progress bar
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == mk.TINY
    assert checkpoint.source == f"{REPOSITORY}@{FIRST[:12]}"
    assert not any("README" in path for path in hub.requests)

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


def test_the_command_says_where_the_file_is_and_how_to_name_it(run, hub, monkeypatch):
    monkeypatch.setenv("NUMPYESM_OFFLINE", "0")  # which `run` sets
    done = run("fetch", REPOSITORY, "--dtype", "int8", "-o", "a stick", bare=True)
    assert done.out.decode() == "a stick/custom-int8.safetensors\n"
    assert "NUMPYESM_WEIGHTS='a stick/custom-int8.safetensors'" in done.err


def test_revisions(hub, tmp_path):
    hub.repositories[REPOSITORY][SECOND] = write_model(tmp_path / "newer", value=0.25)
    target = tmp_path / "out" / "x.safetensors"
    with pytest.raises(InvalidOption, match=r"x\.pt must be a \.safetensors file or a folder"):
        fetch(REPOSITORY, output=tmp_path / "x.pt")
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
    assert not any("00004-of-00004" in path for path in hub.requests)


def test_an_adapter_is_kept_as_it_is_and_its_base_is_fetched(hub, tmp_path, monkeypatch):
    query = "base_model.model.esm.encoder.layer.0.attention.self.query"
    factors = {f"{query}.lora_A.weight": np.ones((2, 40)), f"{query}.lora_B.weight": np.ones((40, 2))}
    folder = write_adapter(tmp_path / "lora", factors, REPOSITORY, r=2, lora_alpha=2)
    hub.repositories["someone/lora"] = {FIRST: folder}
    for offline in ("", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert fetch("someone/lora").name == FIRST
        assert open_weights("someone/lora").array("layers.0.qkv.weight")[0, ::40].tolist() == [2.5, 0.5, 0.5]


def test_corrupted_weights_are_refused_and_deleted(hub, tmp_path):
    hub.corrupt = "model.safetensors"
    message = f"the download of {REPOSITORY} is damaged or was tampered with, and has been deleted"
    with pytest.raises(CheckpointError, match=message):
        fetch(REPOSITORY)
    assert not [path for path in tmp_path.rglob("*.safetensors") if path.parent != tmp_path / "served"]
    hub.corrupt = ""
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


def test_no_hub_and_no_room(hub, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'file'}.* HF_HOME names another cache"):
        fetch(REPOSITORY)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = r"cannot be reached for facebook/esm2_t12_35M_UR50D.*what you can do.*dl\.fbaipublicfiles\.com"
    with pytest.raises(WeightsNotFound, match=message):
        fetch("esm2-35m")


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
