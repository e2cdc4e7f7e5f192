"""What the metadata of an output say: which weights, which version, which parameters, which input."""

from __future__ import annotations

import json
from typing import Any

from .._version import __version__
from ..model import ESM2
from ..weights.integrity import weights_sha256
from .settings import Settings

# Where weights were found does not matter, as long as they are the same.
_NAMES = ("source", "source_sha256")


def describe(model: ESM2, settings: Settings, output_format: str) -> dict[str, Any]:
    """Everything that the output depends on but the input; runs of equal descriptions give equal outputs."""
    checkpoint = model.checkpoint
    return {
        "version": __version__,
        "model": model.name,
        "weights": {
            "source": checkpoint.source,
            "source_sha256": checkpoint.source_sha256 or None,
            "sha256": weights_sha256(checkpoint),
            "synthetic": checkpoint.synthetic,
        },
        "backend": model.backend,
        "precision": model.precision,
        "format": output_format,
        "parameters": settings.to_dict(),
        **({"labels": model.labels} if "classes" in settings.outputs.include else {}),
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first thing in which two descriptions differ, in words; empty if they are the same."""
    for key, value in one.items():
        if key in _NAMES:
            continue
        there = other.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            inner = difference(value, there)
            if inner:
                return f"{key} {inner}" if key != "parameters" else inner
        elif there != value:
            return f"{key} {json.dumps(there)} instead of {json.dumps(value)}"
    return ""
