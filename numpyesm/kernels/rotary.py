"""Rotary position embedding as one complex factor a pair of channels; both backends lay it out from here."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig


def rotary_pair_order(config: ModelConfig) -> npt.NDArray[np.intp]:
    """Column order (3D,) of a qkv matrix that puts the two channels that rotate together side by side.

    Query and key go from halves (head, 2, pair) to (head, pair, 2), value stays. Scores do not change.
    """
    width, heads, half = config.embed_dim, config.num_heads, config.head_dim // 2
    pairs = np.arange(width).reshape(heads, 2, half).swapaxes(1, 2).ravel()
    return np.concatenate((pairs, width + pairs, 2 * width + np.arange(width)))


def rotary_frequencies(head_dim: int) -> npt.NDArray[np.float32]:
    """10000^(-2i/C), rounded to float32 as fair-esm's buffer is: (C/2,)."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(10000.0, exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / power


def rotary_turns(config: ModelConfig, length: int, query_scale: float) -> npt.NDArray[np.complex128]:
    """exp(i · position · frequency), for all query channels times `query_scale`, then all key channels: (length, D)."""
    # Angles in float64: at position 2000 a float32 angle is off by 1e-4.
    angle = np.arange(length)[:, None] * rotary_frequencies(config.head_dim).astype(np.float64)
    turn = np.exp(1j * angle)
    query, key = (np.tile(part, (1, config.num_heads)) for part in (turn * query_scale, turn))
    return np.concatenate((query, key), axis=1)
