"""Arithmetic on one vector at an address: what follows a product, and what attention does beside its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from .emitter import FLOAT, I32, I64, LANES, TILE_BYTES, VECTOR_BYTES, Emitter

# Lanes of a piece that never crosses from one head to the next: head widths are multiples of eight.
PIECE = min(LANES, 8)

_HALF = ir.IntType(16)

# Numba's declarations describe what its decorators take, not what they make of it.
intrinsic: Any = _intrinsic
carray: Any = vars(numba)["carray"]


def _at_addresses(count: int, emit: Callable[..., None]) -> Any:
    """An intrinsic of `count` addresses that writes `emit(emitter, *addresses)`; one to seven of them."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit(Emitter(builder), *arguments)
        return context.get_dummy_value()

    made = types.void(*[types.int64] * count), make
    # Numba looks at the parameters of the function itself.
    if count == 2:

        @intrinsic
        def two(typingctx, a, b):
            return made

        return two
    if count == 3:

        @intrinsic
        def three(typingctx, a, b, c):
            return made

        return three
    if count == 4:

        @intrinsic
        def four(typingctx, a, b, c, d):
            return made

        return four

    @intrinsic
    def five(typingctx, a, b, c, d, e):
        return made

    return five


# -- the end of a product -------------------------------------------------------------------------------------------


def _store_biased(e: Emitter, source: Any, bias: Any, out: Any) -> None:
    e.store(e.b.fadd(e.load(source, e.vector), e.load(bias, e.vector)), out)


def _store_gelu(e: Emitter, source: Any, bias: Any, out: Any) -> None:
    e.store(e.gelu(e.b.fadd(e.load(source, e.vector), e.load(bias, e.vector))), out)


def _store_gelu_bf16(e: Emitter, source: Any, bias: Any, centre: Any, out: Any) -> None:
    value = e.gelu(e.b.fadd(e.load(source, e.vector), e.load(bias, e.vector)), coarse=True)
    e.store(e.narrow(e.b.fsub(value, e.load(centre, e.vector))), out, align=2)


def _store_gelu_split(e: Emitter, source: Any, bias: Any, centre: Any, out: Any, low: Any) -> None:
    value = e.gelu(e.b.fadd(e.load(source, e.vector), e.load(bias, e.vector)))
    e.store_split(e.b.fsub(value, e.load(centre, e.vector)), out, low)


def _add_biased(e: Emitter, source: Any, bias: Any, out: Any) -> None:
    e.store(e.b.fadd(e.load(out, e.vector), e.b.fadd(e.load(source, e.vector), e.load(bias, e.vector))), out)


store_biased = _at_addresses(3, _store_biased)  # out = source + bias
store_gelu = _at_addresses(3, _store_gelu)  # out = gelu(source + bias)
store_gelu_bf16 = _at_addresses(4, _store_gelu_bf16)  # the same to 5 digits less `centre`, rounded to bf16
store_gelu_split = _at_addresses(5, _store_gelu_split)  # the same exactly, what rounding takes off at the last one
add_biased = _at_addresses(3, _add_biased)  # out += source + bias


def _rotated(e: Emitter, source: Any, bias: Any, cosine: Any, sine: Any) -> Any:
    """PIECE channels, neighbours in pairs: (x + iy) turned by (cosine + i sine); `sine` comes as (-sine, sine)."""
    piece = ir.VectorType(FLOAT, PIECE)
    value = e.b.fadd(e.load(source, piece), e.load(bias, piece))
    swap = ir.Constant(ir.VectorType(I32, PIECE), [lane ^ 1 for lane in range(PIECE)])
    swapped = e.b.shuffle_vector(value, ir.Constant(piece, ir.Undefined), swap)
    turned = e.b.fmul(swapped, e.load(sine, piece))
    return e.fma(value, e.load(cosine, piece), turned)


def _piece_bf16(e: Emitter, value: Any) -> Any:
    """float32 rounded to bf16, by integers: PIECE of them need not fill a register."""
    wide = ir.VectorType(I32, PIECE)
    rounded = e.b.add(e.b.bitcast(value, wide), ir.Constant(wide, [0x8000] * PIECE))
    return e.b.trunc(e.b.lshr(rounded, ir.Constant(wide, [16] * PIECE)), ir.VectorType(_HALF, PIECE))


def _store_rotated(e: Emitter, source: Any, bias: Any, cosine: Any, sine: Any, out: Any) -> None:
    e.store(_rotated(e, source, bias, cosine, sine), out)


def _store_piece(e: Emitter, source: Any, bias: Any, out: Any) -> None:
    piece = ir.VectorType(FLOAT, PIECE)
    e.store(e.b.fadd(e.load(source, piece), e.load(bias, piece)), out)


def _store_piece_bf16(e: Emitter, source: Any, bias: Any, out: Any) -> None:
    piece = ir.VectorType(FLOAT, PIECE)
    e.store(_piece_bf16(e, e.b.fadd(e.load(source, piece), e.load(bias, piece))), out, align=2)


store_rotated = _at_addresses(5, _store_rotated)
store_piece = _at_addresses(3, _store_piece)
store_piece_bf16 = _at_addresses(3, _store_piece_bf16)


# -- narrow weights -------------------------------------------------------------------------------------------------


