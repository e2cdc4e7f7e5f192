"""`fetch` against a small Hub on loopback. Each run is a process: huggingface-hub reads HF_ENDPOINT when imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_hub import FakeHub

from numpyesm.config import PRESETS, ModelConfig
from numpyesm.weights import load_checkpoint
from numpyesm.weights.cache import PINNED_COMMITS
from numpyesm.weights.load import open_checkpoint
from numpyesm.weights.safetensors_file import read_safetensors, write_safetensors
from numpyesm.weights.tensor import StoredTensor

pytest.importorskip("huggingface_hub")

TINY = ModelConfig(2, 40, 20, 160)
FIRST, SECOND = "a" * 40, "b" * 40
REPOSITORY = "someone/esm2_t6_8M_like"


def write_model(folder: Path, config: ModelConfig, value: float = 0.5) -> Path:
    """A Hugging Face folder with all numbers the same, made without torch."""
    width, ffn = config.embed_dim, config.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"esm.embeddings.word_embeddings.weight": (33, width)}
    for layer in range(config.num_layers):
        prefix = f"esm.encoder.layer.{layer}."
        for name, rows, columns in (
            *((f"attention.self.{part}", width, width) for part in ("query", "key", "value")),
            ("attention.output.dense", width, width),
            ("intermediate.dense", ffn, width),
            ("output.dense", width, ffn),
        ):
            shapes |= {f"{prefix}{name}.weight": (rows, columns), f"{prefix}{name}.bias": (rows,)}
        for name in ("attention.LayerNorm", "LayerNorm"):
            shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
    shapes |= {f"esm.encoder.emb_layer_norm_after.{kind}": (width,) for kind in ("weight", "bias")}
    tensors = {name: StoredTensor(np.full(shape, value, np.float32)) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    settings = {
        "model_type": "esm", "hidden_size": width, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": ffn, "position_embedding_type": "rotary",
        "token_dropout": True, "vocab_size": 33, "mask_token_id": 32, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "README.md").write_text("not wanted")
    return folder


@pytest.fixture
def hub(tmp_path):
    model = write_model(tmp_path / "served", TINY)
    with FakeHub({REPOSITORY: {FIRST: model}}) as running:
        yield running


@pytest.fixture
def large_hub(tmp_path):
    """One whose file is larger than the pieces of 10 MB in which huggingface-hub writes."""
    model = write_model(tmp_path / "served", PRESETS["esm2-8m"])
    with FakeHub({REPOSITORY: {FIRST: model}}) as running:
        yield running


def start(hub, tmp_path, call=f"{REPOSITORY!r}", **environment):
    code = (
        "import sys\nfrom numpyesm.errors import NumpyesmError\nfrom numpyesm.weights import fetch, open_weights\n"
        f"try:\n    print(fetch({call}))\n"
        "except NumpyesmError as error:\n    print(type(error).__name__, error, sep=': ', file=sys.stderr); sys.exit(1)"
    )
    variables = {
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf-home"),
        "NUMPYESM_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    }
    # A user's own settings must not reach the test.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "NUMPYESM_", "TRANSFORMERS_"))}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=inherited | variables | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments, **options):
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output.strip(), errors


def fetch(hub, tmp_path, call=f"{REPOSITORY!r}", **environment):
    """The path that `fetch` returns."""
    code, output, errors = run(hub, tmp_path, call, **environment)
    assert code == 0, errors
    return Path(output)


def failure(hub, tmp_path, call=f"{REPOSITORY!r}", **environment):
    """The error that `fetch` raises."""
    code, _, errors = run(hub, tmp_path, call, **environment)
    assert code == 1
    return errors


def test_fetch_converts_caches_and_then_needs_no_network(hub, tmp_path):
    _, output, errors = run(hub, tmp_path, TQDM_POSITION="-1")  # shows the bar though stderr is no terminal
    path = Path(output)
    assert path == tmp_path / "cache" / "hub" / REPOSITORY.replace("/", "--") / f"{FIRST}.safetensors"
    assert "model.safetensors" in errors  # the progress bar
    checkpoint = open_checkpoint(path).checkpoint
    assert checkpoint.config == TINY
    assert checkpoint.source == f"{REPOSITORY}@{FIRST[:12]}"
    assert not any("README" in request[1] for request in hub.requests)

    hub.requests.clear()
    assert fetch(hub, tmp_path) == path
    assert fetch(hub, tmp_path, NUMPYESM_OFFLINE="1") == path
    narrow = fetch(hub, tmp_path, f"{REPOSITORY!r}, dtype='bf16'", HF_HUB_OFFLINE="1")  # from huggingface-hub's cache
    assert hub.requests == []
    assert narrow.name == f"{FIRST}-bf16.safetensors"
    assert load_checkpoint(narrow).precision == "bf16"


def test_no_progress_bar(hub, tmp_path):
    code, _, errors = run(hub, tmp_path, f"{REPOSITORY!r}, progress=False", TQDM_POSITION="-1")
    assert (code, errors) == (0, "")


def test_revisions(hub, tmp_path):
    hub.repositories[REPOSITORY][SECOND] = write_model(tmp_path / "newer", TINY, value=0.25)
    assert fetch(hub, tmp_path).name == f"{SECOND}.safetensors"
    older = fetch(hub, tmp_path, f"{REPOSITORY!r}, revision={FIRST!r}")
    assert older.name == f"{FIRST}.safetensors"
    assert load_checkpoint(older).array("final_norm.bias")[0] == 0.5
    assert "WeightsNotFound: the Hub has no" in failure(hub, tmp_path, f"{REPOSITORY!r}, revision='no-such-branch'")


def test_output_elsewhere(hub, tmp_path):
    target = tmp_path / "out" / "x.safetensors"
    assert fetch(hub, tmp_path, f"{REPOSITORY!r}, output={str(target)!r}") == target
    assert load_checkpoint(target).config == TINY


def test_shards(hub, tmp_path):
    """The index is fetched first, and says which files are."""
    served = tmp_path / "served"
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    tensors, _ = read_safetensors(served / "model.safetensors")
    (served / "model.safetensors").unlink()
    weight_map = {name: names[index % 2] for index, name in enumerate(tensors)}
    for shard in names:
        write_safetensors(served / shard, {k: t for k, t in tensors.items() if weight_map[k] == shard}, {})
    (served / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_safetensors(served / "model-00003-of-00003.safetensors", {}, {})
    assert load_checkpoint(fetch(hub, tmp_path)).config == TINY
    assert not hub.transfers("model-00003-of-00003.safetensors")
    (served / names[1]).unlink()
    error = failure(hub, tmp_path / "another")
    assert "WeightsNotFound: the Hub has no" in error


def test_a_dropped_connection_is_resumed(large_hub, tmp_path):
    large_hub.drop_once.add("model.safetensors")
    open_checkpoint(fetch(large_hub, tmp_path))
    first, second = large_hub.transfers("model.safetensors")
    half = (tmp_path / "served" / "model.safetensors").stat().st_size // 2
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= half


def test_a_killed_download_leaves_nothing_that_looks_whole(hub, tmp_path):
    hub.slow.add("model.safetensors")
    process = start(hub, tmp_path)
    while not hub.transfers("model.safetensors"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not [path for path in tmp_path.rglob("*.safetensors") if path.parent != tmp_path / "served"]
    hub.slow.clear()
    open_checkpoint(fetch(hub, tmp_path))
    assert len(hub.transfers("config.json")) == 1  # what was whole is kept


def test_corrupted_weights_are_refused_and_deleted(hub, tmp_path):
    hub.corrupt.add("model.safetensors")
    error = failure(hub, tmp_path)
    assert "CheckpointError" in error
    assert f"the download of {REPOSITORY} is damaged or was tampered with, and has been deleted" in error
    assert not [path for path in tmp_path.rglob("*.safetensors") if path.parent != tmp_path / "served"]
    hub.corrupt.clear()
    open_checkpoint(fetch(hub, tmp_path))


def test_official_names(hub, tmp_path):
    """35M has no checksum in our code; that of 8M is another than the Hub's here."""
    for preset, official in (("esm2-8m", "esm2_t6_8M_UR50D"), ("esm2-35m", "esm2_t12_35M_UR50D")):
        hub.repositories[f"facebook/{official}"] = {PINNED_COMMITS[preset]: tmp_path / "served"}
    assert "facebook/esm2_t6_8M_UR50D is damaged or was tampered with" in failure(hub, tmp_path, "'esm2-8m'")
    assert "is not esm2-35m but custom" in failure(hub, tmp_path, "")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))

    real = write_model(tmp_path / "35m", PRESETS["esm2-35m"])
    hub.repositories["facebook/esm2_t12_35M_UR50D"] = {PINNED_COMMITS["esm2-35m"]: real}
    shutil.rmtree(tmp_path / "hf-home")
    path = fetch(hub, tmp_path, "")
    assert path == tmp_path / "cache" / "esm2-35m.safetensors"
    assert fetch(hub, tmp_path, "'facebook/esm2_t12_35M_UR50D'", HF_HUB_OFFLINE="1") == path


