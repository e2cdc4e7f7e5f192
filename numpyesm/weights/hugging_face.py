"""What transformers calls the tensors of ESM-2, and what config.json and the index of shards say beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import PROBLEM_TYPES, VOCAB_SIZE, Classifier
from ..errors import CheckpointError
from ..printable import listed, quoted
from .checkpoint import CLASSIFIER
from .reading import read_json
from .recognise import Model, Naming

NAMING = Naming(
    embedding="embeddings.word_embeddings.weight",
    layers="encoder.layer.",
    of_layer={
        "attention_norm": ("attention.LayerNorm",),  # before the attention, in spite of BERT's name for it
        "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "out_proj": ("attention.output.dense",),
        "ffn_norm": ("LayerNorm",),
        "fc1": ("intermediate.dense",),
        "fc2": ("output.dense",),
    },
    final_norm="encoder.emb_layer_norm_after",
    decoder="lm_head.decoder.weight",
    # In each layer (up to transformers 4 and early 5), once beside them, or under a layer named "*" (as 5.24 saves it).
    frequencies="rotary_embeddings.inv_freq",
    positions="embeddings.position_embeddings.weight",
    norm_before="embeddings.layer_norm.weight",
    trunk=("embeddings.", "encoder.", "rotary_embeddings."),
    ignored=("position_ids", "embeddings.position_embeddings.weight"),  # official files carry positions, unused
)
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What an ESM-2 model's configuration says. Where a key is absent, transformers' own default counts, which comes first.
_CONFIG: dict[str, tuple[object, tuple[object, ...]]] = {
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
_SIZES = {
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
}
# transformers' class, the head that it puts on the encoder, and the names of that head's parts.
_CLASSIFIERS = {
    "EsmForSequenceClassification": ("sequence", ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")),
    "EsmForTokenClassification": ("token", ("weight", "bias")),
}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a Hugging Face folder; empty if it has none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            if not name.endswith(".index.json"):
                return [folder / name]
            shards = sorted(set(weight_map(folder / name).values()))
            if missing := next((shard for shard in shards if not (folder / shard).is_file()), None):
                raise CheckpointError(f"{folder} is incomplete: {missing}, which {name} names, is missing")
            return [folder / shard for shard in shards]
    return []


def adapter_file(folder: Path) -> Path | None:
    """The weights of an adapter that stands alone, its base elsewhere; None if the folder is something else."""
    if not (folder / "adapter_config.json").is_file() or weight_files(folder):
        return None
    files = (folder / name for name in ADAPTER_FILES)
    return next((file for file in files if file.is_file()), None)


def files_of(place: Path) -> list[Path]:
    """The files with the weights of a file, of an adapter or of a Hugging Face folder; empty for other folders."""
    if not place.is_dir():
        return [place]
    adapter = adapter_file(place)
    return [adapter] if adapter else weight_files(place)


def weight_map(index: Path) -> dict[str, str]:
    """Which file of a sharded checkpoint each tensor is in."""
    content = read_json(index)
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{index} is not an index of weights")
    for file in mapping.values():
        if Path(file).name != file or "\\" in file or file in ("", ".", ".."):  # a name, not a way out of the folder
            raise CheckpointError(f"{index} names a file outside its folder")
        if not file.isprintable():  # a null byte or half a character: no system has such a file
            raise CheckpointError(f"{index} names the file {file!r}, which cannot exist")
    return mapping


def check_complete(folder: Path, names: set[str]) -> None:
    """Refuse a sharded checkpoint whose index names tensors that are in none of its files."""
    index = next(folder / name for name in WEIGHT_FILES if (folder / name).is_file())
    missing = sorted(weight_map(index).keys() - names)
    if missing:
        raise CheckpointError(f"{folder} is incomplete: tensor {missing[0]!r} is in none of its files")


def stated_shape(config: dict[str, Any], origin: str) -> dict[str, Any]:
    """What config.json says of the fields of `ModelConfig`; None where it says nothing.

    CheckpointError if it says anything by which transformers would compute other numbers than ESM-2's.
    """
    nested = config.get("rope_parameters")  # where later versions keep rope_theta
    merged = (nested if isinstance(nested, dict) else {}) | config
    for key, (default, allowed) in _CONFIG.items():
        if key not in merged and config.get("model_type") != "esm":
            continue  # a class of somebody's own, with defaults of its own
        value = merged.get(key, default)
        if not any(value is option or (type(value) in (int, float, str) and value == option) for option in allowed):
            said = f"says {key}={str(value)[:40]!r}" if key in merged else f"does not give {key}"
            raise CheckpointError(f"{origin} is not an ESM-2 model: its config.json {said}, expected {allowed[0]!r}")
    return {ours: config.get(theirs) for ours, theirs in _SIZES.items()}


def classifier_of(model: Model, config: dict[str, Any], origin: str) -> Classifier | None:
    """The classification head of a model; None if it has none, or one that no class of transformers makes.

    A matrix beside the encoder may be applied to anything, so it counts only if config.json names the class. The head
    for sequences is also recognised by the names of its tensors, where config.json names no class. CheckpointError if
    a part is missing, or its size is not that of the labels.
    """
    stated = config.get("architectures")
    stated = stated if isinstance(stated, list) else []
    found = model.head_names
    for architecture, (head, parts) in _CLASSIFIERS.items():
        names = {CLASSIFIER + part for part in parts}
        if architecture in stated or (not stated and head == "sequence" and found == names):
            break
    else:
        return None
    if not found:
        return None
    if missing := sorted(names - found):
        raise CheckpointError(f"{origin} is incomplete: tensor {quoted(missing[0])} of its classifier is missing")
    if unknown := sorted(found - names):
        raise CheckpointError(f"{origin} has tensor {quoted(unknown[0])}, which is not part of an {architecture}")
    last = f"{CLASSIFIER}{parts[-2]}"
    outputs = model.tensors[last].shape[:1]
    if not outputs or not outputs[0]:
        raise CheckpointError(f"{origin} has tensor {quoted(last)} of shape {outputs}, expected a matrix")
    labels = _labels(config, outputs[0], origin)
    problem = config.get("problem_type")
    if problem is None:  # as transformers does in training
        problem = PROBLEM_TYPES[2] if len(labels) == 1 else PROBLEM_TYPES[0]
    try:
        return Classifier(head, labels, problem)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def _labels(config: dict[str, Any], outputs: int, origin: str) -> tuple[str, ...]:
    """The names of a head's outputs; transformers' own where config.json gives none."""
    stated = config.get("id2label")
    if stated is None:
        return tuple(f"LABEL_{index}" for index in range(outputs))
    if not isinstance(stated, dict) or not all(key.isascii() and key.isdigit() for key in stated):
        raise CheckpointError(f"{origin}: id2label in its config.json does not number its labels from 0")
    by_number = {int(key): str(label) for key, label in stated.items()}
    if sorted(by_number) != list(range(outputs)):
        raise CheckpointError(
            f"{origin} has a classifier of {outputs} outputs, but id2label in its config.json has "
            f"{len(stated)} labels, numbered {listed(sorted(stated))}"
        )
    return tuple(by_number[index] for index in range(outputs))


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json or adapter_config.json; empty if there is none."""
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a model configuration")
    return config
