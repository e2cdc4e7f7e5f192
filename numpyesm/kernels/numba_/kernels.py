"""The `Kernels` of compiled code: weights packed at load, room kept per thread, one compiled call a step and block."""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt

from ...config import VOCAB_SIZE
from ...weights.checkpoint import Checkpoint
from ...weights.tensor import StoredTensor, round_to_bfloat16
from ..base import Array, AttentionMaps, Kernels
from ..rotary import rotary_pair_order, rotary_turns
from . import bf16, cache, fp32, int8
from .attention import attend, strip_size, wide_size, work_size
from .emitter import TILE_COLUMNS, TILE_ROWS
from .gemm import aligned, pack_panels, padded_columns, panels
from .isa import check_precision, host_isa

_STEPS = {"fp32": fp32, "bf16": bf16, "int8": int8}

# Beside the width of a row in a buffer, so that rows do not all fall on the same lines of the first cache.
_ROW_PADDING = 16

_NO_ROWS = np.empty((0, 0), np.float32)
_NO_NUMBERS = np.empty(0, np.float64)
_NO_WIDE_ROWS = np.empty((0, 0), np.float64)
_NO_MAPS = np.empty((0, 0, 0), np.float32)


class Room(threading.local):
    """Aligned buffers of the calling thread, reused from block to block."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def flat(self, name: str, size: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """An array of at least `size` numbers with undefined contents, the same one for the same name."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = aligned(size, dtype)
        return buffer

    def rows(self, name: str, rows: int, columns: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """(rows, columns), undefined."""
        return self.flat(name, rows * columns, dtype)[: rows * columns].reshape(rows, columns)


class NumbaKernels(Kernels):
    """Steps of the forward pass in compiled code.

    Query and key columns are reordered at load so that the two channels that rotate together are neighbours. Queries
    also take up log2(e), so that scores are exponents of two.
    """

    name = "numba"
    dtype = np.dtype(np.float32)
    merges_tiles = True

    def __init__(self, checkpoint: Checkpoint, precision: str = "fp32") -> None:
        self.config = checkpoint.config
        self.precision = precision
        check_precision(host_isa(), precision)
        cache.prepare(precision)
        self._room = Room()
        self._table = np.empty((0, 0), np.float32)
        self._table_lock = threading.Lock()
        self._every_head = np.full(self.config.num_heads, -1, np.int64)
        self._embedding = checkpoint.array("embed_tokens.weight")
        self._final_norm = (_owned(checkpoint, "final_norm.weight"), _owned(checkpoint, "final_norm.bias"))
        self._layers = [self._pack_layer(checkpoint, f"layers.{layer}.") for layer in range(self.config.num_layers)]
        self._lm_head = self._pack_lm_head(checkpoint) if checkpoint.has_lm_head else None

    # -- weights ------------------------------------------------------------------------------------------------

    def _pack_layer(self, checkpoint: Checkpoint, prefix: str) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """What `project_qkv` takes of a layer, and what `project_and_feed_forward` takes."""
        order = rotary_pair_order(self.config)

        def norm(name: str) -> tuple[Array, ...]:
            return _owned(checkpoint, f"{prefix}{name}.weight"), _owned(checkpoint, f"{prefix}{name}.bias")

        def matrix(name: str) -> tuple[Array, ...]:
            weight, bias = checkpoint.tensors[f"{prefix}{name}.weight"], checkpoint.array(f"{prefix}{name}.bias")
            return self._pack(weight, bias, order if name == "qkv" else slice(None))

        qkv = (*norm("attention_norm"), *matrix("qkv"))
        rest = (*matrix("out_proj"), *norm("ffn_norm"), *matrix("fc1"), *matrix("fc2"))
        return qkv, rest

    def _pack(self, weight: StoredTensor, bias: Array, order: Array | slice) -> tuple[Array, ...]:
        """The columns `order` of a matrix and its bias, as the products of this precision take them."""
        if self.precision == "int8":
            levels, scales = weight.quantised()
            levels, scales = levels[:, order], scales[order]
            sums = levels.sum(axis=0, dtype=np.int64)
            packed = pack_panels(levels, group=4), padded_columns(sums), padded_columns(scales)
            return *packed, padded_columns(bias[order])
        values: Array = weight.astype(np.float32)[:, order]
        if self.precision == "bf16":
            return pack_panels(round_to_bfloat16(values), group=2), padded_columns(bias[order])
        return pack_panels(values), padded_columns(bias[order])

    def _pack_lm_head(self, checkpoint: Checkpoint) -> tuple[Array, ...]:
        return (
            pack_panels(checkpoint.array("lm_head.dense.weight")),
            padded_columns(checkpoint.array("lm_head.dense.bias")),
            _owned(checkpoint, "lm_head.norm.weight"),
            _owned(checkpoint, "lm_head.norm.bias"),
            pack_panels(np.ascontiguousarray(self._embedding.T)),
            padded_columns(checkpoint.array("lm_head.bias")),
        )

    # -- steps --------------------------------------------------------------------------------------------------

    def embed(self, tokens: Array, scale: Array) -> Array:
        x: Array = self._embedding[tokens]
        x *= scale.astype(np.float32)[:, None]
        return x

    def rotary_tables(self, length: int) -> Array:
        """The positions themselves: the table of angles stays here."""
        with self._table_lock:
            if len(self._table) < length:
                self._table = self._rotary_table(max(length, min(2 * len(self._table), 2050)))
        return np.arange(length)

    def _rotary_table(self, length: int) -> Array:
        """(cos, sin) of position · frequency for all query, then all key channels, queries scaled: (length, 2D)."""
        turns = rotary_turns(self.config, length, math.log2(math.e) * self.config.head_dim**-0.5)
        return turns.astype(np.complex64).view(np.float32)

    def new_qkv(self, rows: int) -> Array:
        """(rows, 3, H, C), a view: in memory the rows of each head follow each other, as attention reads them."""
        config = self.config
        by_head = aligned(rows * 3 * config.embed_dim).reshape(3, config.num_heads, rows, config.head_dim)
        return by_head.transpose(2, 0, 1, 3)

    def _tile(self) -> Array:
        return self._room.flat("tile", TILE_ROWS * TILE_COLUMNS)

    def _padded_rows(self, name: str, columns: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """Room for a group of rows, with some columns to spare."""
        return self._room.rows(name, fp32.GROUP_ROWS, panels(columns) * TILE_COLUMNS + _ROW_PADDING, dtype)

    def _operand_rows(self) -> tuple[Array, ...]:
        """Room for a group of rows as the products of this precision take them, and for their scales."""
        if self.precision == "bf16":
            return (self._padded_rows("left", self.config.embed_dim, np.uint16),)
        if self.precision == "int8":
            wide = max(self.config.embed_dim, self.config.ffn_dim)
            return self._padded_rows("left", wide, np.uint8), self._room.flat("levels", 2 * fp32.GROUP_ROWS)
        return ()

    def qkv(self, layer: int, x: Array, rotary: list[Array], out: Array) -> None:
        config = self.config
        _STEPS[self.precision].project_qkv(
            x,
            *self._layers[layer][0],
            self._table,
            np.concatenate(rotary),
            config.head_dim,
            _address(out),
            *out.strides[:3],
            self._padded_rows("normed", config.embed_dim),
            *self._operand_rows(),
            self._room.rows("projected", fp32.GROUP_ROWS, 3 * config.embed_dim),
            self._tile(),
        )

    def attention(self, query: Array, keys: Array, out: Array | None, maps: AttentionMaps | None) -> None:
        config, length = self.config, len(keys)
        wants_summary = maps is not None and maps.summary is not None
        wants_contacts = maps is not None and maps.heads is not None
        map_of_head, coefficients, residues = self._every_head, _NO_NUMBERS, (0, 0)
        weighted = row_sums = column_sums = _NO_WIDE_ROWS
        summary = np.zeros(length) if wants_summary else _NO_NUMBERS
        full = _NO_MAPS if maps is None or maps.full is None else maps.full
        if maps is not None and maps.heads is not None:
            assert maps.coefficients is not None
            assert maps.weighted is not None
            assert maps.row_sums is not None
            assert maps.column_sums is not None
            map_of_head = self._every_head.copy()
            map_of_head[maps.heads] = np.arange(len(maps.heads))
            coefficients, weighted = maps.coefficients, maps.weighted
            row_sums, column_sums = maps.row_sums, maps.column_sums
            column_sums[...] = 0
            residues = (maps.rows.start, maps.rows.stop)
        attend(
            _address(query),
            len(query),
            _address(keys),
            length,
            *keys.strides[:3],
            _NO_ROWS if out is None else out,
            config.embed_dim,
            config.num_heads,
            self._room.flat("strip", strip_size(length, wants_summary or wants_contacts or full.size > 0)),
            self._room.flat("work", work_size(config.head_dim)),
            map_of_head,
            coefficients,
            weighted,
            row_sums,
            column_sums,
            summary,
            full,
            *residues,
            self._room.flat("wide", wide_size(len(query), length, wants_contacts), np.float64),
        )
        if maps is not None and maps.summary is not None:
            maps.summary[...] = summary

    def project_and_feed_forward(self, layer: int, context: Array, x: Array) -> None:
        width, ffn = self.config.embed_dim, self.config.ffn_dim
        _STEPS[self.precision].project_and_feed_forward(
            context,
            x,
            *self._layers[layer][1],
            ffn,
            self._padded_rows("normed", width),
            *self._operand_rows(),
            self._padded_rows("hidden", ffn, np.uint16 if self.precision == "bf16" else np.float32),
            self._tile(),
        )

    def final_norm(self, x: Array, out: Array) -> None:
        fp32.normalise(x, *self._final_norm, out)

    def lm_head(self, x: Array) -> Array:
        assert self._lm_head is not None
        out = np.empty((len(x), VOCAB_SIZE), np.float32)
        hidden = self._room.rows("lm head", len(x), self.config.embed_dim)
        fp32.lm_head(x, *self._lm_head, hidden, out, self._tile())
        return out


def _owned(checkpoint: Checkpoint, name: str) -> Array:
    """A vector as a writable array of our own: a mapped file's arrays have another Numba type."""
    return np.array(checkpoint.array(name), np.float32)


def _address(array: Array) -> int:
    """Where an array's first number lies."""
    address: int = array.__array_interface__["data"][0]
    return address
