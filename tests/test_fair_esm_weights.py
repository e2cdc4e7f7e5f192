"""Files of fair-esm: what stands beside the tensors, and the contact regression."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from numpyesm.config import ModelConfig
from numpyesm.errors import CheckpointError, WeightsNotFound
from numpyesm.weights.load import load_checkpoint

mk = pytest.importorskip("make_checkpoints")
torch = mk.torch

REGRESSION = Path(__file__).parent / "data" / "esm2_t12_35M_UR50D-contact-regression.pt"


@pytest.fixture(scope="module")
def model():
    return mk.fair_esm_model()


def test_the_real_regression(tmp_path):
    model = mk.fair_esm_model(ModelConfig(12, 40, 20, 160))
    path = mk.write_fair_esm(tmp_path / "m.pt", model, regression=False)
    checkpoint = load_checkpoint(path, regression=REGRESSION)
    assert np.count_nonzero(checkpoint.array("contact_head.weight")) == 61
    model.load_state_dict(torch.load(REGRESSION, weights_only=True)["model"], strict=False)
    mk.expect_same_model(checkpoint, model)


def test_fair_esm_itself_reads_our_test_file(tmp_path, model):
    """Otherwise the tests would only show that we read what we write."""
    path = mk.write_fair_esm(tmp_path / "esm2_tiny.pt", model)
    data = torch.load(path, weights_only=False)
    regression = torch.load(tmp_path / "esm2_tiny-contact-regression.pt", weights_only=False)
    loaded, _ = mk.esm.pretrained.load_model_and_alphabet_core("esm2_tiny", data, regression)
    mk.expect_same_model(load_checkpoint(path), loaded)


@pytest.mark.parametrize(("dtype", "precision"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float64", "fp32")])
def test_storage_dtypes(tmp_path, dtype, precision):
    model = mk.fair_esm_model().to(getattr(torch, dtype))
    checkpoint = load_checkpoint(mk.write_fair_esm(tmp_path / "m.pt", model))
    assert checkpoint.precision == precision
    assert checkpoint.tensors["layers.0.ffn_norm.weight"].dtype == "F32"
    mk.expect_same_model(checkpoint, model.float())


CONFIGURATIONS = {
    "other depth": ({"encoder_layers": 3}, "num_layers=2, its configuration says 3"),
    "other width": ({"encoder_embed_dim": 80}, "embed_dim=40, its configuration says 80"),
    "other heads": ({"encoder_attention_heads": 7}, "even number of channels"),
    "heads of another type": ({"encoder_attention_heads": "20"}, "does not give num_heads as a number"),
    "no token dropout": ({"token_dropout": False}, "token dropout"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_that_contradict(tmp_path, model, name):
    change, message = CONFIGURATIONS[name]
    content = mk.fair_esm_content(model)
    vars(content["cfg"]["model"]).update(change)
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "m.pt")
    assert "m.pt" in str(caught.value)


def test_regression_of_another_model(tmp_path, model):
    path = mk.write_fair_esm(tmp_path / "m.pt", model)
    with pytest.raises(CheckpointError, match="contact regression of another model"):
        load_checkpoint(path, regression=REGRESSION)
    with pytest.raises(CheckpointError, match="not a contact regression"):
        load_checkpoint(path, regression=path)
    with pytest.raises(WeightsNotFound, match="does not exist"):
        load_checkpoint(path, regression=tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="only a contact regression"):
        load_checkpoint(REGRESSION)


def test_esm_1b_itself(tmp_path):
    arguments = Namespace(
        arch="roberta_large", layers=1, embed_dim=40, ffn_embed_dim=80, attention_heads=2, max_positions=64,
        emb_layer_norm_before=True, logit_bias=True, token_dropout=True, final_bias=True, max_tokens=64,
    )  # fmt: skip
    model = mk.esm.ProteinBertModel(arguments, mk.esm.Alphabet.from_architecture("roberta_large"))
    torch.save({"args": arguments, "model": model.state_dict()}, tmp_path / "esm1b.pt")
    with pytest.raises(CheckpointError, match="ESM-1b"):
        load_checkpoint(tmp_path / "esm1b.pt")
