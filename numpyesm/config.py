"""Model shapes: one small dataclass and the published ESM-2 sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .errors import CheckpointError

VOCAB_SIZE = 33
MAX_RESIDUES = 2048


HEADS = ("sequence", "token")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
_SIZES = ("num_layers", "embed_dim", "num_heads", "ffn_dim")


@dataclass(frozen=True)
class Classifier:
    """What a classification head, added to the encoder by fine-tuning, means."""

    head: str  # "sequence": one row of numbers, from the `<cls>` row; "token": one per residue
    labels: tuple[str, ...]  # name of each number
    problem_type: str  # of `PROBLEM_TYPES`: softmax, sigmoid, or the numbers as they are

    def __post_init__(self) -> None:
        for name, value, allowed in (("head", self.head, HEADS), ("problem_type", self.problem_type, PROBLEM_TYPES)):
            if value not in allowed:
                raise CheckpointError(f"the classifier has {name}={value!r}, expected one of {', '.join(allowed)}")
        if not self.labels or not all(isinstance(label, str) for label in self.labels):
            raise CheckpointError("the classifier's labels are not a list of names")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of an ESM-2 encoder.

    Attributes
    ----------
    num_layers, embed_dim, num_heads, ffn_dim : int
        Number of layers, width, attention heads per layer, feed-forward width.
    classifier : Classifier or None
        The head of a fine-tuned model; two encoders are equal whatever their heads.
    whole_layers : int or None
        If the model consists of the first layers of another one: how many layers that one has. The LayerNorm after
        the last layer is then left out.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    ffn_dim: int
    classifier: Classifier | None = field(default=None, compare=False)
    whole_layers: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(f"the model configuration has {name}={value!r}, expected a positive integer")
        whole = self.whole_layers
        if whole is not None and (type(whole) is not int or whole <= self.num_layers or self.classifier is not None):
            raise CheckpointError(f"the model configuration has whole_layers={whole!r}, expected more than num_layers")
        if self.embed_dim % (2 * self.num_heads):
            raise CheckpointError(
                f"the model configuration has embed_dim={self.embed_dim} and num_heads={self.num_heads}: "
                "rotary attention needs an even number of channels per head"
            )

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.embed_dim // self.num_heads

    @property
    def num_representations(self) -> int:
        """Number of representations: the embedding (0) and one per layer."""
        return self.num_layers + 1

    @property
    def name(self) -> str:
        """Preset name (`esm2-35m`), or `custom`; `esm2-35m-first-6` for the first layers of one."""
        if self.whole_layers is not None:
            whole = replace(self, num_layers=self.whole_layers, whole_layers=None)
            return f"{whole.name}-first-{self.num_layers}"
        return next((name for name, preset in PRESETS.items() if preset == self), "custom")

    def to_json(self) -> str:
        """Return the fields as a JSON object with sorted keys, as canonical files store it."""
        fields = {key: value for key, value in asdict(self).items() if value is not None}
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Parse what `to_json` returns; CheckpointError for anything else."""
        try:
            fields: dict[str, Any] = json.loads(text)
            sizes = {key: fields[key] for key in _SIZES}
            said: Mapping[str, Any] | None = fields.get("classifier")
            classifier = said and Classifier(said["head"], tuple(said["labels"]), said["problem_type"])
            return cls(**sizes, classifier=classifier or None, whole_layers=fields.get("whole_layers"))
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"the model configuration in the file cannot be read ({error})") from error


PRESETS: dict[str, ModelConfig] = {
    "esm2-8m": ModelConfig(6, 320, 20, 1280),
    "esm2-35m": ModelConfig(12, 480, 20, 1920),
    "esm2-150m": ModelConfig(30, 640, 20, 2560),
    "esm2-650m": ModelConfig(33, 1280, 20, 5120),
    "esm2-3b": ModelConfig(36, 2560, 40, 10240),
    "esm2-15b": ModelConfig(48, 5120, 40, 20480),
}

# What fair-esm calls each preset, such as esm2_t12_35M_UR50D; on the Hugging Face Hub the same follows "facebook/".
OFFICIAL_NAMES: dict[str, str] = {
    name: f"esm2_t{config.num_layers}_{name.removeprefix('esm2-').upper()}_UR50D" for name, config in PRESETS.items()
}


def preset_name(name: str) -> str | None:
    """Return `esm2-35m` for that name in any case, `esm2_t12_35M_UR50D` or `facebook/esm2_t12_35M_UR50D`; else None."""
    if name.lower() in PRESETS:
        return name.lower()
    bare = name.removeprefix("facebook/")
    return next((preset for preset, official in OFFICIAL_NAMES.items() if official == bare), None)
