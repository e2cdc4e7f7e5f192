"""Arithmetic on one vector at an address: what follows a product, and what attention does beside its products."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from .emitter import (
    FLOAT,
    I32,
    I64,
    LANES,
    STRIP_COLUMNS,
    TILE_BYTES,
    TILE_COLUMNS,
    VECTOR_BYTES,
    Emitter,
    intrinsic,
    on_addresses,
)

# Lanes of a piece that never crosses from one head to the next: head widths are multiples of eight.
PIECE = min(LANES, 8)

FLOATS = ir.VectorType(FLOAT, PIECE)
_HALF = ir.IntType(16)

# Numba's declarations describe what its decorators take, not what they make of it.
carray: Any = vars(numba)["carray"]


# -- the end of a product -------------------------------------------------------------------------------------------


@on_addresses(3)
def store_biased(e: Emitter, source: Any, bias: Any, out: Any) -> None:
    """out = source + bias"""
    e.store(e.b.fadd(e.load(source, e.vector), e.load(bias, e.vector)), out)


@on_addresses(3)
def store_gelu(e: Emitter, source: Any, bias: Any, out: Any) -> None:
    """out = gelu(source + bias)"""
    e.store(e.gelu(e.b.fadd(e.load(source, e.vector), e.load(bias, e.vector))), out)


@on_addresses(4)
def store_gelu_bf16(e: Emitter, source: Any, bias: Any, centre: Any, out: Any) -> None:
    """out = gelu(source + bias) to 4 digits, less `centre`, rounded to bf16."""
    value = e.coarse_gelu(e.b.fadd(e.load(source, e.vector), e.load(bias, e.vector)))
    e.store(e.narrow(e.b.fsub(value, e.load(centre, e.vector))), out, align=2)


@on_addresses(5)
def store_gelu_split(e: Emitter, source: Any, bias: Any, centre: Any, out: Any, low: Any) -> None:
    """The same without the limit to 4 digits, and what rounding takes off to `low`."""
    value = e.gelu(e.b.fadd(e.load(source, e.vector), e.load(bias, e.vector)))
    e.store_split(e.b.fsub(value, e.load(centre, e.vector)), out, low)


@on_addresses(3)
def add_biased(e: Emitter, source: Any, bias: Any, out: Any) -> None:
    """out += source + bias"""
    e.store(e.b.fadd(e.load(out, e.vector), e.b.fadd(e.load(source, e.vector), e.load(bias, e.vector))), out)


@on_addresses(5)
def store_rotated(e: Emitter, source: Any, bias: Any, cosine: Any, sine: Any, out: Any) -> None:
    """PIECE channels, neighbours in pairs: (x + iy) turned by (cosine + i sine); `sine` comes as (-sine, sine)."""
    value = e.b.fadd(e.load(source, FLOATS), e.load(bias, FLOATS))
    swap = ir.Constant(ir.VectorType(I32, PIECE), [lane ^ 1 for lane in range(PIECE)])
    swapped = e.b.shuffle_vector(value, ir.Constant(FLOATS, ir.Undefined), swap)
    turned = e.b.fmul(swapped, e.load(sine, FLOATS))
    e.store(e.fma(value, e.load(cosine, FLOATS), turned), out)


@on_addresses(3)
def store_piece(e: Emitter, source: Any, bias: Any, out: Any) -> None:
    """PIECE numbers: out = source + bias"""
    e.store(e.b.fadd(e.load(source, FLOATS), e.load(bias, FLOATS)), out)


@on_addresses(3)
def store_piece_bf16(e: Emitter, source: Any, bias: Any, out: Any) -> None:
    """The same rounded to bf16, by integers: PIECE of them need not fill a register."""
    value, wide = e.b.fadd(e.load(source, FLOATS), e.load(bias, FLOATS)), ir.VectorType(I32, PIECE)
    rounded = e.b.add(e.b.bitcast(value, wide), ir.Constant(wide, [0x8000] * PIECE))
    half = e.b.trunc(e.b.lshr(rounded, ir.Constant(wide, [16] * PIECE)), ir.VectorType(_HALF, PIECE))
    e.store(half, out, align=2)


# -- narrow weights -------------------------------------------------------------------------------------------------


@on_addresses(3)
def widen_bf16(e: Emitter, source: Any, steps: Any, out: Any) -> None:
    """`steps` of k of a panel: bf16 -> float32"""
    half = ir.VectorType(_HALF, e.isa.lanes)

    def step(i: Any, _: list[Any]) -> list[Any]:
        for j in range(e.isa.vectors):
            here = e.offset(e.offset(source, i, TILE_BYTES // 2), e.number(j), VECTOR_BYTES // 2)
            e.store(e.widen(e.load(here, half, align=2)), e.at(e.offset(out, i, TILE_BYTES), j))
        return []

    e.loop(steps, [], step)


@on_addresses(5)
def widen_int8(e: Emitter, pairs: Any, source: Any, scales: Any, steps: Any, out: Any) -> None:
    """`steps` of k of a panel: int8, with a scale for each column -> float32, or bf16 in `pairs`"""
    lanes = e.isa.lanes
    factors = [e.load(e.at(scales, j), e.vector) for j in range(e.isa.vectors)]

    def widened(address: Any, factor: Any) -> Any:
        levels = e.load(address, ir.VectorType(ir.IntType(8), lanes), align=1)
        return e.b.fmul(e.b.sitofp(e.b.sext(levels, e.integers), e.vector), factor)

    def case(choice: int) -> None:
        # The scales of neighbours in k, of which there are two in each column.
        masks = [[i // 2 + half * lanes // 2 for i in range(lanes)] for half in range(2)] if choice else []
        doubled = [[e.b.shuffle_vector(one, one, ir.Constant(e.integers, mask)) for mask in masks] for one in factors]

        def step(i: Any, _: list[Any]) -> list[Any]:
            here, there = e.offset(source, i, TILE_BYTES // (2 if choice else 4)), e.offset(out, i, TILE_BYTES)
            for j in range(e.isa.vectors):
                target = e.at(there, j)
                if not choice:
                    e.store(widened(e.offset(here, e.number(j), lanes), factors[j]), target)
                    continue
                for half in range(2):
                    value = widened(e.offset(here, e.number(2 * j + half), lanes), doubled[j][half])
                    e.store(e.narrow(value), e.offset(target, e.number(half), VECTOR_BYTES // 2), align=2)
            return []

        e.loop(steps, [], step)

    e.switch(pairs, [0, 1], case)


@on_addresses(6)
def pack_steps(e: Emitter, item: Any, group: Any, source: Any, row_bytes: Any, steps: Any, out: Any) -> None:
    """`steps` of k of a panel as a product takes them: `group` rows of numbers of `item` bytes, column by column"""

    def pack(item: int, group: int) -> None:
        columns = ir.VectorType(ir.IntType(8 * item), TILE_COLUMNS)
        mask = [i // group + i % group * TILE_COLUMNS for i in range(group * TILE_COLUMNS)]

        def step(i: Any, _: list[Any]) -> list[Any]:
            row = e.b.add(source, e.b.mul(i, e.b.mul(row_bytes, e.number(group))))
            rows = [e.load(e.b.add(row, e.b.mul(row_bytes, e.number(j))), columns, align=item) for j in range(group)]
            packed = e.b.shuffle_vector(rows[0], rows[-1], ir.Constant(ir.VectorType(I32, len(mask)), mask))
            e.store(packed, e.offset(out, i, item * group * TILE_COLUMNS), align=item)
            return []

        e.fold(steps, [], step)

    e.switch(group, [1, 2], lambda group: e.switch(item, [1, 2, 4], lambda item: pack(item, group)))


@on_addresses(6)
def add_row(e: Emitter, item: Any, row: Any, scales: Any, factor: Any, count: Any, out: Any) -> None:
    """out += factor · row of a matrix: `count` numbers of `item` bytes, bf16, or int8 with `scales`"""
    times, whole = e.load(factor, FLOAT), e.b.udiv(count, e.number(LANES))
    left = e.b.mul(whole, e.number(LANES))

    def add(item: int) -> None:
        def some(lanes: int, start: Any, steps: Any) -> None:
            floats = ir.VectorType(FLOAT, lanes)

            def step(i: Any, _: list[Any]) -> list[Any]:
                at = e.b.add(start, e.b.mul(i, e.number(lanes)))
                bits = e.load(e.offset(row, at, item), ir.VectorType(ir.IntType(8 * item), lanes), align=item)
                if item == 1:
                    levels = e.b.sitofp(e.b.sext(bits, ir.VectorType(I32, lanes)), floats)
                    value = e.b.fmul(levels, e.load(e.offset(scales, at, 4), floats))
                else:
                    value = e.widen(bits)
                target = e.offset(out, at, 4)
                e.store(e.fma(value, e.splat(times, lanes), e.load(target, floats)), target)
                return []

            e.fold(steps, [], step)

        some(LANES, e.number(0), whole)
        some(1, left, e.b.sub(count, left))

    e.switch(item, [1, 2], add)


# -- columns of a strip of scores (keys × queries): one lane is one query -------------------------------------------


@on_addresses(3)
def store_scaled(e: Emitter, source: Any, factor: Any, out: Any) -> None:
    """out = source · factor, lane by lane"""
    e.store(e.b.fmul(e.load(source, e.vector), e.load(factor, e.vector)), out)


@on_addresses(4)
def column_maximum(e: Emitter, scores: Any, step: Any, count: Any, highest: Any) -> None:
    """highest = max(highest, scores[0], …) of rows `step` bytes apart"""

    def body(i: Any, values: list[Any]) -> list[Any]:
        return [e.larger(values[0], e.load(e.b.add(scores, e.b.mul(i, step)), e.vector))]

    (result,) = e.loop(count, [e.load(highest, e.vector)], body)
    e.store(result, highest)


@on_addresses(4)
def exponentials(e: Emitter, lanes: Any, count: Any, scores: Any, total: Any) -> None:
    """scores (count, lanes) = 2^scores; total (lanes,) += their sum over rows."""

    def strip(lanes: int) -> None:
        vectors = range(lanes // LANES)

        def row(i: Any, sums: list[Any]) -> list[Any]:
            sums = list(sums)
            for j in vectors:
                address = e.at(e.offset(scores, i, 4 * lanes), j)
                value = e.exp2(e.load(address, e.vector))
                e.store(value, address)
                sums[j] = e.b.fadd(sums[j], value)
            return sums

        sums = e.fold(count, [e.load(e.at(total, j), e.vector) for j in vectors], row)
        for j in vectors:
            e.store(sums[j], e.at(total, j))

    e.switch(lanes, [LANES, STRIP_COLUMNS], strip)


@on_addresses(6)
def exponentials_bf16(e: Emitter, lanes: Any, count: Any, scores: Any, total: Any, pairs: Any, keep: Any) -> None:
    """See `exponential_pairs`."""
    kept = e.b.icmp_signed("!=", keep, e.number(0))

    def strip(lanes: int) -> None:
        exponential_pairs(e, lanes // LANES, count, scores, pairs, (total, kept))

    e.switch(lanes, [LANES, STRIP_COLUMNS], strip)


def exponential_pairs(
    e: Emitter, vectors: int, count: Any, scores: Any, pairs: Any, total_and_kept: tuple[Any, Any] | None = None
) -> None:
    """pairs = 2^scores of neighbouring rows in bf16, side by side, zeros beside an odd last one.

    Of `count` rows of so many vectors. With `total_and_kept`, total += their sum, and scores become those numbers if
    the bit `kept` is set.
    """
    total, kept = total_and_kept or (None, None)
    row_bytes = vectors * VECTOR_BYTES

    def pair_row(i: Any, sums: list[Any], rows: int = 2) -> list[Any]:
        start, out, new = e.offset(scores, i, 2 * row_bytes), e.offset(pairs, i, row_bytes), []
        for j in range(vectors):
            addresses = [e.at(start, row * vectors + j) for row in range(rows)]
            low, high = [*(e.load(address, e.vector) for address in addresses), None][:2]
            pair = e.exp2_pair(low, high)
            if sums:
                new.append(e.pair_sum(pair, sums[j]))
            e.store(pair, e.at(out, j))
            if kept is not None:
                with e.b.if_then(kept):
                    for number, address in zip(e.widen_pair(pair), addresses, strict=False):
                        e.store(number, address)
        return new

    places = [] if total is None else [e.at(total, j) for j in range(vectors)]
    whole = e.b.lshr(count, e.number(1))
    sums = e.fold(whole, [e.load(place, e.vector) for place in places], pair_row)
    sums = e.fold(e.b.and_(count, e.number(1)), sums, lambda _, sums: pair_row(whole, sums, 1))
    for value, place in zip(sums, places, strict=True):
        e.store(value, place)


# -- numbers at an address ------------------------------------------------------------------------------------------


@on_addresses(2)
def store_bf16(e: Emitter, source: Any, out: Any) -> None:
    """One vector, rounded to bf16."""
    e.store(e.narrow(e.load(source, e.vector)), out, align=2)


@on_addresses(3)
def store_split(e: Emitter, source: Any, out: Any, low: Any) -> None:
    """The same, and what rounding takes off to `low`."""
    e.store_split(e.load(source, e.vector), out, low)


@intrinsic(types.float32, types.int64)
def load_number(e: Emitter, address: Any) -> Any:
    """The float32 at an address."""
    return e.load(address, FLOAT)


@intrinsic(types.void, types.float32, types.int64)
def store_number(e: Emitter, value: Any, address: Any) -> None:
    """Write one float32."""
    e.store(value, address)


@intrinsic(types.void, types.float32, types.int64, types.int64)
def split_number(e: Emitter, value: Any, address: Any, low: Any) -> None:
    """Write one float32, rounded to bf16, and `low` bytes on what that takes off, unless `low` is 0."""
    # The first part goes last, for where both go to one place.
    for part, at in zip(reversed(e.split(e.splat(value))), (e.b.add(address, low), address), strict=True):
        e.store(e.b.extract_element(part, ir.Constant(I32, 0)), at, align=2)


@intrinsic(types.int64, types.int64, types.int64)
def load_integer(e: Emitter, table: Any, index: Any) -> Any:
    """Entry `index` of a table of 64-bit integers."""
    return e.load(e.offset(table, index, 8), I64, align=8)


@on_addresses(4)
def transpose_eight(e: Emitter, source: Any, source_step: Any, out: Any, out_step: Any) -> None:
    """out[j, i] = source[i, j] for 8 × 8 numbers of four bytes; rows are `source_step` and `out_step` bytes apart."""
    eight = ir.VectorType(FLOAT, 8)
    rows = [e.load(e.offset(source, source_step, i), eight) for i in range(8)]
    # Swap blocks of 4, then of 2, then of 1 across the diagonal.
    for width in (4, 2, 1):
        for i in range(8):
            if i & width:
                continue
            low = [j if not j & width else 8 + (j ^ width) for j in range(8)]
            high = [j ^ width if not j & width else 8 + j for j in range(8)]
            first, second = rows[i], rows[i | width]
            rows[i], rows[i | width] = (
                e.b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, 8), mask)) for mask in (low, high)
            )
    for j in range(8):
        e.store(rows[j], e.offset(out, out_step, j))


@on_addresses(3)
def part_pairs(e: Emitter, source: Any, low: Any, high: Any) -> None:
    """Pairs of a strip's keys, or as many, as their two numbers of two bytes: (32,) -> (32,), (32,)"""
    pairs = e.load(source, ir.VectorType(I32, 32))
    half = ir.VectorType(_HALF, 32)
    e.store(e.b.trunc(pairs, half), low, align=2)
    e.store(e.b.trunc(e.b.lshr(pairs, ir.Constant(pairs.type, [16] * 32)), half), high, align=2)


