"""Checkpoints of others: ESM-2 under any wrapper, in any container, of fair-esm and of transformers; else its own name.

What a checkpoint is, its tensors say.
"""

from __future__ import annotations

import json
import tracemalloc
import warnings
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS

from numpyesm import ESM2
from numpyesm.config import ModelConfig
from numpyesm.errors import CheckpointError, WeightsNotFound
from numpyesm.weights import convert, load_checkpoint, save_canonical
from numpyesm.weights.checkpoint import computed_frequencies
from numpyesm.weights.synthetic import random_checkpoint

mk = pytest.importorskip("make_checkpoints")
torch = mk.torch
pytestmark = pytest.mark.usefixtures("quick_calibration")

REGRESSION = Path(__file__).parent / "data" / "esm2_t12_35M_UR50D-contact-regression.pt"
SIX = ModelConfig(num_layers=6, embed_dim=160, num_heads=20, ffn_dim=640)
MODEL = mk.MODEL
OTHER = mk.fair_esm_model(seed=1)
State = dict[str, Any]


def fair_esm(prefix: str = "", model: Any = MODEL) -> State:
    return {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}


def hugging_face(prefix: str = "", model: Any = MODEL, trunk: str = "esm.") -> State:
    return {prefix + name: tensor for name, tensor in mk.hugging_face_state(model, prefix=trunk).items()}


