"""The `Kernels` of compiled code."""

from __future__ import annotations

import numpy as np

from ...batch import Batch
from ...config import VOCAB_SIZE
from ...threads import WorkerPool
from ...weights.checkpoint import Checkpoint
from ..base import Array, Forward, Kernels, Partition
from .emitter import TILE_COLUMNS, TILE_ROWS
from .forward import NumbaForward
from .gemm import aligned
from .layer import lm_head
from .layout import address
from .packing import PackedModel


class NumbaKernels(Kernels):
    """Compiled steps over packed weights."""

    name = "compiled"
    dtype = np.dtype(np.float32)

    def __init__(self, checkpoint: Checkpoint, precision: str = "fp32") -> None:
        self.config, self.precision = checkpoint.config, precision
        self.packed = PackedModel(checkpoint, precision)

    def forward(self, pool: WorkerPool, batch: Batch, layers: int, partition: Partition) -> Forward:
        return NumbaForward(self.packed, pool, batch, layers, partition)

    def lm_head(self, x: Array) -> Array:
        assert self.packed.lm_head is not None
        width, columns = self.config.embed_dim, VOCAB_SIZE
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty((len(x), columns), np.float32)
        hidden, tile = np.empty(x.shape, np.float32), aligned(TILE_ROWS * TILE_COLUMNS)
        buffers = (address(array) for array in (hidden, out, tile))
        lm_head(address(x), len(x), width, *self.packed.lm_head, columns, *buffers)
        return out
