"""Weights as the compiled steps read them: packed at load, with their tables and the buffers of each thread."""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt

from ...weights.checkpoint import FREQUENCIES, Checkpoint
from ...weights.equalise import equalised
from ...weights.tensor import StoredTensor, round_to_bfloat16
from ..base import Array
from ..rotary import rotary_angles, rotary_pair_order
from ..shared import shared
from . import attention, bf16, cache, fp32, int8
from .emitter import TILE_COLUMNS, TILE_ROWS
from .gemm import NARROW_ROWS, aligned, pack_panels, padded_columns, panels
from .isa import check_precision, host_isa
from .layout import Layer, Model, Room, address, table

_STEPS = {"fp32": fp32, "bf16": bf16, "int8": int8}

# What the linear steps take at a time: fewer passes over the weights against rows that leave a second cache of a
# megabyte. Measured: flat from 100 to 220 rows of the 35M model, slightly better at 200.
_GROUP_BYTES = 1_250_000
_MOST_GROUP_ROWS = 256
_BLOCK_ROWS = 256
_FFN_COLUMNS = 960
# Tile registers multiply faster than weights come from the third cache: more rows for each pass over them. Panels of
# bf16 for more hidden channels would leave the first cache.
_GROUP_BYTES_ON_TILES = 8_000_000
_MOST_ROWS_ON_TILES = 1100
_FFN_COLUMNS_ON_TILES = {"bf16": 480, "int8": 960}


