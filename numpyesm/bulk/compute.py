"""A batch of checked sequences through the model, long ones window by window: what every engine does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..alphabet import tokenize
from ..config import MAX_RESIDUES
from ..model import ESM2
from ..options import Outputs
from ..results import EncodeResult
from .journal import Pending
from .packing import token_budget
from .settings import Settings
from .windows import WindowAverage, cuts


def default_budget(model: ESM2, settings: Settings) -> int:
    """Tokens of one batch for this model on this machine."""
    return token_budget(
        model.config, model.threads, layers=max(1, len(settings.layers)), contacts="contacts" in settings.include
    )


def residues_computed(length: int, settings: Settings) -> int:
    """How many residues of a sequence the outputs are of."""
    return min(length, MAX_RESIDUES) if settings.long == "truncate" else length


def encode_pending(
    model: ESM2, batch: Sequence[Pending], settings: Settings, budget: int
) -> Iterator[tuple[int, EncodeResult]]:
    """Number and result of each sequence of a batch."""
    outputs = Outputs(settings.include, settings.layers)
    short = [item for item in batch if len(item.sequence) <= MAX_RESIDUES or settings.long == "truncate"]
    if short:
        tokens = tokenize([item.sequence[:MAX_RESIDUES] for item in short])
        results = model.passes.encode(tokens, outputs, budget)
        yield from zip((item.number for item in short), results, strict=True)
    for item in batch:
        if len(item.sequence) > MAX_RESIDUES and settings.long == "windows":
            yield item.number, _encode_windows(model, item, settings, budget)


def _encode_windows(model: ESM2, item: Pending, settings: Settings, budget: int) -> EncodeResult:
    average = WindowAverage(len(item.sequence), settings.layers, settings.include)
    outputs = Outputs(tuple(average.needed(settings.include)), settings.layers)
    windows = cuts(len(item.sequence), settings.overlap)
    at_once = max(1, budget // (MAX_RESIDUES + 2))
    for first in range(0, len(windows), at_once):
        few = windows[first : first + at_once]
        tokens = tokenize([item.sequence[start:stop] for start, stop in few])
        for (start, _), result in zip(few, model.passes.encode(tokens, outputs, budget), strict=True):
            average.add(start, result)
    return average.result(item.number)
