"""A batch of checked sequences through the model, long ones window by window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..alphabet import check_letters, frame, residue_ids
from ..config import MAX_RESIDUES
from ..errors import InvalidOption, InvalidSequence
from ..options import Outputs, number_within, one_of
from ..passes import Passes
from ..results import EncodeResult

Array = npt.NDArray[Any]

LONG_RULES = ("error", "truncate", "windows")
DEFAULT_OVERLAP = 512
# A map of 16,384 by 16,384 is a gigabyte in float32; it is held three times while windows are averaged.
_MOST_RESIDUES_OF_CONTACTS = 16384


class Pending(NamedTuple):
    """A sequence of a batch; one that is `done` only keeps the batch as it was, see `Journal.batches`."""

    number: int
    sequence: str
    done: bool = False


@dataclass(frozen=True)
class LongSequences:
    """What is done with sequences of more than 2048 residues."""

    rule: str = "error"  # or "truncate": take the first 2048; or "windows": average overlapping windows
    overlap: int = DEFAULT_OVERLAP  # residues that neighbouring windows share, at least

    def __post_init__(self) -> None:
        one_of("long", self.rule, LONG_RULES)
        overlap = number_within("overlap", self.overlap, 0, MAX_RESIDUES // 2)
        object.__setattr__(self, "overlap", overlap)  # an int, whatever integer was given

    @classmethod
    def chosen(cls, rule: str, overlap: int | None) -> LongSequences:
        """Make the rule that users chose; InvalidOption for an overlap without windows."""
        if overlap is None:
            return cls(rule)
        made = cls(rule, overlap)
        if rule != "windows":
            raise InvalidOption(f"overlap={overlap}: long={rule!r} has no windows that could overlap")
        return made

    def residues(self, length: int) -> int:
        """How many residues of a sequence its outputs cover."""
        return min(length, MAX_RESIDUES) if self.rule == "truncate" else length

    def check(self, sequence: str, outputs: Outputs) -> None:
        """Raise InvalidSequence if the outputs of this sequence cannot be computed."""
        if not sequence:
            raise InvalidSequence("the sequence is empty")
        check_letters(sequence)
        length = len(sequence)
        if length > MAX_RESIDUES and self.rule == "error":
            raise InvalidSequence(
                f"{length} residues, at most {MAX_RESIDUES} fit the model "
                "(of the option long, 'windows' averages overlapping windows and 'truncate' takes the beginning)"
            )
        if "contacts" in outputs.include and self.residues(length) > _MOST_RESIDUES_OF_CONTACTS:
            raise InvalidSequence(f"{length} residues, contact maps end at {_MOST_RESIDUES_OF_CONTACTS}")


def encode_batch(
    passes: Passes, batch: Sequence[Pending], outputs: Outputs, long: LongSequences, budget: int
) -> Iterator[tuple[int, EncodeResult]]:
    """Yield the number and the result of each sequence of a batch that is not done, in any order. All are checked."""
    short = [item for item in batch if long.residues(len(item.sequence)) <= MAX_RESIDUES]
    if short:
        tokens = [frame(residue_ids(item.sequence[:MAX_RESIDUES])) for item in short]
        for item, result in zip(short, passes.encode(tokens, outputs, budget), strict=True):
            if not item.done:
                yield item.number, result
    for item in batch:
        if long.residues(len(item.sequence)) > MAX_RESIDUES and not item.done:
            yield item.number, _average(_windows(passes, item.sequence, outputs, long.overlap, budget), item, outputs)


def cuts(length: int, overlap: int) -> list[tuple[int, int]]:
    """Cover `length` residues with evenly spread windows (start, stop) of as many as the model takes.

    Neighbours share at least `overlap` residues; a sequence that fits is one window.
    """
    if length <= MAX_RESIDUES:
        return [(0, length)]
    count = -(-(length - overlap) // (MAX_RESIDUES - overlap))
    starts = [(length - MAX_RESIDUES) * i // (count - 1) for i in range(count)]
    return [(start, start + MAX_RESIDUES) for start in starts]


def _windows(
    passes: Passes, sequence: str, outputs: Outputs, overlap: int, budget: int
) -> Iterator[tuple[slice, EncodeResult]]:
    """Yield the residues and the result of each window; a mean over all residues needs their rows."""
    include = dict.fromkeys("per_token" if name == "mean" else name for name in outputs.include)
    windows = (slice(*ends) for ends in cuts(len(sequence), overlap))
    while few := list(islice(windows, max(1, budget // (MAX_RESIDUES + 2)))):
        tokens = [frame(residue_ids(sequence[window])) for window in few]
        yield from zip(few, passes.encode(tokens, Outputs(tuple(include), outputs.layers), budget), strict=True)


def _average(windows: Iterable[tuple[slice, EncodeResult]], item: Pending, outputs: Outputs) -> EncodeResult:
    """Average over the windows of one sequence; every window counts the same where several overlap.

    Rows of residues (`per_token`, `logits`, `attentions`) are averaged over the windows that contain the residue;
    `mean` is taken over these averaged rows; `bos` and the classes of a sequence are averaged over the windows. A pair
    of residues that no window contains has no contact probability: NaN.
    """
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    for window, result in windows:
        labels = result.labels
        for name, array in result.to_arrays().items():
            # Axes of which a window is a part.
            axes = {"contacts": (0, 1), "attentions": (1,)}.get(name, range(array.ndim - 1))
            place = tuple(window if axis in axes else slice(None) for axis in range(array.ndim))
            if name not in sums:
                shape = [len(item.sequence) if axis in axes else size for axis, size in enumerate(array.shape)]
                small = name == "contacts"  # in bytes, of which this is many
                sums[name] = np.zeros(shape, np.float32 if small else np.float64)
                counted = [size if axis in axes else 1 for axis, size in enumerate(shape)]
                counts[name] = np.zeros(counted, np.uint8 if small else np.int64)
            sums[name][place] += array
            counts[name][place] += 1
    with np.errstate(invalid="ignore"):  # 0 / 0, of pairs that no window contains
        for name, total in sums.items():
            total /= counts[name]
    arrays = {name: total.astype(np.float32, copy=False) for name, total in sums.items()}

    def by_layer(kind: str) -> dict[int, Array]:
        return {layer: arrays[name] for layer in outputs.layers if (name := f"{kind}_{layer}") in arrays}

    rows = by_layer("per_token")
    return EncodeResult(
        item.number,
        embeddings={layer: x.mean(axis=0) for layer, x in rows.items()} if "mean" in outputs.include else None,
        bos_embeddings=by_layer("bos") or None,
        per_token_embeddings=rows if "per_token" in outputs.include else None,
        contacts=arrays.get("contacts"),
        logits=arrays.get("logits"),
        attentions=arrays.get("attentions"),
        classes=arrays.get("classes"),
        labels=labels,
    )
