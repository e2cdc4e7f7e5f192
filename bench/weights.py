"""The same weights for every engine: a Hugging Face folder, and from it each peer's own file.

`python -m bench.weights STEP FOLDER` makes one of the files in the peers' environment, which has torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from numpyesm.config import PRESETS, ModelConfig
from numpyesm.weights import parse_synthetic

from .engines import ROOT, Engine
from .workloads import REAL_PROTEINS, pad, random_sequence, read_fasta

VERSION = 4  # of the files in the cache: raise it when they change
TRAINED = "trained"  # instead of a preset's name: the 8M trunk of tests/trained_weights.py

sys.path.append(str(ROOT / "tests"))


def make_weights(model: str, engines: Sequence[Engine], python: Path, cache: Path) -> Path:
    """Write every file that the engines need and that is not there yet. Returns their folder.

    `model` is as in `shape_of`, for random numbers, or `trained`; `python` is the interpreter of the peers. An engine
    whose file cannot be made will fail to open it.
    """
    from numpyesm.weights import convert

    folder = cache / f"{model.replace('/', '-')}-v{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    steps = ("hf", *(step for engine in engines for step in STEPS_OF.get(engine.file, ())))
    for step in dict.fromkeys(steps):
        if not (folder / f"{step}.done").exists():
            command = [str(python), "-m", "bench.weights", step, str(folder), model]
            with open(folder / f"{step}.log", "w") as log:
                run = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)
            if run.returncode == 0:
                (folder / f"{step}.done").touch()
            else:
                print(f"{step} failed, see {log.name}", file=sys.stderr)
    ours = {engine.file: engine.precision for engine in engines if engine.ours}
    for file, dtype in ({"canonical.safetensors": "fp32"} | ours).items():
        if not (folder / file).exists():
            convert(folder / "hf", folder / file, dtype=dtype)
    return folder


def shape_of(model: str) -> ModelConfig:
    """Return the shape of a preset, or of its first layers: `esm2-3b/4`. ValueError for anything else."""
    name, _, layers = model.partition("/")
    config = PRESETS[parse_synthetic(f"synthetic:{name}")[0]]
    return replace(config, num_layers=int(layers)) if layers else config


def hugging_face(folder: Path, model: str) -> None:
    """Write `hf/`, an EsmForMaskedLM, and `config.json`, its shape. Random numbers are transformers' own."""
    trained_weights: Any = import_module("trained_weights")
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    shape = shape_of("esm2-8m" if model == TRAINED else model)
    same = {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "layer_norm_eps": 1e-5, "token_dropout": True}
    config = transformers.EsmConfig(
        hidden_size=shape.embed_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.ffn_dim,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        **same,
    )
    if model == TRAINED:
        tensors = trained_weights.hugging_face_tensors()
    else:
        torch.manual_seed(0)
        tensors = transformers.EsmForMaskedLM._from_config(config).state_dict()
        # The official models hold the frequencies in half precision, per layer.
        frequencies = tensors.pop("esm.rotary_embeddings.inv_freq").half().float()
        for layer in range(shape.num_layers):
            name = f"{trained_weights.PREFIX}{layer}.attention.self.rotary_embeddings.inv_freq"
            tensors[name] = frequencies
    # esm-cpp needs the tied matrix too; the `format` entry is what transformers checks.
    tensors["lm_head.decoder.weight"] = tensors["esm.embeddings.word_embeddings.weight"]
    config.save_pretrained(folder / "hf")
    tensors.update((name, tensor.clone().contiguous()) for name, tensor in tensors.items())  # nothing is held twice
    import_module("safetensors.torch").save_file(tensors, folder / "hf" / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(shape.to_json())


def fair_esm(folder: Path, model: str) -> None:
    """Write a state dict with the model's shape beside it: nothing in it is a pickled module."""
    trained_weights: Any = import_module("trained_weights")
    torch: Any = import_module("torch")
    tensors: dict[str, Any] = import_module("safetensors.torch").load_file(folder / "hf" / "model.safetensors")
    del tensors["lm_head.decoder.weight"]
    state = trained_weights.fair_esm_tensors(tensors)
    torch.save({"config": json.loads((folder / "config.json").read_text()), "model": state}, folder / "fair-esm.pt")


def onnx(folder: Path, model: str) -> None:
    """Export one graph for onnxruntime and OpenVINO from transformers: logits and the last representation."""
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")

    class Outputs(transformers.EsmForMaskedLM):  # type: ignore[misc]
        def forward(self, input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
            out = super().forward(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
            return out.logits, out.hidden_states[-1]

    names = ["input_ids", "attention_mask", "logits", "last"]
    torch.onnx.export(
        Outputs.from_pretrained(folder / "hf", attn_implementation="eager").eval(),
        tuple(map(torch.from_numpy, pad([random_sequence(32, 1), random_sequence(30, 2)]))),
        str(folder / "model.onnx"),
        input_names=names[:2],
        output_names=names[2:],
        dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names},
        opset_version=17,
        dynamo=False,
    )


def onnx_int8(folder: Path, model: str) -> None:
    """Apply onnxruntime's dynamic quantisation, per channel, to the matrix products."""
    quantization: Any = import_module("onnxruntime.quantization")
    quantization.quantize_dynamic(
        folder / "model.onnx",
        folder / "model-int8.onnx",
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def openvino_int8(folder: Path, model: str) -> None:
    """Apply NNCF's post-training quantisation for transformers, calibrated on real proteins."""
    openvino: Any = import_module("openvino")
    nncf: Any = import_module("nncf")

    def feed(sequence: str) -> dict[str, Any]:
        return dict(zip(("input_ids", "attention_mask"), pad([sequence]), strict=True))

    proteins = list(read_fasta(REAL_PROTEINS).values())
    quantised = nncf.quantize(
        openvino.Core().read_model(folder / "model.onnx"),
        nncf.Dataset(proteins, feed),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(proteins),
    )
    openvino.save_model(quantised, folder / "openvino-int8.xml", compress_to_fp16=False)


STEPS: dict[str, Callable[[Path, str], None]] = {
    "hf": hugging_face,
    "fair-esm": fair_esm,
    "onnx": onnx,
    "onnx-int8": onnx_int8,
    "openvino-int8": openvino_int8,
}
# The steps before a file can be opened, in order.
STEPS_OF = {
    "fair-esm.pt": ("fair-esm",),
    "model.onnx": ("onnx",),
    "model-int8.onnx": ("onnx", "onnx-int8"),
    "openvino-int8.xml": ("onnx", "openvino-int8"),
}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    STEPS[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
