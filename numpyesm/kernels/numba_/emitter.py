"""The one place that writes LLVM IR: register-tiled products and the vector arithmetic around them.

What it makes are Numba intrinsics that take addresses as integers: products here, arithmetic on a vector in
`vectors.py`; `gemm.py` and `attention.py` build on them.
The IR names vector widths and, for bf16, instructions; which ones comes from `isa.target_isa()`.

A product intrinsic computes one tile, C (rows × columns) = A (rows × k) · B (k × columns), with all of C in registers.
Every element of C is one chain of multiply-adds in ascending k, whatever the height of the tile: a row's result does
not depend on which rows share its tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from inspect import Parameter, Signature
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from ..compiled.isa import target_isa
from ..constants import GELU_POLYNOMIAL

ISA = target_isa()
LANES = ISA.lanes
VECTOR_BYTES = 4 * LANES
TILE_ROWS = ISA.rows
TILE_COLUMNS = ISA.columns
TILE_BYTES = 4 * TILE_COLUMNS
STRIP_ROWS, STRIP_COLUMNS = ISA.strip_rows, ISA.strip_columns

I32, I64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()

# 2^f on [-1/2, 1/2], highest power first: least squares reweighted to an even relative error of 2e-9, and of 7e-5 for
# what is rounded to 8 bits afterwards.
_EXP2_P = (
    0.00015353361885996788,
    0.0013398874422857476,
    0.009618437357837392,
    0.05550332471098659,
    0.24022647913626272,
    0.693147202855082,
    1.0,
)
_EXP2_COARSE_P = (0.055171694643288575, 0.242611373151015, 0.6932610019297842, 0.9999280588191541)
# The seven digits after the first one of 2^(i / 128) in bf16.
_EXP2_DIGITS = tuple(round(128 * (2 ** (i / 128) - 1)) for i in range(128))
# (Φ(x) - 1/2) / x as a polynomial in x², highest power first, up to the x at which it makes Φ one: a minimax fit of
# gelu, error 9e-5 (tools/fit_gelu.py).
_GELU_COARSE_P = (
    -8.460386311905595e-10,
    7.570816615925739e-08,
    -2.9387978276191586e-06,
    6.552702545558053e-05,
    -0.0009404470669908183,
    0.009257821111117242,
    -0.06545349616629448,
    0.39842004132978337,
)
_GELU_COARSE_LARGEST = 4.25
# Adding 1.5 · 2^23 rounds a float32 to a whole number and leaves that number in its low bits.
_ROUND = 12582912.0
# Pointers have no type since LLVM 15.
_PREFETCH = "llvm.prefetch.p0" if llvm.llvm_version_info[0] >= 15 else "llvm.prefetch.p0i8"
_EXP2_LOWEST, _EXP2_HIGHEST = -125.0, 126.0
# What `vreduceps` takes off: the largest whole number below, without a report that it was not exact.
_FLOOR = 9
# Two ones in bf16.
_ONES = 0x3F803F80
# Turns of a product's loop at a time: some fifty multiplications. Half as many are 2 to 3 % slower, twice 5 to 10 %.
_UNROLLED = 48 // (TILE_ROWS * ISA.vectors)


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

    def __init__(self, builder: Any) -> None:
        self.b, self.isa = builder, ISA
        self.vector = ir.VectorType(FLOAT, ISA.lanes)
        self.integers = ir.VectorType(I32, ISA.lanes)

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

    def fetch(self, address: Any) -> None:
        """Bring a line of memory into the L2 cache; any address will do."""
        pointer = self.b.inttoptr(address, ir.IntType(8).as_pointer())
        read, second_cache, data = ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)
        self.call(_PREFETCH, ir.VoidType(), pointer, read, second_cache, data)

    def offset(self, address: Any, count: Any, step: int) -> Any:
        return self.b.add(address, self.b.mul(count, self.number(step)))

    def at(self, address: Any, number: int) -> Any:
        """Where vector `number` of those from `address` on lies."""
        return self.offset(address, self.number(number), VECTOR_BYTES)

    def whole(self, value: int) -> Any:
        """This integer in every lane."""
        return ir.Constant(self.integers, [value] * self.isa.lanes)

    def splat(self, scalar: Any, lanes: int = LANES) -> Any:
        """A vector with `scalar` in every lane."""
        undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
        one = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        if not self.isa.fused:  # it would be a call into the C library for every lane
            return self.b.fadd(self.b.fmul(x, y), z)
        return self.call(f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)

    def larger(self, x: Any, y: Any) -> Any:
        """Lane-wise maximum; x where either is NaN."""
        return self.b.select(self.b.fcmp_ordered("<", x, y), y, x)

    def smaller(self, x: Any, y: Any) -> Any:
        """Lane-wise minimum; x where either is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), y, x)

    def exp2(self, x: Any, coarse: bool = False, raised: float = 0.0) -> Any:
        """2^x; NaN stays NaN. Without AVX-512, exponents are limited to those of normal numbers.

        `raised` is added to what is then multiplied by a power of two: to a number from 1 to 2 on AVX-512, else from
        1/√2 to √2.
        """
        b = self.b
        coefficients = np.poly1d(_EXP2_COARSE_P if coarse else _EXP2_P)
        scales = self.isa.lanes == 16  # instructions that take off the whole part, and know overflow and underflow
        if scales:
            fraction = self._avx512("reduce", x, ir.Constant(I32, _FLOOR))
            coefficients = math.sqrt(2) * coefficients(np.poly1d([1, -0.5]))
        else:
            x = self.smaller(self.larger(x, self.constant(_EXP2_LOWEST)), self.constant(_EXP2_HIGHEST))
            shifted = b.fadd(x, self.constant(_ROUND))
            fraction = b.fsub(x, b.fsub(shifted, self.constant(_ROUND)))
        p = self._polynomial((coefficients + raised).coef, fraction)
        if scales:
            return self._avx512("scalef", p, x)
        power = b.shl(b.bitcast(shifted, self.integers), self.whole(23))
        return b.bitcast(b.add(b.bitcast(p, self.integers), power), self.vector)

    def _avx512(self, name: str, x: Any, *arguments: Any) -> Any:
        """An instruction for one register of float32, in every lane, rounded as is set."""
        every, rounding = ir.Constant(ir.IntType(16), 0xFFFF), ir.Constant(I32, 4)
        return self.call(f"llvm.x86.avx512.mask.{name}.ps.512", self.vector, x, *arguments, x, every, rounding)

    def exp2_pair(self, low: Any, high: Any) -> Any:
        """2^low and 2^high in bf16, lane by lane side by side; `high` may be None.

        Rounded halves up, with polynomials to 4 digits. On CPUs with AMX, which have no time for more, exponents are
        first rounded to 1/128, which costs as much again as rounding to bf16, and kept between -126 and 126, NaN too.
        """
        b = self.b
        if self.isa.tiles:
            return self._exp2_pair_of_table(low, high)

        def bits(x: Any) -> Any:
            if self.isa.lanes == 16:  # half of the last digit in bf16 of a number from 1 to 2
                return b.bitcast(self.exp2(x, coarse=True, raised=2.0**-8), self.integers)
            return b.add(b.bitcast(self.exp2(x, coarse=True), self.integers), self.whole(0x8000))

        pair = b.lshr(bits(low), self.whole(16))
        return pair if high is None else b.or_(pair, b.and_(bits(high), self.whole(0xFFFF0000)))

    def _exp2_pair_of_table(self, low: Any, high: Any) -> Any:
        b, bytes_ = self.b, ir.VectorType(ir.IntType(8), 64)

        def bits(x: Any) -> Any:
            """127 + x in steps of 1/128, in the low half: all digits of 2^x in bf16, but its last seven as of x."""
            return b.bitcast(b.fadd(self._within(x, 126.0), self.constant(1.5 * 2.0**16 + 127)), self.integers)

        pair = bits(low)
        if high is not None:
            pair = self._merge(0xFFFF, pair, b.shl(bits(high), self.whole(16)))
        first, second = (ir.Constant(bytes_, list(_EXP2_DIGITS[start : start + 64])) for start in (0, 64))
        digits = self.call("llvm.x86.avx512.vpermi2var.qi.512", bytes_, first, b.bitcast(pair, bytes_), second)
        pair = self._merge(0x007F007F, b.bitcast(digits, self.integers), pair)
        return pair if high is not None else b.and_(pair, self.whole(0xFFFF))

    def _merge(self, mask: int, x: Any, y: Any) -> Any:
        """The bits of x where the mask has ones, else those of y."""
        choice = ir.Constant(I32, 0xCA)
        return self.call("llvm.x86.avx512.pternlog.d.512", self.integers, self.whole(mask), x, y, choice)

    def pair_sum(self, pair: Any, total: Any) -> Any:
        """`total` plus the two numbers of each lane of a pair."""
        return _multiply_bf16(self, pair, self.whole(_ONES), total)

    def widen_pair(self, pair: Any) -> tuple[Any, Any]:
        """The two numbers of each lane of a pair as float32."""
        low, high = self.b.shl(pair, self.whole(16)), self.b.and_(pair, self.whole(0xFFFF0000))
        return self.b.bitcast(low, self.vector), self.b.bitcast(high, self.vector)

    def narrow(self, x: Any) -> Any:
        """float32 rounded to bf16, as the bits that memory holds."""
        if not self.isa.bf16 or self.isa.spelled_out:  # it would be a call into a library for every lane
            bits = self.b.add(self.b.bitcast(x, self.integers), self.whole(0x8000))
            return self.b.trunc(self.b.lshr(bits, self.whole(16)), ir.VectorType(ir.IntType(16), self.isa.lanes))
        kind = ir.VectorType(_BFloat(), self.isa.lanes)
        return self.b.bitcast(self.b.fptrunc(x, kind), ir.VectorType(ir.IntType(16), self.isa.lanes))

    def widen(self, bits: Any) -> Any:
        """bf16, as the bits that memory holds, as float32."""
        integers = ir.VectorType(I32, bits.type.count)
        wide = self.b.shl(self.b.zext(bits, integers), ir.Constant(integers, [16] * bits.type.count))
        return self.b.bitcast(wide, ir.VectorType(FLOAT, bits.type.count))

    def split(self, x: Any) -> tuple[Any, Any]:
        """float32 as the sum of two numbers in bf16, good to 16 bits."""
        high = self.narrow(x)
        return high, self.narrow(self.b.fsub(x, self.widen(high)))

    def store_split(self, x: Any, out: Any, low: Any) -> None:
        """The two numbers of `split` at two addresses."""
        for part, address in zip(self.split(x), (out, low), strict=True):
            self.store(part, address, align=2)

    def gelu(self, x: Any) -> Any:
        """x (1 + erf(x / √2)) / 2 as x / (1 + exp(-x P(x²))), the fit of `constants.py`."""
        b = self.b
        p = self._polynomial([-c * math.log2(math.e) for c in GELU_POLYNOMIAL], b.fmul(x, x))
        return b.fdiv(x, b.fadd(self.constant(1.0), self.exp2(b.fmul(p, x))))

    def coarse_gelu(self, x: Any) -> Any:
        """The same as x (1/2 + x P(x²)), to 4 digits."""
        b = self.b
        limited = self._within(x, _GELU_COARSE_LARGEST)
        p = self._polynomial(_GELU_COARSE_P, b.fmul(limited, limited))
        return b.fmul(x, self.fma(p, limited, self.constant(0.5)))

    def _polynomial(self, coefficients: Iterable[float], x: Any) -> Any:
        """A polynomial, highest power first."""
        first, *others = coefficients
        p = self.constant(first)
        for coefficient in others:
            p = self.fma(p, x, self.constant(coefficient))
        return p

    def _within(self, x: Any, largest: float) -> Any:
        """x between -largest and largest; what becomes of NaN is open."""
        if self.isa.lanes == 16:
            magnitude = ir.Constant(I32, 2)  # the smaller one, with the sign of x
            return self._avx512("range", x, self.constant(largest), magnitude)
        return self.smaller(self.larger(x, self.constant(-largest)), self.constant(largest))

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

    def fold(self, count: Any, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """`loop`, or `start` if `count` is not above zero."""
        b = self.b
        before = b.block
        with b.if_then(b.icmp_signed(">", count, self.number(0))):
            values = self.loop(count, start, body)
            inside = b.block
        merged = []
        for first, value in zip(start, values, strict=True):
            phi = b.phi(first.type)
            phi.add_incoming(first, before)
            phi.add_incoming(value, inside)
            merged.append(phi)
        return merged

    def unrolled(self, count: Any, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """`fold`, some turns at a time: counting them takes issue slots that a CPU's two threads compete for."""
        b = self.b
        whole = b.sdiv(count, self.number(_UNROLLED))
        done = b.mul(whole, self.number(_UNROLLED))

        def several(i: Any, values: list[Any]) -> list[Any]:
            first = b.mul(i, self.number(_UNROLLED))
            for turn in range(_UNROLLED):
                values = body(b.add(first, self.number(turn)), values)
            return values

        values = self.fold(whole, start, several)
        return self.fold(b.sub(count, done), values, lambda i, values: body(b.add(done, i), values))

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
    if e.isa.spelled_out:
        low, high = zip(e.widen_pair(a), e.widen_pair(b), strict=True)
        return e.fma(*high, e.fma(*low, total))
    pairs = ir.VectorType(_BFloat(), 2 * e.isa.lanes)
    name = "llvm.aarch64.neon.bfdot.v4f32.v8bf16" if e.isa.lanes == 4 else "llvm.x86.avx512bf16.dpbf16ps.512"
    return e.call(name, e.vector, total, e.b.bitcast(a, pairs), e.b.bitcast(b, pairs))


_MULTIPLY = {"fp32": _multiply_fp32, "bf16": _multiply_bf16}


def intrinsic(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a Numba intrinsic of `emit(emitter, *values)`, which writes IR and returns the result's value, if any."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            value = emit(Emitter(builder), *values)
            return context.get_dummy_value() if value is None else value

        def typed(*_: Any) -> Any:
            return result(*kinds), codegen

        # Numba asks the function for its parameters.
        names = ["typingctx", *(f"value{i}" for i in range(len(kinds)))]
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        vars(typed)["__signature__"] = Signature(parameters)
        return _intrinsic(typed)

    return decorate


def on_addresses(count: int) -> Callable[[Callable[..., Any]], Any]:
    """`intrinsic` without a result, of integers."""
    return intrinsic(types.void, *[types.int64] * count)


def function(name: str, count: int) -> Callable[[Callable[..., None]], Any]:
    """Make an intrinsic that calls what `emit(emitter, *integers)` writes.

    One copy in a module however often it is called: inlined, it would be optimised anew at each place.
    """

    def decorate(emit: Callable[..., None]) -> Any:
        @on_addresses(count)
        def call(e: Emitter, *arguments: Any) -> None:
            made = e.b.module.globals.get(name)
            if made is None:
                made = ir.Function(e.b.module, ir.FunctionType(ir.VoidType(), [I64] * count), name)
                made.attributes.add("noinline")
                made.linkage = "internal"
                inner = ir.IRBuilder(made.append_basic_block("entry"))
                emit(Emitter(inner), *made.args)
                inner.ret_void()
            e.b.call(made, arguments)

        return call

    return decorate


def _multiplied(e: Emitter, kind: str, transposed: bool, height: int, vectors: int, *arguments: Any) -> list[Any]:
    """One tile, A · B, of so many registers in each row: -> the registers, row by row.

    `arguments` are a, a_step, b, k. `a` (height, k) has its rows `a_step` bytes apart, k contiguous; transposed, k is
    `a_step` apart and rows contiguous. `b` (k, columns) is contiguous. `k` counts steps of 4 bytes: one float32, two
    bf16. Two more arguments, `ahead, ahead_step`: each step along k also brings a line from `ahead` on, `ahead_step`
    bytes further each time, into the L2 cache.
    """
    a, a_step, b, k, *ahead = arguments
    zeros = [ir.Constant(e.vector, None)] * (height * vectors)

    def step(i: Any, totals: list[Any]) -> list[Any]:
        if ahead:
            e.fetch(e.b.add(ahead[0], e.b.mul(i, ahead[1])))
        here = e.offset(b, i, vectors * VECTOR_BYTES)
        right = [e.load(e.at(here, j), e.integers) for j in range(vectors)]
        new = []
        for row in range(height):
            if transposed:
                address = e.offset(e.b.add(a, e.b.mul(i, a_step)), e.number(row), 4)
            else:
                address = e.offset(e.b.add(a, e.offset(e.number(0), a_step, row)), i, 4)
            left = e.splat(e.load(address, I32))
            for j in range(vectors):
                new.append(_MULTIPLY[kind](e, left, right[j], totals[row * vectors + j]))
        return new

    return e.unrolled(k, zeros, step)


def _store_tile(e: Emitter, height: int, totals: list[Any], c: Any, c_step: Any, add: Any) -> None:
    """Put a tile at C, whose rows are `c_step` bytes apart, or add it to what is there if `add` is not 0."""
    vectors = len(totals) // height
    addresses = [e.at(e.offset(c, c_step, row), j) for row in range(height) for j in range(vectors)]
    with e.b.if_else(e.b.icmp_signed("!=", add, e.number(0))) as (yes, no):
        with yes:
            for value, address in zip(totals, addresses, strict=True):
                e.store(e.b.fadd(e.load(address, e.vector), value), address)
        with no:
            for value, address in zip(totals, addresses, strict=True):
                e.store(value, address)


def _linear_product(kind: str) -> Any:
    """Make the intrinsic `f(rows, a, a_step, b, k, c, c_step, add, ahead, ahead_step)` for up to TILE_ROWS rows."""

    @function(f"numpyesm_product_{kind}", 10)
    def multiply(
        e: Emitter, rows: Any, a: Any, a_step: Any, b: Any, k: Any, c: Any, c_step: Any, add: Any, *ahead: Any
    ) -> None:
        def tile(height: int) -> None:
            totals = _multiplied(e, kind, False, height, e.isa.vectors, a, a_step, b, k, *ahead)
            _store_tile(e, height, totals, c, c_step, add)

        e.switch(rows, list(range(1, TILE_ROWS + 1)), tile)

    return multiply


def _scores(
    e: Emitter, kind: str, height: int, vectors: int, keys: Any, step: Any, queries: Any, k: Any, out: Any
) -> None:
    """A tile of keys · queries."""
    totals = _multiplied(e, kind, False, height, vectors, keys, step, queries, k)
    _store_tile(e, height, totals, out, e.number(vectors * VECTOR_BYTES), e.number(0))


def _context(
    e: Emitter, kind: str, height: int, vectors: int, values: Any, step: Any, scores: Any, k: Any, out: Any, add: Any
) -> None:
    """A tile of values transposed · scores, added to what is there if `add` is not 0."""
    totals = _multiplied(e, kind, True, height, vectors, values, step, scores, k)
    _store_tile(e, height, totals, out, e.number(vectors * VECTOR_BYTES), add)


def _attention_product(kind: str, count: int, tile: Callable[..., None]) -> Any:
    """Make the intrinsic `f(rows, lanes, a, a_step, b, k, out, …)` of a tile that is given all but the first two.

    Tiles of attention have one register or a full tile of query columns. Rows that are left over are taken in powers
    of two: fewer kernels to compile, and attention's rows are many.
    """
    heights = sorted({1, 2, 4, *([8] if STRIP_ROWS > 8 else []), STRIP_ROWS})

    @function(f"numpyesm{tile.__name__}_{kind}", count)
    def multiply(e: Emitter, rows: Any, lanes: Any, *arguments: Any) -> None:
        def columns(lanes: int) -> None:
            e.switch(rows, heights, lambda height: tile(e, kind, height, lanes // LANES, *arguments))

        e.switch(lanes, [LANES, STRIP_COLUMNS], columns)

    return multiply


multiply_fp32, multiply_bf16 = _linear_product("fp32"), _linear_product("bf16")
scores_fp32, scores_bf16 = (_attention_product(kind, 7, _scores) for kind in ("fp32", "bf16"))
context_fp32, context_bf16 = (_attention_product(kind, 8, _context) for kind in ("fp32", "bf16"))
