"""Checkpoints of Hugging Face: a folder of config.json and weights, or one weights file.

`EsmForMaskedLM` and everything built on the same trunk: `EsmModel`, classifiers, fine-tuned models. What is not part
of the trunk, the LM head or the contact head (a pooler, a classifier) is left out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..config import VOCAB_SIZE
from ..errors import CheckpointError
from .assemble import LM_BIAS, Assembler, Naming, Tensors, deduce_config
from .checkpoint import Checkpoint
from .fair_esm import state_dict
from .safetensors_file import looks_like_safetensors, read_safetensors
from .tensor import StoredTensor
from .torch_file import read_torch

NAMING = Naming(
    embedding="embeddings.word_embeddings.weight",
    layers="encoder.layer.",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_norm="attention.LayerNorm",  # before the attention, in spite of BERT's name for it
    out_proj="attention.output.dense",
    ffn_norm="LayerNorm",
    fc1="intermediate.dense",
    fc2="output.dense",
    final_norm="encoder.emb_layer_norm_after",
    tied_embedding="lm_head.decoder.weight",
    # In each layer (up to transformers 4 and early 5), once beside them, or under a layer named "*" (as 5.24 saves it).
    frequencies="rotary_embeddings.inv_freq",
)
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TRUNK = ("embeddings.", "encoder.", "lm_head.", "contact_head.")
# Not learned, or (position_embeddings) carried along unused by files converted long ago.
_POSITIONS = "embeddings.position_embeddings.weight"
_IGNORED = ("position_ids", _POSITIONS)
# What an ESM-2 model's configuration says. Where a key is absent, transformers' own default counts, which comes first.
_CONFIG: dict[str, tuple[object, tuple[object, ...]]] = {
    "model_type": (None, ("esm",)),
    "is_folding_model": (False, (False, None)),
    "position_embedding_type": ("absolute", ("rotary",)),
    "emb_layer_norm_before": (None, (False, None)),
    "token_dropout": (False, (True,)),
    "vocab_size": (None, (VOCAB_SIZE,)),
    "mask_token_id": (None, (32,)),
    "layer_norm_eps": (1e-12, (1e-5,)),
    "rope_theta": (10000.0, (10000.0,)),
    "is_decoder": (False, (False, None)),
    "add_cross_attention": (False, (False, None)),
}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a Hugging Face folder; empty if it has none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            if not name.endswith(".index.json"):
                return [folder / name]
            return [folder / shard for shard in sorted(set(_weight_map(folder / name).values()))]
    return []


def read_hugging_face(path: str | os.PathLike[str]) -> Checkpoint:
    """The canonical checkpoint from a Hugging Face folder or a single weights file.

    Parameters
    ----------
    path : str or path
        A folder with `config.json` and weights, sharded or not; or the weights, with `config.json` beside them if it
        is there: without it the shape must be that of a published model.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is a PEFT adapter, not a whole model; merge it into its base model first (merge_and_unload)"
        )
    files = weight_files(path) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path} has none of {', '.join(WEIGHT_FILES)}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        piece = _read(file)
        if repeated := piece.keys() & tensors.keys():
            raise CheckpointError(f"{folder} has tensor {min(repeated)!r} in two of its files")
        tensors |= piece
    if path.is_dir():
        _check_complete(path, tensors)
    config_file = folder / "config.json"
    return from_hugging_face(tensors, path, _read_config(config_file) if config_file.is_file() else None)


def from_hugging_face(tensors: Tensors, path: Path, config: dict[str, Any] | None) -> Checkpoint:
    """The canonical checkpoint from tensors under Hugging Face's names.

    Parameters
    ----------
    tensors : mapping of str to StoredTensor
    path : Path
        Where they are from, for messages.
    config : dict or None
        Content of config.json.
    """
    origin = str(path)
    if config is not None:
        _check_config(config, origin)
    tensors = _canonical_names(tensors, origin)
    if config is None and _POSITIONS in tensors and not any(name.endswith("inv_freq") for name in tensors):
        # The unused position table alone is no proof, but with no trace of rotary positions it must be in use.
        raise CheckpointError(
            f"{origin} has learned positions, so is no ESM-2 model (if it is one, add its config.json)"
        )
    heads = None if config is None else _integer(config, "num_attention_heads", origin)
    shape = deduce_config(tensors, NAMING, heads, origin)
    for key, value in (
        ("num_hidden_layers", shape.num_layers),
        ("hidden_size", shape.embed_dim),
        ("intermediate_size", shape.ffn_dim),
    ):
        if config is not None and _integer(config, key, origin) != value:
            raise CheckpointError(f"{origin}: config.json says {key}={config[key]}, the weights have {value}")
    assembler = Assembler(tensors, shape, NAMING, origin)
    result = assembler.assemble()
    assembler.check_unused(_IGNORED, within=_TRUNK)
    return Checkpoint(shape, result, source=path.name, precision=assembler.precision)


