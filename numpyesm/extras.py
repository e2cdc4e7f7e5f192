"""Optional libraries: imported where they are used, with an error that names the extra that brings them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .errors import MissingExtra


def require(library: str, what: str, extra: str) -> Any:
    """Import and return a library that `what` needs; MissingExtra if it is not installed."""
    try:
        return import_module(library)
    except ImportError as error:
        name = library.partition(".")[0]
        raise MissingExtra(f"{what} needs {name}: pip install 'numpyesm[{extra}]'") from error
