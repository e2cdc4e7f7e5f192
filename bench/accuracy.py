"""Do the engines compute the same thing, and how exactly? Agreement is decided before any of them is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .client import Bench, EngineFailed
from .engines import Engine
from .workloads import REAL_PROTEINS, encode, read_fasta

FP32_ABSOLUTE = 1e-3
MIN_COSINE = {"bf16": 0.99, "int8": 0.98}
# Nearer to fp32 than this, an engine does not compute in bf16 or int8, whatever it says.
REDUCED_AT_LEAST = 1e-4

Outputs = Sequence[dict[str, npt.NDArray[Any]]]


def compare(outputs: Outputs, reference: Outputs, precision: str) -> dict[str, Any]:
    """How far an engine is from the reference on mean embeddings and logits, and whether that is near enough.

    `fp32` is allowed 1e-3 absolute; `bf16` needs a cosine of 0.99 and `int8` of 0.98, for the worst sequence.
    """
    difference, cosine = 0.0, 1.0
    for ours, theirs in zip(outputs, reference, strict=True):
        for key in ("mean", "logits"):
            a, b = ours[key].astype(np.float64), theirs[key].astype(np.float64)
            if a.shape != b.shape:
                return {"agrees": False, "reason": f"{key} has shape {a.shape}, the reference {b.shape}"}
            if not np.isfinite(a).all():
                return {"agrees": False, "reason": f"{key} is not finite"}
            difference = max(difference, float(np.abs(a - b).max()))
            cosine = min(cosine, float(cosines(a.ravel(), b.ravel())))
    verdict: dict[str, Any] = {"max_difference": difference, "min_cosine": cosine}
    if precision == "fp32":
        agrees = difference <= FP32_ABSOLUTE
        reason = f"differs by {difference:.2g}, allowed is {FP32_ABSOLUTE:g}"
    elif difference < REDUCED_AT_LEAST:
        agrees, reason = False, f"is within {difference:.1g} of fp32: it does not compute in {precision}"
    else:
        agrees = cosine > MIN_COSINE[precision]
        reason = f"has cosine {cosine:.4f}, needed is more than {MIN_COSINE[precision]:g}"
    return verdict | ({"agrees": True} if agrees else {"agrees": False, "reason": reason})


def cosines(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Cosines between the vectors on the last axis."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    products: npt.NDArray[np.float64] = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return products


def measure_accuracy(bench: Bench, engines: Sequence[Engine]) -> dict[str, dict[str, Any]]:
    """Each engine's last representation of real proteins against float64, on trained weights.

    By engine: smallest cosine of a residue and its 1st percentile, smallest cosine of a mean embedding, and the largest
    error as a share of the largest number; or `missing` with the reason.
    """
    proteins = list(read_fasta(REAL_PROTEINS).values())
    truths = float64_representations(bench, proteins)
    found: dict[str, dict[str, Any]] = {}
    for engine in engines:
        try:
            with bench.opened(engine) as worker:
                rows = [output["rows"] for output in worker.outputs(proteins)]
        except EngineFailed as failure:
            found[engine.name] = {"missing": str(failure)}
            continue
        found[engine.name] = summary(rows, truths)
    return found


def summary(rows: Sequence[npt.NDArray[Any]], truths: Sequence[npt.NDArray[Any]]) -> dict[str, Any]:
    """Figures of `measure_accuracy` from the representations (L, D) of each protein."""
    if broken := sum(not np.isfinite(values).all() for values in rows):
        return {"missing": f"gives NaN or infinity for {broken} of {len(rows)} proteins"}
    residues = np.concatenate([cosines(a, b) for a, b in zip(rows, truths, strict=True)])
    means = [cosines(a.astype(np.float64).mean(0), b.mean(0)) for a, b in zip(rows, truths, strict=True)]
    return {
        "residue_min": float(residues.min()),
        "residue_1st_percentile": float(np.percentile(residues, 1)),
        "mean_min": float(min(means)),
        "largest_error": max(float(np.abs(a - b).max()) for a, b in zip(rows, truths, strict=True))
        / max(float(np.abs(b).max()) for b in truths),
    }


def float64_representations(bench: Bench, proteins: Sequence[str]) -> list[npt.NDArray[np.float64]]:
    """The last representation (L, D) of each protein by numpyesm/reference.py."""
    from numpyesm.reference import forward, nested
    from numpyesm.weights import load_checkpoint

    weights = nested(load_checkpoint(bench.folder / "canonical.safetensors"))
    del weights["lm_head"], weights["contact_head"]
    return [forward(np.array(encode(protein)), **weights)["representations"][-1, 1:-1] for protein in proteins]
