"""PEFT adapters: merged as peft merges them; anything but plain LoRA, or for another base, is refused by name."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, random_sequence
from safetensors.numpy import load_file, save_file

from numpyesm import ESM2
from numpyesm.cli import main
from numpyesm.config import ModelConfig
from numpyesm.errors import CheckpointError, WeightsNotFound
from numpyesm.weights import convert, default_weights, load_checkpoint, open_weights, save_canonical
from numpyesm.weights.synthetic import random_checkpoint

mk = pytest.importorskip("make_checkpoints")
torch = mk.torch
pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")

WIDTH = mk.TINY.embed_dim
MODULES = ("self.query", "self.key", "self.value", "attention.output.dense", "intermediate.dense", "output.dense")
Arrays = dict[str, np.ndarray]
STATE = mk.hugging_face_state(mk.MODEL)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    checkpoint = load_checkpoint(mk.write_hugging_face(folder / "hf", STATE))
    save_canonical(folder / "base.safetensors", replace(checkpoint, synthetic=True))  # without the inputs of matrices
    return folder / "base.safetensors"


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def lora(rank: int = 4, part: str = "", state: dict[str, Any] = STATE) -> Arrays:
    """Factors of all matrices of the layers whose name contains `part`."""
    tensors = {}
    for seed, (name, weight) in enumerate(state.items()):
        module = name.removesuffix(".weight")
        if part in name and module.endswith(MODULES):
            tensors[f"base_model.model.{module}.lora_A.weight"] = draw(seed, rank, weight.shape[1])
            tensors[f"base_model.model.{module}.lora_B.weight"] = draw(seed + 1000, weight.shape[0], rank)
    return tensors


def head() -> Arrays:
    shapes = {"dense.weight": (WIDTH, WIDTH), "dense.bias": (WIDTH,)}
    shapes |= {"out_proj.weight": (3, WIDTH), "out_proj.bias": (3,)}
    return {f"base_model.model.classifier.{name}": draw(len(name), *shape) for name, shape in shapes.items()}


def write(folder: Path, tensors: Arrays, base: object = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "base_model_name_or_path": base and str(base), "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def test_doors_to_an_adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base and adapter, the adapter alone, the merged file: the same numbers."""
    folder = write(tmp_path / "adapter", lora() | head(), base, task_type="SEQ_CLS")
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}}))
    merged = tmp_path / "merged.safetensors"
    assert main(["convert", str(base), "--adapter", str(folder), "-o", str(merged)]) == 0
    assert main(["convert", str(folder), "-o", str(tmp_path / "again.safetensors")]) == 0
    assert load_file(merged).keys() == load_file(tmp_path / "again.safetensors").keys()
    sequences = [random_sequence(40), random_sequence(7)]
    monkeypatch.setenv("NUMPYESM_WEIGHTS", str(folder))
    with pytest.raises(CheckpointError, match="not the esm2-8m that was asked for"):
        open_weights("esm2-8m")
    opened = [open_weights(base, adapter=folder), open_weights(default_weights()), open_weights(merged)]
    models = [ESM2(checkpoint, backend="numpy") for checkpoint in opened]
    first, *others = [model.classify(sequences) for model in models]
    for other in others:
        for one, two in zip(first, other, strict=True):
            np.testing.assert_array_equal(one.probabilities, two.probabilities)
            assert one.labels == two.labels == ["a", "b", "c"]
    np.testing.assert_array_equal(models[0].classify(sequences[1:])[0].logits, first[1].logits)  # without batch mates
    plain = ESM2.from_pretrained(base, backend="numpy")
    assert plain.head is None
    assert not np.allclose(plain.encode(sequences)[0].embeddings[2], models[0].encode(sequences)[0].embeddings[2])


