"""The published reference numbers of ESM-2 35M, and how far a model is from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from .errors import InvalidOption
from .model import ESM2

# The numbers are good to about 1e-4; weights or arithmetic narrower than float32 cannot be.
_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1, "int8": 2e-1}


@dataclass(frozen=True)
class Comparison:
    """One group of reference numbers: largest deviation and how much is allowed."""

    sequence: str
    output: str
    deviation: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.deviation <= self.tolerance


def compare_with_reference(model: ESM2) -> list[Comparison]:
    """Run the reference requests on `model` and compare the numbers that are published (the first two of each row).

    The deviation is |got - expected| / max(1, |expected|), the largest of the group.

    Raises
    ------
    InvalidOption
        The model is not the 35M one: there are no reference numbers for it.
    """
    if model.name != "esm2-35m":
        raise InvalidOption(f"there are reference numbers for esm2-35m only, these weights are {model.name}")
    reference = json.loads(files(__package__).joinpath("data", "reference_esm2_35m.json").read_text())
    tolerance = max(_TOLERANCES.get(p, 1e-4) for p in (model.precision, model.checkpoint.precision))
    comparisons: list[Comparison] = []

    def add(sequence: str, output: str, got: Any, expected: Any) -> None:
        wanted = np.array(expected)
        found = np.asarray(got, dtype=np.float64)[tuple(slice(n) for n in wanted.shape)]
        deviation = float((np.abs(found - wanted) / np.maximum(1, np.abs(wanted))).max())
        comparisons.append(Comparison(sequence, output, deviation, tolerance))

    cases = reference["encode"]
    results = model.encode([case["sequence"] for case in cases], [6, -1], ["mean", "bos", "per_token", "contacts"])
    for case, result in zip(cases, results, strict=True):
        for name, by_layer in (
            ("mean", result.embeddings),
            ("bos", result.bos_embeddings),
            ("per_token", result.per_token_embeddings),
        ):
            assert by_layer is not None
            for layer, expected in case[name].items():
                add(case["sequence"], f"{name}, layer {layer}", by_layer[int(layer)], expected)
        add(case["sequence"], "contacts", result.contacts, case["contacts"])
    cases = reference["predict"]
    for case, predicted in zip(cases, model.predict([case["sequence"] for case in cases]), strict=True):
        add(case["sequence"], "logits", predicted.logits, case["logits"])
    return comparisons
