"""A trained 8M model: float32 against transformers, from 1 to 2048 residues; the gates of bf16 and int8."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trained_weights
from conftest import BACKENDS, assert_float32_rule, outputs_of_reference

from numpyesm import ESM2, reference
from numpyesm.alphabet import tokenize
from numpyesm.config import PRESETS
from numpyesm.kernels.compiled.isa import host_isa, host_levels
from numpyesm.weights.conversion import convert

mk = pytest.importorskip("make_checkpoints")
torch = mk.torch

pytestmark = [pytest.mark.trained_weights, pytest.mark.slow]

# -- float32: all layers, attentions, logits, contacts ---------------------------------------------------------------

# The judge is reference.py. Up to 300 residues it is held against transformers in float64 with the checkpoint's own
# frequencies, which takes tens of gigabytes at 2048.
LENGTHS = (1, 2, 10, 76, 300, 1022, 2048)
LONGEST_IN_FLOAT64, LONGEST_FOR_MAPS = 300, 1022  # torch holds every attention map
LAYERS = range(trained_weights.LAYERS + 1)

Outputs = dict[str, np.ndarray]


def sequences_of(length: int) -> list[str]:
    """Natural text of any length: real proteins, one behind the other.

    Few residues are judged twenty sequences at a time: from one to the next, torch's error varies threefold.
    """
    text = "".join(trained_weights.real_proteins().values())
    return [text[length * i : length * (i + 1)] for i in range(20 if length < 10 else 1)]


def write(folder: Path, random_contacts: bool = False) -> Path:
    """The trained model as transformers wrote it."""
    tensors = trained_weights.hugging_face_tensors(random_contacts)
    return mk.write_hugging_face(folder, tensors, mk.hugging_face_config(PRESETS["esm2-8m"]))


def outputs_of_transformers(checkpoint: Path, sequence: str, dtype: Any) -> Outputs:
    """The frequencies are those in the file: in float64, others would be far from `reference.py`."""
    from transformers import EsmForMaskedLM

    model = EsmForMaskedLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=dtype).eval()
    tokens = torch.from_numpy(tokenize([sequence])[0].astype(np.int64))[None]
    maps = len(sequence) <= LONGEST_FOR_MAPS
    with torch.no_grad(), mk.exact_rotary():
        found = model(tokens, output_hidden_states=True, output_attentions=maps)
        outputs = {f"per_token_{n}": found.hidden_states[n][0, 1:-1].numpy() for n in LAYERS}
        outputs["logits"] = found.logits[0, 1:-1, 4:24].numpy()
        if maps:
            attentions = [one[0].mean(dim=(0, 1))[1:-1].numpy() for one in found.attentions]
            outputs["attentions"] = np.stack(attentions)
            del found
            outputs["contacts"] = model.predict_contacts(tokens, torch.ones_like(tokens))[0].numpy()
    return outputs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("trained"), random_contacts=True)


@pytest.fixture(scope="module", params=LENGTHS)
def truth(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[list[str], list[Outputs], list[Outputs]]:
    """Sequences, their outputs in float64, and transformers' in float32."""
    pytest.importorskip("transformers")
    sequences = sequences_of(request.param)
    weights = reference.nested(ESM2.from_pretrained(checkpoint, backend="numpy").checkpoint)
    exact = [outputs_of_reference(weights, tokens) for tokens in tokenize(sequences)]
    if request.param <= LONGEST_IN_FLOAT64:
        for name, values in outputs_of_transformers(checkpoint, sequences[0], torch.float64).items():
            assert np.abs(values - exact[0][name]).max() < 1e-9, name
    return sequences, exact, [outputs_of_transformers(checkpoint, sequence, torch.float32) for sequence in sequences]


@pytest.mark.parity
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_as_exact_as_torch(truth: Any, checkpoint: Path, backend: str) -> None:
    sequences, exact, torchs = truth
    include = ["per_token", "logits", "attentions", "contacts"]
    results = ESM2.from_pretrained(checkpoint, backend=backend).encode(sequences, LAYERS, include)
    found = [result.to_arrays() for result in results]
    for name in found[0]:
        sides = ([arrays[name] for arrays in side] for side in (found, exact, torchs) if name in side[0])
        assert_float32_rule(name, *sides)


# -- bf16 and int8 on real proteins of 21 to 659 residues, six of them under 40 --------------------------------------

# Judged in float64 on the last layer: the cosine of every residue's embedding and of every protein's mean.
# Smallest cosine of a residue, its first percentile, smallest cosine of a mean.
GATES = {"bf16": (0.9993, 0.9998, 0.9999), "int8": (0.997, 0.9985, 0.9993)}
LAST = trained_weights.LAYERS

Vectors = tuple[np.ndarray, np.ndarray]  # of one protein: the mean (D,), and residues (L, D)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trunk as transformers wrote it, and converted to every precision."""
    folder = write(tmp_path_factory.mktemp("trained"))
    for dtype in ("fp32", *GATES):
        convert(folder, folder / f"{dtype}.safetensors", dtype=dtype)
    return folder


def encode(path: Path, backend: str, precision: str) -> list[Vectors]:
    model = ESM2.from_pretrained(path, backend=backend, precision=precision)
    results = model.encode(list(trained_weights.real_proteins().values()), [LAST], ["mean", "per_token"])
    return [(result.embeddings[LAST], result.per_token_embeddings[LAST]) for result in results]


@pytest.fixture(scope="module")
def exact(folder: Path) -> list[Vectors]:
    return encode(folder / "fp32.safetensors", "numpy", "fp64")


def cosines(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Cosines between the vectors on the last axis, in float64."""
    found = found.astype(np.float64)
    return (found * exact).sum(-1) / np.sqrt((found * found).sum(-1) * (exact * exact).sum(-1))


def assert_in_gates(found: list[Vectors], exact: list[Vectors], precision: str) -> None:
    pairs = list(zip(found, exact, strict=True))
    means = [cosines(a, b) for (a, _), (b, _) in pairs]
    residues = np.concatenate([cosines(a, b) for (_, a), (_, b) in pairs])
    values = residues.min(), np.quantile(residues, 0.01), min(means)
    print(f"{precision}: smallest {values[0]:.5f}, 1st percentile {values[1]:.5f}, mean {values[2]:.5f}")
    assert all(value >= gate for value, gate in zip(values, GATES[precision], strict=True)), values


@pytest.mark.parametrize("precision", GATES)
@pytest.mark.parametrize(
    ("backend", "source"), [("numpy", ""), ("numba", ""), ("numba", "fp32.safetensors"), ("numba", "checkpoint")]
)
def test_gates(folder: Path, exact: list[Vectors], precision: str, backend: str, source: str) -> None:
    """From a file in this precision, from one in float32, and from the checkpoint itself."""
    pytest.importorskip(backend)
    path = folder if source == "checkpoint" else folder / (source or f"{precision}.safetensors")
    assert_in_gates(encode(path, backend, precision if backend == "numba" else "fp32"), exact, precision)


@pytest.mark.parametrize("precision", GATES)
def test_other_way_of_bf16(folder: Path, exact: list[Vectors], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best instruction set that treats it in the other way, in a process of its own."""
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMPYESM_ISA", next(n for n, isa in host_levels().items() if isa.bf16 != host_isa().bf16))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(encode, folder / f"{precision}.safetensors", "compiled", precision).result()
    assert_in_gates(found, exact, precision)
