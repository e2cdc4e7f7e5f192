"""Compiled steps against NumPy in float64: every row count around the tiles' heights, the widths of the four presets.

The file runs once for the host's best instruction set, and in other processes for the lower ones that it has.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import numba

from numpyesm.config import PRESETS, ModelConfig
from numpyesm.kernels.base import AttentionMaps
from numpyesm.kernels.numba_ import gemm, steps
from numpyesm.kernels.numba_.emitter import TILE_COLUMNS, TILE_ROWS
from numpyesm.kernels.numba_.isa import host_isa, host_levels
from numpyesm.kernels.numba_.kernels import NumbaKernels
from numpyesm.kernels.reference_numpy import NumpyKernels
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import quantise_columns

# One layer of each preset, and a shape that fills no tile.
SHAPES = {name: ModelConfig(1, p.embed_dim, p.num_heads, p.ffn_dim) for name, p in PRESETS.items()}
SHAPES["odd"] = ModelConfig(1, 30, 3, 50)


@numba.njit
def _linear(x, piece, weight, bias, columns, step, out, tile):  # type: ignore[no-untyped-def]
    gemm.linear(x, x.shape[1], piece, weight, bias, columns, step, out, tile)


@numba.njit
def _quantise_rows(x, out, scales, offsets):  # type: ignore[no-untyped-def]
    steps.quantise_rows(x, x.shape[1], out, scales, offsets)


def linear(x: Any, weight: Any, bias: Any, step: int, out: Any, piece: int = 100) -> Any:
    tile = gemm.aligned(TILE_ROWS * TILE_COLUMNS)
    _linear(x, piece, gemm.pack_panels(weight), gemm.padded_columns(bias), weight.shape[1], step, out, tile)
    return out


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


@pytest.fixture(scope="module", params=SHAPES)
def backends(request: pytest.FixtureRequest) -> tuple[NumbaKernels, NumpyKernels]:
    checkpoint = random_checkpoint(SHAPES[request.param], seed=3)
    return NumbaKernels(checkpoint), NumpyKernels(checkpoint, "fp64")


@pytest.fixture(scope="module")
def small() -> tuple[NumbaKernels, NumpyKernels]:
    checkpoint = random_checkpoint(SHAPES["esm2-35m"], seed=3)
    return NumbaKernels(checkpoint), NumpyKernels(checkpoint, "fp64")


def project(kernels: Any, x: Any, start: int = 0) -> Any:
    out = kernels.new_qkv(len(x))
    kernels.qkv(0, x.astype(kernels.dtype), [kernels.rotary_tables(start + len(x))[start:]], out)
    return out


@pytest.mark.parametrize("rows", range(1, 41))
def test_linear_takes_any_number_of_rows(rows: int) -> None:
    for inner, columns in ((24, 96), (101, 20)):
        x, weight, bias = normal(rows, inner), normal(inner, columns), normal(columns)
        exact = x.astype(np.float64) @ weight + bias
        # A frame around the rows shows stores that go astray.
        frame = np.full((rows + 2, columns), 7, np.float32)
        linear(x, weight, bias, gemm.STORE, frame[1:-1])
        np.testing.assert_allclose(frame[1:-1], exact, rtol=0, atol=2e-5)
        assert (frame[[0, -1]] == 7).all()
        before = normal(rows, columns, seed=1)
        np.testing.assert_allclose(linear(x, weight, bias, gemm.ADD, before.copy()), before + exact, rtol=0, atol=2e-5)


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


@pytest.mark.parametrize("rows", [1, 13, 101])
def test_qkv(backends: Any, rows: int) -> None:
    ours, reference = backends
    x, width = normal(rows, ours.config.embed_dim), ours.config.embed_dim
    found = project(ours, x, start=5).reshape(rows, 3 * width).astype(np.float64)
    found[:, :width] /= math.log2(math.e)
    np.testing.assert_allclose(found, project(reference, x, start=5), rtol=0, atol=5e-6)


@pytest.mark.parametrize("rows", [1, 13, 101])
def test_project_and_feed_forward(backends: Any, rows: int) -> None:
    ours, reference = backends
    context, x = normal(rows, ours.config.embed_dim), normal(rows, ours.config.embed_dim, seed=1)
    found, exact = x.copy(), x.astype(np.float64)
    ours.project_and_feed_forward(0, context, found)
    reference.project_and_feed_forward(0, context.astype(np.float64), exact)
    np.testing.assert_allclose(found, exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("rows", [1, 19, 40])
def test_norm_and_lm_head(backends: Any, rows: int) -> None:
    ours, reference = backends
    x = normal(rows, ours.config.embed_dim) + np.float32(0.5)
    normed, exact = np.empty_like(x), np.empty(x.shape)
    ours.final_norm(x, normed)
    reference.final_norm(x.astype(np.float64), exact)
    np.testing.assert_allclose(normed, exact, rtol=0, atol=2e-6)
    np.testing.assert_allclose(ours.lm_head(x), reference.lm_head(x.astype(np.float64)), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 3), (17, 17), (33, 40), (43, 258), (64, 700)])
def test_attention(backends: Any, rows: int, length: int) -> None:
    ours, reference = backends
    x = normal(length, ours.config.embed_dim)
    qkv, exact_qkv = project(ours, x), project(reference, x)
    found, exact = np.empty((rows, x.shape[1]), np.float32), np.empty((rows, x.shape[1]))
    ours.attention(qkv[:rows], qkv, found, None)
    reference.attention(exact_qkv[:rows], exact_qkv, exact, None)
    np.testing.assert_allclose(found, exact, rtol=0, atol=5e-6)


def test_attention_that_is_sharp(small: Any) -> None:
    """Scores of hundreds, where an exponential without its row's maximum would overflow."""
    ours, reference = small
    x = normal(300, 480)
    qkv, exact_qkv = project(ours, x), project(reference, x)
    qkv[:, :2] *= 16
    exact_qkv[:, : 2 * 480] = qkv[:, :2].reshape(300, 960)
    exact_qkv[:, :480] /= math.log2(math.e)
    found, exact = np.empty((64, 480), np.float32), np.empty((64, 480))
    ours.attention(qkv[:64], qkv, found, None)
    reference.attention(exact_qkv[:64], exact_qkv, exact, None)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-3)