def is_hugging_face(tensors: Tensors) -> bool:
    """Whether tensors bear Hugging Face's names."""
    return any("attention.self." in name or name.endswith(NAMING.embedding) for name in tensors)


def _read(file: Path) -> dict[str, StoredTensor]:
    try:
        with open(file, "rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error})") from error
    tensors = read_safetensors(file)[0] if looks_like_safetensors(head) else state_dict(read_torch(file))
    if not tensors:
        raise CheckpointError(f"{file} holds no named tensors")
    return tensors


def _canonical_names(tensors: Tensors, origin: str) -> dict[str, StoredTensor]:
    """The same tensors with the trunk's prefix (`esm.`, or what a wrapper put before it) taken off."""
    if any("lora_" in name for name in tensors):
        raise CheckpointError(f"{origin} holds a LoRA adapter; merge it into its base model first (merge_and_unload)")
    embeddings = [name for name in tensors if name.endswith(NAMING.embedding)]
    if len(embeddings) != 1:
        what = "no" if not embeddings else "more than one"
        raise CheckpointError(f"{origin} is not an ESM-2 checkpoint: it has {what} {NAMING.embedding!r}")
    trunk = embeddings[0].removesuffix(NAMING.embedding)
    outside = trunk.removesuffix("esm.")  # the LM head stands beside the trunk
    result: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        in_head = name.startswith(f"{outside}lm_head.")
        bare = name.removeprefix(outside if in_head else trunk)
        if bare == name and (outside if in_head else trunk):
            continue  # a classifier or the like
        if bare.endswith((".gamma", ".beta")):  # LayerNorm in the manner of TensorFlow
            bare = bare.removesuffix(".gamma") + ".weight" if bare.endswith(".gamma") else bare[:-5] + ".bias"
        if bare in result:
            raise CheckpointError(f"{origin} has tensor {bare!r} twice")
        result[bare] = tensor
    _drop_decoder_bias(result, origin)
    return result


def _drop_decoder_bias(tensors: dict[str, StoredTensor], origin: str) -> None:
    """Some writers store the LM head's bias a second time, as that of its decoder."""
    decoder = tensors.pop("lm_head.decoder.bias", None)
    if decoder is None:
        return
    bias = tensors.setdefault(LM_BIAS, decoder)
    if bias.shape != decoder.shape or not np.array_equal(bias.astype(), decoder.astype()):
        raise CheckpointError(f"{origin} has two LM head biases that differ")


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a model configuration")
    return config


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > 64 << 20:
            raise CheckpointError(f"{path} is implausibly large")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not valid JSON") from error


def _check_config(config: dict[str, Any], origin: str) -> None:
    nested = config.get("rope_parameters")  # where later versions keep rope_theta
    config = (nested if isinstance(nested, dict) else {}) | config
    for key, (default, allowed) in _CONFIG.items():
        value = config.get(key, default)
        if not any(value is option or (type(value) in (int, float, str) and value == option) for option in allowed):
            said = f"says {key}={str(value)[:40]!r}" if key in config else f"does not give {key}"
            raise CheckpointError(f"{origin} is not an ESM-2 model: its config.json {said}, expected {allowed[0]!r}")


def _integer(config: dict[str, Any], key: str, origin: str) -> int:
    value = config.get(key)
    if type(value) is not int:
        raise CheckpointError(f"{origin}: config.json does not give {key} as a number")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    """Which file of a sharded checkpoint each tensor is in."""
    content = _read_json(index)
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{index} is not an index of weights")
    for file in mapping.values():
        if Path(file).name != file or "\\" in file or file in ("", ".", ".."):  # a name, not a way out of the folder
            raise CheckpointError(f"{index} names a file outside its folder")
        if not file.isprintable():  # a null byte or half a character: no system has such a file
            raise CheckpointError(f"{index} names the file {file!r}, which cannot be")
    return mapping


def _check_complete(folder: Path, tensors: Tensors) -> None:
    files = [name for name in WEIGHT_FILES if (folder / name).is_file()][:1]
    if files and files[0].endswith(".index.json"):
        missing = sorted(_weight_map(folder / files[0]).keys() - tensors.keys())
        if missing:
            raise CheckpointError(f"{folder} is incomplete: tensor {missing[0]!r} is in none of its files")
