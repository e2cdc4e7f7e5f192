"""Compute rows that the kernels do not accept, step by step: slower, but with any tokens in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...alphabet import PAD
from ...heads import sigmoid
from ...kernels.blas import blas_threads
from ...model import ESM2
from ...reference import contact_features, embed, language_model, layer_norm, nested, transformer_layer
from ...weights.checkpoint import Checkpoint
from .data import without_padding

Array = npt.NDArray[Any]


def exact_bytes(checkpoint: Checkpoint, length: int) -> int:
    """Memory that `fill_rows` needs for rows of this many tokens, in bytes."""
    config = checkpoint.config
    maps = 8 * config.num_heads * length**2
    weights = 0 if checkpoint.precision == "fp32" else checkpoint.num_parameters
    return 4 * (maps + 8 * length * (config.ffn_dim + config.embed_dim) + weights)


def fill_rows(model: ESM2, tokens: npt.NDArray[np.uint8], rows: npt.NDArray[np.intp], result: dict[str, Any]) -> None:
    """Compute rows of a batch (B, T) as fair-esm does, padding between tokens included.

    `result` is fair-esm's dictionary; what is not in it is not computed. Padding after the last token is left alone.
    """
    weights = nested(model.checkpoint, np.float32)
    with blas_threads(model.threads):
        for row in rows:
            _fill_row(weights, tokens[row], row, result)


def _fill_row(weights: dict[str, Any], tokens: npt.NDArray[np.uint8], row: int, result: dict[str, Any]) -> None:
    stop = len(without_padding(tokens))
    tokens = tokens[: stop + 1]  # with one <pad>, if there is any: contacts leave out the last column
    real, length = tokens != PAD, len(tokens)
    representations = result["representations"]
    x = embed(tokens, **weights["embed_tokens"])
    contacts: Array = np.zeros(1, np.float32)
    for number, layer in enumerate(weights["layers"]):
        if number in representations:
            representations[number][row, :stop] = x[:stop]
        x, attention = transformer_layer(x, tokens, weights["rotary"], **layer)
        if "attentions" in result:
            result["attentions"][row, number, :, :length, :length] = attention * (real & real[:, None])
        if "contacts" in result:
            coefficients = weights["contact_head"]["weight"].reshape(len(weights["layers"]), -1)[number]
            with np.errstate(invalid="ignore"):  # fair-esm divides 0 by 0 where no attention falls on residues
                features = np.nan_to_num(contact_features(attention, tokens), copy=False)
            contacts = contacts + np.tensordot(coefficients, features, axes=1)
    x = layer_norm(x, **weights["final_norm"]) if "final_norm" in weights else x
    if len(weights["layers"]) in representations:
        representations[len(weights["layers"])][row, :stop] = x[:stop]
    if "logits" in result:
        vocabulary = weights["embed_tokens"]["weight"]
        result["logits"][row, :stop] = language_model(x[:stop], vocabulary, **weights["lm_head"])
    if "contacts" in result:
        inside = max(length - 2, 0)
        result["contacts"][row, :inside, :inside] = sigmoid(contacts + weights["contact_head"]["bias"])