def test_patterns_biases_and_old_names(base: Path, tmp_path: Path) -> None:
    query, layer = "attention.self.query", "base_model.model.esm.encoder.layer.1."
    tensors = {name.replace("_A.", "_A.default."): array for name, array in lora(part=query).items()}
    tensors[f"{layer}{query}.base_layer.bias"] = draw(1, WIDTH)
    tensors[f"{layer}LayerNorm.bias"] = draw(2, WIDTH)
    tensors |= {
        "base_model.model.lm_head.bias": draw(3, 33),
        "base_model.model.lm_head.decoder.weight": draw(4, 33, WIDTH),
    }
    folder = write(tmp_path / "adapter", tensors, base, bias="all", alpha_pattern={"1.attention.self.query": 80})
    found, plain = open_weights(base, adapter=folder), load_checkpoint(base)
    np.testing.assert_array_equal(found.array("layers.1.qkv.bias")[:WIDTH], draw(1, WIDTH))
    np.testing.assert_array_equal(found.array("layers.1.qkv.bias")[WIDTH:], plain.array("layers.1.qkv.bias")[WIDTH:])
    np.testing.assert_array_equal(found.array("layers.1.ffn_norm.bias"), draw(2, WIDTH))
    np.testing.assert_array_equal(found.array("lm_head.bias"), draw(3, 33))
    np.testing.assert_array_equal(found.vocabulary(), draw(4, 33, WIDTH).T)
    names = [f"layers.{i}.qkv.weight" for i in (0, 1)]
    sizes = [np.abs(found.array(name) - plain.array(name)).max() for name in names]
    assert sizes[1] > 5 * sizes[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", ["canonical", "hf"])
def test_further_models_of_a_base_take_little_memory(tmp_path: Path, backend: str, stored: str) -> None:
    config = ModelConfig(2, 320, 20, 1280)
    state = mk.hugging_face_state(mk.fair_esm_model(config))
    place = mk.write_hugging_face(tmp_path / "hf", state, mk.hugging_face_config(config))
    if stored == "canonical":
        plain, place = load_checkpoint(place), tmp_path / "base.safetensors"
        save_canonical(place, replace(plain, synthetic=True))
    adapter = write(tmp_path / "a", lora(part="layer.0.attention.self.query", state=state))
    options: dict[str, Any] = {"adapter": adapter, "backend": backend, "threads": 1}
    first = ESM2.from_pretrained(place, **options)
    wanted = first.encode(["MKTAYI"])[0].embeddings[2]
    tracemalloc.start()
    second = ESM2.from_pretrained(place, **options)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 3_500_000  # of 10 MB of weights: one matrix of 1.2 MB, and a vocabulary
    np.testing.assert_array_equal(second.encode(["MKTAYI"])[0].embeddings[2], wanted)
    for name, tensor in first.checkpoint.tensors.items():
        assert (second.checkpoint.tensors[name] is tensor) == (name != "layers.0.qkv.weight"), name


PRESET, EMBEDDING = "facebook/esm2_t12_35M_UR50D", "base_model.model.esm.embeddings.word_embeddings.lora_embedding_A"
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "DoRA": (lora(), {"use_dora": True}, "an adapter of DoRA; numpyesm merges LoRA and rsLoRA"),
    "IA3": (lora(), {"peft_type": "IA3"}, "an adapter of IA3"),
    "prompt tuning": (lora(), {"peft_type": "PROMPT_TUNING"}, "an adapter of prompt tuning"),
    "PiSSA": (lora(), {"init_lora_weights": "pissa_niter_4"}, "initialised by pissa_niter_4, which changes the base"),
    "another preset": (lora(), {"base_model_name_or_path": PRESET}, rf"for {PRESET}, not for .*base\.safetensors$"),
    "another width": (
        {name: np.ones((4, 24) if "lora_A" in name else (24, 4), np.float32) for name in lora()},
        {"base_model_name_or_path": "lab/esm2-of-ours"},
        r"an adapter for lab/esm2-of-ours, not for .*base\.safetensors: its .* has a different size",
    ),
    "more layers": ({n.replace("r.1.", "r.3."): a for n, a in lora().items()}, {}, "which has no 'encoder.layer.3"),
    "half a pair": ({n: a for n, a in lora().items() if "lora_B" not in n}, {}, "lora_B of .* is missing"),
    "an embedding": ({EMBEDDING: np.ones((4, 33), np.float32)}, {}, "_A', which is not part of a LoRA of a linear map"),
    "NaN": ({n: a * np.nan for n, a in lora().items()}, {}, "whose numbers are not finite floats"),
    "no alpha": (lora(), {"lora_alpha": "8"}, "does not give lora_alpha as a number"),
    "no value": (lora(part="query"), {"target_modules": ["query", "value"]}, "its target 'value' is missing$"),
    "one layer": (lora(part="layer.0."), {"target_modules": ["query"]}, "'query' is missing in 1 of 2 layers"),
    "no head": (lora(), {"modules_to_save": ["classifier", "score"]}, "its trained module 'classifier' is missing"),
    "a head of no class": (lora() | head(), {}, "does not say which class"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(base: Path, tmp_path: Path, kind: str) -> None:
    tensors, config, reason = REFUSED[kind]
    folder = write(tmp_path / "adapter", tensors, **{"base": base} | config)
    with pytest.raises(CheckpointError, match=reason) as caught:
        ESM2.from_pretrained(base, adapter=folder, backend="numpy")
    assert "\n" not in str(caught.value)
    assert main(["convert", str(base), "--adapter", str(folder), "-o", str(tmp_path / "x.safetensors")]) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_another_base_of_the_same_shape(base: Path, tmp_path: Path) -> None:
    """The base that the adapter names is there, and it is not the one that is given."""
    other, rounded = tmp_path / "other.safetensors", tmp_path / "rounded.safetensors"
    save_canonical(other, random_checkpoint(mk.TINY, 2))
    convert(base, rounded, dtype="bf16")
    folder = write(tmp_path / "adapter", lora(), base)
    with pytest.raises(CheckpointError, match=r"for .*/base\.safetensors, not for .*/other\.safetensors$"):
        open_weights(other, adapter=folder)
    assert open_weights(rounded, adapter=folder).config == mk.TINY
    narrow = convert(base, tmp_path / "int8.safetensors", dtype="int8").path
    with pytest.raises(CheckpointError, match=r"is stored as int8: merge .* before rounding"):
        open_weights(narrow, adapter=folder)  # its norms have taken over a part of its matrices
    write(folder, lora(), "/train/on/another/machine")
    assert open_weights(other, adapter=folder).config == mk.TINY
    with pytest.raises(WeightsNotFound, match="is an adapter for /train/on/another/machine; name the base yourself"):
        open_weights(folder)
    write(folder, lora(), "lab/base", revision="2" * 40)  # of which another commit will not do
    with pytest.raises(WeightsNotFound, match="is an adapter for lab/base@2222"):
        open_weights(folder)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "rslora"), [(4, False), (64, False), (4, True)])
@pytest.mark.parametrize("kind", ["single", "token"])
def test_parity_with_peft(tmp_path: Path, rank: int, rslora: bool, kind: str) -> None:
    """On an adapter that peft wrote."""
    peft = pytest.importorskip("peft")
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
