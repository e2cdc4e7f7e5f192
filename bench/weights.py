"""The same random weights for every engine: numpyesm's canonical file, and its numbers in each peer's own format."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .engines import CACHE, ROOT, Engine, Environments

Array = npt.NDArray[np.float32]
EXPORT_VERSION = 1  # of the exported files: raise it when they change

# numpyesm's matrices are (in, out); fair-esm and Hugging Face have (out, in) and query, key and value apart.
_FAIR_ESM_LAYER = {
    "attention_norm": "self_attn_layer_norm",
    "out_proj": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "fc1": "fc1",
    "fc2": "fc2",
}
_HUGGING_FACE_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}


# What the peers' environment has to make, in order, before a file can be opened.
_STEPS = {
    "fair-esm.pt": ("fair-esm",),
    "model.onnx": ("onnx",),
    "model-int8.onnx": ("onnx", "onnx-int8"),
    "openvino-int8.xml": ("onnx", "openvino-int8"),
}


def make_weights(
    model: str, seed: int, engines: list[Engine], environments: Environments, cache: Path = CACHE
) -> tuple[Path, dict[str, str]]:
    """Write every file that the engines need and that is not there yet.

    Returns
    -------
    folder : Path
    problems : dict of str to str
        Why a step failed, by its name.
    """
    folder = cache / f"{model}-{seed}-v{EXPORT_VERSION}"
    if not (folder / "config.json").exists():
        _write_with_numpy(model, seed, folder)
    problems: dict[str, str] = {}
    for step in dict.fromkeys(step for engine in engines for step in _STEPS.get(engine.file, ())):
        done = folder / f"{step}.done"
        if done.exists():
            continue
        run = subprocess.run(
            [str(environments.peers), "-m", "bench.export_peers", step, str(folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        (folder / f"{step}.log").write_text(run.stdout + run.stderr)
        if run.returncode:
            lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            problems[step] = lines[-1].strip()
        else:
            done.touch()
    return folder, problems


def problem_of(engine: Engine, problems: dict[str, str]) -> str | None:
    """Why an engine has nothing to open; None if it has."""
    step = next((step for step in _STEPS.get(engine.file, ()) if step in problems), None)
    return None if step is None else f"{engine.file} could not be made ({step}): {problems[step]}"


def _write_with_numpy(model: str, seed: int, folder: Path) -> None:
    from safetensors.numpy import save_file

    from numpyesm.weights import save_canonical, synthetic_checkpoint

    (folder / "hf").mkdir(parents=True, exist_ok=True)
    checkpoint = synthetic_checkpoint(model, seed)
    config = checkpoint.config
    save_canonical(folder / "canonical.safetensors", checkpoint)
    fair_esm = fair_esm_tensors({name: checkpoint.array(name) for name in checkpoint.tensors}, config.num_layers)
    save_file(fair_esm, folder / "fair-esm.safetensors")

    hugging_face = hugging_face_tensors(fair_esm)
    # The `format` entry is what transformers checks.
    save_file(hugging_face, folder / "hf" / "model.safetensors", {"format": "pt"})
    (folder / "hf" / "config.json").write_text(json.dumps(hugging_face_config(json.loads(config.to_json()))))

    # esm-cpp reads Hugging Face's names as older versions of transformers wrote them.
    frequencies = hugging_face.pop("esm.rotary_embeddings.inv_freq")
    for layer in range(config.num_layers):
        hugging_face[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = frequencies.copy()
    hugging_face["lm_head.decoder.weight"] = hugging_face["esm.embeddings.word_embeddings.weight"].copy()
    save_file(hugging_face, folder / "esm-cpp.safetensors", {"format": "pt"})
    # Last: its presence says that the rest is whole.
    (folder / "config.json").write_text(config.to_json())


def fair_esm_tensors(canonical: dict[str, Array], num_layers: int) -> dict[str, Array]:
    """Canonical tensors under fair-esm's names, in its layout."""
    tensors = {
        "embed_tokens.weight": canonical["embed_tokens.weight"],
        "lm_head.weight": canonical["embed_tokens.weight"].copy(),
        "lm_head.bias": canonical["lm_head.bias"],
        "contact_head.regression.weight": canonical["contact_head.weight"][None],
        "contact_head.regression.bias": canonical["contact_head.bias"],
    }
    for layer in range(num_layers):
        tensors[f"layers.{layer}.self_attn.rot_emb.inv_freq"] = canonical["rotary.frequencies"].copy()
    for kind in ("weight", "bias"):
        tensors[f"lm_head.dense.{kind}"] = canonical[f"lm_head.dense.{kind}"].T
        tensors[f"lm_head.layer_norm.{kind}"] = canonical[f"lm_head.norm.{kind}"]
        tensors[f"emb_layer_norm_after.{kind}"] = canonical[f"final_norm.{kind}"]
        for layer in range(num_layers):
            prefix = f"layers.{layer}."
            parts = np.split(canonical[f"{prefix}qkv.{kind}"], 3, axis=-1)
            for name, part in zip("qkv", parts, strict=True):
                tensors[f"{prefix}self_attn.{name}_proj.{kind}"] = part.T
            for ours, theirs in _FAIR_ESM_LAYER.items():
                tensors[f"{prefix}{theirs}.{kind}"] = canonical[f"{prefix}{ours}.{kind}"].T
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def hugging_face_tensors(fair_esm: dict[str, Array]) -> dict[str, Array]:
    """The same tensors under Hugging Face's names."""
    tensors: dict[str, Array] = {}
    for name, tensor in fair_esm.items():
        if name == "embed_tokens.weight":
            tensors["esm.embeddings.word_embeddings.weight"] = tensor
        elif name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            if rest == "self_attn.rot_emb.inv_freq":
                tensors["esm.rotary_embeddings.inv_freq"] = tensor
                continue
            part, kind = rest.rsplit(".", 1)
            tensors[f"esm.encoder.layer.{layer}.{_HUGGING_FACE_LAYER[part]}.{kind}"] = tensor
        elif name.startswith("emb_layer_norm_after"):
            tensors[f"esm.encoder.{name}"] = tensor
        elif name.startswith("contact_head"):
            tensors[f"esm.{name}"] = tensor
        elif name != "lm_head.weight":
            tensors[name] = tensor
    return tensors


def hugging_face_config(config: dict[str, int]) -> dict[str, Any]:
    """`config.json` of an EsmForMaskedLM."""
    return {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "hidden_size": config["embed_dim"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "intermediate_size": config["ffn_dim"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 1026,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "token_dropout": True,
        "vocab_size": 33,
        "mask_token_id": 32,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-05,
        "is_folding_model": False,
        "tie_word_embeddings": True,
    }
