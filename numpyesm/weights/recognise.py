"""Find the ESM-2 model among the tensors of a checkpoint, by names and shapes alone.

A trunk is recognised by its layers, under whatever prefix wrappers and training scripts have put in front of them. The
LM head and the contact head are inside or beside it. Everything else is left out and listed.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import VOCAB_SIZE, ModelConfig
from ..errors import CheckpointError
from ..printable import quoted
from .checkpoint import CLASSIFIER
from .tensor import STORAGE_DTYPES, StoredTensor

Tensors = Mapping[str, StoredTensor]

LM_DENSE, LM_BIAS = "lm_head.dense", "lm_head.bias"
CONTACT_REGRESSION = "contact_head.regression"

_MAX_NESTING = 8  # of dicts; training checkpoints have three
# What wrappers insert into names, anywhere: `_orig_mod` (torch.compile), `_fsdp_wrapped_module`, `_module`, ...
_PRIVATE = re.compile(r"(^|\.)_\w+(?=\.)")
_OPTIMISER = re.compile(r"optim|sched|(^|\.)state\.", re.IGNORECASE)

# Part of a name that only an adapter has, and its kind.
_ADAPTERS = (
    ("lora_", "a LoRA adapter"),
    ("ia3_", "an IA3 adapter"),
    ("prompt_embeddings", "a prompt-tuning adapter"),
    (".base_layer.", "an adapter"),
    (".modules_to_save.", "an adapter"),
)
_QUANTISED = (
    (".SCB", "bitsandbytes, 8 bits"),
    (".quant_state.bitsandbytes", "bitsandbytes, 4 bits"),
    (".absmax", "bitsandbytes, 4 bits"),
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".zero_point", "torch.ao"),
)
# The ends of sentences about such files, by kind.
_ADAPTER_SENTENCE = (
    "holds {} that is not merged into its base model: name the folder of a LoRA adapter, or "
    "merge it first (merge_and_unload of peft) and save the whole model"
)
QUANTISED_SENTENCE = (
    "is quantised ({}), and numpyesm reads float32, float16 and bfloat16: "
    "save the model that it was made from, and convert that with --dtype int8"
)
# Part of a name that only another family has, and that family. Looked for in files without an ESM-2 trunk only.
_OTHER_MODELS = (
    ("row_self_attention", "an MSA Transformer"),
    ("gvp_encoder", "an ESM-IF1 checkpoint"),
    ("trunk.blocks.0.", "an ESMFold checkpoint"),
    (".geom_attn.", "an ESM3 checkpoint"),
    ("transformer.blocks.0.attn.layernorm_qkv", "an ESM C checkpoint"),
    ("self_attention.layernorm_qkv", "ESM-2 in the layout of NVIDIA's Transformer Engine, padded to 64 tokens"),
    ("self_attn.bias_k", "an ESM-1 checkpoint"),
)
_OTHER_VOCABULARIES = {
    446: "a SaProt checkpoint: it has 446 tokens, of residue and structure,",
    64: "ESM-2 with its vocabulary padded to 64 tokens, as NVIDIA publishes it,",
    35: "an ESM-1 checkpoint: it has 35 tokens,",
}


@dataclass(frozen=True)
class Naming:
    """What one family of checkpoints calls each part."""

    embedding: str
    layers: str
    of_layer: Mapping[str, tuple[str, ...]]  # what follows `layers<number>.`, by canonical name; of qkv, three
    final_norm: str
    decoder: str
    frequencies: str
    positions: str
    norm_before: str
    trunk: tuple[str, ...]
    ignored: tuple[str, ...]

    def layer(self, index: int) -> str:
        """Prefix of the names of one layer."""
        return f"{self.layers}{index}."

    def parts(self, config: ModelConfig) -> dict[str, tuple[str, ...]]:
        """Canonical name of every linear map and norm, and the family's: of query, key and value for `qkv`."""
        parts: dict[str, tuple[str, ...]] = {
            "final_norm": (self.final_norm,),
            "lm_head.dense": (LM_DENSE,),
            "lm_head.norm": ("lm_head.layer_norm",),
            "contact_head": (CONTACT_REGRESSION,),
        }
        for index in range(config.num_layers):
            for ours, theirs in self.of_layer.items():
                parts[f"layers.{index}.{ours}"] = tuple(self.layer(index) + name for name in theirs)
        if config.classifier is not None and config.classifier.head == "sequence":
            parts |= {CLASSIFIER + name: (CLASSIFIER + name,) for name in ("dense", "out_proj")}
        elif config.classifier is not None:
            parts[f"{CLASSIFIER}out_proj"] = (CLASSIFIER[:-1],)
        return parts

    def trunks(self, tensors: Tensors) -> list[str]:
        """The prefixes under which layers of this family stand."""
        query = re.escape(self.of_layer["qkv"][0])
        layer = re.compile(rf"((?:.*\.)?){re.escape(self.layers)}\d{{1,6}}\.{query}\.weight")
        return list(dict.fromkeys(match[1] for name in tensors if (match := layer.fullmatch(name))))


