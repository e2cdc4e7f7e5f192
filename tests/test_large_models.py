"""Models of 3B and 15B: presets, half-precision files of fair-esm, shards, and conversion that streams."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from numpyesm.config import ModelConfig
from numpyesm.errors import CheckpointError
from numpyesm.weights import convert, load_checkpoint
from numpyesm.weights.canonical import save_canonical
from numpyesm.weights.synthetic import random_checkpoint

mk = pytest.importorskip("make_checkpoints")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("quick_calibration")

TINY = mk.TINY
SIX = ModelConfig(num_layers=6, embed_dim=160, num_heads=20, ffn_dim=640)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as fair-esm writes large ones, and in shards."""
    folder = tmp_path_factory.mktemp("sources")
    model = mk.fair_esm_model(SIX)
    write_shards(folder / "hf", model, "bin", SIX)
    mk.write_fair_esm(folder / "m.pt", model.half())
    save_canonical(folder / "canonical.safetensors", random_checkpoint(SIX))
    return folder


def write_shards(folder: Path, model: object, ending: str, config: ModelConfig = TINY) -> Path:
    """As transformers shards large models: three files, and an index that says which tensor is where."""
    from safetensors.torch import save_file

    state = mk.hugging_face_state(model)
    stem = "pytorch_model" if ending == "bin" else "model"
    names = [f"{stem}-{number:05}-of-00003.{ending}" for number in (1, 2, 3)]
    weight_map = {name: names[index * 3 // len(state)] for index, name in enumerate(state)}
    folder.mkdir()
    for shard in names:
        part = {name: tensor for name, tensor in state.items() if weight_map[name] == shard}
        torch.save(part, folder / shard) if ending == "bin" else save_file(part, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(mk.hugging_face_config(config)))
    return folder


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_shards(tmp_path: Path, ending: str) -> None:
    model = mk.fair_esm_model()
    folder = write_shards(tmp_path / "hf", model, ending)
    mk.expect_same_model(load_checkpoint(folder), model)
    mk.expect_same_model(convert(folder, tmp_path / "c.safetensors").checkpoint, model)

    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    for change, message in (
        ({"more": "model.bin"}, "is incomplete: model.bin, which .* names, is missing"),
        ({"more": content["weight_map"]["lm_head.bias"]}, "'more' is in none of its files"),
        ({"x": "../../etc/passwd"}, "outside its folder"),
        ({"x": "a\0b"}, "cannot exist"),
        ({"x": "\ud800"}, "cannot exist"),
        ({"x": 3}, "not an index of weights"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)
    index.write_text(json.dumps(content))

    second = next(folder.glob(f"*-00002-of-00003.{ending}"))
    second.unlink()
    output = tmp_path / "none.safetensors"
    with pytest.raises(
        CheckpointError, match=rf"hf is incomplete: {second.name}, which .*index\.json names, is missing"
    ):
        convert(folder, output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("source", "precision"), [("m.pt", "fp32"), ("hf", "bf16"), ("hf", "int8"), ("canonical.safetensors", "fp16")]
)
@pytest.mark.slow
def test_conversion_holds_a_few_matrices_at_a_time(sources: Path, tmp_path: Path, source: str, precision: str) -> None:
    half_of_the_model = SIX.num_layers // 2 * 12 * SIX.embed_dim**2 * 4
    # Of the inputs of one matrix in float32, and two of them in float64, in which NumPy factors them.
    correlations = 5 * SIX.ffn_dim**2 * 4 if precision in ("bf16", "int8") else 0
    tracemalloc.start()
    try:
        convert(sources / source, tmp_path / "c.safetensors", dtype=precision)
        assert tracemalloc.get_traced_memory()[1] < half_of_the_model + correlations
    finally:
        tracemalloc.stop()


def test_progress_of_a_conversion(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    save_canonical(tmp_path / "c.safetensors", random_checkpoint(TINY), progress=lambda *step: steps.append(step))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
