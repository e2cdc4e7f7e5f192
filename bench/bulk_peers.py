"""What bulk embedding is compared with, a process each: `python -m bench.bulk_peers NAME FASTA WEIGHTS THREADS [OUT]`.

Prints one JSON line: `inner_seconds`, from the opened weights to the last file written.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import FairEsm, OnnxRuntime
from .workloads import pad, padded_batches, read_fasta, residues

_TOKENS = 4096


def encode(fasta: Path, weights: Path, threads: int, _: Path) -> float:
    """`ESM2.encode` on the same sequences in batches of the same size: what writing and journalling are measured by."""
    numpyesm: Any = import_module("numpyesm")
    packing: Any = import_module("numpyesm.bulk.packing")
    warnings.simplefilter("ignore")
    model = numpyesm.ESM2.from_pretrained(weights, threads=threads)
    start = time.perf_counter()
    budget = packing.token_budget(model.config, threads)
    for batch in packing.pack(read_fasta(fasta), len, budget):
        model.encode(batch, include=["mean", "bos"])
    return time.perf_counter() - start


def fair_esm(fasta: Path, weights: Path, threads: int, output: Path) -> float:
    """The body of fair-esm's scripts/extract.py (`esm-extract`) with `--include mean bos`, and room for 2048 residues.

    The script itself is not in the package on PyPI, and loads its weights by a name that must be on the network.
    """
    torch: Any = import_module("torch")
    data: Any = import_module("esm.data")
    adapter = FairEsm(weights, "fp32", threads)
    model, layer = adapter.model, adapter.last
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    dataset = data.FastaBatchedDataset.from_file(str(fasta))
    batches = dataset.get_batch_indices(_TOKENS, extra_toks_per_seq=1)
    converter = model.alphabet.get_batch_converter(2048)
    loader = torch.utils.data.DataLoader(dataset, collate_fn=converter, batch_sampler=batches)
    with torch.no_grad():
        for labels, texts, tokens in loader:
            rows = model(tokens, repr_layers=[layer], return_contacts=False)["representations"][layer]
            for i, label in enumerate(labels):
                length = min(2048, len(texts[i]))
                mean = rows[i, 1 : length + 1].mean(0).clone()
                result = {
                    "label": label,
                    "mean_representations": {layer: mean},
                    "bos_representations": {layer: rows[i, 0].clone()},
                }
                torch.save(result, output / f"{label}.pt")
    return time.perf_counter() - start


def onnxruntime(fasta: Path, weights: Path, threads: int, output: Path) -> float:
    """A plain script: sorted by length, padded, pooled, one `.npz` at the end."""
    adapter = OnnxRuntime(weights, "fp32", threads)
    start = time.perf_counter()
    sequences = read_fasta(fasta)
    means: dict[int, Any] = {}
    firsts: dict[int, Any] = {}
    for indices in padded_batches(sequences):
        batch = [sequences[i] for i in indices]
        last, _ = adapter.forward(*pad(batch))
        for row, index in enumerate(indices):
            means[index] = residues(batch, row, last).mean(axis=0)
            firsts[index] = last[row, 0].copy()
    order = range(len(sequences))
    np.savez(output.with_suffix(".npz"), mean=np.stack([means[i] for i in order]), bos=[firsts[i] for i in order])
    return time.perf_counter() - start


ENGINES = {"encode": encode, "fair-esm": fair_esm, "onnxruntime": onnxruntime}


def main() -> None:
    name, fasta, weights, threads, output = (*sys.argv[1:], "")[:5]
    seconds = ENGINES[name](Path(fasta), Path(weights), int(threads), Path(output))
    print(json.dumps({"inner_seconds": seconds}))


if __name__ == "__main__":
    main()
