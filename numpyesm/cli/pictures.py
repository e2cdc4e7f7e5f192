"""Pictures, where matplotlib is installed."""

from __future__ import annotations

import io
from typing import Any

from ..extras import require


def figure_class() -> Any:
    """Return matplotlib's `Figure`, or raise MissingExtra. No pyplot, as nothing here needs a screen."""
    return require("matplotlib.figure", "a picture", "plot").Figure


def png_bytes(figure: Any) -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
