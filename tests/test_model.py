"""The public model: every output, options, independence of batch and threads, errors, pickling, concurrency."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROUNDING, SMALL, assert_close, random_sequence, small_model

from numpyesm import ESM2, InputWarning, InvalidOption, InvalidSequence, MissingHead, SyntheticWeightsWarning
from numpyesm.alphabet import tokenize
from numpyesm.config import ModelConfig
from numpyesm.kernels.numpy_forward import NumpyKernels
from numpyesm.options import Outputs
from numpyesm.results import count_numbers, fields
from numpyesm.weights.checkpoint import CONTACT_HEAD, LM_HEAD, Checkpoint
from numpyesm.weights.synthetic import random_checkpoint

ALL = ["mean", "per_token", "bos", "contacts", "logits", "attentions"]


def arrays(results: list[Any]) -> list[dict[str, np.ndarray]]:
    return [result.to_arrays() for result in results]


def assert_same(a: list[Any], b: list[Any], within: float = 0.0) -> None:
    for x, y in zip(arrays(a), arrays(b), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert_close(x[name], y[name], within)


def test_shapes_types_and_what_is_absent(model: ESM2) -> None:
    sequences = ["MKTAYIAKQR", "W"]
    results = model.encode(sequences, repr_layers=[-1, 0], include=ALL)
    for i, (result, sequence) in enumerate(zip(results, sequences, strict=True)):
        length = len(sequence)
        assert result.sequence_index == i
        assert list(result.embeddings) == list(result.bos_embeddings) == list(result.per_token_embeddings) == [0, 3]
        assert result.embeddings[3].shape == result.bos_embeddings[0].shape == (80,)
        assert result.per_token_embeddings[3].shape == (length, 80)
        assert result.contacts.shape == (length, length)
        assert result.logits.shape == (length, 20)
        assert result.attentions.shape == (3, length)
        assert {a.dtype for a in result.to_arrays().values()} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(result.contacts, result.contacts.T)
        np.testing.assert_allclose(result.embeddings[3], result.per_token_embeddings[3].mean(0), atol=1e-6)
    plain = model.encode(sequences)[0]
    assert plain.to_dict().keys() == {"sequence_index", "embeddings"}
    assert plain.contacts is plain.logits is plain.attentions is plain.bos_embeddings is None


def test_sizes_are_known_beforehand(model: ESM2) -> None:
    outputs = Outputs.check(model.checkpoint, [0, -1], ALL)
    result = model.encode(["MKTAY"], [0, -1], ALL)[0].to_arrays()
    assert {field.name: field.shape(model.config, 5) for field in fields(outputs)} == {
        name: array.shape for name, array in result.items()
    }
    assert count_numbers(outputs, model.config, 5) == sum(array.size for array in result.values())


def test_nothing_may_be_asked_for_where_a_door_allows_it(model: ESM2) -> None:
    outputs = Outputs.check(model.checkpoint, [], ["mean", "logits"], allow_nothing=True)
    assert outputs == Outputs(("logits",))
    nothing = Outputs.check(model.checkpoint, [-1], [], allow_nothing=True)
    assert [result.to_arrays() for result in model.passes.encode(tokenize(["MKT", "W"]), nothing)] == [{}, {}]


@pytest.mark.parametrize("name", ["numpy", "compiled", "numba"])
def test_backend_names(name: str) -> None:
    if name != "numpy":
        pytest.importorskip("numba")
    assert small_model(backend=name).backend == ("numpy" if name == "numpy" else "compiled")


def test_dictionary_is_the_services_shape(model: ESM2) -> None:
    out = model.encode(["MKT"], [1, -1], ["per_residue", "bos", "mean", "logits", "contacts", "attentions"])[
        0
    ].to_dict()
    assert out.keys() == {
        "sequence_index", "embeddings", "bos_embeddings", "per_token_embeddings", "contacts", "logits", "vocab_tokens",
        "attentions",
    }  # fmt: skip
    assert [entry["layer"] for entry in out["embeddings"]] == [1, 3]
    assert out["embeddings"][0].keys() == out["bos_embeddings"][0].keys() == {"layer", "embedding"}
    assert out["per_token_embeddings"][0].keys() == {"layer", "embeddings"}
    assert out["vocab_tokens"] == list("LAGVSERTIDPKQNFYMHWC")
    assert isinstance(out["contacts"][0][0], float)
    predicted = model.predict(["M<mask>T"])[0].to_dict()
    assert predicted.keys() == {"logits", "sequence_tokens", "vocab_tokens"}
    assert predicted["sequence_tokens"] == ["M", "<mask>", "T"]


def test_layers_are_resolved_ascending_and_once(model: ESM2) -> None:
    result = model.encode(["MKT"], repr_layers=[3, -1, 1, -4, np.int64(1)])[0]
    assert list(result.embeddings) == [0, 1, 3]


@pytest.mark.parametrize("layers", [[4], [-5], [1.0], ["1"], [None], [True], 3, None])
def test_bad_layers(model: ESM2, layers: Any) -> None:
    with pytest.raises(InvalidOption, match=r"layer|repr_layers"):
        model.encode(["MKT"], repr_layers=layers)


@pytest.mark.parametrize("include", [["man"], [], "mean", [3], None, ["mean", None]])
def test_bad_include(model: ESM2, include: Any) -> None:
    with pytest.raises(InvalidOption, match="include"):
        model.encode(["MKT"], include=include)


def test_no_layers_asked_for(model: ESM2) -> None:
    with pytest.raises(InvalidOption, match="repr_layers is empty"):
        model.encode(["MKT"], repr_layers=[])
    assert model.encode(["MKT"], repr_layers=[], include=["contacts"])[0].contacts is not None


@pytest.mark.parametrize("options", [{"backend": "torch"}, {"precision": "fp8"}, {"threads": 0}, {"threads": 1.5}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=str(next(iter(options.values())))):
        ESM2(random_checkpoint(SMALL), **options)


def test_bad_positions(model: ESM2) -> None:
    with pytest.raises(InvalidOption, match="all, masked"):
        model.predict(["M<mask>"], positions="some")


def test_bad_sequence_names_item_and_loses_nothing(model: ESM2) -> None:
    for call in (model.encode, model.log_prob):
        with pytest.raises(InvalidSequence, match=r"item 1.*position 2"):
            call(["MKT", "M1"])
    with pytest.raises(InvalidSequence, match=r"item 0.*no <mask>"):
        model.predict(["MKT"])
    with pytest.raises(InvalidSequence, match="list of sequences"):
        model.predict("M<mask>")


def test_predict_rows(model: ESM2) -> None:
    every = model.predict(["M<mask>KT<mask>", "<mask>"])
    masked = model.predict(["M<mask>KT<mask>", "<mask>"], positions="masked")
    assert [r.mask_positions for r in every] == [[1, 4], [0]]
    assert [r.sequence_index for r in masked] == [0, 1]
    for a, b in zip(every, masked, strict=True):
        np.testing.assert_array_equal(a.logits[a.mask_positions], b.logits)


def test_log_prob_counts_canonical_residues_only(model: ESM2) -> None:
    logits = model.encode(["MKXT-"], include=["logits"])[0].logits.astype(np.float64)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = sum(log_softmax[i, "LAGVSERTIDPKQNFYMHWC".index(a)] for i, a in [(0, "M"), (1, "K"), (3, "T")])
    assert model.log_prob(["MKXT-"]) == pytest.approx(expected, abs=1e-9)


def test_log_prob_without_any_amino_acid_is_not_a_number(model: ESM2) -> None:
    """The empty sum, 0, would be the best score there is."""
    with pytest.warns(InputWarning, match=r"NaN.*amino acids: item 1, item 3$") as caught:
        scores = model.log_prob(["MK", "XBZUO", "-W", "----"])
    assert np.isnan(scores).tolist() == [False, True, False, True]
    assert ["NaN" in str(one.message) for one in caught] == [False, True]  # the other is of gaps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.log_prob(["MK"])


def test_any_iterable_of_strings(model: ESM2) -> None:
    expected = model.encode(["MKT", "W"])
    assert_same(model.encode(("MKT", "W")), expected)
    assert_same(model.encode(s for s in ["MKT", "W"]), expected)
    assert_same(model.encode(np.array(["MKT", "W"])), expected)
    assert len(model.predict(s for s in ["M<mask>"])) == 1


MIXED = [random_sequence(n, n) for n in (5, 64, 1, 130, 33, 2, 200, 31, 3, 400, 12, 65)]


def test_results_do_not_depend_on_batch_mates(model: ESM2) -> None:
    together = model.encode(MIXED, [0, 1, 2, 3], ALL)
    for i, sequence in enumerate(MIXED):
        assert_same([together[i]], model.encode([sequence], [0, 1, 2, 3], ALL), within=ROUNDING)
    turned = model.encode(MIXED[::-1], [0, 1, 2, 3], ALL)[::-1]
    assert_same(together, turned, within=ROUNDING)


def test_results_do_not_depend_on_passes(model: ESM2, monkeypatch: pytest.MonkeyPatch) -> None:
    together = model.encode(MIXED, include=ALL)
    masked = [s + "<mask>" for s in MIXED]
    predicted = model.predict(masked)
    monkeypatch.setattr("numpyesm.passes.ROWS_PER_PASS", 140)
    assert_same(together, model.encode(MIXED, include=ALL), within=ROUNDING)
    assert_same(predicted, model.predict(masked), within=1e-5)
    assert [r.sequence_index for r in model.encode(MIXED)] == list(range(len(MIXED)))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_results_do_not_depend_on_threads(model: ESM2, threads: int) -> None:
    other = small_model(backend="numpy", threads=threads)
    assert other.threads == threads
    assert_same(model.encode(MIXED, include=ALL), other.encode(MIXED, include=ALL), within=ROUNDING)


def test_bitwise_the_same_from_run_to_run(model: ESM2) -> None:
    first = model.encode(MIXED, include=ALL)
    for _ in range(3):
        assert_same(first, model.encode(MIXED, include=ALL))


def test_nothing_is_computed_that_was_not_asked_for(model: ESM2, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def spy(name: str) -> None:
        original = getattr(NumpyKernels, name)

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, args[0] if name in ("project_and_feed_forward", "qkv") else None))
            if name == "attention":
                calls.append(("context", args[2] is not None))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(NumpyKernels, name, wrapped)

    for name in ("qkv", "attention", "project_and_feed_forward", "final_norm", "lm_head"):
        spy(name)

    def names(**options: Any) -> list[Any]:
        calls.clear()
        model.encode(["MKT"], **options)
        return list(calls)

    assert names(repr_layers=[0]) == []
    assert names(repr_layers=[0], include=["per_token", "bos"]) == []
    one = names(repr_layers=[0, 1])
    assert [c for c in one if c[0] in ("qkv", "project_and_feed_forward")] == [
        ("qkv", 0),
        ("project_and_feed_forward", 0),
    ]
    assert not any(c[0] in ("lm_head", "final_norm") for c in one)
    assert not any(c[0] == "lm_head" for c in names(include=["mean"]))
    assert [c[0] for c in names(repr_layers=[0], include=["logits"])].count("lm_head") == 1
    # Contacts need the attention of the last layer, but not its output.
    contacts = names(include=["contacts"])
    assert [c for c in contacts if c[0] == "project_and_feed_forward"] == [
        ("project_and_feed_forward", n) for n in (0, 1)
    ]
    assert contacts[-1] == ("context", False)


def test_contact_layers_above_the_last_coefficient_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = random_checkpoint(SMALL)
    weight = checkpoint.tensors["contact_head.weight"].raw
    weight[20:] = 0
    ran: list[int] = []
    original = NumpyKernels.qkv
    monkeypatch.setattr(NumpyKernels, "qkv", lambda self, n, *rest: (ran.append(n), original(self, n, *rest))[1])
    with pytest.warns(SyntheticWeightsWarning):
        model = ESM2(checkpoint, backend="numpy")
    model.encode(["MKTAYIAK"], include=["contacts"])
    assert ran == [0]


def test_all_contact_coefficients_zero() -> None:
    checkpoint = random_checkpoint(SMALL)
    checkpoint.tensors["contact_head.weight"].raw[:] = 0
    checkpoint.tensors["contact_head.bias"].raw[:] = -1
    with pytest.warns(SyntheticWeightsWarning):
        contacts = ESM2(checkpoint).encode(["MKTAYIAK"], include=["contacts"])[0].contacts
    np.testing.assert_allclose(contacts, 1 / (1 + np.e), atol=1e-7)


def without(head: tuple[str, ...]) -> ESM2:
    whole = random_checkpoint(SMALL)
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name not in head}
    return ESM2(Checkpoint(SMALL, tensors, source="a trunk"), backend="numpy")


def test_trunk_without_lm_head() -> None:
    trunk = without(LM_HEAD)
    assert trunk.encode(["MKT"], include=["mean", "contacts"])[0].contacts is not None
    for call in (
        lambda: trunk.encode(["MKT"], include=["logits"]),
        lambda: trunk.predict(["M<mask>"]),
        lambda: trunk.log_prob(["MKT"]),
    ):
        with pytest.raises(MissingHead, match="no LM head"):
            call()


def test_trunk_without_contact_head() -> None:
    trunk = without(CONTACT_HEAD)
    assert trunk.predict(["M<mask>"])
    with pytest.raises(MissingHead, match="no contact head"):
        trunk.encode(["MKT"], include=["contacts"])


@pytest.mark.parametrize("shape", [(2, 320, 20, 1280), (1, 640, 20, 2560), (1, 1280, 20, 5120), (2, 48, 3, 96)])
def test_other_shapes(shape: tuple[int, int, int, int]) -> None:
    config = ModelConfig(*shape)
    checkpoint = random_checkpoint(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntheticWeightsWarning)
        ours, truth = ESM2(checkpoint, backend="numpy"), ESM2(checkpoint, backend="numpy", precision="fp64")
    sequences = ["MKTAYIAKQR", random_sequence(70)]
    assert_same(ours.encode(sequences, include=ALL), truth.encode(sequences, include=ALL), within=2e-4)


def test_half_precision_storage_is_widened(tmp_path: Path) -> None:
    from numpyesm.weights import convert

    full = ESM2.from_pretrained(convert("synthetic:esm2-8m:3", tmp_path / "a.safetensors").path, threads=1)
    for dtype, atol in (("fp16", 0.02), ("bf16", 0.2), ("int8", 0.5)):
        path = convert("synthetic:esm2-8m:3", tmp_path / f"{dtype}.safetensors", dtype=dtype).path
        for precision in ("fp32", "bf16", "int8") if find_spec("numba") else ("fp32",):
            narrow = ESM2.from_pretrained(path, precision=precision)
            a, b = (m.encode(["MKTAYIAKQR"])[0].embeddings[6] for m in (full, narrow))
            assert 0 < np.abs(a - b).max() < max(atol, {"fp32": 0, "bf16": 0.2, "int8": 0.5}[precision])


def test_model_from_a_file_can_be_pickled_and_saved(tmp_path: Path) -> None:
    from numpyesm.weights import convert

    path = convert("synthetic:esm2-8m:3", tmp_path / "a.safetensors").path
    loaded = ESM2.from_pretrained(path, backend="numpy", threads=2)
    expected = loaded.encode(["MKT"], include=["mean", "contacts"])
    again = pickle.loads(pickle.dumps(loaded))  # noqa: S301 - our own bytes
    assert repr(again) == repr(loaded)
    assert_same(again.encode(["MKT"], include=["mean", "contacts"]), expected)
    assert_same(copy.deepcopy(loaded).encode(["MKT"], include=["mean", "contacts"]), expected)
    loaded.save(tmp_path / "b.safetensors")
    saved = ESM2.from_pretrained(str(tmp_path / "b.safetensors"), backend="numpy")
    assert_same(saved.encode(["MKT"], include=["mean", "contacts"]), expected)
    assert len(pickle.dumps(loaded)) < 10_000


def test_model_without_a_file_says_how_to_pickle(model: ESM2) -> None:
    with pytest.raises(pickle.PicklingError, match="save it"):
        pickle.dumps(model)


def test_repr_says_what_it_is(model: ESM2) -> None:
    text = repr(model)
    for part in ("3 layers", "width 80", "20 heads", "numpy", "fp32", "threads=2", "SYNTHETIC"):
        assert part in text


def test_synthetic_weights_are_loud() -> None:
    with pytest.warns(SyntheticWeightsWarning, match="mean nothing"):
        ESM2.from_pretrained("synthetic:esm2-8m")


def test_several_threads_share_one_model(model: ESM2) -> None:
    batches = [[random_sequence(n, seed) for n in (70, 20, 150)] for seed in range(6)]
    expected = [model.encode(batch, include=ALL) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(lambda b: model.encode(b, include=ALL), batches), expected, strict=True):
                assert_same(found, wanted, within=ROUNDING)


def test_failure_in_a_worker_reaches_the_caller_and_leaves_the_model_usable(
    model: ESM2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(NumpyKernels, "project_and_feed_forward", fail)
        with pytest.raises(MemoryError, match="no room"):
            model.encode(MIXED)
    assert len(model.encode(MIXED)) == len(MIXED)


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
    import _thread

    threading.Thread(target=lambda: (begun.wait(), _thread.interrupt_main())).start()
    with pytest.raises(KeyboardInterrupt):
        model.encode([random_sequence(2000)])
    done = len(blocks)
    threading.Event().wait(0.2)
    assert len(blocks) == done < 20


def test_large_scores_do_not_overflow() -> None:
    """Attention so sharp that exp of a raw score would overflow float32."""
    checkpoint = random_checkpoint(SMALL)
    for layer in range(SMALL.num_layers):
        checkpoint.tensors[f"layers.{layer}.qkv.weight"].raw[:, :160] *= 30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntheticWeightsWarning)
        ours, truth = ESM2(checkpoint, backend="numpy"), ESM2(checkpoint, backend="numpy", precision="fp64")
    a, b = (m.encode([random_sequence(90)], [1], ["mean", "attentions"])[0] for m in (ours, truth))
    assert np.isfinite(a.embeddings[1]).all()
    np.testing.assert_allclose(a.embeddings[1], b.embeddings[1], atol=1e-3)
