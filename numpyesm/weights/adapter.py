"""LoRA adapters of peft, merged into their base. Only the matrices that they change are computed.

A module `m` with weight W (out, in) becomes W + s·B·A with A (r, in), B (out, r) and s = alpha / r or, for rsLoRA,
alpha / √r. Modules that were trained whole (`modules_to_save`, biases) replace those of the base.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import PRESETS, Classifier, preset_name
from ..errors import CheckpointError
from ..files import same_file
from ..printable import quoted
from .assemble import is_finite
from .checkpoint import CLASSIFIER, DECODER, Checkpoint, canonical_shapes
from .hugging_face import NAMING, adapter_file, classifier_of, read_config
from .load import load_checkpoint, read_weights
from .recognise import Model, named_tensors
from .tensor import STORAGE_DTYPES, DeferredTensor, StoredTensor

Array = npt.NDArray[Any]

_KINDS = {"PROMPT_TUNING": "prompt tuning", "P_TUNING": "p-tuning", "PREFIX_TUNING": "prefix tuning"}
# Variants of LoRA that compute something else, by the keys of adapter_config.json that ask for them.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "LoRA with replicated layers",
    "target_parameters": "LoRA of bare parameters",
    "trainable_token_indices": "LoRA with trained tokens",
}
# Initialisations that change the base as well, unless peft converted the adapter on saving.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TASKS = {"SEQ_CLS": "EsmForSequenceClassification", "TOKEN_CLS": "EsmForTokenClassification"}
_LAYER = re.compile(r"\blayer\.(\d+)\.")
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.(weight|bias)")
# What peft adds to names: in front of all of them, and around biases and whole modules that it trained.
_WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer(?=\.|$)|\.modules_to_save(\.default)?(?=\.|$)")


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter folder."""

    origin: str  # the folder
    base: str  # what its configuration names, perhaps nothing
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class _Change:
    """What an adapter does to a weight or bias of its base; arrays are as the base has them, matrices (in, out)."""

    whole: Array | None = None  # replaces it
    factors: tuple[Array, ...] = ()  # their product is added: (in, r) and (r, out), or (out,) alone
    scale: float = 1.0

    def fits(self, shape: tuple[int, ...]) -> bool:
        sizes = [] if self.whole is None else [self.whole.shape]
        if self.factors:
            sizes.append(self.factors[0].shape[:1] + self.factors[-1].shape[1:])
        return all(size == shape or (len(shape) == 1 and size == (*shape, 1)) for size in sizes)

    def apply(self, values: Array) -> None:
        """Change an array of the base in place."""
        if self.whole is not None:
            values[...] = self.whole.reshape(values.shape)
        if self.factors:
            values += (self.scale * reduce(np.matmul, self.factors)).reshape(values.shape)


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base that an adapter names, and its revision on the Hub if it names one."""
    config = read_config(folder / "adapter_config.json")
    base, revision = _stated_base(config), config.get("revision")
    if not base:
        raise CheckpointError(f"{folder} is an adapter that does not name its base: give both (adapter=…)")
    return base, revision if isinstance(revision, str) and revision not in ("", "main") else None


def read_adapter(folder: Path) -> Adapter:
    """Read a folder that peft wrote; the CheckpointError about an adapter that cannot be merged names its kind."""
    file = adapter_file(folder)
    if file is None:
        raise CheckpointError(f"{folder} is not an adapter: it needs adapter_config.json and adapter_model.safetensors")
    config = read_config(folder / "adapter_config.json")
    kind = str(config.get("peft_type"))
    refused = None if kind == "LORA" else _KINDS.get(kind, kind[:40])
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        refused = f"LoRA initialised by {start[:40]}, which changes the base"
    refused = next((name for key, name in _VARIANTS.items() if config.get(key)), refused)
    if refused:
        raise CheckpointError(f"{folder} is an adapter of {refused}; numpyesm merges LoRA and rsLoRA")
    tensors = named_tensors(read_weights(file)[0], str(file))
    return Adapter(str(folder), _stated_base(config), config, tensors)


def _stated_base(config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) else ""


def merged(checkpoint: Checkpoint, adapter: Adapter, name: str = "") -> Checkpoint:
    """Return the base, which the user calls `name`, with an adapter merged in; what it does not touch is shared.

    CheckpointError if the adapter is for another base, changes something that ESM-2 lacks, or is damaged.
    """
    base = name or checkpoint.source
    _check_base(checkpoint, adapter, base)
    if checkpoint.precision == "int8":
        raise CheckpointError(
            f"{base} is stored as int8: merge {adapter.origin} before rounding (convert --dtype int8)"
        )
    changes = _changes(adapter)
    _check_complete(adapter, changes, checkpoint.config.num_layers)
    classifier, head = _classifier(checkpoint, adapter, changes)
    config = replace(checkpoint.config, classifier=classifier)
    places = {
        module: (ours, part, len(modules))
        for ours, modules in NAMING.parts(config).items()
        for part, module in enumerate(modules)
    }
    places |= {module: (module, 0, 1) for module in ("lm_head", "lm_head.decoder")}  # a bias, the last matrix
    tensors = {n: t for n, t in checkpoint.tensors.items() if head is None or not n.startswith(CLASSIFIER)}
    tensors |= head or {}
    if checkpoint.has_lm_head and any(name.startswith("lm_head.decoder.") for name in changes):
        tensors.setdefault(DECODER, StoredTensor(checkpoint.vocabulary()))  # it was tied to the embedding
    for changed, change in changes.items():
        module, _, kind = changed.rpartition(".")
        if module not in places and module.startswith(NAMING.layers):
            raise CheckpointError(f"{_another_base(adapter, base)}, which has no {quoted(module)}")
        if module not in places:
            raise CheckpointError(
                f"{adapter.origin} adapts {quoted(module)}, which is not a linear map or norm of ESM-2"
            )
        ours, part, parts = places[module]
        if ours == "contact_head" and not checkpoint.has_contact_head:
            continue
        target = f"{ours}.{kind}"
        if target not in tensors:
            raise CheckpointError(f"{adapter.origin} adapts {quoted(module)}, which {base} does not have")
        *rows, columns = tensors[target].shape
        share = columns // parts
        if not change.fits((*rows, share)):
            raise CheckpointError(f"{_another_base(adapter, base)}: its {quoted(module)} has a different size")
        tensors[target] = _changed(tensors[target], slice(part * share, (part + 1) * share), change)
    source = f"{checkpoint.source} + {Path(adapter.origin).name}"
    return replace(
        checkpoint, config=config, tensors=tensors, source=source, source_sha256="", metadata={}, base=checkpoint
    )


def _check_base(checkpoint: Checkpoint, adapter: Adapter, base: str) -> None:
    preset = preset_name(adapter.base)
    if preset is not None and PRESETS[preset] != checkpoint.config:
        raise _another_base(adapter, base)
    if preset is None and adapter.base and Path(adapter.base).exists() and not same_file(adapter.base, base):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about heads, which do not matter here
            theirs = load_checkpoint(Path(adapter.base))
        if theirs.config != checkpoint.config or not _same_numbers(theirs, checkpoint):
            raise _another_base(adapter, base)


def _same_numbers(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints of one shape are the same model, perhaps rounded."""
    first, second = (checkpoint.array("embed_tokens.weight") for checkpoint in (one, other))
    return bool(np.allclose(first, second, rtol=0.01, atol=0.01 * float(np.abs(first).max())))


