"""The look-alike against the real fair-esm: same calls, same numbers."""

from __future__ import annotations

import contextlib
import gzip
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, SMALL, largest, random_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

import numpyesm.compat.fair_esm as look_alike
from numpyesm import ESM2, InvalidSequence, MissingHead
from numpyesm.compat import extract
from numpyesm.compat.fair_esm.data import NotSupported, UnknownToken
from numpyesm.config import OFFICIAL_NAMES
from numpyesm.errors import InputWarning

torch = pytest.importorskip("torch")
fair = pytest.importorskip("esm")

from make_checkpoints import as_checkpoint, fair_esm_model, write_fair_esm  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")]

OURS = look_alike.Alphabet.from_architecture("ESM-1b")
THEIRS = fair.Alphabet.from_architecture("ESM-1b")

QUICK_START = [
    ("protein1", "MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG"),
    ("protein2", "KALTARQQEVFDLIRDHISQTGMPPTRAEIAQRLGFRSPNAAEEHLKALARKGVIEIVSGASRGIRLLQEE"),
    ("protein2 with mask", "KALTARQQEVFDLIRD<mask>ISQTGMPPTRAEIAQRLGFRSPNAAEEHLKALARKGVIEIVSGASRGIRLLQEE"),
    ("protein3", "K A <mask> I S Q"),
]


def batch(*sequences: str) -> Any:
    return OURS.get_batch_converter().convert([("", sequence) for sequence in sequences])[2]


# Tokens of batches, and matrices of tokens that no converter makes.
TOKENS = {
    "quick start": batch(*(sequence for _, sequence in QUICK_START)),
    "one": batch("MKTAYIAKQR"),
    "lengths": batch(*(random_sequence(n, 7) for n in (40, 1, 130, 2, 65, 3, 64))),
    "letters": batch("BXZUO.-", "XX", "<mask><mask>", "A<unk>C<null_1>D", "W"),
    "inner eos": batch("MK<eos>TAYIA", "ACDEFGHIKLMNP", "<cls>MK"),
    "empty": batch("", "MKT"),
    "no ends": [[5, 6, 7, 8]],
    "no eos": [[0, 5, 6, 7, 8], [0, 5, 6, 1, 1]],
    "cut off": [[0, 32, 6, 2, 1, 1], [0, 4, 5, 6, 7, 2]],
    "fair-esm's own test": [[0, 1, 2], [3, 4, 5]],
    "padding between": [[0, 5, 1, 6, 7, 2], [1, 1, 5, 6, 1, 1], [0, 5, 6, 7, 8, 2]],
    "padding and masks": [[0, 32, 1, 5, 32, 6, 1, 2], [0, 5, 2, 1, 6, 7, 1, 1]],
    "anything": np.random.default_rng(5).integers(0, 33, (3, 90)),
}


@pytest.fixture(scope="module", params=BACKENDS)
def models(request: pytest.FixtureRequest) -> Any:
    """(fair-esm, look-alike) with the same random weights, attention peaked and contacts spread."""
    theirs = fair_esm_model(SMALL, 2, 2.0)
    return theirs, look_alike.ESM2(ESM2(as_checkpoint(theirs), backend=request.param, threads=2))


