"""Compiled steps against NumPy in float64: every row count around the tiles' heights, heads as the four presets have.

The file runs once for the host's best instruction set, and in other processes for the lower ones that it has.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import numba

from numpyesm.config import ModelConfig
from numpyesm.kernels.base import AttentionMaps
from numpyesm.kernels.compiled.code import needed
from numpyesm.kernels.compiled.forward import CompiledKernels, cut_blocks, map_table
from numpyesm.kernels.compiled.isa import host_isa, host_levels
from numpyesm.kernels.compiled.layout import Matrix, Room, address
from numpyesm.kernels.compiled.library import library_code
from numpyesm.kernels.compiled.panels import aligned, pack_panels, padded_columns
from numpyesm.kernels.numba_ import gemm
from numpyesm.kernels.numba_.code import numba_code
from numpyesm.kernels.numba_.emitter import TILE_BYTES
from numpyesm.kernels.numpy_forward import NumpyKernels
from numpyesm.threads import WorkerPool
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import StoredTensor

pytestmark = pytest.mark.slow  # Numba compiles some steps by themselves

ISA = host_isa()

# One layer with heads of 16, 24, 32 and 64 channels, as the presets have them, and a shape that fills no tile.
SHAPES = {
    "esm2-8m": ModelConfig(1, 320, 20, 1280),
    "esm2-35m": ModelConfig(1, 480, 20, 1920),
    "32 channels": ModelConfig(1, 160, 5, 640),
    "64 channels": ModelConfig(1, 192, 3, 768),
    "odd": ModelConfig(1, 30, 3, 50),
}


@numba.njit
def _linear(x, rows, inner, matrix, columns, step, out, room):  # type: ignore[no-untyped-def]
    lines = x, 4 * inner, rows, 0, 0
    gemm.linear(False, step, lines, matrix, inner, 0, inner, 0, columns, out, 4 * columns, 0, room)


def linear(x: Any, weight: Any, bias: Any, step: int, out: Any) -> Any:
    tile, packed, padded = aligned(ISA.rows * ISA.columns), pack_panels(ISA, weight), padded_columns(ISA, bias)
    matrix, room = np.zeros(len(Matrix), np.int64), np.zeros(Room.ENTRIES, np.int64)
    matrix[[Matrix.WEIGHT, Matrix.BIAS, Matrix.STEP_BYTES]] = address(packed), address(padded), TILE_BYTES
    room[Room.TILE] = address(tile)
    _linear(address(x), *x.shape, address(matrix), weight.shape[1], step, address(out), address(room))
    return out


class Steps:
    """Compiled steps of a model of one layer, on arrays."""

    in_short: Any = False  # which rows are taken for those of short sequences

    def __init__(self, checkpoint: Any, precision: str = "fp32") -> None:
        # Both are the same code bit for bit, see test_kernel_library.py.
        self.code = library_code() or numba_code(precision)
        self.kernels = CompiledKernels(checkpoint, precision, self.code, WorkerPool(1))
        self.packed = self.kernels.packed
        self.config, self.dtype = self.kernels.config, np.dtype(np.float32)
        self.project_qkv, self.attend, self.rest, *_ = needed(self.code.isa, precision)

    def tables(self, rows: int, length: int, with_maps: bool = False) -> tuple[Any, Any]:
        model, self.rotary = self.packed.model_table(length)
        return model, self.packed.room(rows, length, with_maps)

    def short(self, rows: int) -> Any:
        """How many rows before each one are of short sequences."""
        return np.concatenate([[0], np.cumsum(np.broadcast_to(self.in_short, rows))])

    def project(self, x: Any, start: int = 0) -> Any:
        """Query, key and value (3, H, rows, padded C) as they lie in memory."""
        rows, packed = len(x), self.packed
        out = aligned(3 * rows * self.config.num_heads * packed.head_dim)
        model, room = self.tables(rows, start + rows)
        positions = np.arange(start, start + rows)
        tables, short = (address(table) for table in (model, packed.layers, room)), self.short(rows)
        at = address(positions), address(short), rows, address(out)
        self.code.call(self.project_qkv, *tables, address(x), rows, *at)
        return out.reshape(3, self.config.num_heads, rows, packed.head_dim)

    def plain(self, qkv: Any) -> Any:
        """The same as (rows, 3D) numbers, queries without the factor that makes scores exponents of two."""
        found = qkv[..., : self.config.head_dim].transpose(2, 0, 1, 3).astype(np.float64)
        found[:, 0] /= math.log2(math.e)
        return found.reshape(len(found), -1)

    def attention(self, qkv: Any, start: int, stop: int, maps: Any = None, context: bool = True) -> Any:
        """Context (stop - start, D) of some rows; the maps are filled in."""
        packed, length = self.packed, qkv.shape[2]
        model, room = self.tables(stop - start, length, maps is not None)
        out = np.full((stop - start, self.config.num_heads, packed.head_dim), 7, np.float32)
        table, summaries, kept = map_table([maps], [length], self.config.num_heads, not context) if maps else (0, [], 0)
        at = address(qkv)
        row = packed.head_dim * qkv.itemsize
        tables = address(model), address(room)
        maps_at = address(table) if maps else 0
        query = at + start * row
        self.code.call(self.attend, *tables, query, stop - start, at, length, length, address(out), maps_at)
        if maps:
            maps.summary[...] = summaries[0]
            del kept
        if not context:
            assert (out == 7).all()
        return out[..., : self.config.head_dim].reshape(stop - start, -1)

    def project_and_feed_forward(self, context: Any, x: Any) -> None:
        """In place on x (rows, D)."""
        packed, config = self.packed, self.config
        padded = np.zeros((len(x), config.num_heads, packed.head_dim), np.float32)
        padded[..., : config.head_dim] = context.reshape(len(x), config.num_heads, -1)
        model, room = self.tables(len(x), 1)
        arrays, short = (model, packed.layers, room, padded, x), self.short(len(x))
        self.code.call(self.rest, *map(address, arrays), len(x), address(short))


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


Backends = Callable[..., tuple[Steps, NumpyKernels]]


@pytest.fixture(scope="module")
def backends() -> Backends:
    """Compiled steps of a shape in a precision, and what they are judged by."""

    @functools.cache
    def make(shape: str = "esm2-35m", precision: str = "fp32") -> tuple[Steps, NumpyKernels]:
        checkpoint = random_checkpoint(SHAPES[shape], seed=3)
        return Steps(checkpoint, precision), NumpyKernels(checkpoint, "fp64")

    return make


def project(kernels: NumpyKernels, x: Any, start: int = 0) -> Any:
    out = kernels.new_qkv(len(x))
    kernels.qkv(0, x.astype(kernels.dtype), [kernels.rotary_tables(start + len(x))[start:]], out)
    return out


def test_linear_takes_any_number_of_rows() -> None:
    # The last takes more than one chain of sums, longer than the others'.
    shapes = ((24, 96, 2e-5), (101, 20, 2e-5), (501, 20, 1e-4))
    for rows, (inner, columns, within) in itertools.product(range(1, 41), shapes):
        x, weight, bias = normal(rows, inner), normal(inner, columns), normal(columns)
        exact = x.astype(np.float64) @ weight + bias
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=within)
        # A frame around the rows shows stores that go astray.
        frame = np.full((rows + 2, columns), 7, np.float32)
        linear(x, weight, bias, gemm.STORE, frame[1:-1])
        close(frame[1:-1], exact)
        assert (frame[[0, -1]] == 7).all()
        before = normal(rows, columns, seed=1)
        close(linear(x, weight, bias, gemm.ADD, before.copy()), before + exact)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight, bias = normal(40, 96), normal(96, 70), normal(70)
    together = linear(x, weight, bias, gemm.GELU, np.empty((40, 70), np.float32))
    for first, last in ((0, 1), (3, 9), (5, 18), (17, 40)):
        part = linear(x[first:last], weight, bias, gemm.GELU, np.empty((last - first, 70), np.float32))
        np.testing.assert_array_equal(part, together[first:last])


def test_gelu_is_the_exact_form() -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), [0, -0.0, 1e-30, -1e-30, 60, -60, 1e6, -1e6, np.inf]])
    rows = x.astype(np.float32)[:, None]
    one = np.ones((1, 1), np.float32)
    found = linear(rows, one, np.zeros(1, np.float32), gemm.GELU, np.empty_like(rows))[:, 0]
    exact = np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) if v > -40 else 0.0 for v in rows[:, 0].astype(float)])
    np.testing.assert_allclose(found, exact, rtol=1.2e-7, atol=1.5e-7)
    assert np.isnan(linear(one * np.nan, one, np.zeros(1, np.float32), gemm.GELU, np.empty_like(one))).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_steps(backends: Backends, shape: str) -> None:
    ours, reference = backends(shape)
    width = ours.config.embed_dim
    for rows in (1, 13, 101, 300):
        context, x = normal(rows, width), normal(rows, width, seed=1)
        found = ours.plain(ours.project(x, start=5))
        np.testing.assert_allclose(found, project(reference, x, start=5), rtol=0, atol=5e-6)
        logits = reference.lm_head(x.astype(np.float64) + 0.5)
        np.testing.assert_allclose(ours.kernels.lm_head(x + np.float32(0.5)), logits, rtol=0, atol=2e-5)
        exact = x.astype(np.float64)
        ours.project_and_feed_forward(context, x)
        reference.project_and_feed_forward(0, context.astype(np.float64), exact)
        np.testing.assert_allclose(x, exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention(backends: Backends, shape: str) -> None:
    ours, reference = backends(shape)
    for rows, length in ((1, 1), (2, 3), (17, 17), (33, 40), (43, 258), (64, 700)):
        x = normal(length, ours.config.embed_dim)
        qkv, exact_qkv = ours.project(x), project(reference, x)
        exact = np.empty((rows, x.shape[1]))
        reference.attention(exact_qkv[:rows], exact_qkv, exact, None)
        np.testing.assert_allclose(ours.attention(qkv, 0, rows), exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shift", [0, 150, -150])
def test_attention_out_of_the_range_of_exponentials(backends: Backends, shift: int, precision: str) -> None:
    """Scores of hundreds, where an exponential without its row's maximum would overflow; all far below zero; both."""
    ours, reference = backends(precision=precision)
    qkv = ours.project(normal(300, 480))
    qkv[:2] *= 2 if ours.packed.narrow else 16  # rounding to bf16 moves scores by their 500th
    if shift:  # the same for all keys of some queries: a channel that every key shares
        qkv[1, :, :, 0] = 1
        qkv[0, :, :, 0] = np.where(np.arange(300) % 3 == 0, shift, 0)
        qkv[:2, :, :, 1] = 0
    exact_qkv, exact = ours.plain(qkv), np.empty((64, 480))
    reference.attention(exact_qkv[:64], exact_qkv, exact, None)
    found = ours.attention(qkv, 0, 64)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.1 if ours.packed.narrow else 2e-3)
    for first, last in ((0, 1), (3, 40)):
        np.testing.assert_array_equal(ours.attention(qkv, first, last), found[first:last])


