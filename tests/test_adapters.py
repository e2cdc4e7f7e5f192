"""PEFT adapters: merged as peft merges them; anything but plain LoRA, or for another base, is refused by name."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, SMALL, random_sequence
from safetensors.numpy import load_file, save_file

from numpyesm import ESM2
from numpyesm.config import ModelConfig
from numpyesm.errors import CheckpointError, WeightsNotFound
from numpyesm.weights import convert, load_checkpoint, open_weights, save_canonical
from numpyesm.weights.adapter import merged, read_adapter
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import DeferredTensor

pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")

WIDTH, FFN = SMALL.embed_dim, SMALL.ffn_dim
# Sizes (in, out) of every module that may be adapted, and where it is in the canonical layout.
MODULES = {
    "attention.self.query": (WIDTH, WIDTH, "qkv", slice(0, WIDTH)),
    "attention.self.key": (WIDTH, WIDTH, "qkv", slice(WIDTH, 2 * WIDTH)),
    "attention.self.value": (WIDTH, WIDTH, "qkv", slice(2 * WIDTH, None)),
    "attention.output.dense": (WIDTH, WIDTH, "out_proj", slice(None)),
    "intermediate.dense": (WIDTH, FFN, "fc1", slice(None)),
    "output.dense": (FFN, WIDTH, "fc2", slice(None)),
}
CLASSIFIER = {
    "classifier.dense.weight": (WIDTH, WIDTH),
    "classifier.dense.bias": (WIDTH,),
    "classifier.out_proj.weight": (3, WIDTH),
    "classifier.out_proj.bias": (3,),
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_canonical(path, random_checkpoint(SMALL, 1))
    return path


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def lora(rank: int = 4, modules: Any = MODULES, layers: int = SMALL.num_layers) -> Arrays:
    tensors = {}
    for layer in range(layers):
        for number, module in enumerate(modules):
            inputs, outputs, *_ = MODULES[module]
            name = f"base_model.model.esm.encoder.layer.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = draw(100 * layer + number, rank, inputs)
            tensors[f"{name}.lora_B.weight"] = draw(100 * layer + number + 50, outputs, rank)
    return tensors


def head() -> Arrays:
    return {f"base_model.model.{name}": draw(len(name), *shape) for name, shape in CLASSIFIER.items()}


def write(folder: Path, tensors: Arrays, base: object = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "base_model_name_or_path": base and str(base), "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("rank", "rslora"), [(4, False), (64, False), (4, True)])
def test_every_target_is_merged(base: Path, tmp_path: Path, rank: int, rslora: bool) -> None:
    tensors = lora(rank)
    folder = write(tmp_path / "adapter", tensors, base, use_rslora=rslora)
    found, plain = open_weights(base, adapter=folder), load_checkpoint(base)
    scale = 8 / (rank**0.5 if rslora else rank)
    for layer in range(SMALL.num_layers):
        wanted = {n: plain.array(f"layers.{layer}.{n}.weight", np.float64) for n in ("qkv", "out_proj", "fc1", "fc2")}
        wanted = {name: np.array(values) for name, values in wanted.items()}
        for module, (_, _, ours, columns) in MODULES.items():
            name = f"base_model.model.esm.encoder.layer.{layer}.{module}"
            a, b = (tensors[f"{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
            wanted[ours][:, columns] += scale * (b @ a).T
        for ours, values in wanted.items():
            np.testing.assert_array_equal(found.array(f"layers.{layer}.{ours}.weight"), values.astype(np.float32))


def test_doors_to_an_adapter(base: Path, tmp_path: Path) -> None:
    """Base and adapter, the adapter alone, the merged file: the same numbers."""
    from numpyesm.cli import main

    folder = write(tmp_path / "adapter", lora() | head(), base, task_type="SEQ_CLS")
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}}))
    merged = tmp_path / "merged.safetensors"
    assert main(["convert", str(base), "--adapter", str(folder), "-o", str(merged)]) == 0
    assert main(["convert", str(folder), "-o", str(tmp_path / "again.safetensors")]) == 0
    assert load_file(merged).keys() == load_file(tmp_path / "again.safetensors").keys()
    sequences = [random_sequence(40), random_sequence(7)]
    models = [
        ESM2.from_pretrained(base, adapter=folder, backend="numpy"),
        ESM2.from_pretrained(folder, backend="numpy"),
        ESM2.from_pretrained(merged, backend="numpy"),
    ]
    first, *others = [model.classify(sequences) for model in models]
    for other in others:
        for one, two in zip(first, other, strict=True):
            np.testing.assert_array_equal(one.probabilities, two.probabilities)
            assert one.labels == two.labels == ["a", "b", "c"]
    plain = ESM2.from_pretrained(base, backend="numpy")
    assert plain.head is None
    assert not np.allclose(plain.encode(sequences)[0].embeddings[3], models[0].encode(sequences)[0].embeddings[3])


def test_patterns_biases_and_old_names(base: Path, tmp_path: Path) -> None:
    query, layer = "attention.self.query", "base_model.model.esm.encoder.layer.1."
    tensors = {name.replace(".lora_A.", ".lora_A.default."): array for name, array in lora(modules=[query]).items()}
    tensors[f"{layer}{query}.base_layer.bias"] = draw(1, WIDTH)
    tensors[f"{layer}LayerNorm.bias"] = draw(2, WIDTH)
    folder = write(tmp_path / "adapter", tensors, base, bias="all", alpha_pattern={"1.attention.self.query": 80})
    found, plain = open_weights(base, adapter=folder), load_checkpoint(base)
    np.testing.assert_array_equal(found.array("layers.1.qkv.bias")[:WIDTH], draw(1, WIDTH))
    np.testing.assert_array_equal(found.array("layers.1.qkv.bias")[WIDTH:], plain.array("layers.1.qkv.bias")[WIDTH:])
    np.testing.assert_array_equal(found.array("layers.1.ffn_norm.bias"), draw(2, WIDTH))
    sizes = [
        np.abs(found.array(f"layers.{i}.qkv.weight") - plain.array(f"layers.{i}.qkv.weight")).max() for i in (0, 1)
    ]
    assert sizes[1] > 5 * sizes[0]


def test_models_of_one_base_share_it(base: Path, tmp_path: Path) -> None:
    folders = [
        write(tmp_path / str(rank), lora(rank, ["attention.self.query"], layers=1), base) for rank in (2, 4)
    ]  # fmt: skip
    first, second = (ESM2.from_pretrained(base, adapter=folder, backend="numpy") for folder in folders)
    for name, tensor in first.checkpoint.tensors.items():
        assert (second.checkpoint.tensors[name] is tensor) == (name != "layers.0.qkv.weight"), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", ["canonical", "deferred"])
def test_further_models_of_a_base_take_little_memory(tmp_path: Path, backend: str, stored: str) -> None:
    config = ModelConfig(2, 320, 20, 1280)
    save_canonical(tmp_path / "base.safetensors", random_checkpoint(config, 1))
    plain = load_checkpoint(tmp_path / "base.safetensors")
    if stored == "deferred":  # as the matrices of a Hugging Face folder are
        made = {
            name: DeferredTensor(tensor.shape, "F32", lambda tensor=tensor: np.array(tensor.raw), [tensor])
            for name, tensor in plain.tensors.items()
        }
        plain = replace(plain, tensors=made)
    query = {"q.lora_A.weight": draw(1, 4, 320), "q.lora_B.weight": draw(2, 320, 4)}
    prefix = "base_model.model.esm.encoder.layer.0.attention.self."
    folder = write(tmp_path / "a", {name.replace("q.", f"{prefix}query."): array for name, array in query.items()})
    adapter = read_adapter(folder)
    models = [ESM2(merged(plain, adapter), backend=backend, threads=1)]
    wanted = models[0].encode(["MKTAYI"])[0].embeddings[2]
    tracemalloc.start()
    models.append(ESM2(merged(plain, adapter), backend=backend, threads=1))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 3_500_000  # of 10 MB of weights: one matrix of 1.2 MB, and a vocabulary
    np.testing.assert_array_equal(models[1].encode(["MKTAYI"])[0].embeddings[2], wanted)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "DoRA": (lora, {"use_dora": True}, "an adapter of DoRA; numpyesm merges LoRA and rsLoRA"),
    "IA3": (lora, {"peft_type": "IA3"}, "an adapter of IA3"),
    "prompt tuning": (lora, {"peft_type": "PROMPT_TUNING"}, "an adapter of prompt tuning"),
    "another kind": (lora, {"peft_type": "VERA"}, "an adapter of VERA"),
    "PiSSA": (lora, {"init_lora_weights": "pissa_niter_4"}, "initialised by pissa_niter_4, which changes the base"),
    "another preset": (
        lora,
        {"base_model_name_or_path": "facebook/esm2_t12_35M_UR50D"},
        r"adapter is an adapter for facebook/esm2_t12_35M_UR50D, not for .*base\.safetensors$",
    ),
    "another width": (
        lambda: {name: np.ones((4, 24) if "lora_A" in name else (24, 4), np.float32) for name in lora()},
        {"base_model_name_or_path": "lab/esm2-of-ours"},
        r"an adapter for lab/esm2-of-ours, not for .*base\.safetensors: its .* has a different size",
    ),
    "more layers": (
        lambda: lora(layers=4),
        {},
        r"for .*base\.safetensors, not for .*base\.safetensors, which has no 'encoder.layer.3",
    ),
    "half a pair": (lambda: {n: a for n, a in lora().items() if "lora_B" not in n}, {}, "lora_B of .* is missing"),
    "an embedding": (
        lambda: {"base_model.model.esm.embeddings.word_embeddings.lora_embedding_A": np.ones((4, 33), np.float32)},
        {},
        "lora_embedding_A', which is not part of a LoRA of a linear map",
    ),
    "NaN": (lambda: {n: a * np.nan for n, a in lora().items()}, {}, "whose numbers are not finite floats"),
    "no alpha": (lora, {"lora_alpha": "8"}, "does not give lora_alpha as a number"),
    "a head of no class": (lambda: lora() | head(), {}, "does not say which class"),
    "a head in part": (
        lambda: {name: array for name, array in head().items() if "out_proj.bias" not in name},
        {"task_type": "SEQ_CLS"},
        "'classifier.out_proj.bias' of its classifier is missing",
    ),
    "head of other labels": (head, {"task_type": "SEQ_CLS"}, "a classifier of 3 outputs, but id2label .* 2 labels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(base: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    from numpyesm.cli import main

    make, config, reason = REFUSED[kind]
    folder = write(tmp_path / "adapter", make(), **({"base": base} | config if "base" not in config else config))
    if kind == "head of other labels":
        (folder / "config.json").write_text('{"id2label": {"0": "a", "1": "b"}}')
    with pytest.raises(CheckpointError, match=reason) as caught:
        ESM2.from_pretrained(base, adapter=folder, backend="numpy")
    assert "\n" not in str(caught.value)
    assert main(["convert", str(base), "--adapter", str(folder), "-o", str(tmp_path / "x.safetensors")]) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_another_base_of_the_same_shape(base: Path, tmp_path: Path) -> None:
    """The base that the adapter names is there, and it is not the one that is given."""
    other, rounded = tmp_path / "other.safetensors", tmp_path / "rounded.safetensors"
    save_canonical(other, random_checkpoint(SMALL, 2))
    convert(base, rounded, dtype="bf16")
    folder = write(tmp_path / "adapter", lora(), base)
    with pytest.raises(CheckpointError, match=r"for .*/base\.safetensors, not for .*/other\.safetensors$"):
        open_weights(other, adapter=folder)
    assert open_weights(rounded, adapter=folder).config == SMALL
    write(folder, lora(), "/train/on/another/machine")
    assert open_weights(other, adapter=folder).config == SMALL
    with pytest.raises(WeightsNotFound, match="is an adapter for /train/on/another/machine; name the base yourself"):
        open_weights(folder)


def test_an_int8_base_is_refused(base: Path, tmp_path: Path) -> None:
    """Its norms have taken over a part of its matrices."""
    narrow = convert(base, tmp_path / "int8.safetensors", dtype="int8").path
    with pytest.raises(CheckpointError, match=r"is stored as int8: merge .* before rounding"):
        open_weights(narrow, adapter=write(tmp_path / "adapter", lora(), base))


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "rslora"), [(4, False), (64, False), (4, True)])
@pytest.mark.parametrize("kind", ["single", "token"])
def test_parity_with_peft(tmp_path: Path, rank: int, rslora: bool, kind: str) -> None:
    """On an adapter that peft wrote; NUMPYESM_PEFT names the folder of an installation of its own."""
    if "NUMPYESM_PEFT" in os.environ:
        sys.path.append(os.environ["NUMPYESM_PEFT"])
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers
    from test_classify import HEADS, expected
    from test_classify import write as write_base

    write_base(tmp_path / "base", kind)
    theirs = getattr(transformers, HEADS[kind][0]).from_pretrained(tmp_path / "base", attn_implementation="eager")
    config = peft.LoraConfig(
        r=rank, lora_alpha=16, use_rslora=rslora, task_type="SEQ_CLS" if kind == "single" else "TOKEN_CLS",
        target_modules=["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    )  # fmt: skip
    model = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "adapter")
    ours = ESM2(open_weights(tmp_path / "adapter"), backend="numpy", precision="fp64")
    assert ours.labels == HEADS[kind][2]
    sequence = random_sequence(50)
    logits, probabilities = expected(model.double(), kind, sequence)
    (found,) = ours.classify([sequence])
    # Merged matrices are rounded to float32 once.
    np.testing.assert_allclose(found.logits, logits, atol=1e-6 * max(1, np.abs(logits).max()))
    np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-6)
