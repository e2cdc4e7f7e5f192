"""The one place that writes LLVM IR: register-tiled products and the vector arithmetic around them.

Everything here is a Numba intrinsic that takes addresses as integers; `gemm.py` and `attention.py` build on them.
The IR names vector widths and, for bf16 and int8, instructions; which ones comes from `isa.host_isa()`.

A product intrinsic computes one tile, C (rows × columns) = A (rows × k) · B (k × columns), with all of C in registers.
Every element of C is one chain of multiply-adds in ascending k, whatever the height of the tile: a row's result does
not depend on which rows share its tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..reference_numpy import _GELU_P
from .isa import Isa, host_isa

ISA = host_isa()
LANES = ISA.lanes
VECTOR_BYTES = 4 * LANES
TILE_ROWS = ISA.rows
TILE_COLUMNS = ISA.columns
TILE_BYTES = 4 * TILE_COLUMNS

I32, I64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()

# 2^f on [-1/2, 1/2], highest power first: least squares reweighted to an even relative error of 2e-9.
EXP2_P = (
    0.00015353361885996788,
    0.0013398874422857476,
    0.009618437357837392,
    0.05550332471098659,
    0.24022647913626272,
    0.693147202855082,
    1.0,
)
# Adding 1.5 · 2^23 rounds a float32 to a whole number and leaves that number in its low bits.
_ROUND = 12582912.0
_EXP2_LOWEST, _EXP2_HIGHEST = -125.0, 126.0


class _BFloat(ir.Type):
    """llvmlite has no bfloat type; its name is all that is needed."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class Emitter:
    """IR for one function: addresses are 64-bit integers, vectors have the host's width."""

    def __init__(self, builder: Any, isa: Isa = ISA) -> None:
        self.b, self.isa = builder, isa
        self.vector = ir.VectorType(FLOAT, isa.lanes)
        self.integers = ir.VectorType(I32, isa.lanes)

    def number(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [value] * self.isa.lanes)

    def load(self, address: Any, kind: Any, align: int = 4) -> Any:
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Any, address: Any, align: int = 4) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = align

    def offset(self, address: Any, count: Any, step: int) -> Any:
        return self.b.add(address, self.b.mul(count, self.number(step)))

    def splat(self, scalar: Any) -> Any:
        """A vector with `scalar` in every lane."""
        kind = ir.VectorType(scalar.type, self.isa.lanes)
        undefined = ir.Constant(kind, ir.Undefined)
        one = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, undefined, ir.Constant(self.integers, [0] * self.isa.lanes))

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        # Without the instruction, `fma` would be a call into the C library for every lane.
        name = "fma" if self.isa.fused else "fmuladd"
        return self.call(f"llvm.{name}.v{self.isa.lanes}f32", self.vector, x, y, z)

    def larger(self, x: Any, y: Any) -> Any:
        """Lane-wise maximum; x where either is NaN."""
        return self.b.select(self.b.fcmp_ordered("<", x, y), y, x)

    def exp2(self, x: Any) -> Any:
        """2^x, with x clamped to the range of normal numbers; NaN stays NaN."""
        b = self.b
        x = self.larger(x, self.constant(_EXP2_LOWEST))
        highest = self.constant(_EXP2_HIGHEST)
        x = b.select(b.fcmp_ordered(">", x, highest), highest, x)
        return self._exp2_in_range(x)

    def exp2_negative(self, x: Any) -> Any:
        """2^x for x that are not positive, less work than `exp2`."""
        return self._exp2_in_range(self.larger(x, self.constant(_EXP2_LOWEST)))

    def _exp2_in_range(self, x: Any) -> Any:
        b = self.b
        if self.isa.name == "avx512":
            whole = self.call("llvm.nearbyint.v16f32", self.vector, x)
        else:
            shifted = b.fadd(x, self.constant(_ROUND))
            whole = b.fsub(shifted, self.constant(_ROUND))
        fraction = b.fsub(x, whole)
        p = self.constant(EXP2_P[0])
        for coefficient in EXP2_P[1:]:
            p = self.fma(p, fraction, self.constant(coefficient))
        if self.isa.name == "avx512":
            every = ir.Constant(ir.IntType(16), 0xFFFF)
            current_rounding = ir.Constant(I32, 4)
            name = "llvm.x86.avx512.mask.scalef.ps.512"
            return self.call(name, self.vector, p, whole, p, every, current_rounding)
        power = b.shl(b.bitcast(shifted, self.integers), ir.Constant(self.integers, [23] * self.isa.lanes))
        return b.bitcast(b.add(b.bitcast(p, self.integers), power), self.vector)

    def narrow(self, x: Any) -> Any:
        """float32 rounded to bf16, as the bits that memory holds."""
        kind = ir.VectorType(_BFloat(), self.isa.lanes)
        return self.b.bitcast(self.b.fptrunc(x, kind), ir.VectorType(ir.IntType(16), self.isa.lanes))

    def gelu(self, x: Any) -> Any:
        """x (1 + erf(x / √2)) / 2 as x / (1 + exp(-x P(x²))), the fit of `reference_numpy`."""
        b = self.b
        square = b.fmul(x, x)
        p = self.constant(-_GELU_P[0] * math.log2(math.e))
        for coefficient in _GELU_P[1:]:
            p = self.fma(p, square, self.constant(-coefficient * math.log2(math.e)))
        return b.fdiv(x, b.fadd(self.constant(1.0), self.exp2(b.fmul(p, x))))

    def loop(self, count: Any, values: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """`for i in range(count): values = body(i, values)`, at least once; -> the last values."""
        b = self.b
        before, block, after = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(block)
        b.position_at_end(block)
        index = b.phi(I64)
        index.add_incoming(self.number(0), before)
        current = [b.phi(value.type) for value in values]
        for phi, value in zip(current, values, strict=True):
            phi.add_incoming(value, before)
        new = body(index, current)
        following = b.add(index, self.number(1))
        index.add_incoming(following, b.block)
        for phi, value in zip(current, new, strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, count), block, after)
        b.position_at_end(after)
        return new

    def switch(self, value: Any, choices: list[int], body: Callable[[int], None]) -> None:
        """Run `body(choice)` for the choice that `value` is; the last one if it is none of them."""
        b = self.b
        end = b.append_basic_block("end")
        blocks = [b.append_basic_block(f"rows{choice}") for choice in choices]
        select = b.switch(value, blocks[-1])
        for choice, block in zip(choices[:-1], blocks[:-1], strict=True):
            select.add_case(self.number(choice), block)
        for choice, block in zip(choices, blocks, strict=True):
            b.position_at_end(block)
            body(choice)
            b.branch(end)
        b.position_at_end(end)


