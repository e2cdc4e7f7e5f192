"""Buffers that a thread uses again and again: fresh memory costs more than it is worth."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from .base import Array


class Scratch(threading.local):
    """Buffers of the calling thread, reused from block to block."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def room(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of this shape with undefined contents, valid until the same name is asked for again."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = np.empty(size, dtype)
        piece: Array = buffer[:size].reshape(shape)
        return piece


scratch = Scratch()
