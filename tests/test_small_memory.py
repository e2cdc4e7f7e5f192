"""Small machines: narrow weights stay narrow, `max_memory` is kept, an address-space limit is survived, maps shared."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, assert_close, random_sequence

from numpyesm import ESM2, InvalidOption, NotEnoughMemory, SyntheticWeightsWarning
from numpyesm.batch import BLOCK_ROWS, Batch
from numpyesm.kernels.narrow import NarrowMatrix
from numpyesm.memory import MemoryBudget, Sizes, format_memory, parse_memory
from numpyesm.weights import convert, load_checkpoint
from numpyesm.weights.checkpoint import Checkpoint
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import StoredTensor

ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
NARROW = ("fp16", "bf16", "int8")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """35M in every storage."""
    folder = tmp_path_factory.mktemp("weights")
    return {d: convert("synthetic:esm2-35m", folder / f"{d}.safetensors", dtype=d).path for d in ("fp32", *NARROW)}


def measure(weights: Path, call: str, *, limit: str = "", options: str = "", threads: int = 2) -> dict[str, float]:
    """Run `call` on `model` in a fresh process; peak resident and address space, private memory, in MB."""
    code = f"""
import json, re, warnings
warnings.simplefilter("ignore")
import numpyesm
model = numpyesm.ESM2.from_pretrained({str(weights)!r}, backend="numpy", threads={threads}{options})
{call}
def field(file, name):
    return int(re.search(name + r":\\s+(\\d+)", open(file).read())[1]) / 1024
status, maps = "/proc/self/status", "/proc/self/smaps_rollup"
print(json.dumps({{"peak": field(status, "VmHWM"), "address_space": field(status, "VmPeak"),
    "private": field(maps, "Private_Dirty"), "resident": field(maps, "Rss"), "pss": field(maps, "Pss")}}))
"""
    command = [sys.executable, "-c", code]
    if limit:
        command = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout)
    return result


# -- narrow weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "dtype"), [("fp16", "F16"), ("bf16", "BF16"), ("int8", "I8")])
def test_slices_are_the_stored_numbers(stored, dtype) -> None:
    values = np.random.default_rng(0).standard_normal((70, 40)).astype(np.float32) * np.float32(0.03)
    values[0, :6] = [0.0, -0.0, 65504.0, -65504.0, 6e-8, -3e-5]  # the ends of float16, and subnormals
    tensor = StoredTensor(values).stored_as(dtype)
    matrix = NarrowMatrix(tensor)
    expected = tensor.astype(np.float32)
    for rows in (slice(0, 70), slice(13, 40), slice(69, 70)):
        found = matrix[rows]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[rows])
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected[rows]))


def test_every_finite_half_precision_number_is_widened_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    np.testing.assert_array_equal(NarrowMatrix(StoredTensor(bits, "F16"))[:], bits.astype(np.float32))  # NaN, inf too
    finite = np.where(np.isfinite(bits), bits, np.float16(1))
    np.testing.assert_array_equal(NarrowMatrix(StoredTensor(finite, "F16"))[:], finite.astype(np.float32))


@pytest.mark.parametrize("stored", NARROW)
def test_results_are_those_of_widened_weights(stored, tmp_path) -> None:
    with pytest.warns(SyntheticWeightsWarning):
        wide = ESM2(random_checkpoint(SMALL, seed=1), backend="numpy", threads=2)
    wide.save(tmp_path / "wide.safetensors")
    path = convert(tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors", dtype=stored).path
    narrow = load_checkpoint(path)
    widened = Checkpoint(narrow.config, {k: StoredTensor(t.astype()) for k, t in narrow.tensors.items()}, "test")
    expected, found = (ESM2(c, backend="numpy", threads=2) for c in (widened, narrow))
    sequences = [random_sequence(n) for n in (5, 70, 300)]
    include = ["mean", "per_token", "contacts", "logits", "attentions"]
    for a, b in zip(
        expected.encode(sequences, [0, 1, -1], include), found.encode(sequences, [0, 1, -1], include), strict=True
    ):
        for name, array in a.to_arrays().items():
            if stored == "int8":  # the scale is applied behind the product, not before
                np.testing.assert_allclose(b.to_arrays()[name], array, rtol=0, atol=3e-5)
            else:
                np.testing.assert_array_equal(b.to_arrays()[name], array)


def test_weights_left_in_place_give_the_same_numbers() -> None:
    checkpoint = random_checkpoint(SMALL, seed=1)
    with pytest.warns(SyntheticWeightsWarning):
        plain, limited = (ESM2(checkpoint, backend="numpy", threads=2, max_memory=m) for m in (None, "64G"))
    sequences = [random_sequence(n) for n in (1, 33, 250)]
    found = [model.encode(sequences, include=["per_token", "contacts"]) for model in (plain, limited)]
    for a, b in zip(*found, strict=True):
        for name, array in a.to_arrays().items():
            assert_close(b.to_arrays()[name], array)


# -- measured ------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(("stored", "limit"), [("fp32", 260), ("fp16", 160), ("bf16", 160), ("int8", 160)])
def test_peak_of_a_mean_of_512(weights, stored, limit) -> None:
    peak = measure(weights[stored], f"model.encode([{random_sequence(512)!r}])")["peak"]
    assert 50 < peak < limit


@linux
@pytest.mark.parametrize("stored", ["fp32", "int8"])
def test_an_address_space_of_512_mb_is_enough(weights, stored) -> None:
    used = measure(weights[stored], f"model.encode([{random_sequence(512)!r}])", limit=f"-v {512 * 1024}")
    assert used["address_space"] < 512


CALLS = {
    "mean of many": ([random_sequence(n) for n in range(20, 300, 14)], ["mean"]),
    "contacts of 1400": ([random_sequence(1400)], ["contacts"]),
    "everything": ([random_sequence(700)] * 3, ["mean", "per_token", "bos", "contacts", "logits", "attentions"]),
}


@linux
@pytest.mark.parametrize("call", CALLS)
def test_the_least_memory_that_is_accepted_is_kept(weights, call) -> None:
    """Whatever the budget says a call takes is enough to run it, and is not exceeded."""
    sequences, include = CALLS[call]
    call = f"""
