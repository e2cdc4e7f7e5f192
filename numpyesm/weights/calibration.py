"""The inputs of a model's matrices on natural sequences, which low precision needs to know.

The inputs of a layer's matrices have channels with a large mean. Rounding them to bf16 as they are loses what remains
once the mean is subtracted, and rounding a weight that meets a constant input shifts every result the same way. The
means undo both: see `rounding.py` and `kernels/compiled/packing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .. import reference
from ..alphabet import tokenize
from ..kernels.numpy_steps import gelu
from .checkpoint import FREQUENCIES, MATRICES, Checkpoint

Array = npt.NDArray[np.float32]


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