class PackedModel:
    """The weights of one model for one precision.

    Query and key columns are reordered so that the two channels that rotate together are neighbours, and heads are
    filled up with zeros to a multiple of eight channels. Queries also take up log2(e), so that scores are exponents
    of two.

    Attributes
    ----------
    layers : ndarray (num_layers, Layer.ENTRIES) int64
        `layout.Layer` of each layer.
    lm_head : list of int or None
        Addresses of the LM head's arrays, in the order in which `fp32.lm_head` takes them.
    entries : list of int
        Addresses of the compiled steps: queries, keys and values; attention; the rest of a layer.
    """

    def __init__(self, checkpoint: Checkpoint, precision: str) -> None:
        self.config = config = checkpoint.config
        self.precision = precision
        if precision == "int8":
            checkpoint = equalised(checkpoint)
        check_precision(host_isa(), precision)
        cache.prepare(precision)
        multiple = 8 if config.head_dim <= 32 or not host_isa().tiles else 32
        self.head_dim = -(-config.head_dim // multiple) * multiple
        # Attention is in bf16 where products are narrower than that, if the CPU multiplies it.
        self.qkv_dtype = np.dtype(np.uint16 if precision != "fp32" and host_isa().bf16 else np.float32)
        self._kept: list[Array] = []  # every array that a table points at
        self._rooms = threading.local()
        self._frequencies = np.array(checkpoint.array(FREQUENCIES))
        self._rotary = np.empty((0, 0), np.float32)
        self._rotary_lock = threading.Lock()
        self.embedding = self._keep(np.array(checkpoint.array("embed_tokens.weight"), np.float32))
        on_tiles = host_isa().tiles and precision != "fp32"
        at_a_time = _FFN_COLUMNS_ON_TILES[precision] if on_tiles else _FFN_COLUMNS
        most, room = (_MOST_ROWS_ON_TILES, _GROUP_BYTES_ON_TILES) if on_tiles else (_MOST_GROUP_ROWS, _GROUP_BYTES)
        self.group_rows = max(NARROW_ROWS, min(most, room // (4 * (config.embed_dim + _FFN_COLUMNS))))
        self.block_rows = _MOST_ROWS_ON_TILES if on_tiles else _BLOCK_ROWS
        self.ffn_columns = min(at_a_time, panels(config.ffn_dim) * TILE_COLUMNS)
        widest = panels(max(config.ffn_dim, 3 * config.num_heads * self.head_dim)) * TILE_COLUMNS
        self._zeros = self._keep(np.zeros(widest, np.float32))
        whole = config.whole_layers is None
        self._final_norm = [
            self._vector(checkpoint, f"final_norm.{name}") if whole else 0 for name in ("weight", "bias")
        ]
        self.layers = table(
            [entry for layer in range(config.num_layers) for entry in self._pack_layer(checkpoint, f"layers.{layer}.")]
        ).reshape(config.num_layers, Layer.ENTRIES)
        self.lm_head = self._pack_lm_head(checkpoint) if checkpoint.has_lm_head else None
        steps = _STEPS[precision]
        narrow = self.qkv_dtype == np.uint16
        self.entries = [
            cache.entry(step)
            for step in (
                steps.project_qkv,
                attention.attend_bf16 if narrow else attention.attend,
                steps.project_and_feed_forward,
            )
        ]

    # -- weights ------------------------------------------------------------------------------------------------

    def _keep(self, array: Array) -> Array:
        self._kept.append(array)
        return array

    def _vector(self, checkpoint: Checkpoint, name: str) -> int:
        """Address of a vector."""
        return address(self._keep(np.array(checkpoint.array(name), np.float32)))

    def _pack_layer(self, checkpoint: Checkpoint, prefix: str) -> list[int]:
        """The row of `layout.Layer` of one layer."""
        entries = [
            self._vector(checkpoint, f"{prefix}{norm}.{name}")
            for norm in ("attention_norm", "ffn_norm")
            for name in ("weight", "bias")
        ]
        order = rotary_pair_order(self.config)
        for name in ("qkv", "out_proj", "fc1", "fc2"):
            weight, bias = checkpoint.tensors[f"{prefix}{name}.weight"], checkpoint.array(f"{prefix}{name}.bias")
            entries += self._pack(name, weight, bias, order)
            weight.release()  # or the file's pages would stand beside the packed weights
        return entries

    def _pack(self, name: str, weight: StoredTensor, bias: Array, order: npt.NDArray[np.intp]) -> list[int]:
        """The row of `layout.Matrix` of one matrix, as the products of this precision take it."""
        if name == "qkv":
            bias = self._fill_heads(bias[order], axis=0)
        packed_bias = self._keep(padded_columns(np.asarray(bias, np.float32)))
        if self.precision != "int8":
            form = (self.precision, name, self.head_dim)
            packed = shared(weight, form, lambda: self._panels(self._ordered(name, weight.astype(np.float32), order)))
            return [address(self._keep(packed)), address(packed_bias), 0, 0]
        levels, scales = weight.quantised()
        values: Array = self._ordered(name, levels, order)
        if name == "qkv":
            scales = self._fill_heads(scales[order], axis=0)
        # Activations of the second half of the feed-forward part are quantised a part at a time.
        part = self.ffn_columns if name == "fc2" else len(values)
        parts = [values[first : first + part] for first in range(0, len(values), part)]
        offsets = np.concatenate([padded_columns(rows.sum(axis=0, dtype=np.int64) * scales) for rows in parts])
        packed = pack_panels(values, group=4)
        kept = [self._keep(array) for array in (packed, packed_bias, offsets, padded_columns(scales))]
        return [address(array) for array in kept]

    def _ordered(self, name: str, values: Array, order: npt.NDArray[np.intp]) -> Array:
        """The channels of heads as the kernels take them: in the columns of `qkv`, in the rows of `out_proj`."""
        if name == "qkv":
            return self._fill_heads(values[:, order], axis=1)
        return self._fill_heads(values, axis=0) if name == "out_proj" else values

    def _panels(self, values: Array) -> Array:
        return pack_panels(values) if self.precision == "fp32" else pack_panels(round_to_bfloat16(values), group=2)

    def _fill_heads(self, array: Array, axis: int) -> Array:
        """Zeros behind the channels of each head, up to the width that the kernels take."""
        missing = self.head_dim - self.config.head_dim
        if missing == 0:
            return array
        shape = array.shape
        by_head = array.reshape(*shape[:axis], -1, self.config.head_dim, *shape[axis + 1 :])
        filled = np.pad(by_head, [(0, missing) if i == axis + 1 else (0, 0) for i in range(by_head.ndim)])
        return filled.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    def _pack_lm_head(self, checkpoint: Checkpoint) -> list[int]:
        arrays = (
            pack_panels(checkpoint.array("lm_head.dense.weight")),
            padded_columns(checkpoint.array("lm_head.dense.bias")),
            np.array(checkpoint.array("lm_head.norm.weight"), np.float32),
            np.array(checkpoint.array("lm_head.norm.bias"), np.float32),
            pack_panels(checkpoint.vocabulary()),
            padded_columns(checkpoint.array("lm_head.bias")),
        )
        return [address(self._keep(array)) for array in arrays]

    # -- tables -------------------------------------------------------------------------------------------------

    def model_table(self, length: int) -> tuple[npt.NDArray[np.int64], Array]:
        """`layout.Model` for sequences of up to `length` tokens, and the array of turns that must outlive it."""
        config = self.config
        with self._rotary_lock:
            if len(self._rotary) < length:
                self._rotary = self._rotary_table(max(length, min(2 * len(self._rotary), 2050)))
            rotary = self._rotary
        entries = {
            Model.WIDTH: config.embed_dim,
            Model.HEADS: config.num_heads,
            Model.HEAD_DIM: self.head_dim,
            Model.FFN: config.ffn_dim,
            Model.GROUP_ROWS: self.group_rows,
            Model.FFN_COLUMNS: self.ffn_columns,
            Model.ROTARY: address(rotary),
            Model.EMBEDDING: address(self.embedding),
            Model.FINAL_GAIN: self._final_norm[0],
            Model.FINAL_SHIFT: self._final_norm[1],
            Model.ZEROS: address(self._zeros),
        }
        return table([entries[entry] for entry in Model]), rotary

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

    def room(self, block_rows: int, length: int, with_maps: bool) -> npt.NDArray[np.int64]:
        """`layout.Room` of the calling thread, with its buffers made large enough; they are kept for later."""
        buffers: dict[Room, Array] = self._rooms.__dict__.setdefault("buffers", {})
        width, rows = self.config.embed_dim, self.group_rows
        spare = NARROW_ROWS  # tile registers may read so many rows behind the last one
        lanes, context = TILE_COLUMNS, self.config.num_heads * self.head_dim
        hidden = np.uint16 if self.precision == "bf16" else np.float32
        sizes: dict[Room, tuple[int, npt.DTypeLike]] = {
            Room.NORMED: (rows * width, np.float32),
            Room.HIDDEN: ((rows + spare) * self.ffn_columns, hidden),
            Room.TILE: (max(TILE_ROWS, NARROW_ROWS) * TILE_COLUMNS, np.float32),
            Room.CONTEXT: (block_rows * context, np.float32),
            Room.QUERIES: (self.head_dim * lanes, np.float32),
            Room.SCORES: (attention.strip_size(length, with_maps), np.float32),
            Room.STATE: (3 * lanes, np.float32),
            Room.STRIP_CONTEXT: (self.head_dim * lanes, np.float32),
            Room.KEPT: ((1 + self.head_dim) * lanes, np.float32),
            Room.FACTORS: (lanes, np.float64),
        }
        if self.precision != "fp32":
            sizes[Room.LEFT] = ((rows + spare) * (max(width, context) + 64), np.uint16)
            sizes[Room.LEVELS] = (4 * rows, np.float32)
            sizes[Room.HIDDEN_LEFT] = ((rows + spare) * self.ffn_columns, np.uint8)
        if self.qkv_dtype == np.uint16:
            sizes |= attention.bf16_sizes(length, self.head_dim)
        for name, (size, dtype) in sizes.items():
            if name not in buffers or buffers[name].size < size:
                buffers[name] = aligned(size, dtype)
        return table([address(buffers.get(Room(entry))) for entry in range(Room.ENTRIES)])