def save(path: Path, content: Any) -> Path:
    """By torch, or as a safetensors file, by the ending."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def training(state: State, key: str = "state_dict") -> dict[str, Any]:
    """What a training script keeps beside the weights."""
    steps = {0: {"exp_avg": torch.ones(3)}, 1: {"exp_avg": torch.ones(3)}}
    return {
        "epoch": 3,
        "global_step": torch.tensor(7),
        "optimizer_states": [{"state": steps, "param_groups": [{"params": [0, 1]}]}],
        "optimizer": {"state": steps, "names": {"a": torch.ones(2, 2)}},
        "hyper_parameters": Namespace(arch="roberta_large", encoder_layers=99, device=torch.device("cpu")),
        "callbacks": {"ModelCheckpoint{'monitor': 'x'}": {"best": np.float64(1.5), "path": Path("a/b.ckpt")}},
        "rng": torch.get_rng_state(),
        "loops": {("fit", 0): {"seen": {1, 2}, "counts": Counter("aab")}},
        key: state,
    }


def within(state: State, old: str, new: str) -> State:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


def without(state: State, part: str) -> State:
    return {name: tensor for name, tensor in state.items() if part not in name}


LOOP: State = {"state_dict": fair_esm()}
LOOP["again"] = LOOP
WRAPPERS = ["", "model.", "module._orig_mod.model.net.", "base_model.model.", "encoder.sentence_encoder."]
ALIASES: dict[str, Any] = {
    **{f"fair-esm in {prefix}": fair_esm(prefix) for prefix in WRAPPERS},
    **{f"transformers in {prefix}": hugging_face(prefix) for prefix in WRAPPERS},
    "in a training checkpoint": training(hugging_face(), "ema"),
    "in several": {"run": {"last": training(fair_esm("esm."), "best")}},
    "gamma and beta": within(within(hugging_face(), "Norm.weight", "Norm.gamma"), "Norm.bias", "Norm.beta"),
    "frequencies once": mk.hugging_face_state(MODEL, writer=5),
    "compiled layers": within(fair_esm(), "layers.0.", "layers.0._orig_mod."),
    "sharded layers": within(hugging_face(), "encoder.layer.1.", "encoder.layer.1._fsdp_wrapped_module."),
    "the same trunk twice": fair_esm("model.esm.") | fair_esm("esm."),
    "a trunk beside its language model": hugging_face("model.") | hugging_face("", trunk="backbone."),
    "tied, saved once": without(fair_esm("encoder."), "embed_tokens"),
    "moments by name": {"model": fair_esm(), "optimizer": {"exp_avg": fair_esm("", OTHER)}},
    "in a tuple": (3, {"state": hugging_face("net.")}),
    "bias of the decoder": within(hugging_face(), "lm_head.bias", "lm_head.decoder.bias"),
    "a text model beside it": hugging_face("protein.")
    | within(hugging_face("text."), "contact_head", "head")
    | {"text.esm.embeddings.word_embeddings.weight": torch.ones(99, 40)},
    "a dict that contains itself": LOOP,
    "keys that are no strings": {**fair_esm(), 5: torch.ones(2), b"x": torch.ones(2), None: {"y": torch.ones(2)}},
}


@pytest.mark.parametrize("name", ALIASES)
def test_the_same_numbers_under_other_names(tmp_path: Path, name: str) -> None:
    content = ALIASES[name]
    plain = isinstance(content, dict) and all(map(torch.is_tensor, content.values()))
    for file in ("a.pt", "a.safetensors") if plain else ("a.pt",):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if "beside" in name else "error")
            mk.expect_same_model(load_checkpoint(save(tmp_path / file, content)), MODEL)


def test_other_heads_are_left_out_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from numpyesm.cli import main

    heads = {"model.regressor.0.weight": torch.ones(1, 40), "model.scale": torch.ones(1)}
    heads["model.esm.pooler.dense.weight"] = torch.ones(40, 40)
    path = save(tmp_path / "a.ckpt", training(hugging_face("model.") | heads, "best"))
    expected = "left out: best.model.regressor, best.model.scale, best.model.esm.pooler"
    with pytest.warns(UserWarning, match=rf"a\.ckpt holds more than ESM-2; {expected}$"):
        mk.expect_same_model(load_checkpoint(path), MODEL)
    assert main(["convert", str(path), "-o", str(tmp_path / "c.safetensors")]) == 0
    assert expected in capfd.readouterr().err


def test_what_the_configuration_of_fair_esm_calls_it_does_not_matter(tmp_path: Path) -> None:
    content = mk.fair_esm_content(MODEL)
    content["cfg"]["model"].arch = "roberta_large"
    torch.save(content, tmp_path / "m.pt")
    with pytest.warns(UserWarning, match=r"no contact regression for m\.pt"):
        mk.expect_same_model(load_checkpoint(tmp_path / "m.pt"), MODEL, contact_head=False)


def test_a_class_of_somebodys_own(tmp_path: Path) -> None:
    config = {"model_type": "fast_esm", "hidden_size": 40, "auto_map": {"AutoModel": "x--modeling_fastesm.FastEsm"}}
    mk.expect_same_model(load_checkpoint(mk.write_hugging_face(tmp_path / "hf", hugging_face(), config)), MODEL)


def test_a_merged_model_beside_its_adapter(tmp_path: Path) -> None:
    folder = mk.write_hugging_face(tmp_path / "hf", hugging_face())
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save(folder / "adapter_model.safetensors", {"base_model.model.esm.x.lora_A.weight": torch.ones(2)})
    for place in (folder, folder / "model.safetensors"):
        with pytest.warns(UserWarning, match=r"adapter_config\.json is beside the weights: its adapter is not applied"):
            mk.expect_same_model(load_checkpoint(place), MODEL)


@pytest.mark.parametrize("heads", [1, 5, 20])
def test_heads_are_counted_from_tensors(tmp_path: Path, heads: int) -> None:
    state = fair_esm("", mk.fair_esm_model(ModelConfig(2, 40, heads, 160)))
    for known in (state, without(state, "inv_freq")):
        assert load_checkpoint(save(tmp_path / "m.pt", known)).config.num_heads == heads
    with pytest.raises(CheckpointError, match="how many attention heads"):
        load_checkpoint(save(tmp_path / "m.pt", without(known, "contact")))


def test_where_no_frequencies_are_stored_the_formula_counts(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path / "m.pt", without(FAIR, "inv_freq")))
    np.testing.assert_array_equal(checkpoint.array("rotary.frequencies"), computed_frequencies(mk.TINY.head_dim))
    for head_dim in (2, 16, 24, 32, 64):
        fresh = mk.esm.rotary_embedding.RotaryEmbedding(head_dim).inv_freq
        np.testing.assert_array_equal(computed_frequencies(head_dim), fresh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_untied_decoder_is_used(tmp_path: Path, backend: str) -> None:
    shape = ModelConfig(2, 64, 4, 256)
    model = mk.fair_esm_model(shape)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(33, 64))
    state = mk.hugging_face_state(model) | {"lm_head.decoder.weight": model.lm_head.weight.detach()}
    mk.write_hugging_face(tmp_path / "hf", state, mk.hugging_face_config(shape, tie_word_embeddings=False))
    with torch.no_grad():
        expected = model(torch.tensor([[0, 20, 15, 11, 2]]))["logits"][0, 1:-1, 4:24].numpy()  # MKT
    untied = load_checkpoint(tmp_path / "hf").array("lm_head.decoder.weight")
    np.testing.assert_array_equal(untied, model.lm_head.weight.detach().numpy().T)
    for dtype, within in (("fp32", 1e-4), ("bf16", 0.2), ("int8", 0.2)):
        path = convert(tmp_path / "hf", tmp_path / f"{dtype}.safetensors", dtype=dtype).path
        found = ESM2.from_pretrained(path, backend=backend).encode(["MKT"], include=["logits"])[0].logits
        np.testing.assert_allclose(found, expected, atol=within * float(np.abs(expected).max()))


FAIR, HF, ONE = fair_esm(), hugging_face(), torch.ones(1)
LAYER = "esm.encoder.layer.0."
FC2, WORDS = LAYER + "output.dense.weight", "esm.embeddings.word_embeddings.weight"
ESM_C = {"embed.weight": torch.ones(64, 40), "transformer.blocks.0.attn.layernorm_qkv.1.weight": torch.ones(120, 40)}
ANGLES = [f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq" for layer in (0, 1)]
LEARNED = without(FAIR, "inv_freq") | {"embed_positions.weight": torch.ones(9, 40)}
REFUSED: dict[str, tuple[State, str]] = {
    "two trunks": (fair_esm("student.") | fair_esm("teacher.", OTHER), r"two ESM-2 .*'student\.' and 'teacher\.'"),
    "two families": (fair_esm("a.") | hugging_face("b.", OTHER), r"two ESM-2 .*'a\.' and 'b\.esm\.'"),
    "the same name twice": (fair_esm("m.") | fair_esm("_orig_mod.m."), "twice"),
    "LoRA": (HF | {LAYER + "output.dense.lora_A.default.weight": ONE}, "a LoRA adapter that.*merge it first"),
    "another adapter": ({"base_model.model.esm.x.hada_w1_a": ONE}, "an adapter of peft that is not merged"),
    "bitsandbytes 8": (HF | {LAYER + "output.dense.SCB": torch.ones(40)}, r"quantised \(bitsandbytes, 8 bits"),
    "float8": (HF | {FC2: torch.ones(40, 160).to(torch.float8_e4m3fn)}, "quantised .*F8_E4M3"),
    "int8": (HF | {FC2: torch.ones(40, 160, dtype=torch.int8)}, "quantised .*I8"),
    "ESM C": (ESM_C, "an ESM C checkpoint"),
    "ESM3": (ESM_C | {"transformer.blocks.0.geom_attn.proj.weight": ONE}, "an ESM3 checkpoint"),
    "ESMFold": (HF | {"trunk.blocks.0.x.weight": ONE}, "an ESMFold checkpoint"),
    "SaProt": (HF | {WORDS: torch.ones(446, 40)}, "SaProt checkpoint.*446 tokens"),
    "another vocabulary": (FAIR | {"embed_tokens.weight": torch.ones(30, 40)}, "has 30 tokens"),
    "no embedding": (without(without(HF, WORDS), "lm_head"), r"word_embeddings\.weight' is missing"),
    "ESM-1b": (LEARNED | {"emb_layer_norm_before.weight": torch.ones(40)}, "an ESM-1b checkpoint"),
    "ESM-1v": (LEARNED, r"an ESM-1v checkpoint \(learned positions\)"),
    "learned positions": (
        without(HF, "inv_freq") | {"esm.embeddings.position_embeddings.weight": torch.ones(9, 40)},
        "learned positions",
    ),
    "a part that ESM-2 lacks": (FAIR | {"layers.0.adapter.weight": ONE}, "'layers.0.adapter.weight'"),
    "no model": ({"a.weight": ONE}, r"none of its 1 tensors \('a.weight'\) belongs to an ESM-2 layer"),
    "no names": ({1: ONE, 2: ONE}, "holds no named tensors"),
    "layers without bound": (FAIR | {"layers.999999.fc1.bias": ONE}, "layer 2 is missing"),
    "missing tensor": (without(FAIR, "layers.1.fc2.bias"), r"1\.fc2\.bias' is missing"),
    "wrong shape": (FAIR | {"layers.1.fc2.bias": torch.ones(41)}, r"shape \(41,\), expected \(40,\)"),
    "infinite": (FAIR | {"layers.0.fc1.bias": torch.full((160,), float("inf"))}, "NaN or infinite"),
    "integers": (FAIR | {"layers.0.fc1.bias": torch.ones(160, dtype=torch.long)}, "stored as I64"),
    "frequencies that disagree": (HF | {ANGLES[1]: ONE / 2}, "different rotary frequencies"),
    "a layer without frequencies": (without(HF, ANGLES[1]), r"but none under 'encoder\.layer\.1\.'"),
    "a frequency of 0": (HF | dict.fromkeys(ANGLES, 0 * ONE), r"frequency of 0 .*expected \(0, 1\]"),
    "a frequency above 1": (HF | dict.fromkeys(ANGLES, 1.5 * ONE), r"frequency of 1.5 .*expected \(0, 1\]"),
    "two biases": (HF | {"lm_head.decoder.bias": torch.ones(33)}, "biases that differ"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_has_its_sentence(tmp_path: Path, name: str) -> None:
    state, message = REFUSED[name]
    path = tmp_path / "folder" / ("model.pt" if name == "no names" else "model.safetensors")
    save(path, {name: tensor.clone() for name, tensor in state.items()})
    for place in (path, path.parent):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(place)
        assert "\n" not in str(caught.value)
        assert str(place) in str(caught.value)


@pytest.mark.parametrize("file", ["m.safetensors.incomplete", "m.pt.part"])
def test_unfinished_downloads(tmp_path: Path, file: str) -> None:
    whole = save(tmp_path / file.rpartition(".")[0], FAIR).read_bytes()
    path = tmp_path / "folder" / file
    path.parent.mkdir()
    path.write_bytes(whole[: len(whole) // 2])
    for place in (path, path.parent):
        with pytest.raises((CheckpointError, WeightsNotFound), match="unfinished download"):
            load_checkpoint(place)


# -- fair-esm --------------------------------------------------------------------------------------------------------


def test_the_real_regression(tmp_path: Path) -> None:
    model = mk.fair_esm_model(ModelConfig(12, 40, 20, 160))
    path = mk.write_fair_esm(tmp_path / "m.pt", model, regression=False)
    checkpoint = load_checkpoint(path, regression=REGRESSION)
    assert np.count_nonzero(checkpoint.array("contact_head.weight")) == 61
    model.load_state_dict(torch.load(REGRESSION, weights_only=True)["model"], strict=False)
    mk.expect_same_model(checkpoint, model)


def test_fair_esm_itself_reads_our_test_file(tmp_path: Path) -> None:
    """Otherwise the tests would only show that we read what we write."""
    path = mk.write_fair_esm(tmp_path / "esm2_tiny.pt", MODEL)
    data = torch.load(path, weights_only=False)
    regression = torch.load(tmp_path / "esm2_tiny-contact-regression.pt", weights_only=False)
    loaded, _ = mk.esm.pretrained.load_model_and_alphabet_core("esm2_tiny", data, regression)
    mk.expect_same_model(load_checkpoint(path), loaded)


@pytest.mark.parametrize(("dtype", "precision"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float64", "fp32")])
def test_storage_dtypes(tmp_path: Path, dtype: str, precision: str) -> None:
    model = mk.fair_esm_model().to(getattr(torch, dtype))
    checkpoint = load_checkpoint(mk.write_fair_esm(tmp_path / "m.pt", model))
    assert checkpoint.precision == precision
    assert checkpoint.tensors["layers.0.ffn_norm.weight"].dtype == "F32"
    mk.expect_same_model(checkpoint, model.float())
    state = fair_esm() | {"layers.0.fc2.weight": model.layers[0].fc2.weight.to(getattr(torch, dtype))}
    mixed = load_checkpoint(save(tmp_path / "mixed.pt", state))
    assert mixed.precision == "fp32"
    np.testing.assert_array_equal(mixed.array("layers.0.fc2.weight"), checkpoint.array("layers.0.fc2.weight"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("encoder_layers", 3, "num_layers=2, its configuration says 3"),
        ("encoder_embed_dim", 80, "embed_dim=40, its configuration says 80"),
        ("encoder_attention_heads", 7, "even number of channels"),
        ("encoder_attention_heads", "20", "does not give num_heads as a number"),
        ("token_dropout", False, "token dropout"),
    ],
)
def test_configurations_of_fair_esm_that_contradict(tmp_path: Path, field: str, value: Any, message: str) -> None:
    content = mk.fair_esm_content(MODEL)
    setattr(content["cfg"]["model"], field, value)
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=rf"m\.pt.*{message}"):
        load_checkpoint(tmp_path / "m.pt")


def test_regression_of_another_model(tmp_path: Path) -> None:
    path = mk.write_fair_esm(tmp_path / "m.pt", MODEL)
    for model, regression, message in (
        (path, REGRESSION, "contact regression of another model"),
        (path, path, "not a contact regression"),
        (path, tmp_path / "none.pt", "does not exist"),
        (REGRESSION, None, "only a contact regression"),
    ):
        with pytest.raises((CheckpointError, WeightsNotFound), match=message):
            load_checkpoint(model, regression=regression)


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True])
def test_official_files(tmp_path: Path, binary: bool) -> None:
    """They carry positions, unused, and the embedding twice."""
    state = mk.hugging_face_state(MODEL)
    state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    state["esm.embeddings.position_embeddings.weight"] = torch.ones(1026, 40)
    state["lm_head.decoder.weight"] = state["esm.embeddings.word_embeddings.weight"].clone()
    folder = mk.write_hugging_face(tmp_path / "hf", state, binary=binary)
    for place in (folder, folder / ("pytorch_model.bin" if binary else "model.safetensors")):
        mk.expect_same_model(load_checkpoint(place), MODEL)


@pytest.mark.parametrize("kind", ["EsmForMaskedLM", "EsmModel"])  # classifiers: test_classify.py
def test_what_transformers_writes(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.EsmConfig(**{k: v for k, v in mk.hugging_face_config().items() if k != "architectures"})
    theirs = getattr(transformers, kind)(config)
    prefix = "" if kind == "EsmModel" else "esm."
    theirs.load_state_dict(mk.hugging_face_state(MODEL, prefix=prefix, writer=5), strict=False)
    theirs.save_pretrained(tmp_path / "hf")
    mk.expect_same_model(load_checkpoint(tmp_path / "hf"), MODEL, lm_head=kind == "EsmForMaskedLM")


# By key of config.json: what ESM-2 does not have. None is an absent key, which means what transformers takes it for.
OTHER_MODELS: dict[str, list[Any]] = {
    "position_embedding_type": ["absolute", None],
    "emb_layer_norm_before": [True],
    "token_dropout": [False, None],
    "vocab_size": [32],
    "mask_token_id": [4, None],
    "layer_norm_eps": [1e-12, [1e-5], None],
    "rope_theta": [500000.0],
    "rope_parameters": [{"rope_theta": 1.0}],
    "is_folding_model": [True],
    "is_decoder": [True],
    "num_hidden_layers": [3],
    "hidden_size": [80],
    "intermediate_size": [80],
    "num_attention_heads": [3, "20"],
}
CHANGES = [{key: value} for key, values in OTHER_MODELS.items() for value in values]


@pytest.mark.parametrize("change", [*CHANGES, "", "[]", "[" * 100_000])
def test_other_models_by_their_config(tmp_path: Path, change: dict[str, Any] | str) -> None:
    folder = mk.write_hugging_face(tmp_path / "hf", mk.hugging_face_state(MODEL))
    if not isinstance(change, str):
        config = mk.hugging_face_config(**change)
        change = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "config.json").write_text(change)
    with pytest.raises(CheckpointError, match=r"config\.json|its configuration|even number of channels") as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_shards(tmp_path: Path, ending: str) -> None:
    folder = mk.write_hugging_face(tmp_path / "hf", hugging_face(), binary=ending == "bin", shard_size=60_000)
    mk.expect_same_model(load_checkpoint(folder), MODEL)
    (index,) = folder.glob("*.index.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    for change, message in (
        ({"more": "model.bin"}, "is incomplete: model.bin, which .* names, is missing"),
        ({"more": weight_map["lm_head.bias"]}, "'more' is in none of its files"),
        ({"x": "../../etc/passwd"}, "outside its folder"),
        ({"x": "a\0b"}, "cannot exist"),
        ({"x": 3}, "not an index of weights"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map | change}))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)


# -- models of 3B and 15B --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_conversion_holds_a_few_matrices_at_a_time(tmp_path: Path) -> None:
    """Of a model as fair-esm writes large ones, in shards, and as a canonical file."""
    model = mk.fair_esm_model(SIX)
    config, state = mk.hugging_face_config(SIX), mk.hugging_face_state(model)
    mk.write_hugging_face(tmp_path / "hf", state, config, binary=True, shard_size="3MB")
    mk.write_fair_esm(tmp_path / "m.pt", model.half())
    save_canonical(tmp_path / "canonical", random_checkpoint(SIX))
    half_of_the_model = SIX.num_layers // 2 * 12 * SIX.embed_dim**2 * 4
    for source, precision in (("m.pt", "fp32"), ("hf", "bf16"), ("hf", "int8"), ("canonical", "fp16")):
        # Of the inputs of one matrix in float32, and two of them in float64, in which NumPy factors them.
        correlations = 5 * SIX.ffn_dim**2 * 4 if precision in ("bf16", "int8") else 0
        tracemalloc.start()
        convert(tmp_path / source, tmp_path / "c.safetensors", dtype=precision)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < half_of_the_model + correlations, (source, precision)
