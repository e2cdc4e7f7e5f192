"""Weights as the compiled steps read them: packed at load, with their tables and the buffers of each thread."""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from ...threads import WorkerPool
from ...weights.checkpoint import FREQUENCIES, MATRICES, Checkpoint, input_mean
from ...weights.rounding import rounded_layers
from ...weights.tensor import StoredTensor, groups_of
from ..base import Array
from ..rotary import rotary_angles, rotary_pair_order
from ..shared import shared
from .code import Code, needed
from .layout import Layer, Matrix, Model, Norm, Room, address, table
from .panels import (
    Blocks,
    aligned,
    bf16_sizes,
    column_order,
    heads_at_a_time,
    in_order,
    pack_panels,
    panels,
    product_steps,
    row_numbers,
    strip_size,
)

# What the linear steps take at a time: fewer passes over the weights against rows that leave an L2 cache of a
# megabyte. Measured: flat from 100 to 220 rows of the 35M model, slightly better at 200.
_GROUP_BYTES = 1_250_000
_FEWEST_GROUP_ROWS, _MOST_GROUP_ROWS = 112, 256
_BLOCK_ROWS = 256
_FFN_COLUMNS = 960
# Tile registers multiply faster than weights come from the L3 cache: more rows for each pass over them. Measured:
# flat from 360 to 720 rows of the 35M model, 4 % slower at 1100. Where they take more than half of an L2 cache of
# two megabytes, half as many: 3 % faster at 650M, a quarter at 3B. Panels of bf16 for more hidden channels would leave
# the L1 cache.
_GROUP_ROWS_ON_TILES = 540
_GROUP_BYTES_ON_TILES = 1 << 20
_BLOCK_ROWS_ON_TILES = 1100
# Up to so many rows for each thread, threads take shares of the products: more where weights are wide, which come from
# memory once then, or are widened, which each thread would do to all. Measured with two threads at 102 rows: int8 takes
# 0.9 of the time at 35M, 150M and 650M; at 3B bf16 takes 0.85, int8 0.75. bf16 takes 1.05 at 35M, which stays as it is.
_SHARED_ROWS, _WIDTH_OF_SHARED_ROW = 32, 20
_FFN_COLUMNS_ON_TILES = 480


