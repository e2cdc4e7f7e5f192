"""`verify` finds a model that is wrong in one point, and says what differs and by how much; checksums are verified.

Where the official weights are (see weights/README.md), nothing differs.
"""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numpyesm import ESM2
from numpyesm.config import ModelConfig
from numpyesm.errors import CheckpointError, InvalidOption
from numpyesm.files import file_sha256
from numpyesm.verification import compare_with_reference, published_numbers
from numpyesm.weights import convert, load_checkpoint, save_canonical
from numpyesm.weights.checkpoint import FREQUENCIES, Checkpoint, computed_frequencies
from numpyesm.weights.integrity import SUMS_FILE
from numpyesm.weights.load import open_checkpoint
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import StoredTensor

pytestmark = pytest.mark.usefixtures("quick_calibration")
SHAPE = ModelConfig(num_layers=3, embed_dim=64, num_heads=4, ffn_dim=256)
SEQUENCES = ["MKTFFVLVLLLSGALAAPVA" * 4, "GLDALQITV"]
OUTPUTS = {"mean": "embeddings", "bos": "bos_embeddings", "per_token": "per_token_embeddings"}


@pytest.fixture(scope="module")
def right() -> Checkpoint:
    return replace(random_checkpoint(SHAPE, 2), synthetic=False, source="the right one")


@pytest.fixture(scope="module")
def numbers(right: Checkpoint) -> dict[str, Any]:
    """What the right model computes in float64, in the form of the published numbers."""
    model = ESM2(right, backend="numpy", precision="fp64")
    cases = []
    for result, sequence in zip(model.encode(SEQUENCES, [1, 3], [*OUTPUTS, "contacts"]), SEQUENCES, strict=True):
        found = {name: getattr(result, field) for name, field in OUTPUTS.items()}
        first = {name: {str(n): rows[..., :2].tolist() for n, rows in by.items()} for name, by in found.items()}
        cases.append({"sequence": sequence, "contacts": result.contacts.tolist(), **first})
    masked = SEQUENCES[0][:5] + "<mask>" + SEQUENCES[0][6:]
    logits = model.predict([masked])[0].logits.tolist()
    return {"encode": cases, "predict": [{"sequence": masked, "logits": logits}]}


@pytest.mark.parametrize("backend", ["numpy", pytest.param("numba", marks=pytest.mark.slow)])
def test_wrong_frequencies_alone_are_found_and_printed(
    right: Checkpoint, numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, run: Any, backend: str
) -> None:
    """Frequencies that are computed, instead of as stored."""
    pytest.importorskip(backend)
    monkeypatch.setattr("numpyesm.verification.published_numbers", lambda name: numbers)
    wrong = replace(right, tensors=right.tensors | {FREQUENCIES: StoredTensor(computed_frequencies(SHAPE.head_dim))})
    for checkpoint, code in ((right, 0), (wrong, 1)):
        save_canonical("x.safetensors", checkpoint)
        done = run("verify", "--weights", "x.safetensors", "--backend", backend)
        assert done.code == code
        lines = [line for line in done.out.decode().splitlines() if line.endswith(("ok", "DIFFERS"))]
        assert len(lines) == 2 * (3 * 2 + 1) + 1
    wrong_ones = [line for line in lines if line.endswith("DIFFERS")]
    assert any("logits" in line for line in wrong_ones)
    worst = next(line for line in wrong_ones if "per_token, layer 3" in line)
    expected, found, deviation = (float(text) for text in worst.split()[4:7])
    assert abs(found - expected) / max(1, abs(expected)) == pytest.approx(deviation, rel=0.1)
    assert "reference values differ: not the official weights" in done.err


def test_a_model_of_nan_fails(right: Checkpoint, numbers: dict[str, Any]) -> None:
    broken = right.tensors | {"final_norm.bias": StoredTensor(np.full(64, np.nan, np.float32))}
    found = compare_with_reference(ESM2(replace(right, tensors=broken), backend="numpy"), numbers)
    assert not any(one.passed for one in found if "layer 3" in one.output)