@on_addresses(2)
def fetch(e: Emitter, start: Any, size: Any) -> None:
    """Bring so many bytes into the L2 cache."""

    def line(i: Any, _: list[Any]) -> list[Any]:
        e.fetch(e.offset(start, i, 64))
        return []

    e.fold(e.b.lshr(e.b.add(size, e.number(63)), e.number(6)), [], line)


def _array_at(dtype: Any, kind: Any) -> Any:
    """An intrinsic that makes an address a pointer for `numba.carray`."""

    @intrinsic(types.CPointer(dtype), types.int64)
    def pointer(e: Emitter, address: Any) -> Any:
        return e.b.inttoptr(address, kind.as_pointer())

    return pointer


float32_at, float64_at = _array_at(types.float32, FLOAT), _array_at(types.float64, ir.DoubleType())
int64_at, uint32_at = _array_at(types.int64, I64), _array_at(types.uint32, I32)
uint8_at, uint16_at = _array_at(types.uint8, ir.IntType(8)), _array_at(types.uint16, _HALF)


# -- between threads ------------------------------------------------------------------------------------------------


@intrinsic(types.int64, types.int64)
def take_ticket(e: Emitter, address: Any) -> Any:
    """Add one to a shared counter; what it was before."""
    return e.b.atomic_rmw("add", e.b.inttoptr(address, I64.as_pointer()), ir.Constant(I64, 1), "seq_cst")


