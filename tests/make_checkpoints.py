"""Checkpoints in the exact formats of fair-esm and Hugging Face, made with their own code. Needs torch and fair-esm."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numpyesm.config import ModelConfig

torch = pytest.importorskip("torch")
esm = pytest.importorskip("esm")

TINY = ModelConfig(num_layers=2, embed_dim=40, num_heads=20, ffn_dim=160)

# Hugging Face's name for each part of fair-esm's, within a layer.
HF_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}


def fair_esm_model(config: ModelConfig = TINY, seed: int = 0) -> Any:
    """fair-esm's own model with random numbers everywhere, also where it would start with zeros and ones."""
    torch.manual_seed(seed)
    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    model = esm.model.esm2.ESM2(config.num_layers, config.embed_dim, config.num_heads, alphabet).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return with_half_precision_frequencies(model)


def with_half_precision_frequencies(model: Any) -> Any:
    """`model`, its rotary buffers rounded to half precision as those of the official checkpoints are."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.half())
    return model


def fair_esm_content(model: Any, *, prefix: str = "encoder.sentence_encoder.", **arguments: Any) -> dict[str, Any]:
    """What the official `.pt` holds: names with prefixes, no contact head, a Namespace."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("contact_head"):
            head = prefix.replace("sentence_encoder.", "") if name.startswith("lm_head") else prefix
            state[head + name] = tensor
    namespace = Namespace(
        arch="esm2",
        encoder_layers=model.num_layers,
        encoder_embed_dim=model.embed_dim,
        encoder_attention_heads=model.attention_heads,
        token_dropout=True,
        **arguments,
    )
    return {"cfg": {"model": namespace, "task": Namespace(mask_idx=32)}, "model": state}


def write_fair_esm(path: Path, model: Any, *, regression: bool = True, **options: Any) -> Path:
    """An official-looking `.pt`, with its regression beside it."""
    torch.save(fair_esm_content(model, **options), path)
    if regression:
        write_regression(path.with_name(f"{path.stem}-contact-regression.pt"), model)
    return path


def write_regression(path: Path, model: Any) -> Path:
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("contact_head")}
    torch.save({"model": state}, path)
    return path


def hugging_face_state(model: Any, *, prefix: str = "esm.", gamma: bool = False, writer: int = 4) -> dict[str, Any]:
    """The tensors of a fair-esm model under the names that transformers 4 or 5 gives them."""
    state: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if name == "embed_tokens.weight":
            state[prefix + "embeddings.word_embeddings.weight"] = tensor
        elif name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            if "inv_freq" in rest:
                layer = f"encoder.layer.{index}.attention.self." if writer == 4 else ""
                key = f"{prefix}{layer}rotary_embeddings.inv_freq"
            else:
                if gamma and "norm" in part:
                    kind = {"weight": "gamma", "bias": "beta"}[kind]
                key = f"{prefix}encoder.layer.{index}.{HF_LAYER[part]}.{kind}"
            state[key] = tensor
        elif name.startswith("emb_layer_norm_after"):
            state[f"{prefix}encoder.{name}"] = tensor
        elif name.startswith("contact_head"):
            state[prefix + name] = tensor
        elif name != "lm_head.weight":
            state[name] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def hugging_face_config(config: ModelConfig = TINY, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_dim,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "token_dropout": True,
        "vocab_size": 33,
        "mask_token_id": 32,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-05,
        "is_folding_model": False,
    } | changes


def write_hugging_face(
    folder: Path, state: dict[str, Any], config: dict[str, Any] | None = None, *, binary: bool = False
) -> Path:
    """A Hugging Face folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or hugging_face_config()))
    if binary:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def expect_same_model(checkpoint: Any, model: Any, *, lm_head: bool = True, contact_head: bool = True) -> None:
    """Every tensor of the canonical checkpoint is, bit for bit, the one of the fair-esm model."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    parts = {"final_norm": ["emb_layer_norm_after"]}
    for layer in range(model.num_layers):
        ours = theirs = f"layers.{layer}."
        parts |= {
            f"{ours}qkv": [f"{theirs}self_attn.{name}_proj" for name in "qkv"],
            f"{ours}attention_norm": [f"{theirs}self_attn_layer_norm"],
            f"{ours}ffn_norm": [f"{theirs}final_layer_norm"],
            f"{ours}out_proj": [f"{theirs}self_attn.out_proj"],
            f"{ours}fc1": [f"{theirs}fc1"],
            f"{ours}fc2": [f"{theirs}fc2"],
        }
    if lm_head:
        parts |= {"lm_head.dense": ["lm_head.dense"], "lm_head.norm": ["lm_head.layer_norm"]}
    expected = {
        f"{ours}.{kind}": np.concatenate([state[f"{name}.{kind}"] for name in theirs]).T
        for ours, theirs in parts.items()
        for kind in ("weight", "bias")
    }
    expected["embed_tokens.weight"] = state["embed_tokens.weight"]
    expected["rotary.frequencies"] = state["layers.0.self_attn.rot_emb.inv_freq"]
    if lm_head:
        expected["lm_head.bias"] = state["lm_head.bias"]
    if contact_head:
        expected["contact_head.weight"] = state["contact_head.regression.weight"][0]
        expected["contact_head.bias"] = state["contact_head.regression.bias"]
    found = {name for name in checkpoint.tensors if not name.startswith(("input_means.", "classifier."))}
    assert found == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint.array(name), values, err_msg=name)
