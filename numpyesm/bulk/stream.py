"""`ESM2.embed_iter`: records in, results out, in order and lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ..alphabet import tokenize
from ..config import MAX_RESIDUES
from ..errors import InvalidSequence
from ..fasta import Record
from ..model import ESM2
from ..results import EncodeResult
from .compute import default_budget, encode_pending
from .journal import Pending
from .packing import check_budget, pack
from .reader import why_not
from .settings import Settings

# Results wait for those before them: fewer batches than a run that writes to disk can afford to read ahead.
_LOOK_AHEAD_BATCHES = 4


def embed_iter(
    model: ESM2,
    records: Iterable[str | tuple[str, str] | Record],
    repr_layers: Iterable[int],
    include: Iterable[str],
    *,
    long: str,
    overlap: int,
    tokens_per_batch: int | None,
    rejected: Callable[[Record, InvalidSequence], None] | None,
) -> Iterator[tuple[Record, EncodeResult]]:
    """See `ESM2.embed_iter`. Options are checked at once, records when their turn comes."""
    settings = Settings.check(model, repr_layers=repr_layers, include=include, long=long, overlap=overlap)
    budget = default_budget(model, settings) if tokens_per_batch is None else check_budget(tokens_per_batch)
    if isinstance(records, str | bytes):
        raise InvalidSequence(f"expected records, got one {type(records).__name__}; put it into a list: [sequence]")
    return _embed(model, records, settings, budget, rejected)


def _embed(
    model: ESM2,
    records: Iterable[str | tuple[str, str] | Record],
    settings: Settings,
    budget: int,
    rejected: Callable[[Record, InvalidSequence], None] | None,
) -> Iterator[tuple[Record, EncodeResult]]:
    window: list[tuple[int, Record]] = []
    tokens = 0
    for index, given in enumerate(records):
        record, error = _checked(given, index, settings)
        if error is not None:
            if rejected is None:
                # What stands before it has been asked for and can be had.
                yield from _results(model, window, settings, budget)
                raise error
            rejected(record, error)
            continue
        window.append((index, record))
        tokens += len(record.sequence) + 2
        if tokens >= _LOOK_AHEAD_BATCHES * budget:
            yield from _results(model, window, settings, budget)
            window, tokens = [], 0
    yield from _results(model, window, settings, budget)


def _results(
    model: ESM2, window: list[tuple[int, Record]], settings: Settings, budget: int
) -> Iterator[tuple[Record, EncodeResult]]:
    """Results of one window, each distinct sequence computed once."""
    numbers: dict[str, int] = {}
    for _, record in window:
        numbers.setdefault(record.sequence, len(numbers))
    distinct = [Pending(number, sequence) for sequence, number in numbers.items()]
    found: dict[int, EncodeResult] = {}
    for batch in pack(distinct, lambda item: len(item.sequence), budget):
        found.update(encode_pending(model, batch, settings, budget))
    for index, record in window:
        result = found[numbers[record.sequence]]
        yield record, EncodeResult(**(vars(result) | {"sequence_index": index}))


def _checked(given: object, index: int, settings: Settings) -> tuple[Record, InvalidSequence | None]:
    """The record, and why it cannot be embedded."""
    if isinstance(given, str):
        record = Record(f"sequence_{index + 1}", "", given)
    elif isinstance(given, tuple) and len(given) == 3:
        record = Record(*given)
    elif isinstance(given, tuple) and len(given) == 2:
        record = Record(given[0], str(given[0]), given[1])
    else:
        raise InvalidSequence(
            f"expected a Record, a pair (id, sequence) or a string, got {type(given).__name__}", item=index
        )
    try:
        if not isinstance(record.sequence, str) or len(record.sequence) <= MAX_RESIDUES:
            tokenize([record.sequence])
            return record, None
        reason = why_not(record, settings)
        return record, None if reason is None else InvalidSequence(f"{record.id}: {reason}", item=index)
    except InvalidSequence as error:
        return record, InvalidSequence(
            f"{record.id}: {error.reason}", item=index, position=error.position, character=error.character
        )
