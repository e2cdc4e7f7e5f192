"""The `Kernels` of compiled code."""

from __future__ import annotations

import numpy as np

from ...batch import Batch
from ...config import VOCAB_SIZE
from ...threads import WorkerPool
from ...weights.checkpoint import Checkpoint
from ..base import Array, Forward, Kernels, Partition
from .code import Code
from .forward import CompiledForward
from .layout import address
from .packing import PackedModel


class CompiledKernels(Kernels):
    """Compiled steps over packed weights."""

    name = "compiled"
    dtype = np.dtype(np.float32)

    def __init__(self, checkpoint: Checkpoint, precision: str, code: Code, pool: WorkerPool) -> None:
        self.config, self.precision, self.code = checkpoint.config, precision, code
        self.origin = str(code)
        self.packed = PackedModel(checkpoint, precision, code, pool)

    def forward(self, pool: WorkerPool, batch: Batch, layers: int, partition: Partition) -> Forward:
        return CompiledForward(self.code, self.packed, pool, batch, layers, partition)

    def lm_head(self, x: Array) -> Array:
        assert self.packed.lm_head is not None
        x = np.ascontiguousarray(x, np.float32)
        hidden, out = np.empty(x.shape, np.float32), np.empty((len(x), VOCAB_SIZE), np.float32)
        room = self.packed.room(block_rows=1, length=1, with_maps=False)
        sizes, buffers = (len(x), self.config.embed_dim, VOCAB_SIZE), (address(hidden), address(out))
        self.code.call("lm_head", address(self.packed.lm_head), address(room), address(x), *sizes, *buffers)
        return out
