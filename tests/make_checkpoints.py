"""Checkpoints in the exact formats of fair-esm and Hugging Face, made with their own code. Needs torch and fair-esm."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained_weights import HUGGING_FACE_NAMES, renamed

from numpyesm.config import ModelConfig
from numpyesm.weights import load_checkpoint
from numpyesm.weights.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
esm = pytest.importorskip("esm")

ALPHABET = esm.data.Alphabet.from_architecture("ESM-1b")
TINY = ModelConfig(num_layers=2, embed_dim=40, num_heads=20, ffn_dim=160)

# numpyesm's name for each part of fair-esm's.
CANONICAL_NAMES = {
    "emb_layer_norm_after": "final_norm",
    "self_attn_layer_norm": "attention_norm",
    "final_layer_norm": "ffn_norm",
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.out_proj": "out_proj",
    "lm_head.layer_norm": "lm_head.norm",
    "contact_head.regression": "contact_head",
}


def with_half_precision_frequencies(model: Any) -> Any:
    """`model`, its rotary buffers rounded to half precision as those of the official checkpoints are."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.half())
    return model


def fair_esm_model(config: ModelConfig = TINY, seed: int = 0, sharpness: float = 1.0) -> Any:
    """fair-esm's own model with random numbers everywhere, also where it would start with zeros and ones.

    `sharpness` multiplies query and key weights; above 1, contact coefficients are drawn, too, so that attention peaks
    and contacts spread over 0 to 1.
    """
    torch.manual_seed(seed)
    model = esm.model.esm2.ESM2(config.num_layers, config.embed_dim, config.num_heads, ALPHABET).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(sharpness)
            elif sharpness > 1 and name == "contact_head.regression.weight":
                parameter.normal_(0, 4).mul_(torch.rand_like(parameter) < 0.25)
        if sharpness > 1:
            model.contact_head.regression.bias.fill_(-1.0)
    return with_half_precision_frequencies(model)


def as_checkpoint(model: Any) -> Checkpoint:
    """The numbers of a fair-esm model in numpyesm's layout."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": model.state_dict()}, path := Path(folder, "model.pt"))
        return load_checkpoint(path)


def tokens_of(sequences: list[str]) -> Any:
    """fair-esm's own padded batch."""
    return ALPHABET.get_batch_converter()([(str(i), sequence) for i, sequence in enumerate(sequences)])[2]


@contextlib.contextmanager
def float64_softmax() -> Iterator[None]:
    """fair-esm computes softmax in float32 even in a float64 model; inside, it does not."""
    with pytest.MonkeyPatch.context() as patch:
        exact = lambda x, dim, onnx_trace=False: torch.softmax(x, dim=dim)  # noqa: E731
        patch.setattr(esm.multihead_attention, "utils_softmax", exact)
        yield


@contextlib.contextmanager
def exact_rotary() -> Iterator[None]:
    """transformers rotates in float32 even in a float64 model; inside, it rotates in the model's own precision."""
    from transformers.models.esm import modeling_esm

    def tables(self: Any, x: Any, position_ids: Any, layer_type: Any = None) -> Any:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)  # the heads
        return angles.cos(), angles.sin()

    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int) -> Any:
        return tuple(x * cos + modeling_esm.rotate_half(x) * sin for x in (q, k))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_esm.EsmRotaryEmbedding, "forward", tables)
        patch.setattr(modeling_esm, "apply_rotary_pos_emb", rotate)
        yield


MODEL = fair_esm_model()  # for tests that only read it


def fair_esm_content(model: Any) -> dict[str, Any]:
    """What the official `.pt` holds: names with prefixes, no contact head, a Namespace."""
    namespace = Namespace(
        arch="esm2",
        encoder_layers=model.num_layers,
        encoder_embed_dim=model.embed_dim,
        encoder_attention_heads=model.attention_heads,
        token_dropout=True,
    )
    state = {
        ("encoder." if name.startswith("lm_head") else "encoder.sentence_encoder.") + name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("contact_head")
    }
    return {"cfg": {"model": namespace, "task": Namespace(mask_idx=32)}, "model": state}


def write_fair_esm(path: Path, model: Any, *, regression: bool = True) -> Path:
    """An official-looking `.pt`, with its regression beside it."""
    torch.save(fair_esm_content(model), path)
    if regression:
        state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("contact_head")}
        torch.save({"model": state}, path.with_name(f"{path.stem}-contact-regression.pt"))
    return path


def hugging_face_state(model: Any, *, prefix: str = "esm.", writer: int = 4) -> dict[str, Any]:
    """The tensors of a fair-esm model under the names that transformers 4 or 5 gives them."""
    state: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        theirs = renamed(name, HUGGING_FACE_NAMES)
        if writer == 5:  # once, not in each layer
            theirs = re.sub(r"encoder\.layer\.\d+\.attention\.self\.(?=rotary)", "", theirs)
        if name != "lm_head.weight":
            state[theirs if name.startswith("lm_head") else prefix + theirs] = tensor.clone().contiguous()
    return state


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
    folder: Path,
    state: dict[str, Any],
    config: dict[str, Any] | None = None,
    *,
    binary: bool = False,
    shard_size: int | str = "5GB",
) -> Path:
    """A Hugging Face folder."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or hugging_face_config()))
    save_torch_state_dict(state, folder, safe_serialization=not binary, max_shard_size=shard_size)
    return folder


def expect_same_model(checkpoint: Any, model: Any, *, lm_head: bool = True, contact_head: bool = True) -> None:
    """Every tensor of the canonical checkpoint is, bit for bit, the one of the fair-esm model."""
    parts: dict[str, list[Any]] = {}
    state = model.state_dict()
    for name in sorted(state, key=lambda name: name.replace("q_proj", "")):  # query, key, value
        parts.setdefault(renamed(name, CANONICAL_NAMES), []).append(state[name].detach().numpy())
    frequencies = [parts.pop(f"layers.{layer}.self_attn.rot_emb.inv_freq")[0] for layer in range(model.num_layers)]
    absent = ("lm_head.weight", *(() if lm_head else ("lm_head.",)), *(() if contact_head else ("contact_head.",)))
    expected = {name: np.concatenate(values).T for name, values in parts.items() if not name.startswith(absent)}
    expected |= {"embed_tokens.weight": expected["embed_tokens.weight"].T, "rotary.frequencies": frequencies[0]}
    if contact_head:
        expected["contact_head.weight"] = expected["contact_head.weight"][:, 0]
    found = {name for name in checkpoint.tensors if not name.startswith(("input_means.", "classifier."))}
    assert found == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint.array(name), values, err_msg=name)
