"""Checkpoints of fair-esm: `{"cfg": {"model": Namespace}, "model": state_dict}`, the contact head in a second file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError
from .assemble import CONTACT_REGRESSION, Assembler, Naming, Tensors, deduce_config
from .checkpoint import Checkpoint
from .integrity import verify_file
from .safe_pickle import Inert
from .tensor import StoredTensor
from .torch_file import read_torch

NAMING = Naming(
    embedding="embed_tokens.weight",
    layers="layers.",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_norm="self_attn_layer_norm",
    out_proj="self_attn.out_proj",
    ffn_norm="final_layer_norm",
    fc1="fc1",
    fc2="fc2",
    final_norm="emb_layer_norm_after",
    tied_embedding="lm_head.weight",
    frequencies="rot_emb.inv_freq",
)
# As training wrappers leave them; the longer before what it ends with.
_PREFIXES = ("module.", "model.", "encoder.sentence_encoder.", "sentence_encoder.", "encoder.")
_IGNORED = ("_float_tensor", "encoder.version", "version")
# A name that only the other family has, and that family.
_OTHER_MODELS = (
    ("row_self_attention", "an MSA Transformer"),
    ("msa_position_embedding", "an MSA Transformer"),
    ("embed_positions.weight", "an ESM-1b or ESM-1v checkpoint (learned positions)"),
    ("emb_layer_norm_before.weight", "an ESM-1b or ESM-1v checkpoint"),
    ("bias_k", "an ESM-1 checkpoint"),
    ("embed_out", "an ESM-1 checkpoint"),
    ("trunk.blocks.0", "an ESMFold checkpoint"),
    ("gvp_encoder", "an ESM-IF1 checkpoint"),
    ("transformer.blocks.0.attn", "an ESM-3 or ESM C checkpoint"),
)
_ARCHITECTURES = {
    "roberta_large": "an ESM-1b or ESM-1v checkpoint",
    "protein_bert_base": "an ESM-1 checkpoint",
    "msa_transformer": "an MSA Transformer",
}


def regression_path(path: str | os.PathLike[str]) -> Path:
    """Where fair-esm keeps the contact regression of a checkpoint: beside it."""
    path = Path(path)
    return path.with_name(f"{path.stem}-contact-regression.pt")


def is_fair_esm(content: Any) -> bool:
    """Whether the object in a torch file is, or claims to be, a fair-esm checkpoint."""
    if not isinstance(content, dict):
        return False
    if "cfg" in content or "args" in content:
        return True
    return any(".self_attn." in name or name.endswith("embed_tokens.weight") for name in state_dict(content))


def state_dict(content: Any) -> dict[str, StoredTensor]:
    """The named tensors in the object of a torch file, wherever it keeps them."""
    if isinstance(content, Inert):
        content = content.entries
    if not isinstance(content, dict):
        return {}
    tensors = {name: value for name, value in content.items() if isinstance(value, StoredTensor)}
    if not tensors:
        for key in ("model", "state_dict", "model_state_dict"):
            if isinstance(content.get(key), dict | Inert):
                inner = content[key].entries if isinstance(content[key], Inert) else content[key]
                return {name: value for name, value in inner.items() if isinstance(value, StoredTensor)}
    return {name: value for name, value in tensors.items() if isinstance(name, str)}


def from_fair_esm(content: Any, path: Path, regression: str | os.PathLike[str] | None = None) -> Checkpoint:
    """The canonical checkpoint from the object in a fair-esm file.

    Parameters
    ----------
    content : object
        From `read_torch`, or the tensors of a safetensors file under fair-esm's names.
    path : Path
        The file, for messages and to find the regression beside it.
    regression : path, optional
        The contact regression; by default `<stem>-contact-regression.pt` beside `path`, if it is there.

    Warns
    -----
    UserWarning
        If no contact regression is found: the checkpoint has no contact head then.
    """
    origin = str(path)
    tensors = _without_prefixes(state_dict(content), origin)
    if tensors.keys() and all(name.startswith(CONTACT_REGRESSION) for name in tensors):
        raise CheckpointError(f"{origin} is only a contact regression; name the model's checkpoint instead")
    arguments = _arguments(content)
    _refuse_other_models(tensors, arguments, origin)
    beside = regression_path(path)
    regression_tensors: dict[str, StoredTensor] = {}
    if regression is not None or beside.exists():
        chosen = Path(regression) if regression is not None else beside
        verify_file(chosen)
        regression_tensors = read_regression(chosen)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(CONTACT_REGRESSION)}
    elif not any(name.startswith(CONTACT_REGRESSION) for name in tensors):
        warnings.warn(
            f"no contact regression for {path.name} ({beside.name} is not beside it and none was given): "
            "the converted model cannot predict contacts",
            stacklevel=2,
        )
    config = _config(tensors, arguments, origin)
    if regression_tensors:
        weight = regression_tensors[f"{CONTACT_REGRESSION}.weight"].shape
        expected = (1, config.num_layers * config.num_heads)
        if weight != expected:
            raise CheckpointError(
                f"{chosen} is the contact regression of another model: it has {weight[-1] if weight else 0} "
                f"coefficients, {path.name} needs {expected[1]}"
            )
    assembler = Assembler(tensors | regression_tensors, config, NAMING, origin)
    result = assembler.assemble()
    assembler.check_unused(_IGNORED)
    return Checkpoint(config, result, source=path.name, precision=assembler.precision)


def read_regression(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Weight and bias of a `-contact-regression.pt` file, under fair-esm's names."""
    tensors = _without_prefixes(state_dict(read_torch(path)), str(path))
    names = [f"{CONTACT_REGRESSION}.{part}" for part in ("weight", "bias")]
    if not all(name in tensors for name in names):
        raise CheckpointError(f"{path} is not a contact regression: {names[0]!r} or {names[1]!r} is missing")
    return {name: tensors[name] for name in names}


