"""fair-esm models with random weights of the true 35M shape, and the same numbers as a numpyesm checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoints import with_half_precision_frequencies

from numpyesm.config import PRESETS, ModelConfig
from numpyesm.weights import load_checkpoint
from numpyesm.weights.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
esm = pytest.importorskip("esm")

ALPHABET = esm.data.Alphabet.from_architecture("ESM-1b")


def fair_esm_model(seed: int, sharpness: float = 1.0, config: ModelConfig = PRESETS["esm2-35m"]) -> Any:
    """fair-esm's ESM2 with its own random initialisation, and rotary buffers as official checkpoints have them.

    `sharpness` multiplies query and key weights; above 1, biases and contact coefficients are drawn too, so that
    attention peaks and contacts spread over 0 to 1.
    """
    torch.manual_seed(seed)
    model = esm.model.esm2.ESM2(config.num_layers, config.embed_dim, config.num_heads, ALPHABET, True).eval()
    if sharpness > 1:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    parameter.mul_(sharpness)
                elif name == "contact_head.regression.weight":
                    parameter.normal_(0, 4)
                    parameter.mul_((torch.rand_like(parameter) < 0.25).float())
                elif name == "contact_head.regression.bias":
                    parameter.fill_(-1.0)
                elif name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return with_half_precision_frequencies(model)


def as_checkpoint(model: Any) -> Checkpoint:
    """The same numbers in numpyesm's layout, by way of a checkpoint of fair-esm."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": model.state_dict()}, path := Path(folder, "model.pt"))
        return load_checkpoint(path)


def tokens_of(sequences: list[str]) -> Any:
    """fair-esm's own padded batch."""
    return ALPHABET.get_batch_converter()([(str(i), sequence) for i, sequence in enumerate(sequences)])[2]


@contextlib.contextmanager
def float64_softmax() -> Iterator[None]:
    """fair-esm computes softmax in float32 even in a float64 model; inside, it does not."""
    module = esm.multihead_attention
    original = module.utils_softmax
    module.utils_softmax = lambda x, dim, onnx_trace=False: torch.softmax(x, dim=dim)
    try:
        yield
    finally:
        module.utils_softmax = original


def largest(a: Any, b: Any) -> float:
    """Largest absolute difference, in float64."""
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
