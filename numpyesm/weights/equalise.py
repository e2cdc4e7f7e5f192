"""The same model with activations that suit eight bits: what a channel is too large for, its weights take over.

A row of activations has one scale in int8, so one channel that is thirty times larger than the others takes five bits
from them. Behind a LayerNorm a channel's size is known without data, from gain and shift: both are divided by a factor
for each channel, and the rows of the matrix that follows are multiplied by it (SmoothQuant, Xiao et al. 2023, α = 1/2,
with the LayerNorm in place of calibration). Factors are powers of two: in float32 nothing changes, to the last bit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .checkpoint import Checkpoint
from .tensor import StoredTensor

_FOLLOWED_BY = {"attention_norm": "qkv", "ffn_norm": "fc1"}
# Factors beyond this would be those of channels that are (almost) zero on either side.
_LARGEST_EXPONENT = 8


def equalised(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` ready to be rounded to int8; itself if it is int8 already."""
    if checkpoint.precision == "int8":
        return checkpoint
    tensors = dict(checkpoint.tensors)
    for layer in range(checkpoint.config.num_layers):
        for norm, matrix in _FOLLOWED_BY.items():
            gain, shift, weight = (
                f"layers.{layer}.{name}" for name in (f"{norm}.weight", f"{norm}.bias", f"{matrix}.weight")
            )
            values = {name: tensors[name].astype(np.float32) for name in (gain, shift, weight)}
            factor = _factors(values[gain], values[shift], values[weight])
            if (factor == 1).all():
                continue
            tensors[gain] = StoredTensor(values[gain] / factor)
            tensors[shift] = StoredTensor(values[shift] / factor)
            tensors[weight] = StoredTensor(values[weight] * factor[:, None])
    return replace(checkpoint, tensors=tensors, precision="fp32")


def _factors(
    gain: npt.NDArray[np.floating],
    shift: npt.NDArray[np.floating],
    weight: npt.NDArray[np.floating],
) -> npt.NDArray[np.float32]:
    """What each channel's activations are divided by: (D,), (D,), (D, N) -> (D,), powers of two."""
    activation = np.hypot(gain, shift)  # the root mean square of gain · (a number of variance 1) + shift
    largest = np.abs(weight).max(axis=1)
    exponent = np.zeros(len(gain))
    usable = (activation > 0) & (largest > 0) & np.isfinite(activation) & np.isfinite(largest)
    if usable.any():
        wanted = 0.5 * (np.log2(activation[usable]) - np.log2(largest[usable]))
        exponent[usable] = np.clip(np.rint(wanted - np.median(wanted)), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return np.exp2(exponent).astype(np.float32)
