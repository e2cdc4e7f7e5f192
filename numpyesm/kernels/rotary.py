"""Rotary position embedding as one complex factor per pair of channels, for both backends."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig


def rotary_pair_order(config: ModelConfig) -> npt.NDArray[np.intp]:
    """Return the column order (3D,) of a qkv matrix in which the two channels that rotate together are neighbours.

    Query and key go from (head, 2, pair) to (head, pair, 2), value stays as it is. Attention scores do not change.
    """
    width, heads, half = config.embed_dim, config.num_heads, config.head_dim // 2
    pairs = np.arange(width).reshape(heads, 2, half).swapaxes(1, 2).ravel()
    return np.concatenate((pairs, width + pairs, 2 * width + np.arange(width)))


def rotary_angles(frequencies: npt.NDArray[np.floating], length: int) -> npt.NDArray[np.float64]:
    """Return position · frequency: (C/2,) -> (length, C/2). In float64: float32 is off by 1e-4 at position 2000."""
    return np.multiply.outer(np.arange(length, dtype=np.float64), frequencies.astype(np.float64))


def rotary_turns(
    frequencies: npt.NDArray[np.floating], num_heads: int, length: int, query_scale: float
) -> npt.NDArray[np.complex128]:
    """Return exp(i · position · frequency): (length, D). Queries first, times `query_scale`, then keys."""
    turn = np.exp(1j * rotary_angles(frequencies, length))
    query, key = (np.tile(part, (1, num_heads)) for part in (turn * query_scale, turn))
    return np.concatenate((query, key), axis=1)
