"""Files of fair-esm and folders of transformers: what they write themselves, what is beside the tensors, shards."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numpyesm.config import ModelConfig
from numpyesm.errors import CheckpointError, WeightsNotFound
from numpyesm.weights import convert, load_checkpoint, save_canonical
from numpyesm.weights.synthetic import random_checkpoint

mk = pytest.importorskip("make_checkpoints")
torch = mk.torch
pytestmark = pytest.mark.usefixtures("quick_calibration")

REGRESSION = Path(__file__).parent / "data" / "esm2_t12_35M_UR50D-contact-regression.pt"
SIX = ModelConfig(num_layers=6, embed_dim=160, num_heads=20, ffn_dim=640)


# -- fair-esm --------------------------------------------------------------------------------------------------------


def test_the_real_regression(tmp_path: Path) -> None:
    model = mk.fair_esm_model(ModelConfig(12, 40, 20, 160))
    path = mk.write_fair_esm(tmp_path / "m.pt", model, regression=False)
    checkpoint = load_checkpoint(path, regression=REGRESSION)
    assert np.count_nonzero(checkpoint.array("contact_head.weight")) == 61
    model.load_state_dict(torch.load(REGRESSION, weights_only=True)["model"], strict=False)
    mk.expect_same_model(checkpoint, model)


def test_fair_esm_itself_reads_our_test_file(tmp_path: Path) -> None:
    """Otherwise the tests would only show that we read what we write."""
    path = mk.write_fair_esm(tmp_path / "esm2_tiny.pt", mk.MODEL)
    data = torch.load(path, weights_only=False)
    regression = torch.load(tmp_path / "esm2_tiny-contact-regression.pt", weights_only=False)
    loaded, _ = mk.esm.pretrained.load_model_and_alphabet_core("esm2_tiny", data, regression)
    mk.expect_same_model(load_checkpoint(path), loaded)


@pytest.mark.parametrize(("dtype", "precision"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float64", "fp32")])
def test_storage_dtypes(tmp_path: Path, dtype: str, precision: str) -> None:
    model = mk.fair_esm_model().to(getattr(torch, dtype))
    checkpoint = load_checkpoint(mk.write_fair_esm(tmp_path / "m.pt", model))
    assert checkpoint.precision == precision
    assert checkpoint.tensors["layers.0.ffn_norm.weight"].dtype == "F32"
    mk.expect_same_model(checkpoint, model.float())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("encoder_layers", 3, "num_layers=2, its configuration says 3"),
        ("encoder_embed_dim", 80, "embed_dim=40, its configuration says 80"),
        ("encoder_attention_heads", 7, "even number of channels"),
        ("encoder_attention_heads", "20", "does not give num_heads as a number"),
        ("token_dropout", False, "token dropout"),
    ],
)
def test_configurations_of_fair_esm_that_contradict(tmp_path: Path, field: str, value: Any, message: str) -> None:
    content = mk.fair_esm_content(mk.MODEL)
    setattr(content["cfg"]["model"], field, value)
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=rf"m\.pt.*{message}"):
        load_checkpoint(tmp_path / "m.pt")


def test_regression_of_another_model(tmp_path: Path) -> None:
    path = mk.write_fair_esm(tmp_path / "m.pt", mk.MODEL)
    with pytest.raises(CheckpointError, match="contact regression of another model"):
        load_checkpoint(path, regression=REGRESSION)
    with pytest.raises(CheckpointError, match="not a contact regression"):
        load_checkpoint(path, regression=path)
    with pytest.raises(WeightsNotFound, match="does not exist"):
        load_checkpoint(path, regression=tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="only a contact regression"):
        load_checkpoint(REGRESSION)


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(("gamma", "writer"), [(True, 4), (False, 4), (False, 5)])
def test_masked_lm(tmp_path: Path, binary: bool, gamma: bool, writer: int) -> None:
    state = mk.hugging_face_state(mk.MODEL, gamma=gamma, writer=writer)
    state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    state["esm.embeddings.position_embeddings.weight"] = torch.ones(1026, 40)  # official files carry it, unused
    state["lm_head.decoder.weight"] = state["esm.embeddings.word_embeddings.weight"].clone()
    folder = mk.write_hugging_face(tmp_path / "hf", state, binary=binary)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.config == mk.TINY
    mk.expect_same_model(checkpoint, mk.MODEL)
    mk.expect_same_model(load_checkpoint(folder / ("pytorch_model.bin" if binary else "model.safetensors")), mk.MODEL)


@pytest.mark.parametrize(
    "kind", ["EsmForMaskedLM", "EsmModel", "EsmForSequenceClassification", "EsmForTokenClassification"]
)
def test_what_transformers_writes(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.EsmConfig(**{k: v for k, v in mk.hugging_face_config().items() if k != "architectures"})
    theirs = getattr(transformers, kind)(config)
    prefix = "" if kind == "EsmModel" else "esm."
    theirs.load_state_dict(mk.hugging_face_state(mk.MODEL, prefix=prefix, writer=5), strict=False)
    theirs.save_pretrained(tmp_path / "hf")
    mk.expect_same_model(load_checkpoint(tmp_path / "hf"), mk.MODEL, lm_head=kind == "EsmForMaskedLM")


def test_mixed_dtypes_are_widened(tmp_path: Path) -> None:
    state = mk.hugging_face_state(mk.MODEL)
    name = "esm.encoder.layer.0.output.dense.weight"
    state[name] = state[name].half()
    checkpoint = load_checkpoint(mk.write_hugging_face(tmp_path / "hf", state))
    assert checkpoint.precision == "fp32"
    np.testing.assert_array_equal(checkpoint.array("layers.0.fc2.weight"), state[name].float().numpy().T)


@pytest.mark.parametrize(
    "change",
    [
        {"position_embedding_type": "absolute"},
        {"emb_layer_norm_before": True},
        {"token_dropout": False},
        {"vocab_size": 32},
        {"mask_token_id": 4},
        {"layer_norm_eps": 1e-12},
        {"rope_theta": 500000.0},
        {"rope_parameters": {"rope_theta": 1.0}},
        {"is_folding_model": True},
        {"is_decoder": True},
        {"num_hidden_layers": 3},
        {"hidden_size": 80},
        {"intermediate_size": 80},
        {"num_attention_heads": 3},
        {"num_attention_heads": "20"},
        {"layer_norm_eps": [1e-5]},
        # Absent keys mean what transformers takes them for.
        *({key: None} for key in ("position_embedding_type", "token_dropout", "mask_token_id", "layer_norm_eps")),
        *("", "{", "[]", "null", "[" * 100_000),
    ],
)
def test_other_models_by_their_config(tmp_path: Path, change: dict[str, Any] | str) -> None:
    folder = mk.write_hugging_face(tmp_path / "hf", mk.hugging_face_state(mk.MODEL))
    if not isinstance(change, str):
        config = mk.hugging_face_config(**change)
        change = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "config.json").write_text(change)
    with pytest.raises(CheckpointError, match=r"config\.json|its configuration|even number of channels") as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_shards(tmp_path: Path, ending: str) -> None:
    state = mk.hugging_face_state(mk.MODEL)
    folder = mk.write_hugging_face(tmp_path / "hf", state, binary=ending == "bin", shard_size=60_000)
    mk.expect_same_model(load_checkpoint(folder), mk.MODEL)
    mk.expect_same_model(convert(folder, tmp_path / "c.safetensors").checkpoint, mk.MODEL)

    (index,) = folder.glob("*.index.json")
    content = index.read_text()
    weight_map = json.loads(content)["weight_map"]
    for change, message in (
        ({"more": "model.bin"}, "is incomplete: model.bin, which .* names, is missing"),
        ({"more": weight_map["lm_head.bias"]}, "'more' is in none of its files"),
        ({"x": "../../etc/passwd"}, "outside its folder"),
        ({"x": "a\0b"}, "cannot exist"),
        ({"x": "\ud800"}, "cannot exist"),
        ({"x": 3}, "not an index of weights"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map | change}))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)
    index.write_text(content)

    (second,) = folder.glob("*-00002-of-00003.*")
    second.unlink()
    with pytest.raises(CheckpointError, match=f"hf is incomplete: {second.name}, which .* names, is missing"):
        convert(folder, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


# -- models of 3B and 15B --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as fair-esm writes large ones, in shards, and as a canonical file."""
    folder = tmp_path_factory.mktemp("large")
    model = mk.fair_esm_model(SIX)
    config, state = mk.hugging_face_config(SIX), mk.hugging_face_state(model)
    mk.write_hugging_face(folder / "hf", state, config, binary=True, shard_size="3MB")
    mk.write_fair_esm(folder / "m.pt", model.half())
    save_canonical(folder / "canonical.safetensors", random_checkpoint(SIX))
    return folder


@pytest.mark.parametrize(
    ("source", "precision"), [("m.pt", "fp32"), ("hf", "bf16"), ("hf", "int8"), ("canonical.safetensors", "fp16")]
)
@pytest.mark.slow
def test_conversion_holds_a_few_matrices_at_a_time(large: Path, tmp_path: Path, source: str, precision: str) -> None:
    half_of_the_model = SIX.num_layers // 2 * 12 * SIX.embed_dim**2 * 4
    # Of the inputs of one matrix in float32, and two of them in float64, in which NumPy factors them.
    correlations = 5 * SIX.ffn_dim**2 * 4 if precision in ("bf16", "int8") else 0
    tracemalloc.start()
    try:
        convert(large / source, tmp_path / "c.safetensors", dtype=precision)
        assert tracemalloc.get_traced_memory()[1] < half_of_the_model + correlations
    finally:
        tracemalloc.stop()
