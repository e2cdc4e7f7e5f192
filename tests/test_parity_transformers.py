"""Agreement with transformers' EsmForMaskedLM, through a Hugging Face folder that it wrote itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_sequence

from numpyesm import ESM2
from numpyesm.config import PRESETS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fair_esm_models import largest, tokens_of  # noqa: E402
from make_checkpoints import with_half_precision_frequencies  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ESM2]:
    """(EsmForMaskedLM, numpyesm loaded from its folder)"""
    shape = PRESETS["esm2-35m"]
    torch.manual_seed(5)
    config = transformers.EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=shape.embed_dim,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, intermediate_size=shape.ffn_dim,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=1026,
        position_embedding_type="rotary", emb_layer_norm_before=False, token_dropout=True, layer_norm_eps=1e-5,
        is_folding_model=False,
    )  # fmt: skip
    model = transformers.EsmForMaskedLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query" in name or "key" in name:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
            elif "contact_head" in name:
                parameter.normal_(0, 3)
    folder = tmp_path_factory.mktemp("hugging-face") / "esm2"
    with_half_precision_frequencies(model).save_pretrained(folder)
    return model, ESM2.from_pretrained(folder, backend="numpy", threads=2)


@pytest.mark.parametrize("length", [1, 33, 257])
def test_logits_representations_and_contacts(models: tuple[Any, ESM2], length: int) -> None:
    theirs, ours = models
    sequence = random_sequence(length, 3)
    tokens = tokens_of([sequence])
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
        contacts = theirs.predict_contacts(tokens, torch.ones_like(tokens))
    found = ours.encode([sequence], [0, 5, 12], ["per_token", "logits", "contacts"])[0]
    for layer in (0, 5, 12):
        assert largest(found.per_token_embeddings[layer], expected.hidden_states[layer][0, 1:-1]) < 1e-4
    assert largest(found.logits, expected.logits[0, 1:-1, 4:24]) < 1e-4
    assert largest(found.contacts, contacts[0]) < 1e-4


def test_masks(models: tuple[Any, ESM2]) -> None:
    theirs, ours = models
    sequence = "MKT<mask>AYIAK<mask>RQ"
    with torch.no_grad():
        expected = theirs(tokens_of([sequence])).logits[0, 1:-1, 4:24].numpy()
    np.testing.assert_allclose(ours.predict([sequence])[0].logits, expected, atol=1e-4)


def test_converted_file_gives_the_same_numbers(models: tuple[Any, ESM2], tmp_path: Path) -> None:
    ours = models[1]
    ours.save(tmp_path / "x.safetensors")
    again = ESM2.from_pretrained(tmp_path / "x.safetensors", backend="numpy", threads=2)
    sequence = random_sequence(50)
    np.testing.assert_array_equal(
        again.encode([sequence], include=["logits"])[0].logits, ours.encode([sequence], include=["logits"])[0].logits
    )
