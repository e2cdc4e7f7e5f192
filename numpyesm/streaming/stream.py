"""`ESM2.embed_iter`: records in, results out, in order and lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from ..alphabet import SequenceNotes
from ..errors import InvalidSequence
from ..fasta import Record, nameless
from ..given import labelled
from ..options import Outputs
from ..passes import Passes
from ..results import EncodeResult
from .batches import LongSequences, Pending, encode_batch
from .packing import check_budget, pack, token_budget

# Results wait for those before them, so fewer batches are read ahead than when they are written to disk in any order.
_LOOK_AHEAD_BATCHES = 4

Records = Iterable[str | tuple[str, str] | Record] | Mapping[Any, str]


def embed_iter(
    passes: Passes,
    records: Records,
    repr_layers: Iterable[int],
    include: Iterable[str],
    *,
    long: str,
    overlap: int | None,
    tokens_per_batch: int | None,
    rejected: Callable[[Record, InvalidSequence], None] | None,
) -> Iterator[tuple[Record, EncodeResult]]:
    """See `ESM2.embed_iter`. Options are checked at once, each record when its turn comes."""
    outputs, rule = Outputs.check(passes.checkpoint, repr_layers, include), LongSequences.chosen(long, overlap)
    budget = check_budget(tokens_per_batch) or token_budget(passes.config, passes.pool.threads, outputs)
    if isinstance(records, Record):
        raise InvalidSequence("expected a list of records, got one Record; put it into a list: [record]")
    given = labelled(records)

    def stream() -> Iterator[tuple[Record, EncodeResult]]:
        window: list[tuple[int, Record]] = []
        tokens = 0
        notes = SequenceNotes()
        for index, (label, item) in enumerate(given):
            record = _record(item, index, label)
            try:
                _check(record, index, outputs, rule)
            except InvalidSequence as error:
                if rejected is None:
                    yield from results(window)  # those of the records before it are not lost
                    raise
                rejected(record, error)
                continue
            notes.look(record.sequence, record.id)
            window.append((index, record))
            tokens += len(record.sequence) + 2
            if tokens >= _LOOK_AHEAD_BATCHES * budget:
                yield from results(window)
                window, tokens = [], 0
        yield from results(window)
        notes.warn()

    def results(window: list[tuple[int, Record]]) -> Iterator[tuple[Record, EncodeResult]]:
        """Results of the records of one look-ahead, each distinct sequence computed once."""
        distinct = list(dict.fromkeys(record.sequence for _, record in window))
        found: dict[str, EncodeResult] = {}
        for batch in pack(map(Pending, count(), distinct), lambda item: len(item.sequence), budget):
            for number, result in encode_batch(passes, batch, outputs, rule, budget):
                found[distinct[number]] = result
        for index, record in window:
            yield record, replace(found[record.sequence], sequence_index=index)

    return stream()


def _record(given: Any, index: int, label: str | None) -> Record:
    """Make a record with a name of what was given."""
    if label is not None:
        record = Record(label, label, given)
    elif isinstance(given, str):
        record = Record("", "", given)
    elif isinstance(given, Record):
        record = given
    elif isinstance(given, tuple) and len(given) == 2:
        record = Record(given[0], "" if given[0] is None else str(given[0]), given[1])
    else:
        raise InvalidSequence(f"expected a Record, a pair (id, sequence) or a string, got {_kind(given)}", item=index)
    name = "" if record.id is None else str(record.id)
    return record._replace(id=name if name.strip() else nameless(index + 1))


def _kind(given: object) -> str:
    return f"a tuple of {len(given)}" if isinstance(given, tuple) else type(given).__name__


def _check(record: Record, index: int, outputs: Outputs, long: LongSequences) -> None:
    """Raise InvalidSequence, with the record's id and place, if it cannot be embedded."""
    try:
        if not isinstance(record.sequence, str):
            raise InvalidSequence(f"expected a string, got {type(record.sequence).__name__}")
        long.check(record.sequence, outputs)
    except InvalidSequence as error:
        raise InvalidSequence(
            f"{record.id}: {error.reason}", item=index, position=error.position, character=error.character
        ) from None