def test_attention_keeps_nan_in_its_row(small: Any) -> None:
    ours, _ = small
    qkv = project(ours, normal(40, 480))
    qkv[3, 0] = np.nan  # one query
    out = np.empty((40, 480), np.float32)
    ours.attention(qkv, qkv, out, None)
    assert np.isnan(out[3]).all()
    assert np.isfinite(np.delete(out, 3, axis=0)).all()


def test_attention_of_a_row_does_not_depend_on_the_tile(small: Any) -> None:
    ours, _ = small
    qkv = project(ours, normal(300, 480))
    whole = np.empty((300, 480), np.float32)
    ours.attention(qkv, qkv, whole, None)
    for first, last in ((0, 1), (7, 20), (40, 83), (200, 300)):
        part = np.empty((last - first, 480), np.float32)
        ours.attention(qkv[first:last], qkv, part, None)
        np.testing.assert_array_equal(part, whole[first:last])


def make_maps(rows: int, first: int, last: int, length: int, dtype: Any) -> AttentionMaps:
    heads = np.array([0, 3, 19])
    return AttentionMaps(
        slice(first, last),
        heads,
        np.array([0.5, -2.0, 3.0]),
        np.ones((last - first, length - 2)),
        np.empty((3, last - first)),
        np.empty((3, length - 2)),
        np.empty(length, dtype),
    )


@pytest.mark.parametrize(("start", "rows", "length"), [(0, 3, 3), (0, 43, 258), (200, 58, 258), (60, 33, 400)])
def test_maps(small: Any, start: int, rows: int, length: int) -> None:
    ours, reference = small
    x = normal(length, 480)
    first, last = int(start == 0), rows - int(start + rows == length)
    found, exact = (make_maps(rows, first, last, length, dtype) for dtype in (np.float32, np.float64))
    qkv, exact_qkv = project(ours, x), project(reference, x)
    with_maps, without = (np.empty((rows, 480), np.float32) for _ in range(2))
    ours.attention(qkv[start : start + rows], qkv, with_maps, found)
    ours.attention(qkv[start : start + rows], qkv, without, None)
    reference.attention(exact_qkv[start : start + rows], exact_qkv, None, exact)
    np.testing.assert_array_equal(with_maps, without)
    for name in ("weighted", "row_sums", "column_sums", "summary"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), rtol=0, atol=2e-5, err_msg=name)
    again = make_maps(rows, first, last, length, np.float32)
    ours.attention(qkv[start : start + rows], qkv, None, again)  # maps without context
    np.testing.assert_array_equal(again.weighted, found.weighted)


def test_quantised_columns() -> None:
    weight = normal(50, 30)
    weight[:, 3] = 0
    levels, scales = quantise_columns(weight)
    assert levels.dtype == np.int8
    assert (np.abs(levels).max(axis=0)[np.arange(30) != 3] == 127).all()
    assert (np.abs(levels * scales - weight) <= scales / 2 * 1.001).all()


def test_quantised_rows() -> None:
    x = normal(7, 45)
    x[2] = 1.5
    levels, scales, offsets = np.empty((7, 48), np.uint8), np.empty(7, np.float32), np.empty(7, np.float32)
    _quantise_rows(x, levels, scales, offsets)
    whole = levels.view(np.int8) if host_isa().name == "neon" else levels
    back = whole[:, :45] * scales[:, None] + offsets[:, None]
    assert (np.abs(back - x) <= scales[:, None] * 0.501 + 1e-6).all()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_steps(shape: str, precision: str) -> None:
    if precision not in host_isa().precisions:
        pytest.skip(f"{host_isa().name} has no {precision}")
    checkpoint = random_checkpoint(SHAPES[shape], seed=3)
    ours, reference = NumbaKernels(checkpoint, precision), NumpyKernels(checkpoint, "fp64")
    width = ours.config.embed_dim
    bound = {"bf16": 0.006, "int8": 0.03}[precision]
    for rows in (1, 13, 101):
        x = normal(rows, width)
        found, exact = project(ours, x).reshape(rows, -1).astype(np.float64), project(reference, x)
        found[:, :width] /= math.log2(math.e)
        assert np.sqrt(np.mean((found - exact) ** 2)) < bound * exact.std()
        y, z = x.copy(), x.astype(np.float64)
        ours.project_and_feed_forward(0, x, y)
        reference.project_and_feed_forward(0, x.astype(np.float64), z)
        assert np.sqrt(np.mean((y - z) ** 2)) < bound * (z - x).std()
        single = x[-1:].copy()
        ours.project_and_feed_forward(0, x[-1:].copy(), single)
        np.testing.assert_array_equal(single, y[-1:])


@pytest.mark.parametrize("level", list(host_levels())[1:])
def test_lower_levels_pass_these_tests(level: str) -> None:
    if os.environ.get("NUMPYESM_ISA"):
        pytest.skip("this is the run at a lower level")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "NUMPYESM_ISA": level}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
