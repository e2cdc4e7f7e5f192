"""One small class an engine: open the weights, run a workload, give its outputs for comparison.

These run inside the workers, each in its own environment, so every library is imported when its adapter is made.
"""

from __future__ import annotations

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


class Adapter(ABC):
    """An engine with its weights opened.

    Attributes
    ----------
    packages : tuple of str
        Distributions whose versions are reported.
    """

    packages: tuple[str, ...] = ()

    @abstractmethod
    def run(self, batch: Sequence[str], outputs: str) -> None:
        """From sequences to arrays: last layer's representation and logits, or `mean` embeddings only."""

    @abstractmethod
    def outputs(self, batch: Sequence[str]) -> list[tuple[Array, Array]]:
        """Mean embedding (D,) of the last layer and logits (L, 20) of each sequence."""

    def contacts(self, sequence: str) -> Array:
        """Contact map (L, L)."""
        raise NotImplementedError("no contact maps")

    def versions(self) -> dict[str, str]:
        """Of the packages that do the work."""
        found = {}
        for package in (*self.packages, "numpy"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "source"
        return found


class Numpyesm(Adapter):
    """This package: packed rows, no padding."""

    packages = ("numba", "llvmlite")

    def __init__(self, path: Path, precision: str, threads: int, backend: str) -> None:
        from numpyesm import ESM2, SyntheticWeightsWarning, __version__

        warnings.simplefilter("ignore", SyntheticWeightsWarning)
        self.version = __version__
        self.model = ESM2.from_pretrained(path, backend=backend, precision=precision, threads=threads)
        got = (self.model.backend, self.model.precision)
        if got != (backend, precision):
            raise RuntimeError(f"asked for {backend} {precision} and got {' '.join(got)}")

    def run(self, batch: Sequence[str], outputs: str) -> None:
        self.model.encode(batch, include=["mean"] if outputs == "mean" else ["mean", "logits"])

    def outputs(self, batch: Sequence[str]) -> list[tuple[Array, Array]]:
        last = self.model.config.num_layers
        found = []
        for result in self.model.encode(batch, include=["mean", "logits"]):
            assert result.embeddings is not None
            assert result.logits is not None
            found.append((result.embeddings[last], result.logits))
        return found

    def contacts(self, sequence: str) -> Array:
        contacts = self.model.encode([sequence], include=["contacts"])[0].contacts
        assert contacts is not None
        return contacts

    def versions(self) -> dict[str, str]:
        found = {"numpyesm": self.version, "numpy": np.__version__}
        if self.model.backend != "compiled":
            return found
        from numpyesm.kernels.numba_.isa import host_isa

        return found | super().versions() | {"instructions": host_isa().name}


class Padded(Adapter):
    """Engines that take one rectangle of tokens: sorted by length, at most 4096 tokens a batch."""

    @abstractmethod
    def forward(self, tokens: Array, mask: Array) -> tuple[Array, Array]:
        """(N, T) -> last layer's representation (N, T, D), logits (N, T, 33); float32."""

    def run(self, batch: Sequence[str], outputs: str) -> None:
        for indices in padded_batches(batch):
            self.forward(*pad([batch[i] for i in indices]))

    def outputs(self, batch: Sequence[str]) -> list[tuple[Array, Array]]:
        last, logits = self.forward(*pad(batch))
        return [
            (residues(batch, row, last).mean(axis=0), residues(batch, row, logits)[:, LETTERS])
            for row in range(len(batch))
        ]


class FairEsm(Padded):
    """fair-esm 2.0.0: its own ESM2 class with the weights put in, no pickled module."""

    packages = ("fair-esm", "torch")

    def __init__(self, path: Path, precision: str, threads: int) -> None:
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


class Transformers(Padded):
    """Hugging Face transformers, scaled-dot-product attention."""

    packages = ("transformers", "torch")

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        self.torch: Any = import_module("torch")
        self.torch.set_num_threads(threads)
        transformers: Any = import_module("transformers")
        model = transformers.EsmForMaskedLM.from_pretrained(path, attn_implementation="sdpa").eval()
        self.model = model.to(self.torch.bfloat16) if precision == "bf16" else model

    def forward(self, tokens: Array, mask: Array) -> tuple[Array, Array]:
        torch = self.torch
        with torch.no_grad():
            hidden = self.model.esm(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).last_hidden_state
            logits = self.model.lm_head(hidden)
        return hidden.float().numpy(), logits.float().numpy()


class OnnxRuntime(Padded):
    """onnxruntime on the exported graph; int8 is its dynamic quantisation."""

    packages = ("onnxruntime",)

    def __init__(self, path: Path, precision: str, threads: int) -> None:
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

    def __init__(self, path: Path, precision: str, threads: int, backend: str = "") -> None:
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

    def __init__(self, path: Path, precision: str, threads: int) -> None:
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
            found.append((np.asarray(hidden[-1])[1:-1].mean(axis=0), np.asarray(logits)[1:-1, LETTERS]))
        return found


_PEERS: dict[str, Any] = {
    "fair-esm": FairEsm,
    "transformers": Transformers,
    "onnxruntime": OnnxRuntime,
    "esm-cpp": EsmCpp,
}


def make_adapter(family: str, backend: str, precision: str, path: Path, threads: int) -> Adapter:
    """The engine with its weights opened."""
    if family == "numpyesm":
        return Numpyesm(path, precision, threads, backend)
    if family == "openvino":
        return OpenVino(path, precision, threads, backend)
    adapter: Adapter = _PEERS[family](path, precision, threads)
    return adapter