def _another_base(adapter: Adapter, base: str) -> CheckpointError:
    return CheckpointError(f"{adapter.origin} is an adapter for {adapter.base or 'another base'}, not for {base}")


def _changes(adapter: Adapter) -> dict[str, _Change]:
    """What an adapter changes, by the names that transformers has for it."""
    changes: dict[str, _Change] = {}
    low_rank: dict[str, dict[str, Array]] = {}  # by module: "A" (r, in), "B" (out, r), "bias" (out,)
    for name, tensor in adapter.tensors.items():
        if ".original_module." in name:
            continue  # the module before training
        if tensor.dtype not in STORAGE_DTYPES or not is_finite(tensor):
            raise CheckpointError(f"{adapter.origin} has tensor {quoted(name)} whose numbers are not finite floats")
        array = tensor.astype(np.float64)
        if low := _LORA.fullmatch(name):
            low_rank.setdefault(_plain(low[1]), {})["bias" if low[3] == "bias" else low[2]] = array
        elif "lora_" in name or not name.endswith((".weight", ".bias")):
            raise CheckpointError(
                f"{adapter.origin} has tensor {quoted(name)}, which is not part of a LoRA of a linear map"
            )
        else:
            changes[_plain(name)] = _Change(whole=array.T)
    for module, parts in low_rank.items():
        if missing := sorted({"A", "B"} - parts.keys()):
            raise CheckpointError(f"{adapter.origin} is incomplete: lora_{missing[0]} of {quoted(module)} is missing")
        a, b = parts["A"], parts["B"]
        if a.ndim != 2 or b.ndim != 2 or not len(a) or len(a) != b.shape[1]:
            raise CheckpointError(f"{adapter.origin}: lora_A and lora_B of {quoted(module)} do not match")
        scale = _scale(adapter, module, len(a))
        added = {"weight": (a.T, b.T)} | ({"bias": (parts["bias"],)} if "bias" in parts else {})
        for kind, factors in added.items():
            name = f"{module}.{kind}"
            changes[name] = replace(changes.get(name, _Change()), factors=factors, scale=scale)
    return {name: change for name, change in changes.items() if not name.startswith("pooler.")}