def test_two_processes_at_once_download_once(hub, tmp_path):
    hub.slow.add("model.safetensors")
    processes = [start(hub, tmp_path) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    open_checkpoint(results[0][0].strip())
    assert len(hub.transfers("model.safetensors")) == 1


def test_an_adapter_is_kept_as_it_is_and_its_base_is_fetched(hub, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    tensors = {"lora_A": np.ones((2, 40), np.float32), "lora_B": np.ones((40, 2), np.float32)}
    prefix = "base_model.model.esm.encoder.layer.0.attention.self.query."
    named = {f"{prefix}{part}.weight": StoredTensor(array) for part, array in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", named, {"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": REPOSITORY, "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    hub.repositories["someone/lora"] = {FIRST: folder}
    call = "'someone/lora'), open_weights('someone/lora').array('layers.0.qkv.weight')[0, ::40].tolist("
    for offline in ("", "1"):
        assert str(fetch(hub, tmp_path, call, HF_HUB_OFFLINE=offline)).endswith(f"{FIRST} [2.5, 0.5, 0.5]")


@pytest.mark.parametrize("variable", ["NUMPYESM_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_makes_no_call(hub, tmp_path, variable):
    error = failure(hub, tmp_path, "'esm2-35m'", **{variable: "1"})
    assert "WeightsNotFound: esm2-35m is not in the cache" in error
    assert "dl.fbaipublicfiles.com" in error
    assert hub.requests == []


def test_no_network_names_the_ways_out(tmp_path):
    error = failure(None, tmp_path, "'esm2-35m'")
    assert "WeightsNotFound: the Hugging Face Hub cannot be reached for facebook/esm2_t12_35M_UR50D" in error
    assert "ways out" in error


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").touch()
    error = failure(hub, tmp_path, HF_HUB_CACHE=str(tmp_path / "file" / "below"))
    assert f"CheckpointError: {tmp_path / 'file'}" in error
    assert "HF_HOME names another cache" in error


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "WeightsNotFound: the Hub has no someone/else"),
        (["README.md"], "someone/else on the Hub has no model.safetensors"),
        (["adapter_config.json", "config.json"], "someone/else is a PEFT adapter"),
    ],
)
def test_repositories_that_are_no_model(hub, tmp_path, files, message):
    if files is not None:
        (tmp_path / "else").mkdir()
        for file in files:
            (tmp_path / "else" / file).write_text("{}")
        hub.repositories["someone/else"] = {FIRST: tmp_path / "else"}
    assert message in failure(hub, tmp_path, "'someone/else'")