class PackedModel:
    """The weights of one model for one precision.

    Query and key columns are reordered so that the two channels that rotate together are neighbours, and heads are
    filled up with zeros to a multiple of eight channels. Queries, keys and values of some heads lie together. Queries
    also take up log2(e), so that scores are exponents of two.

    Attributes
    ----------
    layers : ndarray (num_layers, Layer.ENTRIES) int64
        `layout.Layer` of each layer.
    lm_head : ndarray int64 or None
        `layout.LmHead`.
    """

    def __init__(self, checkpoint: Checkpoint, precision: str, code: Code, pool: WorkerPool) -> None:
        self.config = config = checkpoint.config
        self.precision, self.isa, self._code = precision, code.isa, code
        self.narrow = code.isa.bf16 and precision != "fp32"
        if precision == "int8" != checkpoint.precision and not checkpoint.synthetic:
            sys.stderr.write(
                "numpyesm: rounding the weights to int8 (`numpyesm convert --dtype int8` does it once) ...\n"
            )
        multiple = 8 if config.head_dim <= 32 or not self.isa.tiles else 32
        self.head_dim = -(-config.head_dim // multiple) * multiple
        self._kept: list[Array] = []  # every array that a table points at
        self._blocks = Blocks()
        self._rooms = threading.local()
        self._buffers: list[list[Array]] = []
        self._frequencies = np.array(checkpoint.array(FREQUENCIES))
        self._rotary = np.empty((0, 0), np.float32)
        self.embedding = self._keep(np.array(checkpoint.array("embed_tokens.weight"), np.float32))
        on_tiles = self.isa.tiles and self.narrow
        if on_tiles:
            halved = 2 * config.embed_dim * _GROUP_ROWS_ON_TILES > _GROUP_BYTES_ON_TILES
            self.group_rows = _GROUP_ROWS_ON_TILES // 2 if halved else _GROUP_ROWS_ON_TILES
        else:
            most = min(_MOST_GROUP_ROWS, _GROUP_BYTES // (4 * (config.embed_dim + _FFN_COLUMNS)))
            self.group_rows = max(_FEWEST_GROUP_ROWS, most)
        self.shared_rows = max(_SHARED_ROWS, config.embed_dim // _WIDTH_OF_SHARED_ROW)
        if precision == "int8":
            self.shared_rows += _SHARED_ROWS
        self.block_rows = _BLOCK_ROWS_ON_TILES if on_tiles else _BLOCK_ROWS
        at_a_time = _FFN_COLUMNS_ON_TILES if on_tiles else _FFN_COLUMNS
        self.hidden_columns = panels(self.isa, config.ffn_dim) * self.isa.columns
        self.ffn_columns = min(at_a_time, self.hidden_columns)
        self._final_norm = self._norm(checkpoint.array, "final_norm") if config.whole_layers is None else [0, 0]
        self.heads_at_a_time = heads_at_a_time(self.isa, config.num_heads, self.head_dim)
        by_part = self._fill_heads(rotary_pair_order(config), -1).reshape(3, -1, self.heads_at_a_time * self.head_dim)
        self._heads = column_order(self.isa, by_part.swapaxes(0, 1).ravel())
        self.layers = self._pack_layers(checkpoint, pool)
        self.lm_head = self._pack_lm_head(checkpoint) if checkpoint.has_lm_head else None
        attend, linear = needed(self.isa, precision)[:2]
        names = {
            Model.ATTEND: attend,
            Model.LINEAR: linear,
            Model.ATTEND_SHORT: "attend",
            Model.LAYER_NORM: "layer_norm",
        }
        self._functions: dict[int, int | Array] = {place: code.addresses[name] for place, name in names.items()}

    # -- weights ------------------------------------------------------------------------------------------------

    def _keep(self, array: Array) -> Array:
        self._kept.append(array)
        return array

    def _norm(self, vector: Callable[[str], Array], name: str) -> list[int]:
        """A row of `layout.Norm`."""
        return [address(self._keep(np.array(vector(f"{name}.{kind}"), np.float32))) for kind in ("weight", "bias")]

    def _pack_layers(self, checkpoint: Checkpoint, pool: WorkerPool) -> npt.NDArray[np.int64]:
        """`layout.Layer` of all layers."""
        layers = np.zeros((self.config.num_layers, Layer.ENTRIES), np.int64)

        def pack(layer: tuple[int, Mapping[str, StoredTensor]]) -> None:
            number, changed = layer
            layers[number] = self._pack_layer(checkpoint.tensors, changed, number)

        pool.run(pack, enumerate(rounded_layers(checkpoint, self.precision)))
        return layers

    def _pack_layer(
        self, origins: Mapping[str, StoredTensor], changed: Mapping[str, StoredTensor], number: int
    ) -> list[int]:
        """The row of `layout.Layer` of one layer, of which some tensors have `changed` when they were rounded."""
        prefix, tensors = f"layers.{number}.", {**origins, **changed}
        parts = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        vectors = {
            name: np.array(tensor.astype(np.float32)) for name, tensor in parts.items() if len(tensor.shape) == 1
        }
        centre = np.zeros(self.config.ffn_dim, np.float32)
        means: dict[str, Array] = {}
        if self.narrow and input_mean(number, "qkv") in tensors:
            means = {name: tensors[input_mean(number, name)].astype(np.float32) for name in MATRICES}
            vectors["attention_norm.bias"] -= means["qkv"]
            vectors["qkv.bias"][-len(means["out_proj"]) :] -= means["out_proj"]  # of the values
            vectors["ffn_norm.bias"] -= means["fc1"]
            centre = means["fc2"]
        norms = [*self._norm(vectors.__getitem__, "attention_norm"), *self._norm(vectors.__getitem__, "ffn_norm")]
        rows: dict[str, list[int]] = {}
        for name in MATRICES:
            origin, weight, bias = origins[f"{prefix}{name}.weight"], parts[f"{name}.weight"], vectors[f"{name}.bias"]
            rows[name] = self._pack(name, origin, weight, bias, means.get(name))
            origin.release()  # or the file's pages would stand beside the packed weights
        hidden = column_order(self.isa, np.arange(len(centre)))
        rows["fc1"][Matrix.CENTRE] = address(self._keep(in_order(centre, hidden)))
        return [*norms, *itertools.chain.from_iterable(rows[name] for name in MATRICES)]

    def _pack(
        self, name: str, origin: StoredTensor, weight: StoredTensor, bias: Array, mean: Array | None
    ) -> list[int]:
        """The row of `layout.Matrix` of one matrix, rounded from `origin`, which models of one base share.

        The bias takes up what the matrix makes of the `mean` that its input lacks.
        """
        if mean is not None:
            self._add_mean(mean, weight, bias)
        own = self.precision == "int8" and weight is not origin  # rounding depends on what goes into the matrix
        order = self._heads if name == "qkv" else column_order(self.isa, np.arange(weight.shape[1]))
        if name == "out_proj" and self.head_dim != self.config.head_dim:
            # Other rows share a scale then.
            dtype = "F32" if self.precision == "fp32" else weight.dtype
            weight = StoredTensor(self._fill_heads(weight.astype(np.float32))).stored_as(dtype)
        steps = product_steps(self.isa, weight.shape[0], self.narrow)

        def panels() -> Array:
            values = weight.astype(np.float32) if self.precision == "fp32" else weight.raw
            return pack_panels(self._code, values, order, steps, self.narrow, self._blocks)

        packed = panels() if own else shared(origin, (self.precision, name, self.head_dim), panels)
        scales = None
        if self.precision == "int8":
            assert weight.scale is not None
            groups = groups_of(steps * (2 if self.narrow else 1))
            scales = self._keep(pack_panels(self._code, weight.scale, order, groups))
        return self._matrix(weight.shape[0], packed, in_order(bias, order), scales, self.narrow)

    def _add_mean(self, mean: Array, weight: StoredTensor, bias: Array) -> None:
        """bias += mean @ weight"""
        raw, (inner, columns) = np.ascontiguousarray(weight.raw), weight.shape
        sizes = raw.itemsize, address(raw), inner, columns
        self._code.call("add_mean", *sizes, address(mean), address(weight.scale), address(bias))

    def _matrix(
        self, inner: int, packed: Array, bias: Array, scales: Array | None = None, narrow: bool = False
    ) -> list[int]:
        """A row of `layout.Matrix`."""
        step_bytes = self.isa.columns * packed.itemsize * (2 if narrow else 1)
        return [address(self._keep(packed)), address(self._keep(bias)), address(scales), 0, inner, step_bytes]

    def _fill_heads(self, array: Array, nothing: int = 0) -> Array:
        """`nothing` behind the rows of each head, up to the width that the kernels take."""
        missing = self.head_dim - self.config.head_dim
        if missing == 0:
            return array
        by_head = array.reshape(-1, self.config.head_dim, *array.shape[1:])
        filled = np.pad(by_head, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 1)], constant_values=nothing)
        return filled.reshape(-1, *array.shape[1:])

    def _pack_lm_head(self, checkpoint: Checkpoint) -> npt.NDArray[np.int64]:
        def matrix(weight: Array, bias: str) -> list[int]:
            order = column_order(self.isa, np.arange(weight.shape[1]))
            packed = pack_panels(self._code, weight, order, len(weight))
            return self._matrix(len(weight), packed, in_order(checkpoint.array(bias), order))

        dense = matrix(checkpoint.array("lm_head.dense.weight"), "lm_head.dense.bias")
        norm = self._norm(checkpoint.array, "lm_head.norm")
        vocabulary = matrix(checkpoint.vocabulary(), "lm_head.bias")
        functions = (self._code.addresses[name] for name in ("linear", "layer_norm"))
        return np.array([*dense, *norm, *vocabulary, *functions], np.int64)

    # -- tables -------------------------------------------------------------------------------------------------

    def model_table(self, length: int) -> tuple[npt.NDArray[np.int64], Array]:
        """`layout.Model` for sequences of up to `length` tokens, and the array of turns that must outlive it."""
        config = self.config
        rotary = self._rotary
        if len(rotary) < length:  # two threads may both make one, and each keeps its own
            rotary = self._rotary = self._rotary_table(max(length, min(2 * len(rotary), 2050)))
        entries: dict[int, int | Array] = {
            Model.WIDTH: config.embed_dim,
            Model.HEADS: config.num_heads,
            Model.HEAD_DIM: self.head_dim,
            Model.FFN: config.ffn_dim,
            Model.GROUP_ROWS: self.group_rows,
            Model.FFN_COLUMNS: self.ffn_columns,
            Model.ROTARY: rotary,
            Model.EMBEDDING: self.embedding,
            Model.NARROW: int(self.narrow),
            Model.HEADS_AT_A_TIME: self.heads_at_a_time,
            **self._functions,
            Model.FINAL_NORM + Norm.GAIN: self._final_norm[0],
            Model.FINAL_NORM + Norm.SHIFT: self._final_norm[1],
        }
        return table(Model, entries), rotary

    def _rotary_table(self, length: int) -> Array:
        """Return the table that `layout.Model.ROTARY` describes."""
        config = self.config
        angle = rotary_angles(self._frequencies, length)
        turns = np.zeros((length, 2, 2, self.head_dim))
        turns[:, :, 0, : config.head_dim] = np.repeat(np.cos(angle), 2, axis=1)[:, None]
        turns[:, :, 1, 0 : config.head_dim : 2] = -np.sin(angle)[:, None]
        turns[:, :, 1, 1 : config.head_dim : 2] = np.sin(angle)[:, None]
        turns[:, 1] *= math.log2(math.e) * config.head_dim**-0.5
        return turns.reshape(length, -1).astype(np.float32)

    def room(self, block_rows: int, length: int, with_maps: bool, apart: bool = False) -> npt.NDArray[np.int64]:
        """`layout.Room` of the calling thread, with its buffers made large enough; they are kept for later."""
        buffers: dict[Room, Array] = self._rooms.__dict__.setdefault("buffers", {})
        width, rows = self.config.embed_dim, self.group_rows
        lines = max(rows, block_rows) if apart else rows
        spare = self.isa.narrow_rows  # tile registers may read so many rows behind the last one
        columns, lanes, context = self.isa.columns, self.isa.strip_columns, self.config.num_heads * self.head_dim
        number, parts = (np.uint16, 2) if self.narrow else (np.float32, 1)
        widest, hidden = (row_numbers(self.isa, size, self.narrow) for size in (max(width, context), self.ffn_columns))
        sizes: dict[Room, tuple[int, npt.DTypeLike]] = {
            Room.LEFT: (parts * (lines + spare) * widest, number),
            Room.QKV: (3 * block_rows * self.heads_at_a_time * self.head_dim if apart else 0, np.float32),
            Room.HIDDEN: (parts * (rows + spare) * hidden, number),
            Room.TILE: (max(self.isa.rows, self.isa.narrow_rows) * columns, np.float32),
            Room.WIDE: (max(widest, hidden) * columns, np.float32),
            Room.ZEROS: (columns, np.float32),
            Room.CONTEXT: (block_rows * context, np.float32),
            Room.QUERIES: (self.head_dim * lanes, np.float32),
            Room.SCORES: (strip_size(self.isa, length, with_maps), np.float32),
            Room.STATE: (3 * lanes, np.float32),
            Room.STRIP_CONTEXT: (self.head_dim * lanes, np.float32),
            Room.KEPT: ((1 + self.head_dim) * lanes, np.float32),
            Room.FACTORS: (lanes, np.float64),
        }
        if self.narrow:
            sizes |= bf16_sizes(self.isa, block_rows, length, self.head_dim)
        for name, (size, dtype) in sizes.items():
            if name not in buffers or buffers[name].size < size:
                buffers[name] = aligned(size, dtype, zeros=True)
        return table(Room, buffers)

    def take_buffers(self, rows: int, shares: int) -> list[Array]:
        """Buffers of one pass over so many rows: those of an earlier one, if they are large enough.

        Two for queries, keys and values; with `shares`, one for attention's result and one for hidden channels.
        """
        inner = self.config.num_heads * self.head_dim
        sizes = [3 * rows * inner] * 2
        if shares:
            hidden = row_numbers(self.isa, self.hidden_columns, self.narrow)
            sizes += [rows * inner, (self.group_rows + self.isa.narrow_rows) * hidden]
        kept: list[Array] = []
        with suppress(IndexError):
            kept = self._buffers.pop()  # atomic: no two passes get the same
        if len(kept) < len(sizes) or any(array.size < size for array, size in zip(kept, sizes, strict=False)):
            kept.clear()  # before the larger ones are made
            kept += map(aligned, sizes)
        return kept

    def keep_buffers(self, buffers: list[Array]) -> None:
        """Keep the buffers of the pass that has ended last, whichever thread it was of."""
        self._buffers[:] = [buffers]
