"""fair-esm checkpoints into the canonical layout, bit for bit."""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from numpyesm.config import PRESETS
from numpyesm.errors import CheckpointError, WeightsNotFound
from numpyesm.weights.load import load_checkpoint

mk = pytest.importorskip("make_checkpoints")
torch = mk.torch

REGRESSION = Path(__file__).parent / "data" / "esm2_t12_35M_UR50D-contact-regression.pt"


@pytest.fixture(scope="module")
def model():
    return mk.fair_esm_model()


@pytest.mark.parametrize(
    "prefix", ["encoder.sentence_encoder.", "encoder.", "sentence_encoder.", "", "module.encoder."]
)
def test_prefixes(tmp_path, model, prefix):
    path = mk.write_fair_esm(tmp_path / "esm2_tiny.pt", model, prefix=prefix)
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == mk.TINY
    assert checkpoint.source == "esm2_tiny.pt"
    mk.expect_same_model(checkpoint, model)


def test_the_true_35m_shape_with_the_real_regression(tmp_path):
    model = mk.fair_esm_model(PRESETS["esm2-35m"])
    path = mk.write_fair_esm(tmp_path / "esm2_t12_35M_UR50D.pt", model, regression=False)
    checkpoint = load_checkpoint(path, regression=REGRESSION)
    assert checkpoint.config.name == "esm2-35m"
    assert np.count_nonzero(checkpoint.array("contact_head.weight")) == 61
    real = torch.load(REGRESSION, weights_only=True)["model"]
    model.load_state_dict(real, strict=False)
    mk.expect_same_model(checkpoint, model)


def test_fair_esm_itself_reads_our_test_file(tmp_path, model):
    """Otherwise the tests would only show that we read what we write."""
    path = mk.write_fair_esm(tmp_path / "esm2_tiny.pt", model)
    data = torch.load(path, weights_only=False)
    regression = torch.load(tmp_path / "esm2_tiny-contact-regression.pt", weights_only=False)
    loaded, _ = mk.esm.pretrained.load_model_and_alphabet_core("esm2_tiny", data, regression)
    mk.expect_same_model(load_checkpoint(path), loaded)


def test_without_regression_a_warning_and_no_contact_head(tmp_path, model):
    path = mk.write_fair_esm(tmp_path / "m.pt", model, regression=False)
    with pytest.warns(UserWarning, match="no contact regression"):
        checkpoint = load_checkpoint(path)
    mk.expect_same_model(checkpoint, model, contact_head=False)


def test_regression_inside_the_state_dict(tmp_path, model):
    torch.save({"cfg": mk.fair_esm_content(model)["cfg"], "model": model.state_dict()}, tmp_path / "m.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mk.expect_same_model(load_checkpoint(tmp_path / "m.pt"), model)


def test_args_instead_of_cfg(tmp_path, model):
    content = mk.fair_esm_content(model)
    arguments = Namespace(layers=2, embed_dim=40, attention_heads=20, arch="esm2")
    torch.save({"args": arguments, "model": content["model"]}, tmp_path / "m.pt")
    mk.write_regression(tmp_path / "m-contact-regression.pt", model)
    mk.expect_same_model(load_checkpoint(tmp_path / "m.pt"), model)


def test_bare_state_dict_of_a_published_shape(tmp_path):
    model = mk.fair_esm_model(PRESETS["esm2-8m"])
    torch.save(model.state_dict(), tmp_path / "m.pt")
    checkpoint = load_checkpoint(tmp_path / "m.pt")
    assert checkpoint.config.name == "esm2-8m"
    mk.expect_same_model(checkpoint, model)


def test_bare_state_dict_of_another_shape_lacks_its_heads(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="how many attention heads"):
        load_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(("dtype", "precision"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float64", "fp32")])
def test_storage_dtypes(tmp_path, dtype, precision):
    model = mk.fair_esm_model().to(getattr(torch, dtype))
    checkpoint = load_checkpoint(mk.write_fair_esm(tmp_path / "m.pt", model))
    assert checkpoint.precision == precision
    assert checkpoint.tensors["layers.0.ffn_norm.weight"].dtype == "F32"
    mk.expect_same_model(checkpoint, model.float())


def changed(tmp_path, model, change):
    content = mk.fair_esm_content(model)
    change(content["model"], vars(content["cfg"]["model"]))
    torch.save(content, tmp_path / "m.pt")
    mk.write_regression(tmp_path / "m-contact-regression.pt", model)
    return tmp_path / "m.pt"


P = "encoder.sentence_encoder."
CHANGES = {
    "missing tensor": (lambda s, c: s.pop(P + "layers.1.fc2.bias"), r"layers\.1\.fc2\.bias.*missing"),
    "missing layer": (lambda s, c: [s.pop(k) for k in list(s) if "layers.0." in k], "layer 0 is missing"),
    "missing head part": (lambda s, c: s.pop("encoder.lm_head.dense.bias"), "lm_head.dense.bias"),
    "wrong shape": (lambda s, c: s.update({P + "layers.1.fc2.bias": torch.ones(41)}), r"shape \(41,\)"),
    "wrong vocabulary": (lambda s, c: s.update({P + "embed_tokens.weight": torch.ones(35, 40)}), "35 tokens"),
    "nan": (lambda s, c: s[P + "layers.1.fc1.weight"].__setitem__((3, 4), float("nan")), r"NaN.*1\.fc1\.weight"),
    "infinity": (lambda s, c: s.update({P + "layers.0.fc1.bias": torch.full((160,), float("inf"))}), "infinite"),
    "untied": (lambda s, c: s.update({"encoder.lm_head.weight": torch.ones(33, 40)}), "not its embedding"),
    "unknown tensor": (lambda s, c: s.update({P + "layers.0.adapter.weight": torch.ones(2)}), "adapter.*not part"),
    "learned positions": (lambda s, c: s.update({P + "embed_positions.weight": torch.ones(2, 2)}), "ESM-1b"),
    "msa": (lambda s, c: s.update({P + "layers.0.row_self_attention.layer.q_proj.weight": torch.ones(2)}), "MSA"),
    "esm-1b by name": (lambda s, c: c.update(arch="roberta_large"), "ESM-1b"),
    "other depth": (lambda s, c: c.update(encoder_layers=3), "num_layers=3"),
    "other heads": (lambda s, c: c.update(encoder_attention_heads=7), "even number of channels"),
    "heads of another type": (lambda s, c: c.update(encoder_attention_heads="20"), "not made of numbers"),
    "no token dropout": (lambda s, c: c.update(token_dropout=False), "token dropout"),
    "integers": (lambda s, c: s.update({P + "layers.0.fc1.bias": torch.ones(160, dtype=torch.long)}), "stored as I64"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_checkpoints_are_one_sentence(tmp_path, name):
    change, message = CHANGES[name]
    path = changed(tmp_path, mk.fair_esm_model(), change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "m.pt" in str(caught.value)


def test_layer_numbers_without_bound(tmp_path, model):
    path = changed(tmp_path, model, lambda s, c: s.update({P + "layers.999999.fc1.bias": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="layer 2 is missing"):
        load_checkpoint(path)


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
