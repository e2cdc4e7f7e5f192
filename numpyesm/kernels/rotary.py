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


def rotary_angles(frequencies: npt.NDArray[np.floating], length: int) -> npt.NDArray[np.float64]:
    """position · frequency, in float64, as a float32 angle is off by 1e-4 at position 2000: (C/2,) -> (length, C/2)."""
    return np.multiply.outer(np.arange(length, dtype=np.float64), frequencies.astype(np.float64))


def rotary_turns(
    frequencies: npt.NDArray[np.floating], num_heads: int, length: int, query_scale: float
) -> npt.NDArray[np.complex128]:
    """exp(i · position · frequency), for all query channels times `query_scale`, then all key channels: (length, D)."""
    turn = np.exp(1j * rotary_angles(frequencies, length))
    query, key = (np.tile(part, (1, num_heads)) for part in (turn * query_scale, turn))
    return np.concatenate((query, key), axis=1)
