"""The engine of one machine: batches through the model in this process."""

from __future__ import annotations

from collections.abc import Iterator

from ..model import ESM2
from .compute import default_budget, encode_pending
from .journal import Journal
from .layout import Layout
from .packing import pack
from .settings import Settings


class LocalEngine:
    """Computes what a journal still lacks.

    Parameters
    ----------
    model : ESM2
    settings : Settings
    layout : Layout
    tokens_per_batch : int or None
    """

    def __init__(self, model: ESM2, settings: Settings, layout: Layout, tokens_per_batch: int | None) -> None:
        self._model = model
        self._settings = settings
        self._layout = layout
        self._budget = tokens_per_batch or default_budget(model, settings)

    def run(self, journal: Journal) -> Iterator[tuple[int, bytes]]:
        """Number and numbers of each pending sequence, in no particular order."""
        for batch in pack(journal.pending(), lambda item: len(item.sequence), self._budget):
            for number, result in encode_pending(self._model, batch, self._settings, self._budget):
                yield number, self._layout.pack(result)

    def close(self) -> None:
        """Nothing to put away."""
