"""Vector loops along one row: sums, normalising, and what a row of attention adds to maps.

`count` is a number of whole vectors; what is left of a row, none in the published models, is `steps.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from .emitter import FLOAT, I32, VECTOR_BYTES, Emitter, intrinsic, on_addresses
from .vectors import FLOATS, PIECE


def _across(e: Emitter, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """One number from all lanes, by halves."""
    lanes = e.isa.lanes
    undefined = ir.Constant(vector.type, ir.Undefined)
    width = lanes // 2
    while width:
        mask = ir.Constant(e.integers, [(lane + width) % lanes for lane in range(lanes)])
        vector = combine(vector, e.b.shuffle_vector(vector, undefined, mask))
        width //= 2
    return e.b.extract_element(vector, ir.Constant(I32, 0))


def _halves(
    e: Emitter, count: Any, start: Any, step: Callable[[Any, Any], Any], combine: Callable[[Any, Any], Any]
) -> Any:
    """Fold `step(i, value)` over all vectors with two values in flight, and `combine` them."""
    b = e.b
    half = b.lshr(count, e.number(1))

    def two(i: Any, values: list[Any]) -> list[Any]:
        return [step(i, values[0]), step(b.add(i, half), values[1])]

    first, second = e.fold(half, [start, start], two)
    odd = b.and_(count, e.number(1))
    (last,) = e.fold(odd, [first], lambda i, values: [step(b.sub(count, e.number(1)), values[0])])
    return combine(last, second)


@intrinsic(types.float32, types.int64, types.int64)
def row_sum(e: Emitter, x: Any, count: Any) -> Any:
    """Sum of the vectors at x."""

    def step(i: Any, value: Any) -> Any:
        return e.b.fadd(value, e.load(e.offset(x, i, VECTOR_BYTES), e.vector))

    return _across(e, _halves(e, count, e.constant(0.0), step, e.b.fadd), e.b.fadd)


@intrinsic(types.float32, types.int64, types.int64, types.float32)
def row_squares(e: Emitter, x: Any, count: Any, mean: Any) -> Any:
    """Sum of squared differences from the mean."""
    middle = e.splat(mean)

    def step(i: Any, value: Any) -> Any:
        difference = e.b.fsub(e.load(e.offset(x, i, VECTOR_BYTES), e.vector), middle)
        return e.fma(difference, difference, value)

    return _across(e, _halves(e, count, e.constant(0.0), step, e.b.fadd), e.b.fadd)


@on_addresses(4)
def minus_mean(e: Emitter, x: Any, step: Any, count: Any, out: Any) -> None:
    """out = minus the mean of PIECE numbers over `count` rows, which are `step` bytes apart."""

    def less(i: Any, value: Any) -> Any:
        return e.b.fsub(value, e.load(e.b.add(x, e.b.mul(i, step)), FLOATS))

    total = _halves(e, count, ir.Constant(FLOATS, [0.0] * PIECE), less, e.b.fadd)
    e.store(e.b.fdiv(total, e.splat(e.b.sitofp(count, FLOAT), PIECE)), out)


def _normalise(narrow: bool, split: bool = False) -> Any:
    """Make `f(x, count, mean, scale, gain, shift, out)`: (x - mean) · scale · gain + shift, in bf16 if `narrow`.

    With `split`, an eighth argument says how many bytes on what rounding takes off goes.
    """
    addresses = [types.int64] * (4 if split else 3)

    @intrinsic(types.void, types.int64, types.int64, types.float32, types.float32, *addresses)
    def normalise(
        e: Emitter, x: Any, count: Any, mean: Any, scale: Any, gain: Any, shift: Any, out: Any, *low: Any
    ) -> None:
        middle, factor = e.splat(mean), e.splat(scale)

        def body(i: Any, _: list[Any]) -> list[Any]:
            value = e.b.fmul(e.b.fsub(e.load(e.offset(x, i, VECTOR_BYTES), e.vector), middle), factor)
            value = e.fma(
                value,
                e.load(e.offset(gain, i, VECTOR_BYTES), e.vector),
                e.load(e.offset(shift, i, VECTOR_BYTES), e.vector),
            )
            at = e.offset(out, i, VECTOR_BYTES // 2)
            if split:
                e.store_split(value, at, e.b.add(at, low[0]))
            elif narrow:
                e.store(e.narrow(value), at, align=2)
            else:
                e.store(value, e.offset(out, i, VECTOR_BYTES))
            return []

        e.fold(count, [], body)

    return normalise


row_normalise, row_normalise_bf16, row_normalise_split = _normalise(False), _normalise(True), _normalise(True, True)


# -- maps: eight numbers at a time on every CPU, so that sums are added up in the same order everywhere ----------------

_EIGHT_NUMBERS, _EIGHT_SUMS = ir.VectorType(FLOAT, 8), ir.VectorType(ir.DoubleType(), 8)


def _attention(e: Emitter, row: Any, factors: Any, i: Any) -> Any:
    """Eight exponentials times the factors of their queries, in float64."""
    numbers = e.b.fpext(e.load(e.offset(row, i, 32), _EIGHT_NUMBERS), _EIGHT_SUMS)
    return e.b.fmul(numbers, e.load(e.offset(factors, i, 64), _EIGHT_SUMS, align=8))


def _sum_of_eight(e: Emitter, vector: Any) -> Any:
    numbers = [e.b.extract_element(vector, ir.Constant(I32, i)) for i in range(8)]
    while len(numbers) > 1:
        half = len(numbers) // 2
        numbers = [e.b.fadd(a, b) for a, b in zip(numbers[:half], numbers[half:], strict=True)]
    return numbers[0]


@intrinsic(types.float64, types.int64, types.int64, types.int64)
def weighted_sum(e: Emitter, row: Any, factors: Any, eights: Any) -> Any:
    """Sum of 8 · `eights` numbers, float32, times float64 factors."""

    def body(i: Any, values: list[Any]) -> list[Any]:
        return [e.b.fadd(values[0], _attention(e, row, factors, i))]

    return _sum_of_eight(e, e.fold(eights, [ir.Constant(_EIGHT_SUMS, [0.0] * 8)], body)[0])


@intrinsic(types.float64, *[types.int64] * 3, types.float64, *[types.int64] * 2)
def contact_row(e: Emitter, row: Any, factors: Any, eights: Any, coefficient: Any, sums: Any, target: Any) -> Any:
    """sums += attention and target += coefficient · attention, of 8 · `eights` queries; the sum of their attention."""
    weight = ir.Constant(_EIGHT_SUMS, ir.Undefined)
    for i in range(8):
        weight = e.b.insert_element(weight, coefficient, ir.Constant(I32, i))

    def add(value: Any, address: Any, i: Any) -> None:
        at = e.offset(address, i, 64)
        e.store(e.b.fadd(e.load(at, _EIGHT_SUMS, align=8), value), at, align=8)

    def body(i: Any, values: list[Any]) -> list[Any]:
        attention = _attention(e, row, factors, i)
        add(attention, sums, i)
        add(e.b.fmul(attention, weight), target, i)
        return [e.b.fadd(values[0], attention)]

    return _sum_of_eight(e, e.fold(eights, [ir.Constant(_EIGHT_SUMS, [0.0] * 8)], body)[0])
