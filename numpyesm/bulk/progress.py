"""How far a run is: a bar on a terminal, JSON lines for schedulers, or nothing."""

from __future__ import annotations

import json
import sys
import time
from typing import IO, Any

from ..errors import MissingExtra
from .journal import Totals


class Progress:
    """Report nothing; the base of classes that report.

    Calls come in this order: `reading` while the input is read, `start`, `advance` per sequence, `writing`, `stop`.
    """

    def __init__(self) -> None:
        self.totals = self.done = self._at_start = Totals(0, 0, 0)
        self._started = time.monotonic()

    def note(self, message: str) -> None:
        """Tell the user something."""

    def reading(self, records: int) -> None:
        """This many records have been read."""

    def start(self, totals: Totals, done: Totals) -> None:
        """Computing begins; an earlier run has left `done`."""
        self.totals, self.done, self._at_start = totals, done, done
        self._started = time.monotonic()

    def advance(self, step: Totals) -> None:
        """One more sequence is computed; `step` says how many records it stands for."""
        self.done = self.done.plus(step)

    def writing(self) -> None:
        """Everything is computed; the output is being written."""

    def stop(self) -> None:
        """Nothing more will come."""

    def residues_per_second(self) -> float:
        """Rate of this run, since computing began."""
        seconds = time.monotonic() - self._started
        return (self.done.residues - self._at_start.residues) / seconds if seconds > 0 else 0.0

    def seconds_left(self) -> float | None:
        """Estimate from the residues that remain; None while there is nothing to go by."""
        rate = self.residues_per_second()
        return (self.totals.residues - self.done.residues) / rate if rate > 0 else None


class JsonProgress(Progress):
    """One JSON object per line: `{"event": "progress", "records": …, "records_total": …, "residues_per_second": …}`.

    Parameters
    ----------
    stream : text stream
    every : float
        Seconds between two lines of progress.
    """

    def __init__(self, stream: IO[str] | None = None, every: float = 1.0) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._every = every
        self._next = 0.0

    def emit(self, event: str, **values: Any) -> None:
        """Write one line."""
        print(json.dumps({"event": event, **values}), file=self._stream, flush=True)

    def note(self, message: str) -> None:
        self.emit("note", message=message)

    def reading(self, records: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self.emit("reading", records=records)

    def start(self, totals: Totals, done: Totals) -> None:
        super().start(totals, done)
        self._emit_progress()

    def advance(self, step: Totals) -> None:
        super().advance(step)
        if time.monotonic() >= self._next:
            self._emit_progress()

    def writing(self) -> None:
        self._emit_progress()
        self.emit("writing", records=self.done.records)

    def _emit_progress(self) -> None:
        self._next = time.monotonic() + self._every
        left = self.seconds_left()
        totals = {f"{name}_total": count for name, count in self.totals._asdict().items()}
        self.emit(
            "progress",
            **self.done._asdict(),
            **totals,
            residues_per_second=round(self.residues_per_second(), 1),
            seconds_left=None if left is None else round(left, 1),
        )


class BarProgress(Progress):
    """A bar for people, on a terminal."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise MissingExtra("progress bars need tqdm: pip install 'numpyesm[bulk]'") from error
        self._tqdm = tqdm
        self._bar = tqdm(desc="reading", unit=" records", leave=False)

    def note(self, message: str) -> None:
        self._tqdm.write(f"numpyesm: {message}", file=sys.stderr)

    def reading(self, records: int) -> None:
        self._bar.update(records - self._bar.n)

    def start(self, totals: Totals, done: Totals) -> None:
        super().start(totals, done)
        self._bar.close()
        self._bar = self._tqdm(
            desc="embedding",
            total=totals.residues,
            initial=done.residues,
            unit=" residues",
            unit_scale=True,
            leave=False,
        )

    def advance(self, step: Totals) -> None:
        super().advance(step)
        self._bar.set_postfix_str(f"{self.done.records:,}/{self.totals.records:,} records", refresh=False)
        self._bar.update(step.residues)

    def writing(self) -> None:
        self._bar.set_description("writing")

    def stop(self) -> None:
        self._bar.close()
