"""Where tensors come from: readers of every format, one canonical layout, the search for weights.

Each name is imported from its module when it is first used, so that opening a canonical file does not load the readers
of the other formats.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import cache_dir as cache_dir
    from .canonical import load_canonical as load_canonical
    from .canonical import save_canonical as save_canonical
    from .checkpoint import Checkpoint as Checkpoint
    from .conversion import Conversion as Conversion
    from .conversion import convert as convert
    from .hub import fetch as fetch
    from .load import load_checkpoint as load_checkpoint
    from .locate import find_local as find_local
    from .locate import open_weights as open_weights
    from .locate import resolve as resolve
    from .synthetic import parse_synthetic as parse_synthetic
    from .synthetic import synthetic_checkpoint as synthetic_checkpoint

_NAMES = {
    "cache": ("cache_dir",),
    "canonical": ("load_canonical", "save_canonical"),
    "checkpoint": ("Checkpoint",),
    "conversion": ("Conversion", "convert"),
    "hub": ("fetch",),
    "load": ("load_checkpoint",),
    "locate": ("find_local", "open_weights", "resolve"),
    "synthetic": ("parse_synthetic", "synthetic_checkpoint"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _NAMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)
