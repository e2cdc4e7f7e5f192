"""Do the engines compute the same thing? Decided before any of them is timed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FP32_ABSOLUTE = 1e-3
MIN_COSINE = {"bf16": 0.99, "int8": 0.98}
# Nearer to fp32 than this, an engine does not compute in bf16 or int8, whatever it says.
REDUCED_AT_LEAST = 1e-4
CONTACT_ABSOLUTE = {"fp32": 1e-3, "bf16": 0.02, "int8": 0.02}
# The reference is the first of these that runs: independent implementations before our own.
REFERENCES = ("fair-esm-fp32", "transformers-fp32", "onnxruntime-fp32", "openvino-fp32", "numpyesm-numpy-fp32")

Outputs = list[dict[str, Any]]


def compare(outputs: Outputs, reference: Outputs, precision: str) -> dict[str, Any]:
    """How far an engine is from the reference, and whether that is near enough.

    Parameters
    ----------
    outputs, reference : list of dict
        `mean` (D,) and `logits` (L, 20) of each sequence.
    precision : str
        `fp32` is held to 1e-3 absolute, `bf16` to cosine 0.99, `int8` to cosine 0.98; of the worst sequence.
    """
    difference, cosine = 0.0, 1.0
    for ours, theirs in zip(outputs, reference, strict=True):
        for key in ("mean", "logits"):
            a, b = np.asarray(ours[key], np.float64), np.asarray(theirs[key], np.float64)
            if a.shape != b.shape:
                return {"agrees": False, "reason": f"{key} has shape {a.shape}, the reference {b.shape}"}
            if not np.isfinite(a).all():
                return {"agrees": False, "reason": f"{key} is not finite"}
            difference = max(difference, float(np.abs(a - b).max()))
            cosine = min(cosine, _cosine(a, b))
    verdict: dict[str, Any] = {"max_difference": difference, "min_cosine": cosine}
    if precision == "fp32":
        verdict["agrees"] = difference <= FP32_ABSOLUTE
        limit = f"differs by {difference:.2g}, allowed is {FP32_ABSOLUTE:g}"
    else:
        verdict["agrees"] = cosine > MIN_COSINE[precision] and difference >= REDUCED_AT_LEAST
        if difference < REDUCED_AT_LEAST:
            limit = f"is within {difference:.1g} of fp32: it does not compute in {precision}"
        else:
            limit = f"has cosine {cosine:.4f}, needed is more than {MIN_COSINE[precision]:g}"
    return verdict if verdict["agrees"] else verdict | {"reason": limit}


def compare_contacts(sample: list[list[float]], reference: list[list[float]], precision: str) -> dict[str, Any]:
    """The same for a sample of a contact map."""
    difference = float(np.abs(np.asarray(sample) - np.asarray(reference)).max())
    return {"max_difference": difference, "agrees": difference <= CONTACT_ABSOLUTE[precision]}


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norm if norm else float(a.any() == b.any())