def test_attention_keeps_nan_in_its_row(backends: Backends) -> None:
    ours, _ = backends()
    qkv = ours.project(normal(40, 480))
    qkv[0, :, 3] = np.nan  # one query
    out = ours.attention(qkv, 0, 40)
    assert np.isnan(out[3]).all()
    assert np.isfinite(np.delete(out, 3, axis=0)).all()


def test_attention_of_a_row_does_not_depend_on_the_tile(backends: Backends) -> None:
    ours, _ = backends()
    qkv = ours.project(normal(300, 480))
    whole = ours.attention(qkv, 0, 300)
    for first, last in ((0, 1), (7, 20), (40, 83), (200, 300)):
        np.testing.assert_array_equal(ours.attention(qkv, first, last), whole[first:last])


def make_maps(rows: int, first: int, last: int, length: int, dtype: Any) -> AttentionMaps:
    heads = np.array([0, 3, 19])
    return AttentionMaps(
        slice(first, last),
        heads,
        np.array([0.5, -2.0, 3.0]),
        np.ones((length - 2, last - first)).T,
        np.empty((3, last - first)),
        np.empty((3, length - 2)),
        np.empty(length, dtype),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("start", "rows", "length"), [(0, 3, 3), (0, 43, 257), (200, 58, 258), (60, 33, 400)])
