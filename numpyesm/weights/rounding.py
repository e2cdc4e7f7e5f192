"""Round a model's matrices to bf16 or int8 so that its results change as little as possible.

Weights are rounded one input channel after the other, and each makes up for the errors of those before it, as the
correlation of their inputs on natural sequences allows (GPTQ, Frantar et al. 2022, in the form of LDLQ, Chee et al.
2023, which needs no inverse). Where bf16 is only a precision to run in, and no file is made, it is rounded to nearest,
which takes a tenth of the time.

The inputs of a layer's matrices have channels with a large mean. Rounding them to bf16 as they are loses what remains
once the mean is subtracted, and rounding a weight that meets a constant input shifts every result the same way. So
files hold the mean inputs, and what rounding does to them goes into the bias; see `kernels/compiled/packing.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import reference
from ..alphabet import tokenize
from ..kernels.numpy_steps import gelu
from .checkpoint import FREQUENCIES, MATRICES, Checkpoint, input_mean
from .tensor import (
    GROUP,
    PRECISION_DTYPES,
    StoredTensor,
    group_scales,
    nearest_levels,
    round_to_bfloat16,
    widen_bfloat16,
)

# Channels that make up for each other's errors; wider matrices are rounded in parts. The correlations of all 10,240
# hidden channels of 3B would take more than a gigabyte and double the time of a conversion.
_TOGETHER = 2560
# Rows that pass errors on among themselves, before all of them correct the next rows at once.
_ROWS_AT_ONCE = 64
# Added to the mean squares of channels, as a share of their mean: it keeps the corrections from overfitting a few
# thousand tokens. Those of bf16 are small enough to need less.
_DAMPING = {"bf16": 0.3, "int8": 1.0}

# What is rounded here.
LOW = ("bf16", "int8")

Array = npt.NDArray[np.float32]


def needs_rounding(checkpoint: Checkpoint, precision: str) -> bool:
    """Whether a precision is a low one, and not the one that the checkpoint is stored in."""
    return precision in LOW and checkpoint.precision != precision


def rounded_layers(
    checkpoint: Checkpoint, precision: str, *, for_file: bool = False
) -> Iterator[dict[str, StoredTensor]]:
    """Round the matrices of each layer to `bf16` or `int8`, correct their biases, and record the mean inputs.

    Parameters
    ----------
    checkpoint : Checkpoint
    precision : str
        Nothing is rounded unless the checkpoint `needs_rounding`.
    for_file : bool
        The result is kept: find the mean inputs even if nothing is rounded, and take the time to round bf16 well.

    Yields
    ------
    dict of str to StoredTensor
        The tensors of one layer that the checkpoint lacks or has in another form. Synthetic weights are rounded to
        nearest: there is nothing to learn from what goes through them.
    """
    rounds = needs_rounding(checkpoint, precision)
    learns = rounds or (for_file and not checkpoint.has_input_means)
    feeds_back = rounds and (for_file or precision == "int8")
    if checkpoint.synthetic or not learns:
        for layer in range(checkpoint.config.num_layers):
            names = [f"layers.{layer}.{name}.weight" for name in MATRICES] if rounds else []
            yield {name: checkpoint.tensors[name].stored_as(PRECISION_DTYPES[precision]) for name in names}
        return
    matrices = calibrated_matrices(checkpoint) if feeds_back or not checkpoint.has_input_means else None
    for layer in range(checkpoint.config.num_layers):
        changed: dict[str, StoredTensor] = {}
        for name in MATRICES:
            weight, bias = f"layers.{layer}.{name}.weight", f"layers.{layer}.{name}.bias"
            exact, inputs = next(matrices) if matrices else (checkpoint.array(weight), None)
            if checkpoint.has_input_means:
                mean = checkpoint.array(input_mean(layer, name))
            else:
                assert inputs is not None
                mean = inputs.mean(axis=0, dtype=np.float64).astype(np.float32)
                changed[input_mean(layer, name)] = StoredTensor(mean)
            if not rounds:
                continue
            if feeds_back and inputs is not None and np.isfinite(mean).all():
                stored = _with_feedback(exact, inputs - mean, precision)
            else:
                stored = StoredTensor(exact).stored_as(PRECISION_DTYPES[precision])
            # What rounding does to the mean input, from the differences: two products would cancel.
            corrected = checkpoint.array(bias) + mean @ (exact - stored.astype(np.float32))
            changed |= {weight: stored, bias: StoredTensor(corrected.astype(np.float32))}
            checkpoint.tensors[weight].release()
        yield changed


def made_for_file(checkpoint: Checkpoint, precision: str) -> dict[str, Callable[[], StoredTensor]]:
    """Return what makes each of the tensors of `rounded_layers`, mean inputs included, by name.

    Layers are made as their tensors are asked for, in order, and one is held at a time. Nothing is made before: first
    the output must turn out to be writable.
    """
    layers = rounded_layers(checkpoint, precision, for_file=True)
    held: dict[str, StoredTensor] = {}

    def make(name: str) -> StoredTensor:
        while name not in held:
            held.clear()  # before the next layer is made
            held.update(next(layers))
        return held[name]

    matrices = [(layer, name) for layer in range(checkpoint.config.num_layers) for name in MATRICES]
    names: list[str] = []
    if needs_rounding(checkpoint, precision):
        kinds = ("weight",) if checkpoint.synthetic else ("weight", "bias")
        names += [f"layers.{layer}.{name}.{kind}" for layer, name in matrices for kind in kinds]
    if not (checkpoint.synthetic or checkpoint.has_input_means):
        names += [input_mean(layer, name) for layer, name in matrices]
    return {name: partial(make, name) for name in names}


def _with_feedback(weight: Array, inputs: Array, precision: str) -> StoredTensor:
    """Round (K, N) channel by channel, those with the largest of the inputs (T, K) first."""
    scale = group_scales(weight) if precision == "int8" else None
    stored = np.empty(weight.shape, np.uint16 if scale is None else np.int8)
    smallest_first = np.argsort(np.einsum("tk,tk->k", inputs, inputs), kind="stable")
    for stop in range(len(weight), 0, -_TOGETHER):
        channels = smallest_first[max(0, stop - _TOGETHER) : stop]
        _round_together(weight, scale, _feedback(inputs[:, channels], _DAMPING[precision]), channels, stored)
    return StoredTensor(stored, PRECISION_DTYPES[precision], scale)


def _round_together(
    weight: Array, scale: Array | None, feedback: Array, channels: npt.NDArray[np.intp], stored: npt.NDArray[Any]
) -> None:
    """Round some rows of a matrix, the last first, into `stored`."""
    errors = np.empty((len(channels), weight.shape[1]), np.float32)
    for stop in range(len(channels), 0, -_ROWS_AT_ONCE):
        start = max(0, stop - _ROWS_AT_ONCE)
        rows = weight[channels[start:stop]]
        wanted = rows + feedback[stop:, start:stop].T @ errors[stop:]
        among_themselves = feedback[start:stop, start:stop].T.copy()
        for row in range(stop - start - 1, -1, -1):
            channel, behind = channels[start + row], slice(start + row + 1, stop)
            wanted[row] += among_themselves[row, row + 1 :] @ errors[behind]
            if scale is None:
                stored[channel] = found = round_to_bfloat16(wanted[row])
                rounded = widen_bfloat16(found)
            else:
                step = scale[channel // GROUP]
                stored[channel] = levels = nearest_levels(wanted[row], step)
                rounded = levels * step
            errors[start + row] = rows[row] - rounded


def _feedback(inputs: Array, damping: float) -> Array:
    """How much of a channel's error each channel before it takes over: (T, K) -> (K, K), below the diagonal.

    With the mean products of channels factored as L·D·Lᵀ, the output's squared error is that of the rows of Lᵀ·errors,
    weighted by D: each is smallest if the channel makes up for what the channels behind it add to it.
    """
    products: Array = inputs.T @ inputs
    products /= len(inputs)
    diagonal = np.einsum("ii->i", products)
    diagonal += damping * max(diagonal.mean(), np.finfo(np.float32).tiny)
    factor: Array = np.linalg.cholesky(products)
    factor /= np.einsum("ii->i", factor).copy()
    return factor


def calibration_sequences() -> list[str]:
    """Return the proteins and peptides that come with the package for this: 14 to 348 residues, 2,281 in all."""
    from ..fasta import packaged  # not needed to open a file

    return [record.sequence for record in packaged("calibration.fasta")]


def calibrated_matrices(checkpoint: Checkpoint) -> Iterator[tuple[Array, Array]]:
    """Run the calibration sequences and yield each matrix of the layers, in the order of the pass, with its inputs.

    Yields
    ------
    weight : ndarray (K, N) float32
    inputs : ndarray (T, K) float32
        The rows that it is multiplied with, T tokens of all sequences. One matrix is held at a time.
    """
    tokens = tokenize(calibration_sequences())
    ends = np.cumsum([len(one) for one in tokens])[:-1]
    frequencies, embedding = checkpoint.array(FREQUENCIES), checkpoint.array("embed_tokens.weight")
    x = np.concatenate([reference.embed(one, embedding).astype(np.float32) for one in tokens])

    def normed(name: str) -> Array:
        return reference.layer_norm(x, checkpoint.array(f"{name}.weight"), checkpoint.array(f"{name}.bias"))

    def attention(qkv: Array) -> Array:
        parts = zip(np.split(qkv, ends), tokens, strict=True)
        return np.concatenate([reference.self_attention(rows, one, frequencies)[0] for rows, one in parts])

    for layer in range(checkpoint.config.num_layers):
        prefix = f"layers.{layer}."
        inputs = normed(f"{prefix}attention_norm")
        for name in MATRICES:
            weight = checkpoint.array(f"{prefix}{name}.weight")
            yield weight, inputs
            outputs = inputs @ weight
            outputs += checkpoint.array(f"{prefix}{name}.bias")
            checkpoint.tensors[f"{prefix}{name}.weight"].release()
            if name == "qkv":
                inputs = attention(outputs)
            elif name == "fc1":
                gelu(outputs)
                inputs = outputs
            else:
                x += outputs
                inputs = normed(f"{prefix}ffn_norm")
