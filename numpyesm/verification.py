"""The published reference numbers of ESM-2, and how far a model is from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from .errors import InvalidOption
from .model import ESM2
from .options import BY_LAYER, INCLUDES

# The numbers are good to about 1e-4; weights or arithmetic narrower than float32 cannot be.
_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1, "int8": 2e-1}


@dataclass(frozen=True)
class Comparison:
    """The worst deviation in one group of reference numbers."""

    sequence: str
    output: str  # of the model, for example `mean, layer 6`
    expected: float  # the reference number that deviates most
    found: float  # what the model computes instead
    tolerance: float  # the largest `deviation` allowed

    @property
    def deviation(self) -> float:
        """|found - expected| / max(1, |expected|)."""
        return abs(self.found - self.expected) / max(1.0, abs(self.expected))

    @property
    def passed(self) -> bool:
        return self.deviation <= self.tolerance  # NaN does not


def published_numbers(name: str) -> dict[str, Any]:
    """Return the published reference numbers of a model, as `compare_with_reference` takes them.

    Those of 35M come from the hosted API, those of 8M from the tests of transformers. InvalidOption: there are none for
    this model.
    """
    known = json.loads(files(__package__).joinpath("data", "reference_numbers.json").read_text())
    if name not in known:
        raise InvalidOption(f"there are reference numbers for {' and '.join(known)} only, these weights are {name}")
    numbers: dict[str, Any] = known[name]
    return numbers


def compare_with_reference(model: ESM2, reference: Mapping[str, Any] | None = None) -> list[Comparison]:
    """Run the reference requests on `model` and compare the numbers, by default with those published for this model.

    `reference` has `encode` and `predict`: lists of cases with a `sequence` and, by output, the first numbers of each
    row: `mean`, `bos` and `per_token` by layer, `contacts`, `logits`.
    """
    if model.config.whole_layers is not None:
        raise InvalidOption(
            f"these weights are the first {model.config.num_layers} of {model.config.whole_layers} layers: the "
            "reference numbers are those of whole models"
        )
    reference = published_numbers(model.name) if reference is None else reference
    tolerance = max(_TOLERANCES.get(p, 1e-4) for p in (model.precision, model.checkpoint.precision))
    comparisons: list[Comparison] = []

    def add(sequence: str, output: str, got: Any, expected: Any) -> None:
        wanted = np.array(expected)
        found = np.asarray(got, dtype=np.float64)[tuple(slice(n) for n in wanted.shape)]
        pairs = zip(wanted.ravel().tolist(), found.ravel().tolist(), strict=True)
        group = [Comparison(sequence, output, *pair, tolerance) for pair in pairs]
        comparisons.append(max(group, key=lambda one: np.nan_to_num(one.deviation, nan=np.inf)))

    for case in reference.get("encode", ()):
        sequence, outputs = case["sequence"], [name for name in INCLUDES if name in case]
        layers = {int(layer) for name in outputs if name in BY_LAYER for layer in case[name]}
        found = model.encode([sequence], layers or [-1], outputs)[0].to_arrays()
        for name in outputs:
            if name not in BY_LAYER:
                add(sequence, name, found[name], case[name])
                continue
            for layer, expected in case[name].items():
                add(sequence, f"{name}, layer {layer}", found[f"{name}_{layer}"], expected)
    for case in reference.get("predict", ()):
        add(case["sequence"], "logits", model.predict([case["sequence"]])[0].logits, case["logits"])
    return comparisons