# -- how one step of k multiplies: 4 bytes of a row of A, in every lane, by one register of B -----------------------


def _multiply_fp32(e: Emitter, a: Any, b: Any, total: Any) -> Any:
    return e.fma(e.b.bitcast(a, e.vector), e.b.bitcast(b, e.vector), total)


def _multiply_bf16(e: Emitter, a: Any, b: Any, total: Any) -> Any:
    """Two neighbours in k at a time, summed in float32."""
    pairs = ir.VectorType(_BFloat(), 2 * e.isa.lanes)
    name = "llvm.aarch64.neon.bfdot.v4f32.v8bf16" if e.isa.name == "neon" else "llvm.x86.avx512bf16.dpbf16ps.512"
    return e.call(name, e.vector, total, e.b.bitcast(a, pairs), e.b.bitcast(b, pairs))


def _multiply_int8(e: Emitter, a: Any, b: Any, total: Any) -> Any:
    """Four neighbours in k at a time, summed in int32; A is unsigned on x86 and signed on ARM."""
    if e.isa.name == "neon":
        quads = ir.VectorType(ir.IntType(8), 4 * e.isa.lanes)
        return e.call(
            "llvm.aarch64.neon.sdot.v4i32.v16i8", e.integers, total, e.b.bitcast(a, quads), e.b.bitcast(b, quads)
        )
    # LLVM 21 changed the type of the operands.
    quads = ir.VectorType(ir.IntType(8), 64) if llvm.llvm_version_info[0] >= 21 else e.integers
    name = "llvm.x86.avx512.vpdpbusd.512"
    return e.call(name, e.integers, total, e.b.bitcast(a, quads), e.b.bitcast(b, quads))


_MULTIPLY = {"fp32": _multiply_fp32, "bf16": _multiply_bf16, "int8": _multiply_int8}


