"""Where tensors come from: readers of every format, one canonical layout, the search for weights.

The names here are the package's surface; each is imported from its module when first asked for, so that opening a
canonical file never loads the readers of the other formats.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import cache_dir
    from .canonical import check_data, load_canonical, save_canonical
    from .checkpoint import Checkpoint
    from .conversion import Conversion, convert
    from .hub import fetch
    from .load import load_checkpoint
    from .locate import find_local, open_weights, resolve
    from .synthetic import SyntheticSpec, parse_synthetic, synthetic_checkpoint

_HOMES = {
    "Checkpoint": "checkpoint",
    "Conversion": "conversion",
    "SyntheticSpec": "synthetic",
    "cache_dir": "cache",
    "check_data": "canonical",
    "convert": "conversion",
    "fetch": "hub",
    "find_local": "locate",
    "load_canonical": "canonical",
    "load_checkpoint": "load",
    "open_weights": "locate",
    "parse_synthetic": "synthetic",
    "resolve": "locate",
    "save_canonical": "canonical",
    "synthetic_checkpoint": "synthetic",
}

__all__ = [
    "Checkpoint",
    "Conversion",
    "SyntheticSpec",
    "cache_dir",
    "check_data",
    "convert",
    "fetch",
    "find_local",
    "load_canonical",
    "load_checkpoint",
    "open_weights",
    "parse_synthetic",
    "resolve",
    "save_canonical",
    "synthetic_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