def _without_prefixes(tensors: Tensors, origin: str) -> dict[str, StoredTensor]:
    result: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        bare = name
        for prefix in _PREFIXES:
            bare = bare.removeprefix(prefix)
        if bare in result:
            raise CheckpointError(f"{origin} has tensor {bare!r} twice, under different prefixes")
        result[bare] = tensor
    return result


def _arguments(content: Any) -> Mapping[str, Any] | Inert:
    """The training arguments: attributes of a Namespace, or a dict."""
    if not isinstance(content, dict):
        return {}
    configuration = content.get("cfg")
    if isinstance(configuration, dict | Inert):
        configuration = configuration.get("model")
    for candidate in (configuration, content.get("args")):
        if isinstance(candidate, dict | Inert):
            return candidate
    return {}


def _config(tensors: Tensors, arguments: Mapping[str, Any] | Inert, origin: str) -> ModelConfig:
    claimed = {
        field: next((value for name in names if (value := arguments.get(name)) is not None), None)
        for field, names in (
            ("num_layers", ("encoder_layers", "layers")),
            ("embed_dim", ("encoder_embed_dim", "embed_dim")),
            ("num_heads", ("encoder_attention_heads", "attention_heads")),
        )
    }
    for value in claimed.values():
        if value is not None and type(value) is not int:
            raise CheckpointError(f"{origin} is corrupted: its model configuration is not made of numbers")
    if arguments.get("token_dropout") is False:
        raise CheckpointError(f"{origin} was trained without token dropout, which is no ESM-2 model")
    config = deduce_config(tensors, NAMING, claimed["num_heads"], origin)
    for field in ("num_layers", "embed_dim"):
        if claimed[field] not in (None, getattr(config, field)):
            raise CheckpointError(
                f"{origin} is corrupted: its configuration says {field}={claimed[field]}, "
                f"its tensors {getattr(config, field)}"
            )
    return config


def _refuse_other_models(tensors: Tensors, arguments: Mapping[str, Any] | Inert, origin: str) -> None:
    for part, family in _OTHER_MODELS:
        if any(part in name for name in tensors):
            raise CheckpointError(f"{origin} is {family}; numpyesm runs ESM-2 only")
    architecture = arguments.get("arch")
    if isinstance(architecture, str) and (architecture in _ARCHITECTURES or "gvp" in architecture):
        family = _ARCHITECTURES.get(architecture, "an ESM-IF1 checkpoint")
        raise CheckpointError(f"{origin} is {family}; numpyesm runs ESM-2 only")
    if NAMING.embedding not in tensors:
        raise CheckpointError(f"{origin} is not an ESM-2 checkpoint: it has no {NAMING.embedding!r}")