def run_theirs(model: Any, tokens: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(torch.as_tensor(tokens), **options)


# -- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENS)
def test_dictionary(models: Any, name: str) -> None:
    """Computed at every place up to a row's last token, that of padding between tokens included."""
    theirs, ours = models
    tokens = np.array(TOKENS[name])
    layers = range(ours.num_layers + 1)
    expected = run_theirs(theirs, tokens, repr_layers=layers, return_contacts=True)
    found = ours(tokens, repr_layers=layers, return_contacts=True)
    assert list(found) == list(expected)
    assert list(found["representations"]) == list(expected["representations"])
    behind = np.flip(np.flip(tokens == 1, axis=1).cumprod(axis=1), axis=1).astype(bool)
    rows = [(found["representations"][n], expected["representations"][n].numpy(), 2e-4) for n in layers]
    for values, fairs, within in (*rows, (found["logits"], expected["logits"].numpy(), 3e-3)):
        assert values.shape == fairs.shape
        assert largest(values[~behind], fairs[~behind]) < within
        assert not values[behind].any()
    # Padding included: zeros in attentions, the bias alone in contacts.
    assert largest(found["attentions"], expected["attentions"]) < 1e-5
    with_residues = ~np.isnan(expected["contacts"].numpy())  # fair-esm divides 0 by 0 where a row has none
    assert largest(found["contacts"][with_residues], expected["contacts"].numpy()[with_residues]) < 1e-3
    for kind in ("logits", "attentions", "contacts"):
        assert (type(found[kind]), found[kind].dtype) == (np.ndarray, np.float32)
        assert found[kind].shape == expected[kind].shape
        assert np.isfinite(found[kind]).all()
    np.testing.assert_allclose(ours.predict_contacts(tokens), found["contacts"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours(tokens)["logits"], found["logits"], rtol=0, atol=1e-4)


def test_what_was_not_asked_for_is_absent(models: Any) -> None:
    theirs, ours = models
    tokens = np.array([[0, 5, 6, 2]])
    for options in ({}, {"repr_layers": [-1, 3, 99]}, {"need_head_weights": True}, {"return_contacts": True}):
        found, expected = ours(tokens, **options), run_theirs(theirs, tokens, **options)
        assert list(found) == list(expected)
        assert list(found["representations"]) == list(expected["representations"])


@pytest.mark.slow
def test_longer_than_encode_allows(models: Any) -> None:
    theirs, ours = models
    tokens = batch(random_sequence(2060, 1))
    expected = run_theirs(theirs, tokens, repr_layers=[3])["representations"][3]
    assert largest(ours(tokens, repr_layers=[3])["representations"][3], expected) < 1e-3


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([0, 5, 2], "shape"),
        ([[0.0, 5.0, 2.0]], "whole numbers"),
        ([[]], "shape"),
        ([[0, 33, 2]], "no token 33"),
        ([[0, -1, 2]], "no token -1"),
        ([[0, 5, 2], [1, 1, 1]], "item 1: nothing but padding"),
        ([[0, 5, 2], [32, 32, 1]], "item 1: nothing but <mask>"),
    ],
)
def test_tokens_that_are_refused(models: Any, tokens: Any, said: str) -> None:
    with pytest.raises(InvalidSequence, match=said):
        models[1](tokens)


def test_attributes_and_torch_habits(models: Any) -> None:
    theirs, ours = models
    numbers = {name: value for name, value in vars(theirs).items() if isinstance(value, int) and name[0] != "_"}
    assert len(numbers) > 10
    for name in numbers.keys() - {"embed_scale"}:
        assert getattr(ours, name) == numbers[name], name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.eval().cpu().float().to("cpu").to(device="cpu").train(False).requires_grad_(False) is ours
    for call in (ours.cuda, ours.half, ours.bfloat16, lambda: ours.to("cuda:0"), lambda: ours.to(torch.float16)):
        with pytest.warns(UserWarning, match="changes nothing"):
            assert call() is ours
    assert not isinstance(ours, look_alike.MSATransformer)
    for lacking in (ours.train, lambda: look_alike.ESM2(33, 1280, 20), look_alike.ProteinBertModel):
        with pytest.raises(NotSupported):
            lacking()


def test_without_heads() -> None:
    checkpoint = as_checkpoint(fair_esm_model())
    trunk = {name: t for name, t in checkpoint.tensors.items() if not name.startswith(("lm_head", "contact_head"))}
    model = look_alike.ESM2(ESM2(replace(checkpoint, tensors=trunk), backend="numpy"))
    assert list(model([[0, 5, 2]], repr_layers=[2])) == ["representations"]
    with pytest.raises(MissingHead):
        model([[0, 5, 2]], return_contacts=True)


# -- alphabet and batches ----------------------------------------------------------------------------------------

