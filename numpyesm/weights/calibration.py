"""What a model's matrices take in on natural sequences, as low precision needs to know it.

The inputs of a layer's matrices have channels with a large mean. Rounded as they are, they lose in bf16 what is left
without the mean, and rounding a weight that meets a constant input shifts every result the same way. Both are undone
by the means: see `rounding.py` and `kernels/numba_/packing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .. import reference
from ..alphabet import tokenize
from ..kernels.numpy_steps import gelu
from .checkpoint import FREQUENCIES, MATRICES, Checkpoint, input_mean
from .tensor import StoredTensor

Array = npt.NDArray[np.float32]


def calibration_sequences() -> list[str]:
    """Return the proteins and peptides that come with the package for this: 14 to 348 residues, 2,281 in all."""
    from importlib.resources import files  # neither is needed to open a file

    from ..fasta import parse_fasta

    text = files("numpyesm").joinpath("data", "calibration.fasta").read_text(encoding="ascii")
    return [record.sequence for record in parse_fasta(text.splitlines())]


def matrix_inputs(checkpoint: Checkpoint) -> Iterator[dict[str, Array]]:
    """Run the calibration sequences and yield, layer by layer, the rows that each matrix is multiplied with.

    Yields
    ------
    dict of str to ndarray (T, K) float32
        For `qkv`, `out_proj`, `fc1` and `fc2`; T tokens of all sequences. One layer's weights are held at a time.
    """
    tokens = tokenize(calibration_sequences())
    ends = np.cumsum([len(one) for one in tokens])
    frequencies, embedding = checkpoint.array(FREQUENCIES), checkpoint.array("embed_tokens.weight")
    x = np.concatenate([reference.embed(one, embedding).astype(np.float32) for one in tokens])
    for layer in range(checkpoint.config.num_layers):

        def part(name: str, prefix: str = f"layers.{layer}.") -> dict[str, npt.NDArray[np.floating]]:
            return {kind: checkpoint.array(f"{prefix}{name}.{kind}") for kind in ("weight", "bias")}

        normed = reference.layer_norm(x, **part("attention_norm"))
        qkv = reference.linear(normed, **part("qkv"))
        context = np.concatenate(
            [
                reference.self_attention(rows, one, frequencies)[0]
                for rows, one in zip(np.split(qkv, ends[:-1]), tokens, strict=True)
            ]
        )
        x = x + reference.linear(context, **part("out_proj"))
        ffn_normed = reference.layer_norm(x, **part("ffn_norm"))
        hidden = reference.linear(ffn_normed, **part("fc1"))
        gelu(hidden)
        x = x + reference.linear(hidden, **part("fc2"))
        for name in MATRICES:
            checkpoint.tensors[f"layers.{layer}.{name}.weight"].release()
        yield {"qkv": normed, "out_proj": context, "fc1": ffn_normed, "fc2": hidden}


def mean_of(inputs: Array) -> Array:
    """Return the mean of the rows that a matrix is multiplied with: (T, K) -> (K,)."""
    mean: Array = inputs.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def with_input_means(checkpoint: Checkpoint) -> Checkpoint:
    """Return `checkpoint` with the mean input of every matrix; itself if it has them or is synthetic."""
    if checkpoint.has_input_means or checkpoint.synthetic:
        return checkpoint
    means = {
        input_mean(layer, name): StoredTensor(mean_of(inputs[name]))
        for layer, inputs in enumerate(matrix_inputs(checkpoint))
        for name in MATRICES
    }
    return replace(checkpoint, tensors={**checkpoint.tensors, **means})
