"""Tab-separated lines, whatever stands in a header."""

from __future__ import annotations

import re

_BREAKS = re.compile(r"[\t\r\n\v\f\x1c-\x1e\x85\u2028\u2029\0]")


def tsv_line(*cells: object) -> str:
    """One line; what would break it within a cell becomes a blank."""
    return "\t".join(_BREAKS.sub(" ", str(cell)) for cell in cells) + "\n"
