"""ESM-2 protein language models on NumPy alone."""

from ._version import __version__

__all__ = ["__version__"]