@intrinsic(types.int64, types.int64)
def load_shared(e: Emitter, address: Any) -> Any:
    """A number that other threads write; what they wrote before it is seen too."""
    return e.b.load_atomic(e.b.inttoptr(address, I64.as_pointer()), "acquire", 8)


@on_addresses(0)
def pause(e: Emitter) -> None:
    """Tell the processor that this is a loop that waits."""
    if e.isa.name.startswith("neon"):
        e.call("llvm.aarch64.hint", ir.VoidType(), ir.Constant(I32, 1))
    elif e.isa.name != "plain":
        e.call("llvm.x86.sse2.pause", ir.VoidType())


@_intrinsic
def call_kernel(typingctx, entry, arguments):
    """Call the compiled kernel at address `entry` with a tuple of integers: it returns nothing and raises nothing."""

    def codegen(context, builder, signature, values):
        address, packed = values
        numbers = cgutils.unpack_tuple(builder, packed)
        pointer = ir.IntType(8).as_pointer()
        # How Numba calls what it compiles: room for the result, room for an exception, then the arguments.
        kind = ir.FunctionType(I32, [pointer.as_pointer(), pointer.as_pointer(), *[I64] * len(numbers)])
        result, error = (cgutils.alloca_once(builder, pointer) for _ in range(2))
        builder.call(builder.inttoptr(address, kind.as_pointer()), [result, error, *numbers])
        return context.get_dummy_value()

    return types.void(entry, arguments), codegen
