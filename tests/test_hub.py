"""`fetch` against a small Hub on loopback. Each run is a process: huggingface-hub reads HF_ENDPOINT when imported."""

from __future__ import annotations

import json
import os
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
from numpyesm.weights.safetensors_file import write_safetensors
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
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip


def run(*arguments, **options):
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output.strip(), errors


def test_fetch_converts_caches_and_then_needs_no_network(hub, tmp_path):
    code, output, errors = run(hub, tmp_path, TQDM_POSITION="-1")  # shows the bar though stderr is no terminal
    assert code == 0, errors
    path = Path(output)
    assert path == tmp_path / "cache" / "hub" / REPOSITORY.replace("/", "--") / f"{FIRST}.safetensors"
    open_checkpoint(path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == TINY
    assert checkpoint.source == f"{REPOSITORY}@{FIRST[:12]}"
    assert not any("README" in request[1] for request in hub.requests)
    assert "model.safetensors" in errors  # the progress bar
    assert not list((tmp_path / "cache" / "downloads").glob("*/*"))

    hub.requests.clear()
    assert run(hub, tmp_path)[:2] == (0, output)
    assert run(hub, tmp_path, NUMPYESM_OFFLINE="1")[:2] == (0, output)
    assert hub.requests == []

    code, output, errors = run(hub, tmp_path, f"{REPOSITORY!r}, dtype='bf16', progress=False", TQDM_POSITION="-1")
    assert output.endswith(f"{FIRST}-bf16.safetensors")
    assert "model.safetensors" not in errors
    assert load_checkpoint(output).precision == "bf16"


def test_revisions(hub, tmp_path):
    hub.repositories[REPOSITORY][SECOND] = write_model(tmp_path / "newer", TINY, value=0.25)
    assert run(hub, tmp_path)[1].endswith(f"{SECOND}.safetensors")
    code, output, _ = run(hub, tmp_path, f"{REPOSITORY!r}, revision={FIRST!r}")
    assert output.endswith(f"{FIRST}.safetensors")
    assert load_checkpoint(output).array("final_norm.bias")[0] == 0.5
    code, _, errors = run(hub, tmp_path, f"{REPOSITORY!r}, revision='no-such-branch'")
    assert code == 1
    assert "WeightsNotFound: the Hub has no" in errors


def test_output_elsewhere(hub, tmp_path):
    target = tmp_path / "out" / "x.safetensors"
    code, output, errors = run(hub, tmp_path, f"{REPOSITORY!r}, output={str(target)!r}")
    assert (code, output) == (0, str(target)), errors
    assert load_checkpoint(target).config == TINY


def test_a_dropped_connection_is_resumed(large_hub, tmp_path):
    large_hub.drop_once.add("model.safetensors")
    code, output, errors = run(large_hub, tmp_path)
    assert code == 0, errors
    open_checkpoint(output)
    first, second = large_hub.transfers("model.safetensors")
    half = (tmp_path / "served" / "model.safetensors").stat().st_size // 2
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= half


def test_a_killed_download_goes_on_in_the_next_run(large_hub, tmp_path):
    large_hub.slow.add("model.safetensors")
    process = start(large_hub, tmp_path)
    deadline = time.monotonic() + 60
    partial = (
        tmp_path / "cache" / "downloads" / f"{REPOSITORY.replace('/', '--')}-{FIRST[:12]}" / "model.safetensors.part"
    )
    while not (partial.exists() and partial.stat().st_size > 1_000_000):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    large_hub.slow.clear()
    code, output, errors = run(large_hub, tmp_path)
    assert code == 0, errors
    open_checkpoint(output)
    assert int(large_hub.transfers("model.safetensors")[-1].removeprefix("bytes=").rstrip("-")) > 1_000_000


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_corrupted_content_is_refused_and_deleted(hub, tmp_path, file):
    hub.corrupt.add(file)
    code, _, errors = run(hub, tmp_path)
    assert code == 1
    assert f"CheckpointError: {file} of {REPOSITORY} has a wrong checksum" in errors
    assert not list((tmp_path / "cache").rglob(f"{file}*"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.corrupt.clear()
    assert run(hub, tmp_path)[0] == 0


def test_an_official_name_with_other_content_is_refused(hub, tmp_path):
    """The Hub's own checksum fits, the one in our code does not."""
    hub.repositories["facebook/esm2_t6_8M_UR50D"] = {PINNED_COMMITS["esm2-8m"]: tmp_path / "served"}
    code, _, errors = run(hub, tmp_path, "'esm2-8m'")
    assert code == 1
    assert "CheckpointError: model.safetensors of facebook/esm2_t6_8M_UR50D has a wrong checksum" in errors


def test_35m_by_its_name(hub, tmp_path):
    commit = PINNED_COMMITS["esm2-35m"]
    hub.repositories["facebook/esm2_t12_35M_UR50D"] = {commit: write_model(tmp_path / "35m", PRESETS["esm2-35m"])}
    code, output, errors = run(hub, tmp_path, "")
    assert (code, output) == (0, str(tmp_path / "cache" / "esm2-35m.safetensors")), errors
    assert load_checkpoint(output).config.name == "esm2-35m"
    hub.requests.clear()
    assert run(hub, tmp_path, "'facebook/esm2_t12_35M_UR50D'", HF_HUB_OFFLINE="1")[:2] == (0, output)
    assert hub.requests == []


def test_another_model_under_an_official_name(hub, tmp_path):
    hub.repositories["facebook/esm2_t12_35M_UR50D"] = {PINNED_COMMITS["esm2-35m"]: tmp_path / "served"}
    code, _, errors = run(hub, tmp_path, "'esm2-35m'")
    assert code == 1
    assert "is not esm2-35m but custom" in errors
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_two_processes_at_once_download_once(hub, tmp_path):
    hub.slow.add("model.safetensors")
    processes = [start(hub, tmp_path) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    open_checkpoint(results[0][0].strip())
    assert len(hub.transfers("model.safetensors")) == 1


@pytest.mark.parametrize("variable", ["NUMPYESM_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_makes_no_call(hub, tmp_path, variable):
    code, _, errors = run(hub, tmp_path, "'esm2-35m'", **{variable: "1"})
    assert code == 1
    assert "WeightsNotFound" in errors
    assert "dl.fbaipublicfiles.com" in errors
    assert hub.requests == []


def test_no_network_fails_quickly_and_names_the_ways_out(tmp_path):
    begin = time.monotonic()
    code, _, errors = run(None, tmp_path, "'esm2-35m'")
    assert time.monotonic() - begin < 15
    assert code == 1
    assert "WeightsNotFound: the Hugging Face Hub cannot be reached for facebook/esm2_t12_35M_UR50D" in errors
    assert "ways out" in errors


def test_repositories_that_are_no_model(hub, tmp_path):
    code, _, errors = run(hub, tmp_path, "'someone/nothing'")
    assert code == 1
    assert "WeightsNotFound: the Hub has no someone/nothing" in errors
    for name, files, message in (
        ("text", ["README.md"], "has no model.safetensors"),
        ("adapter", ["adapter_config.json", "config.json"], "PEFT adapter"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in files:
            (folder / file).write_text("{}")
        hub.repositories[f"someone/{name}"] = {FIRST: folder}
        code, _, errors = run(hub, tmp_path, f"'someone/{name}'")
        assert code == 1
        assert message in errors
