"""Products on the tile registers of Intel AMX: 16 rows of 64 bytes each, configured by every thread for itself.

One instruction multiplies a tile of A (rows × 64 bytes of k) by a tile of B (16 steps of k × 16 columns) and adds to
a tile of C (rows × 16 columns). A lies as rows lie anyway, B as `panels.pack_panels` lays it. Four tiles of C, two of A
and two of B make one product of up to 32 × 32 elements. Each element of C is one chain over ascending k, whatever
rows share its tile; what lies behind the last row may be read, and gives rows that nobody looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from ..compiled.isa import HALF_ROWS, STEPS
from ..compiled.panels import SCORE_KEYS
from .emitter import I64, LANES, STRIP_COLUMNS, TILE_BYTES, VECTOR_BYTES, Emitter, function, on_addresses
from .vectors import exponential_pairs

BYTE = ir.IntType(8)
_POINTER = BYTE.as_pointer()
_ROW_BYTES = 64
_PALETTE = 1
# Numbers of the tile registers: C by row and column, then A by row, then B by column.
_C, _A, _B = ((0, 1), (2, 3)), (4, 5), (6, 7)


def _zero(e: Emitter, tile: int) -> None:
    e.call("llvm.x86.tilezero", ir.VoidType(), BYTE(tile))


def _load(e: Emitter, tile: int, address: Any, step: Any, hint: str = "") -> None:
    """Rows that lie `step` bytes apart."""
    e.call(f"llvm.x86.tileloadd{hint}64", ir.VoidType(), BYTE(tile), e.b.inttoptr(address, _POINTER), step)


def _store(e: Emitter, tile: int, address: Any, step: Any) -> None:
    e.call("llvm.x86.tilestored64", ir.VoidType(), BYTE(tile), e.b.inttoptr(address, _POINTER), step)


def _multiply(e: Emitter, total: int, a: int, b: int) -> None:
    e.call("llvm.x86.tdpbf16ps", ir.VoidType(), BYTE(total), BYTE(a), BYTE(b))


@on_addresses(2)
def configure_tiles(e: Emitter, first: Any, second: Any) -> None:
    """From now on, in this thread, the two rows of tiles of A and C have so many rows each; every tile becomes zero."""
    bytes_of_table = ir.ArrayType(BYTE, 64)
    with e.b.goto_entry_block():
        table = e.b.alloca(bytes_of_table)
    e.b.store(ir.Constant(bytes_of_table, None), table)
    start = e.b.ptrtoint(table, I64)
    rows = [e.b.trunc(count, BYTE) for count in (first, second)]
    e.store(BYTE(_PALETTE), start, align=1)
    for tile in range(8):
        e.store(ir.IntType(16)(_ROW_BYTES), e.b.add(start, e.number(16 + 2 * tile)), align=1)
        height = BYTE(HALF_ROWS) if tile in _B else rows[tile in (*_C[1], _A[1])]
        e.store(height, e.b.add(start, e.number(48 + tile)), align=1)
    e.call("llvm.x86.ldtilecfg", ir.VoidType(), e.b.bitcast(table, _POINTER))


@on_addresses(3)
def store_tiles(e: Emitter, half: Any, c: Any, c_step: Any) -> None:
    """C, two by two tiles of `half` rows, to memory; rows are `c_step` bytes apart."""
    for row in range(2):
        start = e.b.add(c, e.b.mul(half, c_step)) if row else c
        for column in range(2):
            _store(e, _C[row][column], e.b.add(start, e.number(column * _ROW_BYTES)), c_step)


@on_addresses(0)
def release_tiles(e: Emitter) -> None:
    """Tiles are not in use any more: the system need not save them."""
    e.call("llvm.x86.tilerelease", ir.VoidType())


def _steps_of_k(
    e: Emitter,
    rows: int,
    columns: int,
    steps: Any,
    a: Callable[[Any, int], tuple[Any, Any]],
    b: Callable[[Any, int], tuple[Any, Any]],
    beside: Callable[[Any], None] | None = None,
) -> None:
    """C += A · B over `steps` tiles of k; `a(i, row)` and `b(i, column)` say where tile i lies and how far its rows."""

    def body(i: Any, _: list[Any]) -> list[Any]:
        if beside is not None:
            beside(i)
        for column in range(columns):
            _load(e, _B[column], *b(i, column))
        for row in range(rows):
            _load(e, _A[row], *a(i, row), hint="t1")
            for column in range(columns):
                _multiply(e, _C[row][column], _A[row], _B[column])
        return []

    e.loop(steps, [], body)


@function("numpyesm_tiles", 8)
def multiply_tiles(
    e: Emitter, half: Any, a: Any, a_step: Any, b: Any, k: Any, ahead: Any, ahead_step: Any, add: Any
) -> None:
    """Two tiles of `half` rows, as configured, by a packed panel, with what the next one fetches.

    As `emitter._multiplied`; `k` is a multiple of STEPS. C stays in its registers until `store_tiles`, and beyond it
    for what is added next.
    """
    builder = e.b
    second = builder.mul(half, a_step)
    with builder.if_then(builder.icmp_signed("==", add, e.number(0))):
        for tiles in _C:
            for tile in tiles:
                _zero(e, tile)

    def left(i: Any, row: int) -> tuple[Any, Any]:
        start = builder.add(a, second) if row else a
        return e.offset(start, i, _ROW_BYTES), a_step

    def right(i: Any, column: int) -> tuple[Any, Any]:
        here = e.offset(b, i, STEPS * TILE_BYTES)
        return builder.add(here, e.number(column * _ROW_BYTES)), e.number(TILE_BYTES)

    fetched = builder.mul(ahead_step, e.number(STEPS))
    lines = builder.add(builder.sdiv(builder.sub(fetched, e.number(1)), e.number(64)), e.number(1))

    def fetch(i: Any) -> None:
        here = builder.add(ahead, builder.mul(i, fetched))

        def line(j: Any, _: list[Any]) -> list[Any]:
            e.fetch(e.offset(here, j, 64))
            return []

        e.loop(lines, [], line)

    _steps_of_k(e, 2, 2, builder.sdiv(k, e.number(STEPS)), left, right, fetch)


@function("numpyesm_tiles_context", 8)
def context_product(
    e: Emitter, shape: Any, a: Any, a_step: Any, a_next: Any, b: Any, b_step: Any, k: Any, c: Any
) -> None:
    """C = A · B in bf16, of 16 rows and those that are configured for the second tiles.

    `shape` is 2 · (two tiles of rows?) + (two of columns?), plus 4 to add to C. Rows of B and C are `b_step` bytes
    apart; tile i of A begins `i · a_next` bytes on; `k` counts tiles.
    """
    builder = e.b
    one_row_of_tiles = builder.mul(b_step, e.number(HALF_ROWS))

    def left(i: Any, row: int) -> tuple[Any, Any]:
        start = e.offset(a, a_step, HALF_ROWS) if row else a
        return builder.add(start, builder.mul(i, a_next)), a_step

    def right(i: Any, column: int) -> tuple[Any, Any]:
        here = builder.add(b, builder.mul(i, one_row_of_tiles))
        return builder.add(here, e.number(column * _ROW_BYTES)), b_step

    def case(choice: int) -> None:
        rows, columns = 1 + (choice >> 1 & 1), 1 + (choice & 1)
        tiles = [
            (_C[row][column], builder.add(c, e.offset(e.number(column * _ROW_BYTES), one_row_of_tiles, row)))
            for row in range(rows)
            for column in range(columns)
        ]
        for tile, address in tiles:
            if choice & 4:
                _load(e, tile, address, b_step)
            else:
                _zero(e, tile)
        _steps_of_k(e, rows, columns, k, left, right)
        for tile, address in tiles:
            _store(e, tile, address, b_step)

    e.switch(shape, list(range(8)), case)


@function("numpyesm_tiles_scores", 10)
def tile_scores(e: Emitter, lanes: Any, *arguments: Any) -> None:
    """2^(keys · queries + shift) of `lanes` queries, with 16 rows configured; see `_score_blocks`."""
    e.switch(lanes, [LANES, STRIP_COLUMNS], lambda lanes: _score_blocks(e, lanes // LANES, *arguments))


def _score_blocks(e: Emitter, vectors: int, *arguments: Any) -> None:
    """Exponentials for `count` keys, which lie `step` bytes apart, and some vectors of queries in `k` tiles of pairs.

    Rounded to bf16 they go to `pairs`, neighbouring keys side by side, zeros beside an odd last one. With `keep` the
    exponents stay in `scores`, else that holds SCORE_KEYS keys at a time.

    So many keys' products come before their exponentials because what a tile register has just stored cannot be read
    at once. Taking both in turns, block by block of 16 keys, is a fifth slower; all keys do not fit the L1 cache.
    """
    count, keys, step, queries, k, scores, shift, pairs, keep = arguments
    b = e.b
    row_bytes = vectors * VECTOR_BYTES
    kept = b.icmp_signed("!=", keep, e.number(0))
    rows_of = e.number(SCORE_KEYS)

    def load_queries(i: Any, tiles: tuple[int, int]) -> None:
        start = e.offset(queries, i, STEPS * row_bytes)
        for column in range(vectors):
            _load(e, tiles[column], b.add(start, e.number(column * _ROW_BYTES)), e.number(row_bytes))

    def product(here: Any, out: Any) -> None:
        """Scores of 16 keys."""
        _load(e, _A[0], here, step)
        for column in range(vectors):
            # The same row sixteen times.
            _load(e, _C[0][column], e.at(shift, column), e.number(0))
            _multiply(e, _C[0][column], _A[0], _B[column])

        def further(i: Any, _: list[Any]) -> list[Any]:
            i = b.add(i, e.number(1))
            load_queries(i, _C[1])
            _load(e, _A[1], e.offset(here, i, _ROW_BYTES), step)
            for column in range(vectors):
                _multiply(e, _C[0][column], _A[1], _C[1][column])
            return []

        e.fold(b.sub(k, e.number(1)), [], further)
        for column in range(vectors):
            _store(e, _C[0][column], b.add(out, e.number(column * _ROW_BYTES)), e.number(row_bytes))

    def part(i: Any, _: list[Any]) -> list[Any]:
        first = b.mul(i, rows_of)
        left = b.sub(count, first)
        rows = b.select(b.icmp_signed("<", left, rows_of), left, rows_of)
        here = b.add(keys, b.mul(step, first))
        out = b.select(kept, e.offset(scores, first, row_bytes), scores)

        def block(j: Any, _: list[Any]) -> list[Any]:
            row = b.mul(j, e.number(HALF_ROWS))
            product(b.add(here, b.mul(step, row)), e.offset(out, row, row_bytes))
            return []

        e.loop(b.sdiv(b.add(rows, e.number(HALF_ROWS - 1)), e.number(HALF_ROWS)), [], block)
        exponential_pairs(e, vectors, rows, out, e.offset(pairs, first, row_bytes // 2))
        return []

    load_queries(e.number(0), _B)
    e.loop(b.sdiv(b.add(count, e.number(SCORE_KEYS - 1)), rows_of), [], part)