def _check_complete(adapter: Adapter, changes: Mapping[str, _Change], layers: int) -> None:
    """Raise CheckpointError if what the configuration says was trained is not there: merged, it would be half a model.

    Targets with numbers, expressions and chosen layers are the trainer's own choice, which is not looked into.
    """
    adapted = {name.rpartition(".")[0] for name, change in changes.items() if change.factors}
    whole = {name.rpartition(".")[0] for name, change in changes.items() if change.whole is not None}
    targets, narrowed = adapter.config.get("target_modules"), ("layers_to_transform", "exclude_modules")
    named = targets if isinstance(targets, list) and not any(adapter.config.get(key) for key in narrowed) else []
    for target in (one for one in named if isinstance(one, str) and not re.search(r"\d", one)):
        found = [module for module in adapted if f".{module}".endswith(f".{target}")]
        numbers = {match[1] for module in found if (match := _LAYER.search(module))}
        if not found or 0 < len(numbers) < layers:
            where = "" if not found else f" in {layers - len(numbers)} of {layers} layers"
            raise CheckpointError(f"{adapter.origin} is incomplete: its target {quoted(target)} is missing{where}")
    saved = adapter.config.get("modules_to_save") or []
    heads = {"classifier", "score"}  # peft lists both, whichever the model has
    for one in saved if isinstance(saved, list) else []:
        wanted = heads if one in heads else {one}
        if not any(f".{part}." in f".{name}." for name in whole for part in wanted):
            raise CheckpointError(f"{adapter.origin} is incomplete: its trained module {quoted(str(one))} is missing")


def _plain(name: str) -> str:
    """A name without what peft and transformers' heads put around it."""
    return _WRAPPERS.sub("", name).removeprefix("esm.")


def _scale(adapter: Adapter, module: str, rank: int) -> float:
    """alpha / r, or alpha / √r of rsLoRA."""
    alpha, patterns = adapter.config.get("lora_alpha"), adapter.config.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        plain = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", plain):
            raise CheckpointError(f"{adapter.origin}: alpha_pattern has {quoted(pattern)}, expected names of modules")
        if f".{module}".endswith(f".{plain}"):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{adapter.origin} does not give lora_alpha as a number")
    return alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)


def _changed(tensor: StoredTensor, columns: slice, change: _Change) -> StoredTensor:
    """A tensor of the base with a change; a matrix is computed when its numbers are needed."""

    def build() -> Array:
        values = np.array(tensor.astype(np.float64))
        change.apply(values[..., columns])
        return values.astype(np.float32)

    return DeferredTensor(tensor.shape, "F32", build, [tensor]) if len(tensor.shape) == 2 else StoredTensor(build())


def _classifier(
    checkpoint: Checkpoint, adapter: Adapter, changes: dict[str, _Change]
) -> tuple[Classifier | None, dict[str, StoredTensor] | None]:
    """The classification head of the merged model, and its tensors if the adapter brings the whole head.

    The labels are those of a config.json beside the adapter or, if the head has the same size, of the base.
    """
    found = {
        name: StoredTensor(change.whole.T.astype(np.float32))
        for name, change in changes.items()
        if name.startswith(CLASSIFIER) and change.whole is not None
    }
    theirs = checkpoint.config.classifier
    if f"{CLASSIFIER}weight" not in found and f"{CLASSIFIER}out_proj.weight" not in found:
        return theirs, None
    config = read_config(Path(adapter.origin, "config.json"))
    mapping = adapter.config.get("auto_mapping")
    stated = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    architecture = _TASKS.get(str(adapter.config.get("task_type")), stated)
    config = {key: config.get(key) for key in ("id2label", "problem_type")} | {"architectures": [architecture]}
    ours = classifier_of(Model(NAMING, found, ()), config, adapter.origin)
    if ours is None:
        raise CheckpointError(f"{adapter.origin} has a classifier, but does not say which class of transformers it is")
    if theirs is not None and theirs.head == ours.head and len(theirs.labels) == len(ours.labels):
        ours = replace(
            theirs,
            labels=ours.labels if config["id2label"] else theirs.labels,
            problem_type=ours.problem_type if config["problem_type"] else theirs.problem_type,
        )
    shapes = canonical_shapes(replace(checkpoint.config, classifier=ours))
    return ours, {n: StoredTensor(np.zeros(s, np.float32)) for n, s in shapes.items() if n.startswith(CLASSIFIER)}
