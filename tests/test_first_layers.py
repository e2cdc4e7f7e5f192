"""`convert --layers N`: a model of the first layers, whose representations are those of the whole one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, SMALL, assert_same, random_sequence

from numpyesm import ESM2, MissingHead
from numpyesm.alphabet import tokenize
from numpyesm.cli import main
from numpyesm.errors import CheckpointError, InvalidOption
from numpyesm.reference import forward, nested
from numpyesm.weights import convert, load_checkpoint, save_canonical
from numpyesm.weights.checkpoint import FREQUENCIES, computed_frequencies
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
@pytest.mark.parametrize(("dtype", "within"), [("fp32", 1e-5), ("int8", 1e-4)])
def test_representations_are_those_of_the_whole_model(
    folder: Path, tmp_path: Path, backend: str, dtype: str, within: float
) -> None:
    whole, two = (
        ESM2.from_pretrained(convert(folder / "whole.safetensors", path, layers=n, dtype=dtype).path, backend=backend)
        for n, path in ((3, tmp_path / "3.safetensors"), (2, tmp_path / "2.safetensors"))
    )
    outputs = ["mean", "per_token", "bos", "attentions"]
    expected, found = whole.encode(SEQUENCES, [0, 1, 2], outputs), two.encode(SEQUENCES, [0, 1, -1], outputs)
    for result in expected:
        result.attentions = result.attentions[:2]
    assert_same(found, expected, within=1e-6)
    exact = forward(tokenize(SEQUENCES[:1])[0], **nested(two.checkpoint))["representations"]
    np.testing.assert_allclose(expected[0].bos_embeddings[2], exact[2, 0], rtol=0, atol=within)
    frequencies = load_checkpoint(folder / "whole.safetensors").array(FREQUENCIES)
    assert not np.array_equal(frequencies, computed_frequencies(SMALL.head_dim))
    np.testing.assert_array_equal(two.checkpoint.array(FREQUENCIES), frequencies)


def test_what_needs_all_layers_says_why(folder: Path) -> None:
    model = ESM2.from_pretrained(folder / "two.safetensors", backend="numpy")
    assert model.config.whole_layers == 3
    assert model.name == "custom-first-2"
    for output in ("contacts", "logits"):
        with pytest.raises(MissingHead, match=r"are the first 2 of 3 layers, and the .* head needs all of them"):
            model.encode(["MK"], include=[output])


def test_layers_of_layers_and_of_all(folder: Path, tmp_path: Path) -> None:
    one = convert(folder / "two.safetensors", tmp_path, layers=1)
    assert one.path == tmp_path / "synthetic-custom-first-1.safetensors"  # not a real model's name
    assert one.checkpoint.config.whole_layers == 3
    whole = convert(folder / "whole.safetensors", tmp_path / "all.safetensors", layers=3).checkpoint
    assert whole.has_lm_head
    assert whole.config == load_checkpoint(folder / "whole.safetensors").config
    for count in (0, 4, -1):
        with pytest.raises(InvalidOption, match=rf"layers={count}: custom has 3 layers, expected 1 to 3"):
            convert(folder / "whole.safetensors", tmp_path / "none.safetensors", layers=count)
    assert not (tmp_path / "none.safetensors").exists()


def test_a_file_that_states_fewer_layers_than_it_has(folder: Path, tmp_path: Path) -> None:
    content, bad = (folder / "two.safetensors").read_bytes(), tmp_path / "bad.safetensors"
    for whole in (b"2", b"0"):
        bad.write_bytes(content.replace(b'\\"whole_layers\\": 3', b'\\"whole_layers\\": ' + whole))
        with pytest.raises(CheckpointError, match="whole_layers="):
            load_checkpoint(bad)


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "c.safetensors"
    assert main(["convert", str(folder / "whole.safetensors"), "-o", str(output), "--layers", "1"]) == 0
    assert "custom-first-1" in capsys.readouterr().err
    for command, code in ((["contacts", "MKTAYIAK"], 1), (["verify"], 2)):
        assert main([*command, "--weights", str(output)]) == code
        assert "are the first 1 of 3 layers" in capsys.readouterr().err
