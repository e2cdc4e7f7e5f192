"""One small class for each engine: open the weights, run a workload, return outputs for comparison.

These run inside the workers, each in its own environment, so each library is imported when its adapter is made.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .workloads import LETTERS, encode, pad, padded_batches, residues

Array = npt.NDArray[Any]
SCANNED = "ACDEFGHIKLMNPQRSTVWY"


class Adapter(ABC):
    """An engine with its weights opened. `packages` are the distributions whose versions are reported."""

    packages: tuple[str, ...] = ()

    @abstractmethod
    def run(self, batch: Sequence[str], outputs: str) -> None:
        """From sequences to arrays: last layer's representation and logits, or `mean` embeddings only."""

    @abstractmethod
    def outputs(self, batch: Sequence[str]) -> list[tuple[Array, Array]]:
        """Last representation of each residue (L, D) and logits (L, 20) of each sequence."""

    def contacts(self, sequence: str) -> Array:
        """Contact map (L, L)."""
        raise NotImplementedError("no contact maps")

    def scan(self, sequence: str) -> Array:
        """Masked marginals (L, 20) of every substitution, columns in the order of `SCANNED`."""
        raise NotImplementedError("no scans")

    def versions(self) -> dict[str, str]:
        """Versions of the packages that do the work."""
        found = {}
        for package in (*self.packages, "numpy"):
            with contextlib.suppress(PackageNotFoundError):
                found[package] = version(package)
        return found


class Numpyesm(Adapter):
    """This package: packed rows, no padding."""

    packages = ("numpyesm", "numba", "llvmlite")

    def __init__(self, path: Path, precision: str, threads: int, backend: str) -> None:
        from numpyesm import ESM2, SyntheticWeightsWarning

        warnings.simplefilter("ignore", SyntheticWeightsWarning)
        self.model = ESM2.from_pretrained(path, backend=backend, precision=precision, threads=threads)
        if (self.model.backend, self.model.precision) != (backend, precision):
            raise RuntimeError(f"asked for {backend} {precision}, got {self.model.backend} {self.model.precision}")

    def run(self, batch: Sequence[str], outputs: str) -> None:
        self.model.encode(batch, include=["mean"] if outputs == "mean" else ["mean", "logits"])

    def outputs(self, batch: Sequence[str]) -> list[tuple[Array, Array]]:
        arrays = [r.to_arrays() for r in self.model.encode(batch, include=["per_token", "logits"])]
        last = f"per_token_{self.model.config.num_layers}"
        return [(found[last], found["logits"]) for found in arrays]

    def contacts(self, sequence: str) -> Array:
        return self.model.encode([sequence], include=["contacts"])[0].to_arrays()["contacts"]

    def scan(self, sequence: str) -> Array:
        return self.model.scan_mutations(sequence).scores


class Padded(Adapter):
    """Engines that take one rectangle of tokens: sorted by length, at most 4096 tokens a batch."""

    @abstractmethod
    def forward(self, tokens: Array, mask: Array) -> tuple[Array, Array]:
        """(N, T) -> last layer's representation (N, T, D), logits (N, T, 33); float32."""

    def run(self, batch: Sequence[str], outputs: str) -> None:
        for indices in padded_batches(batch):
            self.forward(*pad([batch[i] for i in indices]))

    def outputs(self, batch: Sequence[str]) -> list[tuple[Array, Array]]:
        found = []
        for sequence in batch:
            last, logits = self.forward(*pad([sequence]))
            found.append((residues([sequence], 0, last), residues([sequence], 0, logits)[:, LETTERS]))
        return found