def test_published_numbers() -> None:
    assert published_numbers("esm2-8m")["encode"][0]["bos"]["6"] == [0.1444, 0.5413, 0.3248]
    assert len(published_numbers("esm2-35m")["encode"]) == 2
    with pytest.raises(InvalidOption, match="esm2-8m and esm2-35m only, these weights are esm2-150m"):
        published_numbers("esm2-150m")


@pytest.mark.official_weights
@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_official_weights_compute_the_reference_numbers(backend: str) -> None:
    model = ESM2.from_pretrained("esm2-35m", backend=backend)
    assert not model.checkpoint.synthetic
    assert [comparison for comparison in compare_with_reference(model) if not comparison.passed] == []
    assert np.count_nonzero(model.checkpoint.array("contact_head.weight")) == 61


# -- checksums -------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(small_file: str, tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    return Path(shutil.copy(small_file, tmp_path / "weights" / "w.safetensors"))


def test_a_flipped_bit_is_found_where_checksums_are_asked_for(
    small_file: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 0x10
    weights.write_bytes(content)
    load_checkpoint(weights)
    for verify in (open_checkpoint, lambda path: convert(path, tmp_path / "out.safetensors")):
        with pytest.raises(CheckpointError, match="corrupted"):
            verify(weights)
    monkeypatch.setenv("NUMPYESM_VERIFY", "1")
    with pytest.raises(CheckpointError, match="corrupted"):
        load_checkpoint(weights)
    load_checkpoint(small_file)
    monkeypatch.setenv("NUMPYESM_VERIFY", "sometimes")
    with pytest.raises(InvalidOption, match="NUMPYESM_VERIFY"):
        load_checkpoint(weights)


def test_verify_compares_every_checksum(run: Any, weights: Path) -> None:
    weights.with_name(SUMS_FILE).write_text(f"{file_sha256(weights)}  w.safetensors\n")
    assert "2 checksums verified" in run("verify", "--weights", str(weights)).err


OWN, ALL = "w.safetensors.sha256", SUMS_FILE


@pytest.mark.parametrize("name", [ALL, OWN])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_a_list_of_checksums_that_is_no_file(weights: Path, name: str, make: Any) -> None:
    """Opening a FIFO would wait for ever."""
    make(weights.with_name(name))
    with pytest.raises(CheckpointError, match=f"{name} should list checksums, but is not a regular file"):
        open_checkpoint(weights)


WRONG, UNREADABLE = "its SHA-256 is not", r"does not state a SHA-256 for w\.safetensors"


@pytest.mark.parametrize(
    ("place", "form", "outcome"),
    [
        (OWN, "{} *w.safetensors\n", WRONG),
        (ALL, "SHA256 (w.safetensors) = {}", WRONG),  # sha256sum --tag, and BSD
        (OWN, "SHA256(w.safetensors)= {}", WRONG),  # openssl
        (ALL, "{}  weights/w.safetensors", WRONG),  # made from the folder above
        (OWN, "{}  before-it-was-renamed.safetensors", WRONG),
        (ALL, "\ufeff{}  w.safetensors\r\n", WRONG),
        # Of other files.
        (ALL, "{}  another.safetensors\n", None),
        (ALL, "{0}  older/w.safetensors\n{0}  xw.safetensors\n\n", None),
        # Of this file by its name: that it cannot be read must not pass for a check.
        (ALL, "what?  w.safetensors\n", UNREADABLE),
        (OWN, "nothing", UNREADABLE),
        (OWN, "{0}  a\n{0}  b\n", UNREADABLE),
    ],
)
def test_a_checksum_beside_the_file(weights: Path, place: str, form: str, outcome: str | None) -> None:
    for digest, message in ((file_sha256(weights), None if outcome is WRONG else outcome), ("0" * 64, outcome)):
        weights.with_name(place).write_text(form.format(digest), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message) if message else nullcontext():
            open_checkpoint(weights)