def test_maps(backends: Backends, start: int, rows: int, length: int, precision: str) -> None:
    ours, reference = backends(precision=precision)
    first, last = int(start == 0), rows - int(start + rows == length)
    found, exact = (make_maps(rows, first, last, length, dtype) for dtype in (np.float32, np.float64))
    qkv = ours.project(normal(length, 480))
    exact_qkv = ours.plain(qkv)
    with_maps = ours.attention(qkv, start, start + rows, found)
    np.testing.assert_array_equal(with_maps, ours.attention(qkv, start, start + rows))
    reference.attention(exact_qkv[start : start + rows], exact_qkv, None, exact)
    bound = 2e-2 if ours.packed.narrow else 2e-5
    for name in ("weighted", "row_sums", "column_sums", "summary"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), rtol=0, atol=bound, err_msg=name)
    again = make_maps(rows, first, last, length, np.float32)
    ours.attention(qkv, start, start + rows, again, context=False)
    np.testing.assert_array_equal(again.weighted, found.weighted)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[3], [102], [514], [2050], [258] * 8, [3, 700, 40, 40, 2, 1], [5] * 300])
def test_blocks_cover_every_row_once(lengths: list[int], threads: int) -> None:
    ends = np.cumsum([0, *lengths]).tolist()
    spans = list(itertools.pairwise(ends))
    blocks = cut_blocks(spans, threads, 256, 32)
    pieces = [piece for block in blocks for piece in block]
    rows = [row for start, stop, _, _ in pieces for row in range(start, stop)]
    assert rows == list(range(ends[-1]))
    assert all((first, last) in spans and first <= start < stop <= last for start, stop, first, last in pieces)
    sizes = [block[-1][1] - block[0][0] for block in blocks]
    assert max(sizes) <= 256 + 32
    if ends[-1] >= 64 * threads:
        assert len(blocks) % threads == 0
        assert max(sizes) <= ends[-1] / len(blocks) + 32


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_steps(backends: Backends, shape: str, precision: str) -> None:
    ours, reference = backends(shape, precision)
    width = ours.config.embed_dim
    bound = {"bf16": 0.006, "int8": 0.01}[precision]
    for rows in (1, 13, 101):
        x = normal(rows, width)
        qkv, exact = ours.project(x), project(reference, x)
        found = ours.plain(qkv)
        assert np.sqrt(np.mean((found - exact) ** 2)) < bound * exact.std()
        context, rounded = ours.attention(qkv, 0, rows), np.empty((rows, width))
        reference.attention(found, found, rounded, None)
        assert np.sqrt(np.mean((context - rounded) ** 2)) < 0.006 * exact.std()
        y, z = x.copy(), x.astype(np.float64)
        ours.project_and_feed_forward(x, y)
        reference.project_and_feed_forward(0, x.astype(np.float64), z)
        assert np.sqrt(np.mean((y - z) ** 2)) < bound * (z - x).std()
        single = x[-1:].copy()
        ours.project_and_feed_forward(x[-1:], single)
        np.testing.assert_array_equal(single, y[-1:])


