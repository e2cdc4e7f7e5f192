"""The canonical layout, which every reader produces and every backend takes.

Matrices are (in_features, out_features), so a layer is `rows @ weight`: OpenBLAS runs this up to twice as fast as
`rows @ weight.T` at the 16 to 100 rows of a short protein. Query, key and value are one matrix, in this order. Nothing
is scaled or folded: a file converted to float32 holds the checkpoint's own numbers, and beside them the mean input of
each matrix, which lower precisions need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ..config import VOCAB_SIZE, ModelConfig
from ..errors import CheckpointError, InvalidOption
from .tensor import StoredTensor

LM_HEAD = ("lm_head.dense.weight", "lm_head.dense.bias", "lm_head.norm.weight", "lm_head.norm.bias", "lm_head.bias")
CONTACT_HEAD = ("contact_head.weight", "contact_head.bias")
CLASSIFIER = "classifier."  # how the names of a classification head begin
FREQUENCIES = "rotary.frequencies"
DECODER = "lm_head.decoder.weight"  # (D, V), only where fine-tuning untied it from the embedding

# The matrices of a layer.
MATRICES = ("qkv", "out_proj", "fc1", "fc2")
INPUT_MEANS = "input_means."


def input_mean(layer: int, matrix: str) -> str:
    """Return the name of the mean input of a layer's matrix: (K,), over natural sequences (`rounding.py`)."""
    return f"{INPUT_MEANS}{layer}.{matrix}"


def computed_frequencies(head_dim: int) -> npt.NDArray[np.float32]:
    """Return 10000^(-2i/C), rounded to float32 as fair-esm and transformers compute it: (C/2,).

    Only for checkpoints that store no frequencies. Those of the official models are rounded to half precision.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(10000.0, exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / power


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a canonical file may hold, in file order."""
    width, ffn = config.embed_dim, config.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCAB_SIZE, width)}

    def add(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[-1:]})

    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        add(prefix + "attention_norm", width)
        add(prefix + "qkv", width, 3 * width)
        add(prefix + "out_proj", width, width)
        add(prefix + "ffn_norm", width)
        add(prefix + "fc1", width, ffn)
        add(prefix + "fc2", ffn, width)
        # With their layer: `convert` learns them layer by layer, too.
        shapes.update({input_mean(layer, name): (ffn if name == "fc2" else width,) for name in MATRICES})
    if config.classifier is not None:
        if config.classifier.head == "sequence":
            add(f"{CLASSIFIER}dense", width, width)
        add(f"{CLASSIFIER}out_proj", width, len(config.classifier.labels))
    if config.whole_layers is None:
        add("final_norm", width)
    add("lm_head.dense", width, width)
    add("lm_head.norm", width)
    return shapes | {
        "lm_head.bias": (VOCAB_SIZE,),
        "contact_head.weight": (config.num_layers * config.num_heads,),
        "contact_head.bias": (1,),
        FREQUENCIES: (config.head_dim // 2,),
        DECODER: (width, VOCAB_SIZE),
    }


@dataclass(frozen=True)
class Checkpoint:
    """Weights in the canonical layout, and where they came from.

    Attributes
    ----------
    config : ModelConfig
    tensors : mapping of str to StoredTensor
        Canonical names; the LM head and the contact head are each there completely or not at all, a classification head
        if the configuration names one. The LM head's decoder is only there if it differs from the embedding.
    source : str
        Where the numbers came from, for people (`esm2_t12_35M_UR50D.pt`, `synthetic:esm2-35m:0`).
    source_sha256 : str
        SHA-256 of the source file, empty if there is none.
    precision : str
        How the matrices are stored: `fp32`, `fp16`, `bf16` or `int8`.
    synthetic : bool
        True for seeded random weights: their outputs mean nothing.
    base : Checkpoint or None
        What an adapter was merged into; tensors that the adapter does not touch are the same objects.
    """

    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    source: str
    source_sha256: str = ""
    precision: str = "fp32"
    synthetic: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    base: Checkpoint | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # First, because the names of all layers are made next, and a damaged file may state a billion.
        if self.config.num_layers > len(self.tensors):
            raise CheckpointError(
                f"the configuration states {self.config.num_layers} layers, but there are {len(self.tensors)} tensors"
            )
        expected = canonical_shapes(self.config)
        means = tuple(input_mean(layer, name) for layer in range(self.config.num_layers) for name in MATRICES)
        for head in (LM_HEAD, CONTACT_HEAD, (DECODER,), means):
            present = [name for name in head if name in self.tensors]
            if present and len(present) < len(head):
                missing = next(name for name in head if name not in self.tensors)
                raise CheckpointError(f"tensor {missing!r} is missing, though {present[0]!r} is there")
            if not present:
                expected = {name: shape for name, shape in expected.items() if name not in head}
        for name, shape in expected.items():
            if name not in self.tensors:
                raise CheckpointError(f"tensor {name!r} is missing")
            if self.tensors[name].shape != shape:
                raise CheckpointError(
                    f"tensor {name!r} has shape {self.tensors[name].shape}, expected {shape} for {self.config.name}"
                )
        unknown = sorted(self.tensors.keys() - expected.keys())
        if unknown:
            raise CheckpointError(f"tensor {unknown[0]!r} is not part of an ESM-2 model")
        frequencies = self.array(FREQUENCIES)
        if not ((frequencies > 0) & (frequencies <= 1)).all():  # NaN fails too
            raise CheckpointError("a rotary frequency is not in (0, 1]")

    @property
    def has_lm_head(self) -> bool:
        return LM_HEAD[0] in self.tensors

    @property
    def has_contact_head(self) -> bool:
        return CONTACT_HEAD[0] in self.tensors

    @property
    def has_input_means(self) -> bool:
        return input_mean(0, MATRICES[0]) in self.tensors

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters: all but frequencies and mean inputs."""
        return sum(
            int(np.prod(tensor.shape))
            for name, tensor in self.tensors.items()
            if name != FREQUENCIES and not name.startswith(INPUT_MEANS)
        )

    def first_layers(self, count: int) -> Checkpoint:
        """Return the first layers alone: their representations are those of the whole model, and all heads are gone.

        InvalidOption if the model does not have that many.
        """
        layers = self.config.num_layers
        if not 1 <= count <= layers:
            raise InvalidOption(f"layers={count}: {self.config.name} has {layers} layers, expected 1 to {layers}")
        if count == layers:
            return self
        whole = self.config.whole_layers or layers
        config = replace(self.config, num_layers=count, classifier=None, whole_layers=whole)
        gone = {*LM_HEAD, *CONTACT_HEAD, DECODER}
        kept = {name: self.tensors[name] for name in canonical_shapes(config) if name in self.tensors.keys() - gone}
        return replace(self, config=config, tensors=kept)

    def array(self, name: str, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[np.floating]:
        """Return one tensor as `dtype`: a view of the file if it is stored that way."""
        return self.tensors[name].astype(dtype)

    def vocabulary(self, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[np.floating]:
        """Return the last matrix of the LM head, contiguous: (D, V). The embedding, unless fine-tuning untied it."""
        tied = DECODER not in self.tensors
        matrix = self.array("embed_tokens.weight", dtype).T if tied else self.array(DECODER, dtype)
        return np.ascontiguousarray(matrix)
