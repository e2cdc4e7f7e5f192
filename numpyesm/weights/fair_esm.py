"""What fair-esm calls the tensors of ESM-2, and what its files say beside them.

A file is `{"cfg": {"model": Namespace}, "model": state_dict}`; the contact regression is in a second one beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError
from .recognise import CONTACT_REGRESSION, Naming, named_tensors
from .safe_pickle import Inert
from .tensor import StoredTensor

NAMING = Naming(
    embedding="embed_tokens.weight",
    layers="layers.",
    of_layer={
        "attention_norm": ("self_attn_layer_norm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out_proj": ("self_attn.out_proj",),
        "ffn_norm": ("final_layer_norm",),
        "fc1": ("fc1",),
        "fc2": ("fc2",),
    },
    final_norm="emb_layer_norm_after",
    decoder="lm_head.weight",
    frequencies="rot_emb.inv_freq",
    positions="embed_positions.weight",
    norm_before="emb_layer_norm_before.weight",
    trunk=("embed_tokens.", "layers.", "embed_positions.", "emb_layer_norm_"),
    ignored=("._float_tensor",),
)
# What fair-esm reads of `cfg["model"]`, whatever else is in it.
_FIELDS = {
    "num_layers": "encoder_layers",
    "embed_dim": "encoder_embed_dim",
    "num_heads": "encoder_attention_heads",
}


def regression_of(content: Any, path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Weight and bias in the object of a `-contact-regression.pt` file, under fair-esm's names."""
    found = {name.removeprefix("model."): tensor for name, tensor in named_tensors(content, str(path)).items()}
    names = (f"{CONTACT_REGRESSION}.weight", f"{CONTACT_REGRESSION}.bias")
    if found.keys() != set(names):
        raise CheckpointError(f"{path} is not a contact regression, which holds {names[0]!r} and {names[1]!r}")
    shape, needed = found[names[0]].shape, config.num_layers * config.num_heads
    if shape != (1, needed):
        raise CheckpointError(
            f"{path} is the contact regression of another model: it has {shape[-1] if shape else 0} coefficients, "
            f"{config.num_layers} layers of {config.num_heads} heads need {needed}"
        )
    return found


def stated_shape(content: Any, origin: str) -> dict[str, Any]:
    """What `cfg["model"]` says of `num_layers`, `embed_dim` and `num_heads`; None where it says nothing."""
    arguments = _get(_get(content, "cfg"), "model")
    if _get(arguments, "token_dropout") is False:
        raise CheckpointError(f"{origin} was trained without token dropout, so it is not an ESM-2 model")
    return {ours: _get(arguments, theirs) for ours, theirs in _FIELDS.items()}


def _get(arguments: Any, name: str) -> Any:
    """An entry of a dict, or an attribute of what a pickle calls a Namespace; None if it is neither."""
    return arguments.get(name) if isinstance(arguments, dict | Inert) else None
