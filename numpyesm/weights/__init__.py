"""Where tensors come from: readers of every format, one canonical layout, the search for weights.

Each name is imported from its module when it is first used, so that opening a canonical file does not load the readers
of the other formats.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import cache_dir as cache_dir
    from .canonical import save_canonical as save_canonical
    from .conversion import convert as convert
    from .hub import fetch as fetch
    from .load import load_checkpoint as load_checkpoint
    from .locate import default_weights as default_weights
    from .locate import find_local as find_local
    from .locate import open_weights as open_weights
    from .locate import resolve as resolve
    from .synthetic import parse_synthetic as parse_synthetic

_HOMES = {
    "cache_dir": "cache",
    "save_canonical": "canonical",
    "convert": "conversion",
    "fetch": "hub",
    "load_checkpoint": "load",
    "default_weights": "locate",
    "find_local": "locate",
    "open_weights": "locate",
    "resolve": "locate",
    "parse_synthetic": "synthetic",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
