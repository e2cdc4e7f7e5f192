"""From the tensors of a recognised model to the canonical layout.

fair-esm and transformers store the same tensors under different names, which a `Naming` lists; all else is common.
Both store matrices as (out_features, in_features).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import PRESETS, VOCAB_SIZE, ModelConfig
from ..errors import CheckpointError
from ..printable import quoted
from .checkpoint import CLASSIFIER, DECODER, FREQUENCIES, Checkpoint, canonical_shapes, computed_frequencies
from .recognise import CONTACT_REGRESSION, LM_BIAS, LM_DENSE, QUANTISED_SENTENCE, Model
from .tensor import FLOAT_DTYPES, STORAGE_DTYPES, DeferredTensor, StoredTensor

_ALWAYS_FLOAT32 = ("contact_head", CLASSIFIER)  # small and sensitive


def deduce_config(model: Model, num_heads: int | None, origin: str) -> ModelConfig:
    """Return the model's shape, from the tensors themselves.

    If the checkpoint's configuration does not state `num_heads`, that is deduced, too: from the rotary frequencies or
    the contact head or, where neither is stored, from the published model of this depth and width.
    """
    naming, tensors = model.naming, model.tensors
    numbered = re.compile(re.escape(naming.layers) + r"(\d{1,6})\.")
    layers = {int(match[1]) for name in tensors if (match := numbered.match(name))}
    missing = next((index for index in range(len(layers)) if index not in layers), None)
    if missing is not None:
        raise CheckpointError(f"{origin} is incomplete: layer {missing} is missing")
    fc1 = f"{naming.layer(0)}{naming.of_layer['fc1'][0]}.weight"
    shape = tensors[fc1].shape if fc1 in tensors else ()
    if len(shape) != 2:
        raise CheckpointError(f"{origin} is incomplete: tensor {quoted(fc1)} is missing or is not a matrix")
    ffn, width = shape
    heads = num_heads or _deduced_heads(model, len(layers), width)
    if heads is None:
        raise CheckpointError(
            f"{origin} does not say how many attention heads it has, and no published ESM-2 model has {len(layers)} "
            f"layers of width {width}"
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


def assemble(model: Model, config: ModelConfig, origin: str, source: str) -> Checkpoint:
    """Convert all tensors of a model to the canonical layout; the layers' matrices are converted when they are used.

    CheckpointError if one is missing, misshapen, not a float or not finite, or the trunk has parts that ESM-2 lacks.
    """
    assembler = _Assembler(model, config, origin)
    tensors = assembler.assemble()
    precision = next(name for name, dtype in FLOAT_DTYPES.items() if dtype == assembler.storage)
    return Checkpoint(config, tensors, source=source, precision=precision)


class _Assembler:
    """Takes tensors from a checkpoint one by one, checks them, and remembers which it has taken."""

    def __init__(self, model: Model, config: ModelConfig, origin: str) -> None:
        self.tensors = model.tensors
        self.naming = model.naming
        self.config = config
        self.origin = origin
        self.used: set[str] = set()
        self.storage = _common_storage(
            tensor
            for name, tensor in model.tensors.items()
            if not name.startswith(_ALWAYS_FLOAT32) and not name.endswith(model.naming.ignored)
        )

    def assemble(self) -> dict[str, StoredTensor]:
        shapes = canonical_shapes(self.config)
        name, decoder = self.naming.embedding, self.naming.decoder
        if name not in self.tensors and decoder in self.tensors:
            name = decoder  # tied to the embedding: a writer has dropped the second of two equal tensors
        embedding = self.array(name, shapes["embed_tokens.weight"])
        result = {"embed_tokens.weight": StoredTensor(np.ascontiguousarray(embedding), self.storage)}
        absent = tuple(
            head
            for head, sign in (("lm_head.", LM_DENSE), ("contact_head", CONTACT_REGRESSION))
            if f"{sign}.weight" not in self.tensors
        )
        for ours, theirs in self.naming.parts(self.config).items():
            if not ours.startswith(absent):
                result |= self.part(ours, theirs, shapes[f"{ours}.weight"])
        if "lm_head." not in absent:
            result["lm_head.bias"] = self.lm_bias()
            last = self.array(decoder, embedding.shape) if decoder in self.tensors else embedding
            if not np.array_equal(last, embedding):  # fine-tuning untied it
                result[DECODER] = StoredTensor(np.ascontiguousarray(last.T), self.storage)
        result[FREQUENCIES] = StoredTensor(self.frequencies())
        for name in self.tensors:
            if name not in self.used and not name.endswith(self.naming.ignored):  # the numbers would be wrong
                raise CheckpointError(
                    f"{self.origin} is not a plain ESM-2 model: tensor {quoted(name)} is not part of one"
                )
        return result

    def part(self, ours: str, theirs: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        """Convert a linear map, the three of query, key and value as one, or a norm; `shape` is the canonical one."""
        outputs = shape[-1] // len(theirs)
        biases = [self.array(f"{name}.bias", (1 if ours == "contact_head" else outputs,), "F32") for name in theirs]
        bias = {f"{ours}.bias": StoredTensor(np.concatenate(biases))}
        if len(shape) == 1:
            stored = (1, *shape) if ours == "contact_head" else shape
            weight = self.array(f"{theirs[0]}.weight", stored, "F32")
            return bias | {f"{ours}.weight": StoredTensor(np.ascontiguousarray(weight.reshape(shape)))}
        storage = "F32" if ours.startswith(_ALWAYS_FLOAT32) else self.storage
        sources = [self.checked(f"{name}.weight", (outputs, shape[0])) for name in theirs]

        def join() -> npt.NDArray[Any]:
            joined = np.empty(shape, STORAGE_DTYPES[storage])
            for index, source in enumerate(sources):
                joined[:, index * outputs : (index + 1) * outputs] = source.stored_as(storage).raw.T
            return joined

        joined = DeferredTensor(shape, storage, join, sources)
        joined.release()  # every number has been checked
        return bias | {f"{ours}.weight": joined}

    def lm_bias(self) -> StoredTensor:
        """The LM head's bias, which some writers store twice, or only as the decoder's."""
        again = "lm_head.decoder.bias"
        names = [name for name in (LM_BIAS, again) if name in self.tensors] or [LM_BIAS]
        first, *others = (self.array(name, (VOCAB_SIZE,), "F32") for name in names)
        if not all(np.array_equal(other, first) for other in others):
            raise CheckpointError(f"{self.origin} has two LM head biases that differ")
        return StoredTensor(np.ascontiguousarray(first))

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

    def array(self, name: str, shape: tuple[int, ...], storage: str | None = None) -> npt.NDArray[Any]:
        """Return one tensor, checked, in the storage dtype."""
        return self.checked(name, shape).stored_as(storage or self.storage).raw

    def checked(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Return one tensor as the checkpoint has it, checked."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.origin} is incomplete: tensor {quoted(name)} is missing")
        tensor = self.tensors[name]
        if tensor.dtype.startswith("F8") or (len(tensor.shape) == 2 and tensor.dtype in ("I8", "U8")):
            stored = f"{quoted(name)} is stored as {tensor.dtype}"
            raise CheckpointError(f"{self.origin} {QUANTISED_SENTENCE.format(stored)}")
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


def _common_storage(tensors: Iterable[StoredTensor]) -> str:
    """The dtype that all matrices of floats share; float32 if they do not."""
    found = {t.dtype for t in tensors if len(t.shape) == 2 and t.dtype in STORAGE_DTYPES}
    (dtype,) = found if len(found) == 1 else ("F32",)
    return dtype if dtype in FLOAT_DTYPES.values() else "F32"


def is_finite(tensor: StoredTensor) -> bool:
    """Whether a tensor is free of NaN and infinity."""
    if tensor.dtype == "BF16":  # all exponent bits set
        return not bool(((tensor.raw & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(tensor.raw).all())
