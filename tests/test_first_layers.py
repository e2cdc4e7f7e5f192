"""`convert --layers N`: a model of the first layers, whose representations are those of the whole one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, SMALL, random_sequence

from numpyesm import ESM2, MissingHead
from numpyesm.alphabet import tokenize
from numpyesm.cli import main
from numpyesm.errors import CheckpointError, InvalidOption
from numpyesm.reference import forward, nested
from numpyesm.verification import compare_with_reference
from numpyesm.weights import convert, load_checkpoint, save_canonical
from numpyesm.weights.synthetic import random_checkpoint

SEQUENCES = [random_sequence(n) for n in (1, 40, 200)]
pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole.safetensors`, three layers, and `two.safetensors`, the first two of them."""
    folder = tmp_path_factory.mktemp("layers")
    save_canonical(folder / "whole.safetensors", random_checkpoint(SMALL, seed=1))
    convert(folder / "whole.safetensors", folder / "two.safetensors", layers=2)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_representations_are_those_of_the_whole_model(folder: Path, tmp_path: Path, backend: str, dtype: str) -> None:
    models = []
    for layers in (3, 2):
        convert(folder / "whole.safetensors", tmp_path / f"{layers}.safetensors", layers=layers, dtype=dtype)
        models.append(ESM2.from_pretrained(tmp_path / f"{layers}.safetensors", backend=backend))
    outputs = ["mean", "per_token", "bos", "attentions"]
    expected = models[0].encode(SEQUENCES, [0, 1, 2], outputs)
    found = models[1].encode(SEQUENCES, [0, 1, -1], outputs)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("embeddings", "per_token_embeddings", "bos_embeddings"):
            for layer, values in getattr(theirs, name).items():
                np.testing.assert_allclose(getattr(ours, name)[layer], values, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours.attentions, theirs.attentions[:2], rtol=0, atol=1e-6)
    (tokens,) = tokenize(SEQUENCES[:1])
    reference = forward(tokens, **nested(models[1].checkpoint))["representations"]
    np.testing.assert_allclose(
        expected[0].bos_embeddings[2], reference[2, 0], rtol=0, atol=1e-4 if dtype == "int8" else 1e-5
    )


def test_what_needs_all_layers_says_why(folder: Path) -> None:
    model = ESM2.from_pretrained(folder / "two.safetensors", backend="numpy")
    assert model.config.whole_layers == 3
    assert model.name == "custom-first-2"
    for call in (
        lambda: model.encode(["MK"], include=["contacts"]),
        lambda: model.encode(["MK"], include=["logits"]),
        lambda: model.predict(["M<mask>"]),
        lambda: model.log_prob(["MK"]),
        lambda: model.classify(["MK"]),
    ):
        with pytest.raises(MissingHead, match=r"are the first 2 of 3 layers, and the .* head needs all of them"):
            call()
    with pytest.raises(InvalidOption, match="the first 2 of 3 layers: the reference numbers are those of whole models"):
        compare_with_reference(model)


def test_layers_of_layers_and_of_all(folder: Path, tmp_path: Path) -> None:
    one = convert(folder / "two.safetensors", tmp_path, layers=1)
    assert one.path == tmp_path / "synthetic-custom-first-1.safetensors"
    assert one.checkpoint.config.whole_layers == 3
    whole = convert(folder / "whole.safetensors", tmp_path / "all.safetensors", layers=3).checkpoint
    assert whole.has_lm_head
    assert whole.config == load_checkpoint(folder / "whole.safetensors").config
    for count in (0, 4, -1):
        with pytest.raises(InvalidOption, match=rf"layers={count}: custom has 3 layers, expected 1 to 3"):
            convert(folder / "whole.safetensors", tmp_path / "none.safetensors", layers=count)
    assert not (tmp_path / "none.safetensors").exists()


def test_a_file_that_states_fewer_layers_than_it_has(folder: Path, tmp_path: Path) -> None:
    """A configuration that contradicts itself, or the tensors beside it."""
    content = (folder / "two.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    for whole in (b"2", b"0"):
        bad.write_bytes(content.replace(b'\\"whole_layers\\": 3', b'\\"whole_layers\\": ' + whole))
        with pytest.raises(CheckpointError, match="whole_layers="):
            load_checkpoint(bad)


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "c.safetensors"
    assert main(["convert", str(folder / "whole.safetensors"), "-o", str(output), "--layers", "1"]) == 0
    assert "custom-first-1" in capsys.readouterr().err
    assert main(["contacts", "MKTAYIAK", "--weights", str(output)]) == 1
    assert "are the first 1 of 3 layers" in capsys.readouterr().err
    assert main(["verify", "--weights", str(output)]) == 2
    assert "are the first 1 of 3 layers" in capsys.readouterr().err
