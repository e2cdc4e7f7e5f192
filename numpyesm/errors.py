"""Everything numpyesm raises on purpose, and how it warns. Each message says what was wrong, where, what is allowed."""

from __future__ import annotations

import sys
import warnings

# Packages whose lines mean nothing to users: this one, and the one that calls its estimators.
_PASSED = ("numpyesm", "sklearn")


class NumpyesmError(Exception):
    """Base of all errors that numpyesm raises on purpose."""


class InputWarning(UserWarning):
    """Input that is accepted but may be unintended: nucleotides, `--` lines that were left out."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called numpyesm, however deep within it this is."""
    level, frame = 1, sys._getframe()  # noqa: SLF001  (documented; `inspect` takes longer to import)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class InvalidSequence(NumpyesmError, ValueError):
    """A sequence that the model cannot take.

    Attributes
    ----------
    item : int or None
        Index of the sequence in the batch; None if the batch itself is wrong (empty, not a list).
    position : int or None
        1-based residue position of the first offending character; None if the whole item is wrong.
    character : str or None
        The offending character.
    reason : str
        The message without the item's index.
    """

    def __init__(
        self, reason: str, *, item: int | None = None, position: int | None = None, character: str | None = None
    ) -> None:
        super().__init__(reason if item is None else f"item {item}: {reason}")
        self.reason = reason
        self.item = item
        self.position = position
        self.character = character


class InvalidMutation(NumpyesmError, ValueError):
    """A mutation that cannot be read, or that does not fit the wild type.

    Attributes
    ----------
    item : int or None
        Index of the mutation in the list; None if it stands alone, or the list itself is wrong.
    mutation : str or None
        The whole mutant (`A42G:V50L`).
    position : int or None
        The position at fault, as the mutation numbers it; None if it is not about one.
    reason : str
        The message without the item's index.
    """

    def __init__(
        self, reason: str, *, item: int | None = None, mutation: str | None = None, position: int | None = None
    ) -> None:
        if mutation is not None and not reason.startswith(mutation[:80]):
            reason = f"{mutation[:80]}: {reason}"
        super().__init__(reason if item is None else f"item {item}: {reason}")
        self.reason = reason
        self.item = item
        self.mutation = mutation
        self.position = position


class InvalidOption(NumpyesmError, ValueError):
    """An option outside what is allowed: a layer out of range, an unknown `include`, backend or precision."""


class CheckpointError(NumpyesmError, ValueError):
    """A weights file that is truncated, corrupted, of another model, or not a checkpoint at all."""


class WeightsNotFound(NumpyesmError, FileNotFoundError):
    """No weights where they were looked for; the message says what can be done."""

    def __str__(self) -> str:  # FileNotFoundError would format (errno, strerror)
        return str(self.args[0]) if self.args else ""


class NotEnoughMemory(NumpyesmError, MemoryError):
    """`max_memory` is too little for the model or for a call; the message says how much would be enough."""


class MissingHead(NumpyesmError, RuntimeError):
    """The weights lack the head (LM, contact or classification) that an output needs which was asked for."""


class MissingExtra(NumpyesmError, ImportError):
    """An optional dependency is absent; the message says which extra installs it."""


class BulkError(NumpyesmError, RuntimeError):
    """A bulk run that cannot go on: its output is in use, or belongs to a different run."""