def _widen_bf16(e: Emitter, source: Any, steps: Any, out: Any) -> None:
    half = ir.VectorType(_HALF, e.isa.lanes)

    def step(i: Any, _: list[Any]) -> list[Any]:
        for j in range(e.isa.vectors):
            at = e.number(j)
            bits = e.load(e.offset(e.offset(source, i, TILE_BYTES // 2), at, VECTOR_BYTES // 2), half, align=2)
            e.store(e.widen(bits), e.offset(e.offset(out, i, TILE_BYTES), at, VECTOR_BYTES))
        return []

    e.loop(steps, [], step)


def _widen_int8(e: Emitter, pairs: Any, source: Any, scales: Any, steps: Any, out: Any) -> None:
    lanes = e.isa.lanes
    factors = [e.load(e.offset(scales, e.number(j), VECTOR_BYTES), e.vector) for j in range(e.isa.vectors)]

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
                target = e.offset(there, e.number(j), VECTOR_BYTES)
                if not choice:
                    e.store(widened(e.offset(here, e.number(j), lanes), factors[j]), target)
                    continue
                for half in range(2):
                    value = widened(e.offset(here, e.number(2 * j + half), lanes), doubled[j][half])
                    e.store(e.narrow(value), e.offset(target, e.number(half), VECTOR_BYTES // 2), align=2)
            return []

        e.loop(steps, [], step)

    e.switch(pairs, [0, 1], case)


# `steps` of k of a panel: bf16 -> float32
widen_bf16 = _at_addresses(3, _widen_bf16)
# f(pairs, source, scales, steps, out): int8, with a scale for each column -> float32, or bf16 in pairs
widen_int8 = _at_addresses(5, _widen_int8)


# -- columns of a strip of scores (keys × queries): one lane is one query -------------------------------------------


def _store_scaled(e: Emitter, source: Any, factor: Any, out: Any) -> None:
    e.store(e.b.fmul(e.load(source, e.vector), e.load(factor, e.vector)), out)


def _column_maximum(e: Emitter, scores: Any, step: Any, count: Any, highest: Any) -> None:
    def body(i: Any, values: list[Any]) -> list[Any]:
        return [e.larger(values[0], e.load(e.b.add(scores, e.b.mul(i, step)), e.vector))]

    (result,) = e.loop(count, [e.load(highest, e.vector)], body)
    e.store(result, highest)


def _store_pair(e: Emitter, low: Any, high: Any, out: Any) -> None:
    e.store(e.narrow_pair(e.load(low, e.vector), e.load(high, e.vector)), out)


store_scaled = _at_addresses(3, _store_scaled)  # out = source · factor, lane by lane
column_maximum = _at_addresses(4, _column_maximum)  # highest = max(highest, scores[0], …) of rows `step` bytes apart
store_pair = _at_addresses(3, _store_pair)  # out = low and high rounded to bf16, side by side


# -- numbers at an address ------------------------------------------------------------------------------------------


def _store_bf16(e: Emitter, source: Any, out: Any) -> None:
    e.store(e.narrow(e.load(source, e.vector)), out, align=2)


def _store_split(e: Emitter, source: Any, out: Any, low: Any) -> None:
    e.store_split(e.load(source, e.vector), out, low)


store_bf16 = _at_addresses(2, _store_bf16)  # one vector, rounded to bf16
store_split = _at_addresses(3, _store_split)  # the same, and what rounding takes off


@intrinsic
def load_number(typingctx, address):
    """The float32 at an address."""

    def codegen(context, builder, signature, arguments):
        return Emitter(builder).load(arguments[0], FLOAT)

    return types.float32(types.int64), codegen


@intrinsic
def store_number(typingctx, value, address):
    """Write one float32."""

    def codegen(context, builder, signature, arguments):
        Emitter(builder).store(*arguments)
        return context.get_dummy_value()

    return types.void(types.float32, types.int64), codegen


@intrinsic
def split_number(typingctx, value, address, low):
    """Write one float32, rounded to bf16, and `low` bytes on what that takes off, unless `low` is 0."""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        value, address, low = arguments
        # The first part goes last, for where both go to one place.
        for part, at in zip(reversed(e.split(e.splat(value))), (builder.add(address, low), address), strict=True):
            e.store(builder.extract_element(part, ir.Constant(I32, 0)), at, align=2)
        return context.get_dummy_value()

    return types.void(types.float32, types.int64, types.int64), codegen


@intrinsic
def load_integer(typingctx, table, index):
    """Entry `index` of a table of 64-bit integers."""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        return e.load(e.offset(arguments[0], arguments[1], 8), I64, align=8)

    return types.int64(types.int64, types.int64), codegen


def _transpose_eight(e: Emitter, source: Any, source_step: Any, out: Any, out_step: Any) -> None:
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


# out[j, i] = source[i, j] for 8 × 8 numbers of four bytes; rows are `source_step` and `out_step` bytes apart
transpose_eight = _at_addresses(4, _transpose_eight)


def _array_at(dtype: Any) -> Any:
    """An intrinsic that makes an address a pointer for `numba.carray`."""

    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(types.int64), codegen

    return pointer


# -- between threads ------------------------------------------------------------------------------------------------


@intrinsic
def take_ticket(typingctx, address):
    """Add one to a shared counter; what it was before."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def load_shared(typingctx, address):
    """A number that other threads write; what they wrote before it is seen too."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a loop that waits."""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        if e.isa.name.startswith("neon"):
            e.call("llvm.aarch64.hint", ir.VoidType(), ir.Constant(I32, 1))
        elif e.isa.name != "plain":
            e.call("llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
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


float32_at, float64_at = _array_at(types.float32), _array_at(types.float64)
int64_at, uint8_at, uint16_at, uint32_at = (
    _array_at(kind) for kind in (types.int64, types.uint8, types.uint16, types.uint32)
)
