"""From the tensors of a recognised model to the canonical layout.

fair-esm and transformers store the same tensors under different names, which a `Naming` lists; all else is common.
Both store matrices as (out_features, in_features).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import PRESETS, VOCAB_SIZE, ModelConfig
from ..errors import CheckpointError
from ..printable import quoted
from .checkpoint import CLASSIFIER, DECODER, FREQUENCIES, computed_frequencies
from .recognise import CONTACT_REGRESSION, LM_BIAS, LM_DENSE, Model, Tensors, refuse_quantised_storage
from .tensor import FLOAT_DTYPES, STORAGE_DTYPES, DeferredTensor, StoredTensor


def deduce_config(model: Model, num_heads: int | None, origin: str) -> ModelConfig:
    """Return the model's shape, from the tensors themselves.

    Parameters
    ----------
    num_heads : int or None
        As the checkpoint's configuration states it. None to deduce it: from the rotary frequencies or the contact head
        or, where neither is stored, from the published model of this depth and width.
    """
    naming, tensors = model.naming, model.tensors
    numbered = re.compile(re.escape(naming.layers) + r"(\d{1,6})\.")
    layers = {int(match[1]) for name in tensors if (match := numbered.match(name))}
    missing = next((index for index in range(len(layers)) if index not in layers), None)
    if missing is not None:
        raise CheckpointError(f"{origin} is incomplete: layer {missing} is missing")
    ffn, width = _matrix_shape(tensors, naming.layer(0) + naming.fc1 + ".weight", origin)
    heads = num_heads or _deduced_heads(model, len(layers), width)
    if heads is None:
        raise CheckpointError(
            f"{origin} does not say how many attention heads it has, and {len(layers)} layers of width {width} "
            "is no published ESM-2 model"
        )
    try:
        return ModelConfig(len(layers), width, heads, ffn)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def _deduced_heads(model: Model, layers: int, width: int) -> int | None:
    for name, tensor in model.tensors.items():
        size = int(np.prod(tensor.shape, dtype=np.int64))
        if name.endswith(model.naming.frequencies) and size and width % (2 * size) == 0:
            return width // (2 * size)
    regression = model.tensors.get(f"{CONTACT_REGRESSION}.weight")
    if regression is not None and regression.shape[-1:] and regression.shape[-1] % layers == 0:
        return regression.shape[-1] // layers
    same = (preset for preset in PRESETS.values() if (preset.num_layers, preset.embed_dim) == (layers, width))
    return next((preset.num_heads for preset in same), None)


def _matrix_shape(tensors: Tensors, name: str, origin: str) -> tuple[int, int]:
    if name not in tensors:
        raise CheckpointError(f"{origin} is incomplete: tensor {quoted(name)} is missing")
    shape = tensors[name].shape
    if len(shape) != 2:
        raise CheckpointError(f"{origin} has tensor {quoted(name)} of shape {shape}, expected a matrix")
    return shape


@dataclass(frozen=True)
class Assembled:
    """The canonical tensors of a model, and how its matrices are stored: `fp32`, `fp16` or `bf16`."""

    tensors: dict[str, StoredTensor]
    precision: str


def assemble(model: Model, config: ModelConfig, origin: str) -> Assembled:
    """Convert all tensors of a model to the canonical layout; matrices of layers when they are used.

    Raises
    ------
    CheckpointError
        If one is missing, has another shape, is no float or not finite; or if the trunk has parts that ESM-2 lacks.
    """
    assembler = _Assembler(model, config, origin)
    tensors = assembler.assemble()
    assembler.check_unused()
    return Assembled(tensors, next(name for name, dtype in FLOAT_DTYPES.items() if dtype == assembler.storage))


class _Assembler:
    """Takes tensors out of a checkpoint one by one, checks them, and knows at the end which it did not take."""

    def __init__(self, model: Model, config: ModelConfig, origin: str) -> None:
        self.tensors = model.tensors
        self.naming = model.naming
        self.config = config
        self.origin = origin
        self.used: set[str] = set()
        self.storage = _common_storage(
            {
                name: tensor
                for name, tensor in model.tensors.items()
                if not name.startswith(("contact_head.", CLASSIFIER)) and not name.endswith(model.naming.ignored)
            }
        )

    def assemble(self) -> dict[str, StoredTensor]:
        naming, width, ffn = self.naming, self.config.embed_dim, self.config.ffn_dim
        embedding = self.array(self.embedding_name(), (VOCAB_SIZE, width))
        result = {"embed_tokens.weight": StoredTensor(np.ascontiguousarray(embedding), self.storage)}
        for index in range(self.config.num_layers):
            theirs, ours = naming.layer(index), f"layers.{index}."
            result |= self.norm(ours + "attention_norm", theirs + naming.attention_norm)
            heads = [theirs + part for part in (naming.query, naming.key, naming.value)]
            result |= self.linear(ours + "qkv", heads, width, width)
            result |= self.linear(ours + "out_proj", [theirs + naming.out_proj], width, width)
            result |= self.norm(ours + "ffn_norm", theirs + naming.ffn_norm)
            result |= self.linear(ours + "fc1", [theirs + naming.fc1], width, ffn)
            result |= self.linear(ours + "fc2", [theirs + naming.fc2], ffn, width)
            result[ours + "fc2.weight"].release()  # whose file is the whole layer's: every number has been looked at
        result |= self.norm("final_norm", naming.final_norm)
        if f"{LM_DENSE}.weight" in self.tensors:
            result |= self.linear("lm_head.dense", [LM_DENSE], width, width)
            result |= self.norm("lm_head.norm", naming.lm_norm)
            result["lm_head.bias"] = self.lm_bias()
            result |= self.untied_decoder(embedding)
        if f"{CONTACT_REGRESSION}.weight" in self.tensors:
            maps = self.config.num_layers * self.config.num_heads
            weight = self.array(f"{CONTACT_REGRESSION}.weight", (1, maps), "F32")
            result["contact_head.weight"] = StoredTensor(np.ascontiguousarray(weight.reshape(maps)))
            result["contact_head.bias"] = self.vector(f"{CONTACT_REGRESSION}.bias", 1)
        if self.config.classifier is not None:
            labels, last = len(self.config.classifier.labels), "classifier"
            if self.config.classifier.head == "sequence":
                result |= self.linear("classifier.dense", ["classifier.dense"], width, width, "F32")
                last = "classifier.out_proj"
            result |= self.linear("classifier.out_proj", [last], width, labels, "F32")
        result[FREQUENCIES] = StoredTensor(self.frequencies())
        return result

    def embedding_name(self) -> str:
        """The embedding, or the decoder tied to it where a writer has dropped the second of two equal tensors."""
        name, decoder = self.naming.embedding, self.naming.decoder
        return decoder if name not in self.tensors and decoder in self.tensors else name

    def untied_decoder(self, embedding: npt.NDArray[Any]) -> dict[str, StoredTensor]:
        """The LM head's last matrix (D, V), if fine-tuning made it differ from the embedding that it is in ESM-2."""
        if self.naming.decoder not in self.tensors:
            return {}
        decoder = self.array(self.naming.decoder, embedding.shape)
        if np.array_equal(decoder, embedding):
            return {}
        return {DECODER: StoredTensor(np.ascontiguousarray(decoder.T), self.storage)}

    def lm_bias(self) -> StoredTensor:
        """The LM head's bias, which some writers store a second time or only as that of the decoder."""
        again = "lm_head.decoder.bias"
        if again not in self.tensors:
            return self.vector(LM_BIAS, VOCAB_SIZE)
        bias = self.vector(again, VOCAB_SIZE)
        if LM_BIAS in self.tensors and not np.array_equal(self.vector(LM_BIAS, VOCAB_SIZE).raw, bias.raw):
            raise CheckpointError(f"{self.origin} has two LM head biases that differ")
        return bias

    def frequencies(self) -> npt.NDArray[np.float32]:
        """The rotary frequencies as stored, once or in every layer; computed if the checkpoint has none: (C/2,)."""
        layers = [self.naming.layer(index) for index in range(self.config.num_layers)]
        present = [name for name in self.tensors if name.endswith(self.naming.frequencies)]
        if not present:
            return computed_frequencies(self.config.head_dim)
        without = [layer for layer in layers if not any(name.startswith(layer) for name in present)]
        if 0 < len(without) < len(layers):
            raise CheckpointError(
                f"{self.origin} is incomplete: it has {quoted(present[0])}, but none under {quoted(without[0])}"
            )
        first, *others = (self.array(name, (self.config.head_dim // 2,), "F32") for name in present)
        for name, values in zip(present[1:], others, strict=True):
            if not np.array_equal(values, first):
                raise CheckpointError(
                    f"{self.origin} has different rotary frequencies in {quoted(present[0])} and {quoted(name)}"
                )
        outside = first[(first <= 0) | (first > 1)]
        if len(outside):
            raise CheckpointError(
                f"{self.origin} has a rotary frequency of {outside[0]:g} in {quoted(present[0])}, expected (0, 1]"
            )
        return np.ascontiguousarray(first)

    def linear(
        self, ours: str, theirs: list[str], inputs: int, outputs: int, storage: str | None = None
    ) -> dict[str, StoredTensor]:
        """Convert one linear map, or the three of query, key and value as one."""
        shape, storage = (inputs, outputs * len(theirs)), storage or self.storage
        parts = [self.checked(f"{name}.weight", (outputs, inputs)) for name in theirs]

        def join() -> npt.NDArray[Any]:
            joined = np.empty(shape, STORAGE_DTYPES[storage])
            for index, part in enumerate(parts):
                joined[:, index * outputs : (index + 1) * outputs] = part.stored_as(storage).raw.T
            return joined

        bias = np.concatenate([self.array(f"{name}.bias", (outputs,), "F32") for name in theirs])
        return {f"{ours}.weight": DeferredTensor(shape, storage, join, parts), f"{ours}.bias": StoredTensor(bias)}

    def norm(self, ours: str, theirs: str) -> dict[str, StoredTensor]:
        width = self.config.embed_dim
        return {f"{ours}.{part}": self.vector(f"{theirs}.{part}", width) for part in ("weight", "bias")}

    def vector(self, name: str, length: int) -> StoredTensor:
        return StoredTensor(np.ascontiguousarray(self.array(name, (length,), "F32")))

    def array(self, name: str, shape: tuple[int, ...], storage: str | None = None) -> npt.NDArray[Any]:
        """Return one tensor, checked, in the storage dtype."""
        return self.checked(name, shape).stored_as(storage or self.storage).raw

    def checked(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Return one tensor as the checkpoint has it, checked."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.origin} is incomplete: tensor {quoted(name)} is missing")
        tensor = self.tensors[name]
        refuse_quantised_storage(name, tensor, self.origin)
        if tensor.shape != shape:
            raise CheckpointError(f"{self.origin} has tensor {quoted(name)} of shape {tensor.shape}, expected {shape}")
        if tensor.dtype not in STORAGE_DTYPES:
            raise CheckpointError(f"{self.origin} has tensor {quoted(name)} stored as {tensor.dtype}, not as a float")
        self.used.add(name)
        if not is_finite(tensor):
            raise CheckpointError(f"{self.origin} has NaN or infinite numbers in tensor {quoted(name)}")
        if tensor.dtype == "F64" and not is_finite(tensor.stored_as("F32")):
            raise CheckpointError(f"{self.origin} has numbers too large for float32 in tensor {quoted(name)}")
        return tensor

    def check_unused(self) -> None:
        """Refuse a trunk with parts that ESM-2 lacks: without them the numbers would be wrong."""
        for name in self.tensors:
            if name not in self.used and not name.endswith(self.naming.ignored):
                raise CheckpointError(
                    f"{self.origin} is not a plain ESM-2 model: tensor {quoted(name)} is not part of one"
                )


def _common_storage(tensors: Tensors) -> str:
    """The dtype that all matrices of floats share; float32 if they do not."""
    found = {t.dtype for t in tensors.values() if len(t.shape) == 2 and t.dtype in STORAGE_DTYPES}
    (dtype,) = found if len(found) == 1 else ("F32",)
    return dtype if dtype in FLOAT_DTYPES.values() else "F32"


def is_finite(tensor: StoredTensor) -> bool:
    """Whether a tensor is free of NaN and infinity."""
    if tensor.dtype == "BF16":  # all exponent bits set
        return not bool(((tensor.raw & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(tensor.raw).all())