from numpyesm import NotEnoughMemory
from numpyesm.memory import MemoryBudget
from dataclasses import replace
import re
try:
    model.passes.budget = replace(model.passes.budget, limit=model.passes.budget.fixed)
    model.encode({sequences!r}, include={include!r})
except NotEnoughMemory as error:
    least = (int(re.search(r"takes about (\\d+) MiB", str(error))[1]) + 1) << 20
model.passes.budget = replace(model.passes.budget, limit=least)
model.encode({sequences!r}, include={include!r})
import json; print(least / 2**20, file=open("LEAST", "w"))
"""
    folder = weights["int8"].parent
    used = measure(weights["int8"], call.replace('"LEAST"', repr(str(folder / "least"))), options=", max_memory='4G'")
    least = float((folder / "least").read_text())
    assert 0.6 * least < used["peak"] < least


@linux
def test_processes_share_the_weights(weights) -> None:
    """The proportional share of one of two processes with the same file is smaller by half the file."""
    size = weights["fp32"].stat().st_size / (1 << 20)
    call = f"model.encode([{random_sequence(100)!r}])\n"
    other = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", '''
import warnings; warnings.simplefilter("ignore")
import numpyesm
model = numpyesm.ESM2.from_pretrained({str(weights["fp32"])!r}, backend="numpy", threads=2, max_memory="1G")
model.encode(["MKTAYIAK"]); print("ready", flush=True); input()
'''], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
"""
    alone = measure(weights["fp32"], call, options=", max_memory='1G'")
    other += "import atexit; atexit.register(child.kill)"
    both = measure(weights["fp32"], call + other, options=", max_memory='1G'")
    assert alone["private"] < 0.5 * size  # nothing of the size of the weights is its own
    assert alone["resident"] > size
    assert alone["pss"] - both["pss"] > 0.4 * size


# -- the budget ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("512MiB", 512 << 20), (" 512 mib ", 512 << 20), ("400MB", 400_000_000), ("1.5G", 3 << 29),
     ("2kb", 2000), ("2k", 2048), ("1T", 1 << 40), (1000, 1000), ("7", 7), ("7B", 7)],
)  # fmt: skip
def test_sizes_are_read(text, size) -> None:
    assert parse_memory(text) == size
    assert parse_memory(format_memory(300 << 20)) == 300 << 20


@pytest.mark.parametrize("text", ["", "M", "-1", "0", 0, -5, "12X", "1e9", "nan", True, None, 1.5, "9" * 40])
def test_other_sizes_are_refused(text) -> None:
    with pytest.raises(InvalidOption, match="max_memory"):
        parse_memory(text)


def test_too_little_for_the_model_says_what_it_takes() -> None:
    with pytest.raises(NotEnoughMemory, match=r"max_memory is 10 MiB, but a process with .* takes \d+ MiB"):
        ESM2(random_checkpoint(SMALL, seed=1), backend="numpy", max_memory="10M")