def _product(kind: str, vectors: int, heights: list[int], transposed: bool = False) -> Any:
    """Make the intrinsic `f(rows, a, a_step, b, k, c, c_step, add)`.

    `a` (rows, k) has its rows `a_step` bytes apart, k contiguous; transposed, k is `a_step` apart and rows contiguous.
    `b` (k, vectors · lanes) is contiguous, `c` has its rows `c_step` bytes apart. `k` counts steps of 4 bytes: one
    float32, two bf16, four int8. `rows` is one of `heights`. With `add` the product is added to C.
    """

    def emit(e: Emitter, rows: Any, a: Any, a_step: Any, b: Any, k: Any, c: Any, c_step: Any, add: Any) -> None:
        builder = e.b
        total = e.integers if kind == "int8" else e.vector
        zero = ir.Constant(total, None)
        add = builder.icmp_signed("!=", add, e.number(0))

        def tile(height: int) -> None:
            def step(i: Any, totals: list[Any]) -> list[Any]:
                here = e.offset(b, i, vectors * VECTOR_BYTES)
                right = [e.load(e.offset(here, e.number(j), VECTOR_BYTES), e.integers) for j in range(vectors)]
                new = []
                for row in range(height):
                    if transposed:
                        address = e.offset(builder.add(a, builder.mul(i, a_step)), e.number(row), 4)
                    else:
                        address = e.offset(builder.add(a, e.offset(e.number(0), a_step, row)), i, 4)
                    left = e.splat(e.load(address, I32))
                    for j in range(vectors):
                        new.append(_MULTIPLY[kind](e, left, right[j], totals[row * vectors + j]))
                return new

            totals = e.loop(k, [zero] * (height * vectors), step)
            addresses = [
                e.offset(e.offset(c, c_step, row), e.number(j), VECTOR_BYTES)
                for row in range(height)
                for j in range(vectors)
            ]
            with builder.if_else(add) as (yes, no):
                with yes:
                    for value, address in zip(totals, addresses, strict=True):
                        plus = builder.add if kind == "int8" else builder.fadd
                        e.store(plus(e.load(address, total), value), address)
                with no:
                    for value, address in zip(totals, addresses, strict=True):
                        e.store(value, address)

        e.switch(rows, heights, tile)

    @intrinsic
    def product(typingctx, rows, a, a_step, b, k, c, c_step, add):
        def codegen(context, builder, signature, arguments):
            name = f"numpyesm_product_{kind}_{vectors}_{len(heights)}_{'transposed' if transposed else 'plain'}"
            function = builder.module.globals.get(name)
            if function is None:
                function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [I64] * 8), name)
                # One copy however often it is called: inlined, it would be optimised anew at each place.
                function.attributes.add("noinline")
                function.linkage = "internal"
                inner = ir.IRBuilder(function.append_basic_block("entry"))
                emit(Emitter(inner), *function.args)
                inner.ret_void()
            builder.call(function, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return product


_ALL_HEIGHTS = list(range(1, TILE_ROWS + 1))
# Attention takes what is left over in powers of two: fewer kernels to compile, and its rows are many.
_SOME_HEIGHTS = sorted({1, 2, 4, *([8] if TILE_ROWS > 8 else []), TILE_ROWS})

multiply_fp32 = _product("fp32", ISA.vectors, _ALL_HEIGHTS)
multiply_bf16 = _product("bf16", ISA.vectors, _ALL_HEIGHTS)
multiply_int8 = _product("int8", ISA.vectors, _ALL_HEIGHTS)
multiply_wide = _product("fp32", ISA.vectors, _SOME_HEIGHTS)
multiply_narrow = _product("fp32", 1, _SOME_HEIGHTS)
multiply_wide_transposed = _product("fp32", ISA.vectors, _SOME_HEIGHTS, transposed=True)
multiply_narrow_transposed = _product("fp32", 1, _SOME_HEIGHTS, transposed=True)


# -- arithmetic on one vector at an address -------------------------------------------------------------------------


@intrinsic
def store_biased(typingctx, source, bias, out):
    """out = source + bias"""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        source, bias = (e.load(address, e.vector) for address in arguments[:2])
        e.store(builder.fadd(source, bias), arguments[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def store_gelu(typingctx, source, bias, out):
    """out = gelu(source + bias)"""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        source, bias = (e.load(address, e.vector) for address in arguments[:2])
        e.store(e.gelu(builder.fadd(source, bias)), arguments[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def add_biased(typingctx, source, bias, out):
    """out += source + bias"""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        source, bias, before = (e.load(address, e.vector) for address in arguments)
        e.store(builder.fadd(before, builder.fadd(source, bias)), arguments[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def store_scaled(typingctx, source, factor, out):
    """out = source · factor, lane by lane"""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        source, factor = (e.load(address, e.vector) for address in arguments[:2])
        e.store(builder.fmul(source, factor), arguments[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def store_gelu_bf16(typingctx, source, bias, out):
    """out = gelu(source + bias), rounded to bf16"""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        source, bias = (e.load(address, e.vector) for address in arguments[:2])
        e.store(e.narrow(e.gelu(builder.fadd(source, bias))), arguments[2], align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def store_bf16(typingctx, source, out):
    """out = source, rounded to bf16"""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        e.store(e.narrow(e.load(arguments[0], e.vector)), arguments[1], align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def store_number_bf16(typingctx, source, out):
    """One number of `store_bf16`."""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        vector = e.narrow(e.splat(e.load(arguments[0], FLOAT)))
        e.store(builder.extract_element(vector, ir.Constant(I32, 0)), arguments[1], align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def dequantise(typingctx, tile, column_sum, column_scale, scale, offset):
    """tile = column_scale (scale · tile + offset · column_sum) in place: int32 in, float32 out"""

    def codegen(context, builder, signature, arguments):
        tile, column_sum, column_scale, scale, offset = arguments
        e = Emitter(builder)
        product = builder.sitofp(e.load(tile, e.integers), e.vector)
        shift = builder.fmul(e.splat(offset), e.load(column_sum, e.vector))
        value = e.fma(e.splat(scale), product, shift)
        e.store(builder.fmul(value, e.load(column_scale, e.vector)), tile)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.float32), codegen


# -- softmax down the columns of a strip of scores (keys × queries): one lane is one query --------------------------


@intrinsic
def column_maximum(typingctx, scores, step, count, highest):
    """highest = max(highest, scores[0], …, scores[count - 1]), where rows are `step` bytes apart."""

    def codegen(context, builder, signature, arguments):
        scores, step, count, highest = arguments
        e = Emitter(builder)

        def body(i: Any, values: list[Any]) -> list[Any]:
            return [e.larger(values[0], e.load(builder.add(scores, builder.mul(i, step)), e.vector))]

        (result,) = e.loop(count, [e.load(highest, e.vector)], body)
        e.store(result, highest)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def exponentiate_columns(typingctx, scores, step, count, highest, total):
    """scores = 2^(scores - highest) in place; total += their sum."""

    def codegen(context, builder, signature, arguments):
        scores, step, count, highest, total = arguments
        e = Emitter(builder)
        shift = e.load(highest, e.vector)

        def body(i: Any, values: list[Any]) -> list[Any]:
            address = builder.add(scores, builder.mul(i, step))
            value = e.exp2_negative(builder.fsub(e.load(address, e.vector), shift))
            e.store(value, address)
            return [builder.fadd(values[0], value)]

        (result,) = e.loop(count, [e.constant(0.0)], body)
        e.store(builder.fadd(e.load(total, e.vector), result), total)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def exp2_difference(typingctx, x, y, out):
    """out = 2^(x - y) for x <= y"""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        x, y = (e.load(address, e.vector) for address in arguments[:2])
        e.store(e.exp2_negative(builder.fsub(x, y)), arguments[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


# -- single numbers at an address -----------------------------------------------------------------------------------


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
def copy_eight(typingctx, source, out):
    """Copy eight float32."""

    def codegen(context, builder, signature, arguments):
        e = Emitter(builder)
        e.store(e.load(arguments[0], ir.VectorType(FLOAT, 8)), arguments[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def transpose_eight(typingctx, source, source_step, out, out_step):
    """out[j, i] = source[i, j] for 8 × 8 float32; rows are `source_step` and `out_step` bytes apart."""

    def codegen(context, builder, signature, arguments):
        source, source_step, out, out_step = arguments
        e = Emitter(builder)
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
                    builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, 8), mask))
                    for mask in (low, high)
                )
        for j in range(8):
            e.store(rows[j], e.offset(out, out_step, j))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
