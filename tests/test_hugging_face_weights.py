"""Folders of transformers: what it writes itself, shards, config.json."""

from __future__ import annotations

import json

import numpy as np
import pytest

from numpyesm.errors import CheckpointError
from numpyesm.weights.load import load_checkpoint

mk = pytest.importorskip("make_checkpoints")
torch = mk.torch


@pytest.fixture(scope="module")
def model():
    return mk.fair_esm_model()


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(("gamma", "writer"), [(True, 4), (False, 4), (False, 5)])
def test_masked_lm(tmp_path, model, binary, gamma, writer):
    state = mk.hugging_face_state(model, gamma=gamma, writer=writer)
    state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    state["esm.embeddings.position_embeddings.weight"] = torch.ones(1026, 40)  # official files carry it, unused
    state["lm_head.decoder.weight"] = state["esm.embeddings.word_embeddings.weight"].clone()
    folder = mk.write_hugging_face(tmp_path / "hf", state, binary=binary)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.config == mk.TINY
    mk.expect_same_model(checkpoint, model)
    mk.expect_same_model(load_checkpoint(folder / ("pytorch_model.bin" if binary else "model.safetensors")), model)


@pytest.mark.parametrize(
    "kind", ["EsmForMaskedLM", "EsmModel", "EsmForSequenceClassification", "EsmForTokenClassification"]
)
def test_what_transformers_writes(tmp_path, model, kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.EsmConfig(**{k: v for k, v in mk.hugging_face_config().items() if k != "architectures"})
    theirs = getattr(transformers, kind)(config)
    prefix = "" if kind == "EsmModel" else "esm."
    theirs.load_state_dict(mk.hugging_face_state(model, prefix=prefix, writer=5), strict=False)
    theirs.save_pretrained(tmp_path / "hf")
    mk.expect_same_model(load_checkpoint(tmp_path / "hf"), model, lm_head=kind == "EsmForMaskedLM")


def test_mixed_dtypes_are_widened(tmp_path, model):
    state = mk.hugging_face_state(model)
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
def test_other_models_by_their_config(tmp_path, model, change):
    folder = mk.write_hugging_face(tmp_path / "hf", mk.hugging_face_state(model))
    if not isinstance(change, str):
        config = mk.hugging_face_config(**change)
        change = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "config.json").write_text(change)
    with pytest.raises(CheckpointError, match=r"config\.json|its configuration|even number of channels") as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_learned_positions_without_config(tmp_path, model):
    state = {k: v for k, v in mk.hugging_face_state(model).items() if "inv_freq" not in k}
    state["esm.embeddings.position_embeddings.weight"] = torch.ones(1026, 40)
    folder = mk.write_hugging_face(tmp_path / "hf", state)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="learned positions"):
        load_checkpoint(folder)
