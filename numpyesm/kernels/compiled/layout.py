"""Where things stand in the tables that compiled code reads: 64-bit integers, sizes and addresses of arrays.

With plain integers as arguments, a call from Python costs a microsecond, and compiled code can call compiled code
through its address.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ..base import Array

# Up to so many tokens, low precision is exact but for its weights: attention is in float32, and a row is multiplied as
# the sum of two numbers in bf16. Rounding does not average out over a short peptide's few rows.
SHORT = 66


class Model(IntEnum):
    """Sizes of the model, and what all layers share."""

    WIDTH = 0  # D
    HEADS = 1
    HEAD_DIM = 2  # rounded up to a multiple of eight
    FFN = 3
    GROUP_ROWS = 4  # rows that the linear steps take at a time
    FFN_COLUMNS = 5  # hidden channels that the feed-forward step takes at a time
    ROTARY = 6  # (positions, 4 · HEAD_DIM): cosine and (-sine, sine) for keys, then both scaled for queries
    EMBEDDING = 7  # (33, D)
    FINAL_NORM = 8
    NARROW = 10  # not zero: products are in bf16
    ATTEND = 11  # this and what follows are addresses of compiled functions
    LINEAR = 12
    ATTEND_SHORT = 13
    LAYER_NORM = 14
    HEADS_AT_A_TIME = 15  # heads whose queries, keys and values are neighbours among the columns of Layer.QKV
    ENTRIES = 16


class Layer(IntEnum):
    """Weights of one layer; a `Norm` takes two entries, a `Matrix` six."""

    ATTENTION_NORM = 0
    FFN_NORM = 2
    QKV = 4
    OUT_PROJ = 10
    FC1 = 16
    FC2 = 22
    ENTRIES = 28


class Steps(IntEnum):
    """What follows for a row in one phase of a pass, as bits of a number; they are steps 0 to 4."""

    ATTEND = 1  # in phase 0, the embedding
    OUT_PROJ = 2
    FC1 = 4
    FC2 = 8
    QKV = 16  # after the last layer, the final LayerNorm
    ALL = 31
    COUNT = 5


class LmHead(IntEnum):
    """Weights of the LM head."""

    DENSE = 0
    NORM = 6
    VOCABULARY = 8
    LINEAR = 14
    LAYER_NORM = 15


class Norm(IntEnum):
    """A LayerNorm."""

    GAIN = 0
    SHIFT = 1


class Matrix(IntEnum):
    """A packed matrix."""

    WEIGHT = 0
    BIAS = 1
    SCALES = 2  # of int8, (panel, group of rows, tile column); else 0
    CENTRE = 3  # of fc1: what the hidden channels lose before they are rounded to bf16
    INNER = 4  # rows
    STEP_BYTES = 5  # of a panel, for each step of k: fewer than the product takes if it must be widened


class Room(IntEnum):
    """Buffers of one thread."""

    LEFT = 0  # rows as the products take them; in bf16, what rounding takes from short sequences follows
    HIDDEN = 1  # hidden channels, likewise
    TILE = 2
    WIDE = 3  # a panel of widened weights
    ZEROS = 4  # as many as a tile has columns
    CONTEXT = 5  # rows of one block
    QUERIES = 6  # one head of a strip of queries, transposed
    SCORES = 7  # a chunk of a strip, or all of it where maps are wanted
    STATE = 8  # three rows of one number a lane: see attention.py
    STRIP_CONTEXT = 9
    KEPT = 10  # context and sums of the lanes that are finished
    FACTORS = 11  # float64, one a lane
    # Attention in bf16 only.
    NARROW_QUERIES = 12  # one head of a block
    NARROW_KEYS = 13  # one head of a sequence
    NARROW_VALUES = 14
    SHIFT = 15  # what keys are moved by: (head_dim,)
    VALUES = 16  # values of one head, neighbours in pairs
    PAIRS = 17  # a chunk of exponentials as pairs, where SCORES keeps them for maps
    QKV = 18  # queries, keys and values of some heads, where a block is whole sequences
    ENTRIES = 19


class Pass(IntEnum):
    """One forward pass."""

    ROWS = 0
    BLOCKS = 1  # how many
    BLOCK_TABLE = 2  # (BLOCKS, 4): first row, last row, first piece, last piece
    PIECE_TABLE = 3  # (pieces, 4): first row, last row, first and last row of the sequence
    POSITIONS = 4  # (ROWS,) int64
    TOKENS = 5  # (ROWS,) uint8
    TOKEN_SCALE = 6  # (ROWS,) float32
    X = 7  # (ROWS, D)
    QKV = 8  # two buffers that take turns: layer n reads the one of n's parity
    QKV_ODD = 9
    LAYERS = 10  # (layers, Layer.ENTRIES)
    COUNTERS = 11  # (phases, Steps.COUNT, 16): the first of eight are parts taken, the first of the other eight done
    STOP = 12  # of a number; not zero: give up
    LAST = 13  # layers to run in all: the last one projects no query, key and value
    NORM_AFTER = 14  # the layer whose rows go through the final LayerNorm
    MAPS = 15  # (pieces, Maps.ENTRIES) or 0
    SHORT_ROWS = 16  # (ROWS + 1,) int64: how many rows before this one are of short sequences; 0 without bf16
    SHARES = 17  # parts of a product that threads take; 0: they take blocks of rows, through all steps
    CONTEXT = 18  # (ROWS, all heads); this and what follows for shares only
    HIDDEN = 19  # (ROWS, hidden channels), in bf16 as Room.HIDDEN
    APART = 20  # not zero: blocks are whole sequences, which one thread takes through all phases
    ENTRIES = 21


class Maps(IntEnum):
    """What attention leaves of one piece, see `AttentionMaps`."""

    MAP_OF_HEAD = 0  # (H,) index of a head's map or -1; 0: no contacts
    COEFFICIENTS = 1
    WEIGHTED = 2  # neighbours are query rows
    WEIGHTED_STEP = 3  # bytes from key to key
    ROW_SUMS = 4
    ROW_SUMS_STEP = 5
    COLUMN_SUMS = 6
    COLUMN_SUMS_STEP = 7
    SUMMARY = 8  # 0: none
    FIRST_RESIDUE = 9
    LAST_RESIDUE = 10
    ONLY = 11  # not zero: no context
    FULL = 12  # 0: none; float32, neighbours are keys
    FULL_HEAD_STEP = 13
    FULL_ROW_STEP = 14
    ENTRIES = 15


def address(array: Array | None) -> int:
    """Where an array's first number lies; 0 for None."""
    if array is None:
        return 0
    found: int = array.__array_interface__["data"][0]
    return found


def table(kind: type[IntEnum], entries: Mapping[Any, int | Array | None]) -> npt.NDArray[np.int64]:
    """A table of this kind: numbers, and addresses of arrays, which must outlive it; zeros elsewhere."""
    found = np.zeros(kind["ENTRIES"], np.int64)
    for place, value in entries.items():
        found[place] = value if isinstance(value, int) else address(value)
    return found