WORDS = [*THEIRS.all_toks, " ", "  ", "\t", "\n", "j", "J", "*", "a", "<", ">", "<mask", "mask>"]


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=30).map("".join))
def test_tokenize_like_fair_esm(text: str) -> None:
    tokens = THEIRS.tokenize(text)
    assert OURS.tokenize(text) == tokens
    with contextlib.nullcontext() if set(tokens) <= set(THEIRS.all_toks) else pytest.raises(KeyError):
        assert OURS.encode(text) == THEIRS.encode(text)


@pytest.mark.parametrize("name", ["ESM-1b", "roberta_large"])
def test_alphabet(name: str) -> None:
    ours, theirs = (package.Alphabet.from_architecture(name) for package in (look_alike, fair))
    assert len(ours) == len(theirs)
    assert len(vars(theirs)) > 10
    for attribute, value in vars(theirs).items():
        assert getattr(ours, attribute) == value, attribute
    assert ours.to_dict() == theirs.to_dict()
    for token in ("A", "<mask>", "nothing"):
        assert ours.get_idx(token) == theirs.get_idx(token)
    assert ours.get_tok(7) == theirs.get_tok(7)
    with pytest.raises(ValueError, match="'msa_transformer': numpyesm has ESM-2 only"):
        look_alike.Alphabet.from_architecture("msa_transformer")


@pytest.mark.parametrize("truncation", [None, 0, 1, 5, 1022])
def test_batch_converter(truncation: int | None) -> None:
    data = [*QUICK_START, ("empty", ""), ("same", "MKT"), ("same", "BXZUO.-<unk>")]
    labels, strs, tokens = OURS.get_batch_converter(truncation)(data)
    expected_labels, expected_strs, expected = THEIRS.get_batch_converter(truncation)(data)
    assert (labels, strs) == (expected_labels, expected_strs)
    np.testing.assert_array_equal(tokens, expected.numpy())
    assert tokens.dtype == np.int64


def test_letters_that_are_no_tokens() -> None:
    with pytest.raises(UnknownToken, match=r"item 1: 't' at position 3 is not a token.*lower case") as caught:
        OURS.get_batch_converter()([("a", "MKT"), ("b", "MKtA")])
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, InvalidSequence)
    assert (caught.value.item, caught.value.position, caught.value.character) == (1, 3, "t")
    with pytest.raises(InvalidSequence, match="empty"):
        OURS.get_batch_converter()([])


