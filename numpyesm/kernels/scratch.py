"""Buffers that a thread uses again and again: fresh memory costs more than it is worth."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from .base import Array

_buffers = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array of this shape with undefined contents, valid until the thread asks for the same name again."""
    size = math.prod(shape)
    buffer: Array | None = getattr(_buffers, name, None)
    if buffer is None or buffer.size < size or buffer.dtype != dtype:
        buffer = np.empty(size, dtype)
        setattr(_buffers, name, buffer)
    return buffer[:size].reshape(shape)
