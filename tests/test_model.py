"""The public model: every output, options, independence of batch and threads, errors, pickling, concurrency."""

from __future__ import annotations

import _thread
import copy
import math
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ALL, BACKENDS, ROUNDING, SMALL, assert_close, assert_same, random_sequence, small_model

from numpyesm import ESM2, CheckpointError, InputWarning, InvalidOption, MissingHead
from numpyesm.kernels import make_kernels
from numpyesm.kernels.numpy_forward import NumpyKernels
from numpyesm.kernels.numpy_steps import gelu
from numpyesm.memory import Sizes
from numpyesm.options import Outputs
from numpyesm.results import count_numbers, fields
from numpyesm.threads import Lock, WorkerPool
from numpyesm.weights import convert, save_canonical
from numpyesm.weights.checkpoint import CONTACT_HEAD, LM_HEAD, Checkpoint
from numpyesm.weights.synthetic import random_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="Numba is not installed")


# -- outputs -------------------------------------------------------------------------------------------------------


def test_shapes_types_and_what_is_absent(model: ESM2) -> None:
    sequences = ["MKTAYIAKQR", "W"]
    results = model.encode(sequences, [3, -1, 0, -4, np.int64(0)], ALL)  # layers come ascending, once each
    outputs = Outputs.check(model.checkpoint, [0, -1], ALL)
    for i, (result, sequence) in enumerate(zip(results, sequences, strict=True)):
        length = len(sequence)
        assert result.sequence_index == i
        assert list(result.embeddings) == list(result.bos_embeddings) == list(result.per_token_embeddings) == [0, 3]
        shapes = {name: array.shape for name, array in result.to_arrays().items()}
        assert shapes == {
            **dict.fromkeys(("mean_0", "mean_3", "bos_0", "bos_3"), (80,)),
            **dict.fromkeys(("per_token_0", "per_token_3"), (length, 80)),
            "contacts": (length, length),
            "logits": (length, 20),
            "attentions": (3, length),
        }
        assert {field.name: field.shape(model.config, length) for field in fields(outputs)} == shapes
        assert count_numbers(outputs, model.config, length) == sum(a.size for a in result.to_arrays().values())
        assert {a.dtype for a in result.to_arrays().values()} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(result.contacts, result.contacts.T)
        np.testing.assert_allclose(result.embeddings[3], result.per_token_embeddings[3].mean(0), atol=1e-6)
    plain = model.encode(sequences)[0]
    assert plain.to_dict().keys() == {"sequence_index", "embeddings"}
    assert plain.contacts is plain.logits is plain.attentions is plain.bos_embeddings is None
    assert model.encode(["MKT"], repr_layers=[], include=["contacts"])[0].contacts is not None


def test_dictionary_is_the_services_shape(model: ESM2) -> None:
    include = ["per_residue", "bos", "mean", "logits", "contacts", "attentions"]
    out = model.encode(["MKT"], [1, -1], include)[0].to_dict()
    assert list(out) == [
        "sequence_index", "embeddings", "bos_embeddings", "per_token_embeddings", "contacts", "logits", "vocab_tokens",
        "attentions",
    ]  # fmt: skip
    assert [entry["layer"] for entry in out["embeddings"]] == [1, 3]
    assert out["embeddings"][0].keys() == out["bos_embeddings"][0].keys() == {"layer", "embedding"}
    assert out["per_token_embeddings"][0].keys() == {"layer", "embeddings"}
    assert out["vocab_tokens"] == list("LAGVSERTIDPKQNFYMHWC")
    assert isinstance(out["contacts"][0][0], float)
    predicted = model.predict(["M<mask>T"])[0].to_dict()
    assert predicted.keys() == {"logits", "sequence_tokens", "vocab_tokens"}
    assert predicted["sequence_tokens"] == ["M", "<mask>", "T"]


def test_predict_rows(model: ESM2) -> None:
    every = model.predict(["M<mask>KT<mask>", "<mask>"])
    masked = model.predict((s for s in ["M<mask>KT<mask>", "<mask>"]), positions="masked")
    assert [r.mask_positions for r in every] == [[1, 4], [0]]
    assert [r.sequence_index for r in masked] == [0, 1]
    for a, b in zip(every, masked, strict=True):
        np.testing.assert_array_equal(a.logits[a.mask_positions], b.logits)