@dataclass(frozen=True)
class Model:
    """An ESM-2 model found in a checkpoint."""

    naming: Naming
    tensors: dict[str, StoredTensor]  # of trunk and heads, by `naming`, `lm_head.`, `contact_head.` and `classifier.`
    left_out: tuple[str, ...]  # what else there is, by the beginnings of its names
    classifier_name: str = ""  # what the checkpoint calls the tensors that begin with `classifier.`

    @property
    def head_names(self) -> set[str]:
        """Names of the tensors of what may be a classification head."""
        return {name for name in self.tensors if name.startswith(CLASSIFIER)}

    def without_classifier(self) -> Model:
        """The same model without such a head."""
        kept = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(CLASSIFIER)}
        return Model(self.naming, kept, (*self.left_out, *([self.classifier_name] if self.head_names else [])))


def named_tensors(content: Any, origin: str) -> dict[str, StoredTensor]:
    """Return every tensor in the object of a checkpoint, named by the keys that lead to it, joined by dots.

    Keys that are not strings belong to no state dict (an optimiser's are numbers) and are skipped.
    """
    found: dict[str, StoredTensor] = {}
    seen: set[int] = set()
    todo = deque([("", content, 0)])
    while todo:
        path, value, depth = todo.popleft()
        if isinstance(value, StoredTensor) and path:
            name = _PRIVATE.sub("", path).removeprefix(".")
            name = re.sub(r"(?<=Norm\.)gamma$", "weight", re.sub(r"(?<=Norm\.)beta$", "bias", name))  # TensorFlow's
            if found.setdefault(name, value) is not value:
                raise CheckpointError(f"{origin} has tensor {quoted(name)} twice")
            continue
        items = value if isinstance(value, dict) else getattr(value, "entries", None)  # of a dict of unknown class
        if isinstance(value, list | tuple) and depth == 0:
            items = {str(index): item for index, item in enumerate(value)}
        if isinstance(items, dict) and depth < _MAX_NESTING and id(items) not in seen:
            seen.add(id(items))
            for key, item in items.items():
                if isinstance(key, str):
                    todo.append((f"{path}.{key}" if path else key, item, depth + 1))
    return found


def find_model(tensors: Tensors, namings: tuple[Naming, ...], origin: str) -> Model:
    """Find the one ESM-2 model among `tensors`.

    CheckpointError if there is none, in which case it says what there is instead, or if there are two that differ.
    """
    for table, sentence in ((_ADAPTERS, _ADAPTER_SENTENCE), (_QUANTISED, QUANTISED_SENTENCE)):
        for part, kind in table:
            if any(part in name for name in tensors):
                raise CheckpointError(f"{origin} {sentence.format(kind)}")
    trunks = [(naming, prefix) for naming in namings for prefix in naming.trunks(tensors)]
    fitting = [trunk for trunk in trunks if _vocabulary(tensors, *trunk) == VOCAB_SIZE]
    # Moments that an optimiser keeps by the names of parameters look like a model.
    fitting = [trunk for trunk in fitting if not _OPTIMISER.search(trunk[1])] or fitting
    if not fitting or any("trunk.blocks.0." in name for name in tensors):
        raise CheckpointError(f"{origin} {_what_else(tensors, trunks)}")
    candidates = [Model(naming, _of_model(tensors, naming, prefix), ()) for naming, prefix in fitting]
    for (_, prefix), candidate in zip(fitting[1:], candidates[1:], strict=True):
        if not _same_trunk(candidates[0], candidate):
            names = " and ".join(repr(name or "(no prefix)") for name in (fitting[0][1], prefix))
            raise CheckpointError(f"{origin} holds two ESM-2 models that differ, under {names}: save one of them alone")
    # The same trunk may stand under two names: take the one beside which there are heads.
    model = max(candidates, key=lambda candidate: len(candidate.tensors))
    naming, prefix = fitting[candidates.index(model)]
    taken = {id(tensor) for candidate in candidates for tensor in candidate.tensors.values()}
    others = ((name, t) for name, t in tensors.items() if id(t) not in taken)
    rest = [name for name, t in others if t.shape and t.dtype in STORAGE_DTYPES]  # no counters, no generator's state
    left_out = tuple(dict.fromkeys(_groups(rest, prefix)))
    return Model(naming, model.tensors, left_out, (_beside(tensors, prefix, CLASSIFIER) or "") + CLASSIFIER[:-1])


