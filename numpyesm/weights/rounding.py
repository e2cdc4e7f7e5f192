"""Round a model's matrices to bf16 or int8 so that its results move as little as possible.

Weights are rounded to int8 one input channel after the other, and the error of each is made up for by those that
follow, as the correlation of their inputs on natural sequences allows (GPTQ, Frantar et al. 2022). What rounding does
to the mean input goes into the bias.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .calibration import matrix_inputs, mean_of, with_input_means
from .checkpoint import INPUT_MEANS, MATRICES, Checkpoint, input_mean
from .tensor import PRECISION_DTYPES, StoredTensor, group_scales, nearest_levels, row_scales

# Wider inputs (3B and 15B) are rounded to nearest: their correlations alone would take gigabytes, and half an hour.
_WIDEST = 5120
# Rows whose errors are passed on among themselves before the rest of the matrix is corrected.
_ROWS_AT_ONCE = 64

# What is rounded here.
LOW = ("bf16", "int8")

Float64 = npt.NDArray[np.float64]


def needs_rounding(checkpoint: Checkpoint, precision: str) -> bool:
    """Whether a precision is a low one, and not the one that the checkpoint is stored in."""
    return precision in LOW and checkpoint.precision != precision


def rounded_layers(checkpoint: Checkpoint, precision: str) -> Iterator[dict[str, StoredTensor]]:
    """Round the matrices of each layer to `bf16` or `int8`, correct their biases, and take note of the mean inputs.

    Parameters
    ----------
    checkpoint : Checkpoint
    precision : str
        Nothing changes unless the checkpoint `needs_rounding`.

    Yields
    ------
    dict of str to StoredTensor
        The tensors of one layer that take the place of the checkpoint's. Synthetic weights are rounded to nearest:
        there is nothing to learn from what goes through them.
    """
    layers = checkpoint.config.num_layers
    if not needs_rounding(checkpoint, precision):
        yield from ({} for _ in range(layers))
        return
    dtype = PRECISION_DTYPES[precision]
    if checkpoint.synthetic:
        for layer in range(layers):
            names = [f"layers.{layer}.{name}.weight" for name in MATRICES]
            yield {name: checkpoint.tensors[name].stored_as(dtype) for name in names}
        return
    correlated = precision == "int8"
    if not correlated:
        checkpoint = with_input_means(checkpoint)
    for layer, inputs in enumerate(matrix_inputs(checkpoint) if correlated else [None] * layers):
        changed: dict[str, StoredTensor] = {}
        for name in MATRICES:
            weight, bias = f"layers.{layer}.{name}.weight", f"layers.{layer}.{name}.bias"
            exact = checkpoint.array(weight)
            mean = checkpoint.array(input_mean(layer, name)) if inputs is None else mean_of(inputs[name])
            if inputs is not None and len(exact) <= _WIDEST and np.isfinite(mean).all():
                stored = _with_feedback(exact, _correlations(inputs[name] - mean))
            else:
                stored = checkpoint.tensors[weight].stored_as(dtype)
            # What rounding does to the mean input.
            corrected = checkpoint.array(bias) + mean @ (exact - stored.astype(np.float32))
            changed |= {
                weight: stored,
                bias: StoredTensor(corrected.astype(np.float32)),
                input_mean(layer, name): StoredTensor(mean),
            }
            checkpoint.tensors[weight].release()
        yield changed


class RoundedLayers:
    """The tensors of `rounded_layers` by name, made layer by layer while they are asked for in order.

    One layer is held at a time, and all mean inputs.
    """

    def __init__(self, checkpoint: Checkpoint, precision: str) -> None:
        self.needed = needs_rounding(checkpoint, precision)
        self._synthetic = checkpoint.synthetic
        self._layers = iter(rounded_layers(checkpoint, precision))
        self._held: dict[str, StoredTensor] = {}
        self._means: dict[str, StoredTensor] = {}

    def makes(self, name: str) -> bool:
        """Whether a tensor comes from here."""
        if not self.needed or (self._synthetic and not name.endswith(".weight")):
            return False
        return name.startswith(INPUT_MEANS) or (name.startswith("layers.") and name.split(".")[2] in MATRICES)

    def tensor(self, name: str) -> StoredTensor:
        """Return a tensor that does not come before one that was returned already, or is a mean input."""
        while name not in self._held and name not in self._means:
            self._held = next(self._layers)
            self._means |= {key: value for key, value in self._held.items() if key.startswith(INPUT_MEANS)}
        return self._held.get(name) or self._means[name]


def _correlations(inputs: npt.NDArray[np.float32]) -> Float64:
    """Mean products of input channels, (T, K) -> (K, K), with as much again on the diagonal as it has on average.

    So strong a damping keeps the corrections from fitting a few thousand tokens.
    """
    products = (inputs.T @ inputs).astype(np.float64) / len(inputs)
    diagonal = np.einsum("ii->i", products)
    diagonal += max(diagonal.mean(), np.finfo(np.float32).tiny)
    return products


def _with_feedback(weight: npt.NDArray[np.float32], correlations: Float64) -> StoredTensor:
    """Round (K, N) to int8 channel by channel, the largest inputs first; see the module's first lines."""
    scale = group_scales(weight)
    order = np.argsort(-np.einsum("ii->i", correlations), kind="stable")
    # Row i of this factor says how an error in channel i is made up for by the channels behind it.
    inverse = np.linalg.inv(correlations[np.ix_(order, order)])
    factor = np.linalg.cholesky(inverse).T.astype(np.float32)
    remaining, steps = weight[order], row_scales(scale, len(weight))[order]
    levels = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(weight))
        errors = np.empty((stop - start, weight.shape[1]), np.float32)
        for row in range(start, stop):
            levels[order[row]] = found = nearest_levels(remaining[row], steps[row])
            errors[row - start] = (remaining[row] - found * steps[row]) / factor[row, row]
            remaining[row + 1 : stop] -= np.outer(factor[row, row + 1 : stop], errors[row - start])
        remaining[stop:] -= factor[start:stop, stop:].T @ errors
    return StoredTensor(levels, "I8", scale)