def test_fasta_batched_dataset(tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    lengths = "".join(f">s{i}\n{'A' * (i % 17 + 1)}\n" for i in range(60))
    path.write_text(f">one first\nMKTAYI\nAKQR\n>\nMK\n\n>three\nacd\n{lengths}")
    ours, theirs = (package.FastaBatchedDataset.from_file(path) for package in (look_alike, fair))
    assert len(ours) == len(theirs) == 63
    assert [ours[i] for i in range(63)] == [theirs[i] for i in range(63)]
    for tokens, extra in ((1, 0), (20, 1), (64, 0), (64, 2), (4096, 1)):
        assert ours.get_batch_indices(tokens, extra) == theirs.get_batch_indices(tokens, extra)
    assert list(look_alike.data.read_fasta(path, to_upper=True)) == list(fair.data.read_fasta(path, to_upper=True))
    path.write_text("> a\nMKT-\n>>b c\nMKabT.\nA\n")  # A3M
    for options in ({}, {"keep_gaps": False}, {"keep_insertions": False}):
        assert list(look_alike.data.read_fasta(path, **options)) == list(fair.data.read_fasta(path, **options))
    for text, said in ((">a\nMK\n>a\nMT\n", "'a'"), ("MK\n>a\nMT\n", "line 1: expected a header")):
        path.write_text(text)
        with pytest.raises(InvalidSequence, match=said):
            look_alike.FastaBatchedDataset.from_file(path)
    # Both readers are those of `numpyesm.fasta`: any encoding, compressed, with grep's separators.
    path.write_bytes(gzip.compress(">Protéine A\r\nMKT\r\nAYI\r\n--\r\n>b\r\nM<mask>T\r\n".encode("latin-1")))
    expected = [("Protéine A", "MKTAYI"), ("b", "M<mask>T")]
    for read in (look_alike.FastaBatchedDataset.from_file, look_alike.data.read_fasta):
        with pytest.warns(InputWarning, match="--"):
            assert list(read(path)) == expected


# -- loading and scripts -----------------------------------------------------------------------------------------


def test_checkpoints_on_disk(tmp_path: Path) -> None:
    """A .pt file as fair-esm publishes them, the regression beside it."""
    theirs = fair_esm_model()
    path = write_fair_esm(tmp_path / "esm2_tiny.pt", theirs)
    tokens = batch("MKTAYI", "MK<mask>")
    for name in ("load_model_and_alphabet", "load_model_and_alphabet_local", "load_model_and_alphabet_hub"):
        model, alphabet = getattr(look_alike.pretrained, name)(str(path), backend="numpy")
        assert largest(model.predict_contacts(tokens), theirs.predict_contacts(torch.as_tensor(tokens)).detach()) < 1e-5
        assert alphabet.all_toks == THEIRS.all_toks


def test_pretrained_names() -> None:
    for name in OFFICIAL_NAMES.values():
        assert callable(getattr(look_alike.pretrained, name))
    for name in ("esm1v_t33_650M_UR90S_1", "esm_msa1b_t12_100M_UR50S", "esm_if1_gvp4_t16_142M_UR50", "esmfold_v1"):
        with pytest.raises(NotSupported, match="numpyesm has esm2_t6_8M"):
            getattr(look_alike.pretrained, name)()
        with pytest.raises(NotSupported):
            look_alike.pretrained.load_model_and_alphabet(name)
    with pytest.raises(AttributeError):
        look_alike.pretrained.nonsense  # noqa: B018


FASTA = f">one first\nMKTAYIAKQR\n>two\n{'ACDEFGHIKL' * 5}\n>sub/three\nMKX-\n"


@pytest.fixture
def run_extract(small_file: str, tmp_path: Path) -> Any:
    """Run the command on the text of a FASTA file; its outputs are in `out`."""

    def call(fasta: str, *options: str, weights: str = "") -> int:
        (tmp_path / "x.fasta").write_text(fasta)
        return extract.main(
            [weights or small_file, f"{tmp_path}/x.fasta", f"{tmp_path}/out", "--backend", "numpy", *options]
        )

    return call


def test_extract(run_extract: Any, small_file: str, tmp_path: Path, capsys: Any) -> None:
    """fair-esm's arguments; the numbers are those of the model itself."""
    options = ["--repr_layers", "0", "2", "-1", "--include", "mean", "per_tok", "bos", "contacts",
               "--truncation_seq_length", "40", "--toks_per_batch", "64", "--nogpu"]  # fmt: skip
    assert run_extract(FASTA, *options) == 0
    assert capsys.readouterr().err.count("1 sequence (first: sub/three) with gaps (-)") == 1
    model, alphabet = look_alike.pretrained.load_model_and_alphabet(small_file, backend="numpy")
    for label, sequence in look_alike.FastaBatchedDataset.from_file(tmp_path / "x.fasta"):
        found = extract.load(tmp_path / "out" / f"{label}.npz")
        kinds = {"representations", "mean_representations", "bos_representations"}
        assert found.keys() == kinds | {"label", "contacts"}
        assert found["label"] == label
        _, _, tokens = alphabet.get_batch_converter(40)([(label, sequence)])
        expected = model(tokens, repr_layers=[0, 2, 3], return_contacts=True)
        for layer in (0, 2, 3):
            rows = expected["representations"][layer][0]
            for kind, values in (("", rows[1:-1]), ("mean_", rows[1:-1].mean(axis=0)), ("bos_", rows[0])):
                np.testing.assert_allclose(found[f"{kind}representations"][layer], values, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["contacts"], expected["contacts"][0], rtol=0, atol=1e-5)
        with np.load(tmp_path / "out" / f"{label}.npz") as plain:
            assert plain["representations_3"].shape == (min(40, len(sequence)), 80)
    assert not list((tmp_path / "out").rglob("*.tmp"))


ONE = "MKTAYIAKQR"
FIRST = "--repr_layers 1 3 --include mean per_tok"


@pytest.mark.parametrize(
    ("sequence", "options", "kept"),
    [
        (ONE, FIRST, True),
        (ONE, "--repr_layers -1 --include per_tok", True),  # less than the file holds
        (ONE, "--repr_layers 1 2 --include mean per_tok", False),
        (ONE, "--repr_layers 1 3 --include contacts", False),
        (ONE, f"{FIRST} --truncation_seq_length 9", False),
        (ONE, f"{FIRST} --weights synthetic:esm2-8m:2", False),
        ("MKTAYIAKQK", FIRST, False),
        ("damaged", FIRST, False),
    ],
)
def test_extract_skips_only_files_that_hold_what_is_asked(
    run_extract: Any, tmp_path: Path, sequence: str, options: str, kept: bool
) -> None:
    path = tmp_path / "out" / "one.npz"
    assert run_extract(f">one\n{ONE}\n", *FIRST.split()) == 0
    with np.load(path) as plain:
        assert len(plain.files) == 5  # what tells the model apart is no array
    if sequence == "damaged":
        path.write_bytes(path.read_bytes()[:-40])
        sequence = ONE
    before = path.stat().st_ino, path.stat().st_mtime_ns
    another = ">two\nMKT\n" if kept and options == FIRST else ""  # in the same batch
    options, _, weights = options.partition(" --weights ")
    again = partial(run_extract, f">one\n{sequence}\n{another}", *options.split(), weights=weights)
    assert again("--skip_existing") == 0
    assert ((path.stat().st_ino, path.stat().st_mtime_ns) == before) is kept
    assert path.with_name("two.npz").exists() == bool(another)
    if not kept:  # whatever was there, the file now holds what a first run would have written
        found = extract.load(path)
        path.unlink()
        assert again() == 0
        np.testing.assert_equal(found, extract.load(path))


@pytest.mark.parametrize(
    ("fasta", "options", "said"),
    [
        (">../../evil\nMKT\n", [], "would be outside"),
        (">/etc/evil\nMKT\n", [], "would be outside"),
        (f">{'x' * 300}\nMKT\n", [], "too long"),
        (">a\nMKT\n>b\nMKtA\n", [], "record 'b': 't' at position 3"),
        (">a\n\n", [], "no sequence"),
        (">a\nMK<pad>\n", [], "record 'a': <pad> and <eos> are no residues"),
        (">a\nMK\n>a\nMT\n", [], "two records"),
        (">a\nMK\n>./a\nMT\n", [], "two records"),
        (">a\nMKT\n", ["--repr_layers", "7"], "3 layers"),
        (">a\nMKT\n", ["--truncation_seq_length", "0"], "at least 1"),
    ],
)
def test_extract_refuses(
    run_extract: Any, tmp_path: Path, capsys: Any, fasta: str, options: list[str], said: str
) -> None:
    assert run_extract(fasta, "--include", "mean", *options) in (1, 2)
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.skipif(sys.platform == "win32", reason="names are bytes elsewhere")
def test_names_beyond_ascii_in_a_c_locale(small_file: str, tmp_path: Path) -> None:
    """The names of files are UTF-8 whatever the locale, and no message fails to be printed."""
    (tmp_path / "é.fasta").write_text(">Protéine_Δ\nMKT\n>蛋白/質\nMKA\n", "utf-8-sig")
    (tmp_path / "ü.fasta").write_text(">é\nMkT\n", "utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name, said in (("ü.fasta", "'k' at position 2"), ("é.fasta", "")):
        command = [sys.executable, "-m", "numpyesm.compat.extract", small_file, name, "ô", "--include", "mean"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
        assert (done.returncode, said.encode() in done.stderr, b"Traceback" in done.stderr) == (bool(said), True, False)
    names = sorted(os.path.relpath(path, tmp_path / "ô") for path in (tmp_path / "ô").rglob("*.npz"))
    assert names == ["Protéine_Δ.npz", "蛋白/質.npz"]
    assert extract.load(tmp_path / "ô" / "Protéine_Δ.npz")["label"] == "Protéine_Δ"
