"""Pictures, where matplotlib is installed."""

from __future__ import annotations

import io
from typing import Any

from ..errors import MissingExtra


def figure_class() -> Any:
    """Return matplotlib's `Figure`, or raise MissingExtra. No pyplot, as nothing here needs a screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("pictures need matplotlib: pip install 'numpyesm[plot]'") from error
    return Figure


def png_bytes(figure: Any) -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