class FairEsm(Padded):
    """fair-esm 2.0.0: its own ESM2 class with the weights put in, no pickled module."""

    packages = ("fair-esm", "torch")

    def __init__(self, path: Path, precision: str, threads: int, backend: str) -> None:
        self.torch: Any = import_module("torch")
        self.torch.set_num_threads(threads)
        esm2: Any = import_module("esm.model.esm2")
        alphabet: Any = import_module("esm.data").Alphabet.from_architecture("ESM-1b")
        saved = self.torch.load(path, weights_only=True)
        config = saved["config"]
        self.model = esm2.ESM2(config["num_layers"], config["embed_dim"], config["num_heads"], alphabet)
        self.model.load_state_dict(saved["model"])
        self.model.eval()
        self.last: int = config["num_layers"]

    def forward(self, tokens: Array, mask: Array) -> tuple[Array, Array]:
        with self.torch.no_grad():
            out = self.model(self.torch.from_numpy(tokens), repr_layers=[self.last])
        return out["representations"][self.last].numpy(), out["logits"].numpy()

    def contacts(self, sequence: str) -> Array:
        with self.torch.no_grad():
            out = self.model(self.torch.tensor([encode(sequence)]), repr_layers=[self.last], return_contacts=True)
        return np.asarray(out["contacts"][0].numpy())

    def scan(self, sequence: str) -> Array:
        """The loop of fair-esm's examples/variant-prediction/predict.py: a pass per token, of which it keeps a row."""
        torch, alphabet = self.torch, self.model.alphabet
        _, _, tokens = alphabet.get_batch_converter()([("protein1", sequence)])
        rows = []
        for i in range(tokens.size(1)):
            masked = tokens.clone()
            masked[0, i] = alphabet.mask_idx
            with torch.no_grad():
                rows.append(torch.log_softmax(self.model(masked)["logits"], dim=-1)[:, i])
        found: Array = torch.cat(rows, dim=0)[1:-1].numpy()
        own = found[np.arange(len(sequence)), [alphabet.get_idx(letter) for letter in sequence]]
        return found[:, [alphabet.get_idx(letter) for letter in SCANNED]] - own[:, None]


class Transformers(Padded):
    """Hugging Face transformers, scaled-dot-product attention."""

    packages = ("transformers", "torch")

    def __init__(self, path: Path, precision: str, threads: int, backend: str) -> None:
        self.torch: Any = import_module("torch")
        self.torch.set_num_threads(threads)
        transformers: Any = import_module("transformers")
        # Not model.to(bfloat16), which rounds the rotary frequencies too and costs much accuracy.
        dtype = self.torch.bfloat16 if precision == "bf16" else self.torch.float32
        self.model = transformers.EsmForMaskedLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()

    def forward(self, tokens: Array, mask: Array) -> tuple[Array, Array]:
        torch = self.torch
        with torch.no_grad():
            hidden = self.model.esm(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).last_hidden_state
            logits = self.model.lm_head(hidden)
        return hidden.float().numpy(), logits.float().numpy()


class OnnxRuntime(Padded):
    """onnxruntime on the exported graph; int8 is its dynamic quantisation."""

    packages = ("onnxruntime",)

    def __init__(self, path: Path, precision: str, threads: int, backend: str) -> None:
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, tokens: Array, mask: Array) -> tuple[Array, Array]:
        logits, last = self.session.run(["logits", "last"], {"input_ids": tokens, "attention_mask": mask})
        return last, logits


class OpenVino(Padded):
    """OpenVINO on the same graph; bf16 by its precision hint, int8 as NNCF quantised it, the rest fp32 or bf16."""

    packages = ("openvino",)

    def __init__(self, path: Path, precision: str, threads: int, backend: str) -> None:
        openvino: Any = import_module("openvino")
        core = openvino.Core()
        hint = "bf16" if precision == "bf16" or backend == "mixed" else "f32"
        if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise RuntimeError("openvino has no bf16 on this CPU")
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        compiled = core.compile_model(str(path), "CPU", settings)
        self.request = compiled.create_infer_request()

    def forward(self, tokens: Array, mask: Array) -> tuple[Array, Array]:
        out = self.request.infer({"input_ids": tokens, "attention_mask": mask})
        return out["last"], out["logits"]


class EsmCpp(Adapter):
    """esm-cpp: packed, through its scheduler; threads come from ESM_NUM_THREADS."""

    packages = ("esm-cpp",)

    def __init__(self, path: Path, precision: str, threads: int, backend: str) -> None:
        esm_cpp: Any = import_module("esm_cpp")
        self.model = esm_cpp.Model.load_from_safetensors(str(path))
        if precision == "int8":
            self.model.quantize_weights()
        if self.model.num_threads != threads:
            raise RuntimeError(f"asked for {threads} threads and got {self.model.num_threads}")

    def run(self, batch: Sequence[str], outputs: str) -> None:
        ids = [np.array(encode(sequence), np.int32) for sequence in batch]
        if len(ids) == 1:
            self.model.forward(ids[0])
        else:
            self.model.forward_scheduled(ids)

    def outputs(self, batch: Sequence[str]) -> list[tuple[Array, Array]]:
        found = []
        for sequence in batch:
            logits, hidden = self.model.forward_with_hidden_states(np.array(encode(sequence), np.int32))
            found.append((np.asarray(hidden[-1])[1:-1], np.asarray(logits)[1:-1, LETTERS]))
        return found


ADAPTERS: dict[str, Any] = {
    "numpyesm": Numpyesm,
    "fair-esm": FairEsm,
    "transformers": Transformers,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "esm-cpp": EsmCpp,
}