@pytest.mark.skipif(not ISA.bf16, reason="products are in float32")
@pytest.mark.parametrize("shape", SHAPES)
def test_short_sequences_in_bf16(shape: str) -> None:
    """Of their rows nothing is rounded; longer ones beside them have the numbers that they have alone."""
    made = random_checkpoint(SHAPES[shape], seed=3)
    weights = {name: tensor for name, tensor in made.tensors.items() if len(tensor.shape) == 2}
    rounded = {name: StoredTensor(tensor.stored_as("BF16").astype(np.float32)) for name, tensor in weights.items()}
    checkpoint = replace(made, tensors={**made.tensors, **rounded})
    ours, reference = Steps(checkpoint, "bf16"), NumpyKernels(checkpoint, "fp64")
    x, some = normal(101, ours.config.embed_dim), np.arange(101) // 20 == 2
    z = x.astype(np.float64)
    reference.project_and_feed_forward(0, z.copy(), z)
    found = []
    for ours.in_short in (False, some, True):
        y = x.copy()
        ours.project_and_feed_forward(x, y)
        found.append((ours.plain(ours.project(x)), y - x))
    for exact, long, mixed, short in zip((project(reference, x), z - x), *found, strict=True):
        error = [np.sqrt(np.mean((values - exact) ** 2)) / exact.std() for values in (long, short)]
        assert error[0] > 1e-3
        assert error[1] < 2e-5
        np.testing.assert_array_equal(mixed[some], short[some])
        np.testing.assert_array_equal(mixed[~some], long[~some])


# Where the CPU multiplies bf16, that need not be spelled out.
LOWER = [isa.name for isa in host_levels().values() if isa != ISA and not (isa.spelled_out and ISA.bf16)]


@pytest.mark.parametrize("level", LOWER)
def test_lower_levels_pass_these_tests(level: str) -> None:
    if os.environ.get("NUMPYESM_ISA"):
        pytest.skip("this is the run at a lower level")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", __file__]
    done = subprocess.run(command, env={**os.environ, "NUMPYESM_ISA": level}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