def test_too_much_for_a_call_is_refused_before_it_runs(weights) -> None:
    budget = MemoryBudget(200 << 20, 100 << 20, SMALL, 2)
    with pytest.raises(NotEnoughMemory, match="fewer outputs"):
        budget.sizes([2050] * 8, {"contacts"}, 0, 4096)


def test_less_memory_gives_smaller_blocks_and_passes() -> None:
    config = load_checkpoint("synthetic:esm2-35m").config
    plenty = MemoryBudget(1 << 40, 100 << 20, config, 4).sizes([300] * 100, {"mean"}, 1, 4096)
    assert plenty == Sizes(4096, BLOCK_ROWS, 4)
    some, little = (
        MemoryBudget(n << 20, 100 << 20, config, 4).sizes([300] * 100, {"mean"}, 1, 4096) for n in (190, 130)
    )
    assert 302 <= some.rows_per_pass < 4096
    assert 300 <= little.rows_per_pass < some.rows_per_pass
    assert little.threads is not None
    assert (little.threads, little.block_rows) < (4, BLOCK_ROWS)


def test_results_do_not_depend_on_the_sizes() -> None:
    checkpoint = random_checkpoint(SMALL, seed=1)
    with pytest.warns(SyntheticWeightsWarning):
        model = ESM2(checkpoint, backend="numpy", threads=3, max_memory="64G")
    sequences = [random_sequence(n) for n in (200, 3, 90, 1, 260)]
    include = ["mean", "contacts", "logits", "attentions"]
    expected = model.encode(sequences, include=include)
    scores = model.log_prob(sequences)
    for sizes in (Sizes(262, 64, 1), Sizes(400, 128, 2)):
        model.passes.sizes = lambda *_, sizes=sizes: sizes  # type: ignore[method-assign,assignment,misc]
        for a, b in zip(expected, model.encode(sequences, include=include), strict=True):
            for name, array in a.to_arrays().items():
                assert_close(b.to_arrays()[name], array)
        assert_close(model.log_prob(sequences), scores)


def test_blocks_have_the_rows_that_are_asked_for() -> None:
    batch = Batch.pack([np.zeros(1000, np.uint8)])
    assert max(block.stop - block.start for block in batch.blocks(1, 64)) <= 96
    assert max(block.stop - block.start for block in batch.blocks(1)) > 128


@pytest.fixture
def small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no other test had filled this process before."""
    monkeypatch.setattr("numpyesm.memory.resident_memory", lambda: 60 << 20)


@pytest.mark.usefixtures("small_process")
def test_a_pickled_model_keeps_its_limit() -> None:
    with pytest.warns(SyntheticWeightsWarning):
        model = ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy", max_memory="3G")
    with pytest.warns(SyntheticWeightsWarning):
        again = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert again.passes.budget.limit == model.passes.budget.limit == 3 << 30


@linux
def test_with_numba_installed_a_small_address_space_takes_numpy(weights) -> None:
    pytest.importorskip("numba")
    code = f"""
import warnings; warnings.simplefilter("ignore")
import numpyesm
model = numpyesm.ESM2.from_pretrained({str(weights["fp32"])!r}, threads=2)
model.encode(["MKT"])
print(model.backend)
"""
    for setting in ("ulimit -v 524288", "ulimit -d 524288"):
        done = subprocess.run(
            ["sh", "-c", f'{setting} && exec "$@"', "sh", sys.executable, "-c", code],
            capture_output=True, text=True, timeout=120, cwd=ROOT,
        )  # fmt: skip
        assert (done.returncode, done.stdout.strip()) == (0, "numpy"), done.stderr


@pytest.mark.usefixtures("small_process")
def test_the_backend_follows_the_memory(monkeypatch) -> None:
    monkeypatch.setattr("numpyesm.kernels._numba_available", lambda: True)
    with pytest.warns(SyntheticWeightsWarning):
        assert ESM2.from_pretrained("synthetic:esm2-8m", max_memory="350M").backend == "numpy"


@pytest.mark.parametrize(
    ("limit", "code", "said"),
    [("200M", 0, ""), ("50M", 1, r"max_memory is 50 MiB, but .* takes \d+ MiB"), ("plenty", 2, "max_memory='plenty'")],
)
def test_command_line(weights, limit, code, said) -> None:
    command = [sys.executable, "-m", "numpyesm", "encode", random_sequence(300), "--weights", str(weights["int8"])]
    done = subprocess.run([*command, "--max-memory", limit], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == code
    assert re.search(said, done.stderr)
    if code == 0:
        assert len(json.loads(done.stdout)["results"][0]["embeddings"][0]["embedding"]) == 480
