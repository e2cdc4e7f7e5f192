"""A batch of checked sequences through the model, long ones window by window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from ..alphabet import check_letters, frame, residue_ids
from ..config import MAX_RESIDUES
from ..errors import InvalidSequence
from ..options import Outputs, number_within, one_of
from ..passes import Passes
from ..results import EncodeResult
from .windows import average, cuts, needed

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
    """What is done with sequences of more than 2048 residues.

    Attributes
    ----------
    rule : {"error", "truncate", "windows"}
        Refuse them, take the first 2048 residues, or average overlapping windows.
    overlap : int
        Residues that neighbouring windows share, at least.
    """

    rule: str = "error"
    overlap: int = DEFAULT_OVERLAP

    def __post_init__(self) -> None:
        one_of("long", self.rule, LONG_RULES)
        overlap = number_within("overlap", self.overlap, 0, MAX_RESIDUES // 2)
        object.__setattr__(self, "overlap", overlap)  # an int, whatever integer was given

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
                "(--long windows averages overlapping windows, --long truncate takes the beginning)"
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
            yield item.number, _encode_windows(passes, item, outputs, long.overlap, budget)


def _encode_windows(passes: Passes, item: Pending, outputs: Outputs, overlap: int, budget: int) -> EncodeResult:
    length = len(item.sequence)

    def windows() -> Iterator[tuple[int, EncodeResult]]:
        at_once = max(1, budget // (MAX_RESIDUES + 2))
        left = iter(cuts(length, overlap))
        while few := list(islice(left, at_once)):
            tokens = [frame(residue_ids(item.sequence[start:stop])) for start, stop in few]
            starts = [start for start, _ in few]
            yield from zip(starts, passes.encode(tokens, needed(outputs), budget), strict=True)

    return average(windows(), length, outputs, item.number)