def _of_model(tensors: Tensors, naming: Naming, prefix: str) -> dict[str, StoredTensor]:
    """Return the tensors of the trunk under `prefix` and of its heads, without prefixes."""
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(tuple(prefix + part for part in naming.trunk))
    }
    signs = {"lm_head.": f"{LM_DENSE}.weight", "contact_head.": f"{CONTACT_REGRESSION}.weight", CLASSIFIER: CLASSIFIER}
    for head, sign in signs.items():
        outside = _beside(tensors, prefix, sign)
        if outside is not None:
            begin = outside + head
            found |= {head + name.removeprefix(begin): t for name, t in tensors.items() if name.startswith(begin)}
    return found


def _beside(tensors: Tensors, prefix: str, sign: str) -> str | None:
    """The longest part of a trunk's prefix under which some names begin with `sign`; None if there is none."""
    return next((p for p in _parents(prefix) if any(name.startswith(p + sign) for name in tensors)), None)


def _parents(prefix: str) -> Iterator[str]:
    """Yield `a.b.`, `a.` and the empty prefix for `a.b.`."""
    parts = prefix.split(".")[:-1]
    for count in range(len(parts), -1, -1):
        yield "".join(part + "." for part in parts[:count])


def _vocabulary(tensors: Tensors, naming: Naming, prefix: str) -> int | None:
    """Return the rows of the embedding, or of the decoder tied to it if only that was saved."""
    names = [prefix + naming.embedding, *(parent + naming.decoder for parent in _parents(prefix))]
    return next((tensors[name].shape[0] for name in names if name in tensors and tensors[name].shape), None)


def _same_trunk(first: Model, second: Model) -> bool:
    def trunk(model: Model) -> dict[str, StoredTensor]:
        return {name: t for name, t in model.tensors.items() if name.startswith(model.naming.trunk)}

    ours, theirs = trunk(first), trunk(second)
    return first.naming is second.naming and ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and np.array_equal(tensor.raw, theirs[name].raw, equal_nan=False)
        for name, tensor in ours.items()
    )  # fmt: skip


def _groups(names: list[str], prefix: str) -> Iterator[str]:
    """Shorten each name to the part where it departs from the trunk's prefix."""
    ours = prefix.split(".")
    for name in names:
        if _OPTIMISER.search(name):
            continue
        theirs = name.split(".")
        common = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours) - 1)
        yield ".".join(theirs[: common + 1])


def _what_else(tensors: Tensors, trunks: list[tuple[Naming, str]]) -> str:
    """Say what a file without an ESM-2 trunk is, as the end of a sentence."""
    for part, family in _OTHER_MODELS:
        if any(part in name for name in tensors):
            return f"is {family}; numpyesm runs ESM-2 only"
    if all(name.startswith("base_model.") for name in tensors):
        return _ADAPTER_SENTENCE.format("an adapter of peft")
    if all(CONTACT_REGRESSION in name for name in tensors):
        return "is only a contact regression; name the model's checkpoint instead"
    for trunk in trunks:
        rows = _vocabulary(tensors, *trunk)
        if rows in _OTHER_VOCABULARIES:
            return f"is {_OTHER_VOCABULARIES[rows]} and numpyesm runs ESM-2 of {VOCAB_SIZE} tokens only"
        if rows is not None:
            return f"is not an ESM-2 checkpoint: it has {rows} tokens, ESM-2 has {VOCAB_SIZE}"
        return f"is incomplete: tensor {quoted(trunk[1] + trunk[0].embedding)} is missing"
    count, example = len(tensors), quoted(min(tensors))
    return f"is not an ESM-2 checkpoint: none of its {count} tensors ({example}) belongs to an ESM-2 layer"


def refuse_learned_positions(model: Model, position_type: object, origin: str) -> None:
    """Refuse ESM-1b and ESM-1v, which have ESM-2's layers but learn their positions.

    Official ESM-2 files of transformers carry a table of positions too, unused: there the configuration decides or,
    without one, whether rotary frequencies are stored.
    """
    naming, tensors = model.naming, model.tensors
    rotary = position_type == "rotary" or (
        position_type is None and any(name.endswith(naming.frequencies) for name in tensors)
    )
    if naming.positions in tensors and not rotary:
        kind = "ESM-1b" if naming.norm_before in tensors else "ESM-1v"
        raise CheckpointError(f"{origin} is an {kind} checkpoint (learned positions); numpyesm runs ESM-2 only")