def test_log_prob_counts_canonical_residues_only(model: ESM2) -> None:
    logits = model.encode(["MKXT-"], include=["logits"])[0].logits.astype(np.float64)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = sum(log_softmax[i, "LAGVSERTIDPKQNFYMHWC".index(a)] for i, a in [(0, "M"), (1, "K"), (3, "T")])
    assert model.log_prob(["MKXT-"]) == pytest.approx(expected, abs=1e-9)
    # The empty sum, 0, would be the best score there is.
    with pytest.warns(InputWarning, match=r"NaN.*amino acids: item 1, item 3$") as caught:
        scores = model.log_prob(["MK", "XBZUO", "-W", "----"])
    assert np.isnan(scores).tolist() == [False, True, False, True]
    assert ["NaN" in str(one.message) for one in caught] == [False, True]  # the other is of gaps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.log_prob(["MK"])


# -- what is refused -----------------------------------------------------------------------------------------------

LAYERS = [[4], [-5], [1.0], ["1"], [None], [True], 3, None]
INCLUDES = [["man"], [], "mean", [3], None, ["mean", None]]
WRONG = [("backend", "torch"), ("precision", "fp8"), *(("threads", bad) for bad in (0, 1.5, True, "two", 10**6))]
REFUSED: list[tuple[Any, type[Exception], str]] = [
    *((lambda m, bad=bad: m.encode(["MKT"], bad), InvalidOption, "layer|repr_layers") for bad in LAYERS),
    *((lambda m, bad=bad: m.encode(["MKT"], include=bad), InvalidOption, "include") for bad in INCLUDES),
    *((lambda m, bad=bad: ESM2(m.checkpoint, **dict([bad])), InvalidOption, str(bad[1])) for bad in WRONG),
    (lambda m: m.encode(["MKT"], []), InvalidOption, "repr_layers is empty"),
    (lambda m: m.predict(["M<mask>"], positions="some"), InvalidOption, "all, masked"),
    (pickle.dumps, pickle.PicklingError, "save it"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refused(model: ESM2, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(model)


@pytest.mark.parametrize(("head", "message"), [(LM_HEAD, "no LM head"), (CONTACT_HEAD, "no contact head")])
def test_trunk_without_a_head(head: tuple[str, ...], message: str) -> None:
    tensors = {name: tensor for name, tensor in random_checkpoint(SMALL).tensors.items() if name not in head}
    trunk = ESM2(Checkpoint(SMALL, tensors, "a trunk"))
    calls: list[tuple[Any, tuple[str, ...]]] = [
        (lambda: trunk.encode(["MKT"], include=["logits"]), LM_HEAD),
        (lambda: trunk.predict(["M<mask>"]), LM_HEAD),
        (lambda: trunk.log_prob(["MKT"]), LM_HEAD),
        (lambda: trunk.encode(["MKT"], include=["mean", "contacts"]), CONTACT_HEAD),
    ]
    for call, needed in calls:
        with pytest.raises(MissingHead, match=message) if needed == head else nullcontext():
            call()


# -- independence --------------------------------------------------------------------------------------------------

MIXED = [random_sequence(n, n) for n in (5, 64, 1, 130, 33, 2, 200, 31, 3, 400, 12, 65)]


def test_results_do_not_depend_on_batch_mates_threads_passes_or_limits(
    model: ESM2, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, masked = [0, 1, 2, 3], [s + "<mask>" for s in MIXED]
    together, predicted, scores = model.encode(MIXED, layers, ALL), model.predict(masked), model.log_prob(MIXED)
    assert_same(model.encode(MIXED, layers, ALL), together)  # bitwise, from run to run
    alone = [model.encode([sequence], layers, ALL)[0] for sequence in MIXED]
    assert_same(alone, together, within=ROUNDING)
    assert_same(model.encode(MIXED[::-1], layers, ALL)[::-1], together, within=ROUNDING)
    for threads in (1, np.int64(5)):
        other = small_model(backend="numpy", threads=threads)
        assert other.threads == threads
        assert_same(other.encode(MIXED, layers, ALL), together, within=ROUNDING)
    limited = small_model(backend="numpy", threads=3, max_memory="64G")  # whose weights are left in place
    for sizes in (Sizes(4096), Sizes(140, 64, 1), Sizes(400, 128, 2)):
        monkeypatch.setattr(limited.passes, "sizes", lambda *_, sizes=sizes: sizes)
        in_passes = limited.encode(MIXED, layers, ALL)
        assert [r.sequence_index for r in in_passes] == list(range(len(MIXED)))
        assert_same(in_passes, together, within=ROUNDING)
        assert_same(limited.predict(masked), predicted, within=1e-5)
        assert_close(limited.log_prob(MIXED), scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_threads_share_one_model(backend: str) -> None:
    model = small_model(backend=backend, threads=2)
    batches = [[random_sequence(n, seed) for n in (70, 20, 150)] for seed in range(6)]
    expected = [model.encode(batch, include=ALL) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda batch: model.encode(batch, include=ALL), batches * 3)
        for one, wanted in zip(found, expected * 3, strict=True):
            assert_same(one, wanted, within=ROUNDING if backend == "numpy" else 0.0)


# -- what is computed ----------------------------------------------------------------------------------------------


def test_nothing_is_computed_that_was_not_asked_for(model: ESM2, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spy(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Any, *args: Any) -> Any:
            layer = f" {args[0]}" if isinstance(args[0], int) else ""
            calls.append("maps alone" if name == "attention" and args[2] is None else name + layer)
            return original(self, *args)

        return wrapped

    for name in ("qkv", "attention", "project_and_feed_forward", "final_norm", "lm_head"):
        monkeypatch.setattr(NumpyKernels, name, spy(name, getattr(NumpyKernels, name)))

    def made(one: ESM2 = model, **options: Any) -> list[str]:
        calls.clear()
        one.encode(["MKT"], **options)
        return list(calls)

    first, second = (["qkv " + n, "attention", "project_and_feed_forward " + n] for n in "01")
    assert made(repr_layers=[0], include=["mean", "per_token", "bos"]) == []
    assert made(repr_layers=[0, 1]) == first
    assert "lm_head" not in made(include=["mean"])
    assert made(repr_layers=[0], include=["logits"]).count("lm_head") == 1
    # Contacts need the attention of the last layer, but not its output.
    assert made(include=["contacts"]) == [*first, *second, "qkv 2", "maps alone"]
    # Layers above the last coefficient that is not zero do not run.
    checkpoint = random_checkpoint(SMALL)
    checkpoint.tensors["contact_head.weight"].raw[20:] = 0
    assert made(ESM2(checkpoint, backend="numpy"), repr_layers=[0], include=["contacts"]) == ["qkv 0", "maps alone"]
    checkpoint.tensors["contact_head.weight"].raw[:] = 0
    checkpoint.tensors["contact_head.bias"].raw[:] = -1
    (bias_alone,) = ESM2(checkpoint, backend="numpy").encode(["MKTAYIAK"], include=["contacts"])
    np.testing.assert_allclose(bias_alone.contacts, 1 / (1 + np.e), atol=1e-7)


def test_gelu_is_the_exact_form() -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), [0, -0.0, 1e-30, -1e-30, 60, -60, 1e6, -1e6, np.inf]])
    gelu(found := x.astype(np.float32)[:, None])
    exact = [v * 0.5 * math.erfc(-v / math.sqrt(2)) if v > -40 else 0.0 for v in x.astype(np.float32).astype(float)]
    np.testing.assert_allclose(found[:, 0], exact, rtol=1.2e-7, atol=1.5e-7)


def test_large_scores_do_not_overflow() -> None:
    """Attention so sharp that exp of a raw score would overflow float32."""
    checkpoint = random_checkpoint(SMALL)
    for layer in range(SMALL.num_layers):
        checkpoint.tensors[f"layers.{layer}.qkv.weight"].raw[:, :160] *= 30
    models = (ESM2(checkpoint, backend="numpy", precision=precision) for precision in ("fp32", "fp64"))
    a, b = (m.encode([random_sequence(90)], [1], ["mean", "attentions"])[0] for m in models)
    assert np.isfinite(a.embeddings[1]).all()
    np.testing.assert_allclose(a.embeddings[1], b.embeddings[1], atol=1e-3)


# -- where models come from ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["fp16", "bf16", "int8"])
def test_every_storage_runs_in_every_precision(stored: str, tmp_path: Path, loaded: ESM2) -> None:
    save_canonical(tmp_path / "narrow.safetensors", loaded.checkpoint, precision=stored)
    expected = loaded.encode(["MKTAYIAKQR"])[0].embeddings[3]
    differs = {"fp32": 0.0, "fp16": 0.02, "bf16": 0.2, "int8": 0.5}
    for precision in ("fp32", "bf16", "int8") if find_spec("numba") else ("fp32",):
        narrow = ESM2.from_pretrained(tmp_path / "narrow.safetensors", precision=precision)
        difference = np.abs(narrow.encode(["MKTAYIAKQR"])[0].embeddings[3] - expected).max()
        assert 0 < difference < max(differs[stored], differs[precision])
        assert f"stored as {stored}" in repr(narrow)


@needs_numba
@pytest.mark.slow
def test_int8_file_gives_what_rounding_at_load_gives(small_file: str, tmp_path: Path) -> None:
    narrow = convert(small_file, tmp_path / "narrow.safetensors", dtype="int8").path
    a, b = (ESM2.from_pretrained(path, backend="compiled", precision="int8") for path in (small_file, narrow))
    sequences = ["MKTAYIAKQR", "W"]
    assert_same(a.encode(sequences), b.encode(sequences))


@needs_numba
def test_auto_is_compiled() -> None:
    checkpoint = random_checkpoint(SMALL, seed=1)
    assert make_kernels(checkpoint).name == make_kernels(checkpoint, "numba").name == "compiled"
    assert make_kernels(checkpoint, precision="fp64").name == "numpy"
    with pytest.raises(InvalidOption, match="fp64"):
        make_kernels(checkpoint, "numba", "fp64")
    with pytest.raises(InvalidOption, match="compiled backend has it"):
        make_kernels(checkpoint, "numpy", "int8")


def test_model_from_a_file_can_be_pickled_and_saved(loaded: ESM2, tmp_path: Path) -> None:
    sequences, include = ["MKT"], ["mean", "contacts"]
    expected = loaded.encode(sequences, include=include)
    content = pickle.dumps(loaded)
    assert len(content) < 10_000
    again = pickle.loads(content)  # noqa: S301 - our own bytes
    assert repr(again) == repr(loaded)
    loaded.save(tmp_path / "b.safetensors")
    saved = ESM2.from_pretrained(str(tmp_path / "b.safetensors"), backend="numpy")
    for other in (again, copy.deepcopy(loaded), saved):
        assert_same(other.encode(sequences, include=include), expected)
    content = pickle.dumps(saved)
    ESM2(random_checkpoint(SMALL, seed=2)).save(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="other weights"):
        pickle.loads(content)  # noqa: S301


def test_repr_says_what_it_is(model: ESM2) -> None:
    text = repr(model)
    for part in ("3 layers", "width 80", "20 heads", "numpy", "fp32", "threads=2", "SYNTHETIC"):
        assert part in text


# -- failures under way --------------------------------------------------------------------------------------------


def test_failure_in_a_worker_reaches_the_caller_and_leaves_the_model_usable(
    model: ESM2, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(NumpyKernels, "project_and_feed_forward", Mock(side_effect=MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            model.encode(MIXED)
    assert len(model.encode(MIXED)) == len(MIXED)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("startable", [0, 1])
def test_threads_that_cannot_be_started(backend: str, startable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on processes, or a platform without threads: those there are do the work, and none is left behind."""
    sequences = [random_sequence(n, n) for n in (300, 40, 290)]
    expected, within = small_model(backend=backend).encode(sequences, [-1], ALL), ROUNDING * (backend == "numpy")
    start, started = threading.Thread.start, []

    def start_or_refuse(thread: threading.Thread) -> None:
        if len(started) >= startable:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_or_refuse)
        limited = small_model(backend=backend, threads=3)  # whose weights are packed by threads, too
        assert_same(limited.encode(sequences, [-1], ALL), expected, within)
        assert_same(limited.encode(sequences[1:2], [-1], ALL), expected[1:2], within)
    assert len(started) == startable
    # Calls that were queued for threads that never came do not run later, on memory that is no longer theirs.
    for _ in range(3):
        assert_same(limited.encode(sequences, [-1], ALL), expected, within)


def test_interrupt_stops_the_workers(model: ESM2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the caller: the blocks not yet begun are not run."""
    begun = threading.Event()
    blocks: list[int] = []
    original = NumpyKernels.project_and_feed_forward

    def slow(self: Any, layer: int, context: Any, x: Any) -> None:
        blocks.append(layer)
        begun.set()
        threading.Event().wait(0.05)
        original(self, layer, context, x)

    monkeypatch.setattr(NumpyKernels, "project_and_feed_forward", slow)
    threading.Thread(target=lambda: (begun.wait(), _thread.interrupt_main())).start()
    with pytest.raises(KeyboardInterrupt):
        model.encode([random_sequence(2000)])
    done = len(blocks)
    threading.Event().wait(0.2)
    assert len(blocks) == done < 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_workers_outlive_errors_and_forks_and_end_with_their_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    others, seen, children = set(threading.enumerate()), list[int](), list[int]()
    lock, pool, give_up, start = Lock(), WorkerPool(2), Mock(), threading.Thread.start

    def fork_and_start(thread: threading.Thread) -> None:
        """When a worker starts, the pool's lock is held, which the child must not wait for."""
        if not children:
            children.append(os.fork())
            if not children[0]:
                signal.alarm(20)
                with lock:
                    pool.run_together(seen.append, 3, give_up)  # by workers of its own
                os._exit(len(seen))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fork_and_start)
    with lock, pytest.raises(ZeroDivisionError):
        pool.run_together(lambda index: 1 // index, 2, give_up)
    give_up.assert_called_once_with()
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 3
    workers = [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("numpyesm_")]
    assert len(workers) == 2
    pool = None  # gone
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
