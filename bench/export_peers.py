"""`python -m bench.export_peers STEP FOLDER`, in the peers' environment: one peer's file from the shared numbers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from .workloads import pad, random_sequence


def fair_esm(folder: Path) -> None:
    """A state dict with the model's shape beside it: nothing in it is a pickled module."""
    torch: Any = import_module("torch")
    load_file: Any = import_module("safetensors.torch").load_file
    config = json.loads((folder / "config.json").read_text())
    alphabet: Any = import_module("esm.data").Alphabet.from_architecture("ESM-1b")
    model = import_module("esm.model.esm2").ESM2(
        config["num_layers"], config["embed_dim"], config["num_heads"], alphabet
    )
    missing, unexpected = model.load_state_dict(load_file(folder / "fair-esm.safetensors"), strict=False)
    if unexpected or not all(name.endswith("inv_freq") for name in missing):
        raise RuntimeError(f"fair-esm misses {missing} and does not know {unexpected}")
    torch.save({"config": config, "model": model.state_dict()}, folder / "fair-esm.pt")


def onnx(folder: Path) -> None:
    """One graph for onnxruntime and OpenVINO, exported from transformers: logits and the last representation."""
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    model = transformers.EsmForMaskedLM.from_pretrained(folder / "hf", attn_implementation="eager").eval()

    class Outputs(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
            return out.logits, out.hidden_states[-1]

    example = tuple(map(torch.from_numpy, pad([random_sequence(32, 1), random_sequence(30, 2)])))
    names = ["input_ids", "attention_mask", "logits", "last"]
    torch.onnx.export(
        Outputs(),
        example,
        str(folder / "model.onnx"),
        input_names=names[:2],
        output_names=names[2:],
        dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names},
        opset_version=17,
        dynamo=False,
    )


def onnx_int8(folder: Path) -> None:
    """onnxruntime's dynamic quantisation, per channel, of the matrix products."""
    quantization: Any = import_module("onnxruntime.quantization")
    quantization.quantize_dynamic(
        folder / "model.onnx",
        folder / "model-int8.onnx",
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def openvino_int8(folder: Path) -> None:
    """NNCF's post-training quantisation for transformers, calibrated on random sequences."""
    openvino: Any = import_module("openvino")
    nncf: Any = import_module("nncf")

    def feed(seed: int) -> dict[str, Any]:
        tokens, mask = pad([random_sequence(64 + 8 * seed, seed)])
        return {"input_ids": tokens, "attention_mask": mask}

    model = nncf.quantize(
        openvino.Core().read_model(folder / "model.onnx"),
        nncf.Dataset(list(range(16)), feed),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=16,
    )
    openvino.save_model(model, folder / "openvino-int8.xml", compress_to_fp16=False)


STEPS: dict[str, Callable[[Path], None]] = {
    "fair-esm": fair_esm,
    "onnx": onnx,
    "onnx-int8": onnx_int8,
    "openvino-int8": openvino_int8,
}


def main() -> None:
    step, folder = sys.argv[1:3]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        STEPS[step](Path(folder))
    except ImportError as error:
        sys.exit(f"{error.name or error} is not installed in the peers' environment (see --setup)")
    except Exception as error:
        # The driver takes the last line of stderr as the reason.
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main()
