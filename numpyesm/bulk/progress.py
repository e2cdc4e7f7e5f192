"""How far a run is: a bar on a terminal, JSON lines for schedulers, or nothing."""

from __future__ import annotations

import json
import sys
import time
from typing import IO, Any

from ..errors import MissingExtra
from .journal import Totals


class Progress:
    """Says nothing; the base of those that do.

    Calls come in this order: `reading` while the input is read, `start`, `advance` a sequence, `writing`, `stop`.
    """

    def __init__(self) -> None:
        self.totals = self.done = self._at_start = Totals(0, 0, 0)
        self._started = time.monotonic()

    def note(self, message: str) -> None:
        """Something that the user should know."""

    def reading(self, records: int) -> None:
        """So many records have been read."""

    def start(self, totals: Totals, done: Totals) -> None:
        """Computing begins; `done` is left from before."""
        self.totals, self.done, self._at_start = totals, done, done
        self._started = time.monotonic()

    def advance(self, step: Totals) -> None:
        """One more sequence, which is so many records."""
        self.done = Totals(*(a + b for a, b in zip(self.done, step, strict=True)))

    def writing(self) -> None:
        """All is computed; the output is written."""

    def stop(self) -> None:
        """Nothing more will come."""

    def residues_per_second(self) -> float:
        """Computed in this run, since its start."""
        seconds = time.monotonic() - self._started
        return (self.done.residues - self._at_start.residues) / seconds if seconds > 0 else 0.0

    def seconds_left(self) -> float | None:
        """By the residues that remain; None as long as there is no telling."""
        rate = self.residues_per_second()
        return (self.totals.residues - self.done.residues) / rate if rate > 0 else None


class JsonProgress(Progress):
    """One JSON object a line: `{"event": "progress", "records": …, "records_total": …, "residues_per_second": …}`.

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
        self.emit(
            "progress",
            records=self.done.records,
            records_total=self.totals.records,
            sequences=self.done.sequences,
            sequences_total=self.totals.sequences,
            residues=self.done.residues,
            residues_total=self.totals.residues,
            residues_per_second=round(self.residues_per_second(), 1),
            seconds_left=None if left is None else round(left, 1),
        )


class BarProgress(Progress):
    """A bar for people, on a terminal."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
        except ImportError as error:
            raise MissingExtra("progress bars need rich: pip install 'numpyesm[bulk]'") from error
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("reading", total=None, text="")
        self._next = 0.0
        self._bar.start()

    def note(self, message: str) -> None:
        self._bar.console.print(f"numpyesm: {message}", markup=False, highlight=False)

    def reading(self, records: int) -> None:
        self._bar.update(self._task, text=f"{records:,} records")

    def start(self, totals: Totals, done: Totals) -> None:
        super().start(totals, done)
        self._bar.update(self._task, description="embedding", total=max(1, totals.residues), completed=done.residues)
        self._show()

    def advance(self, step: Totals) -> None:
        super().advance(step)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.1
            self._show()

    def writing(self) -> None:
        self._show()
        self._bar.update(self._task, description="writing")

    def stop(self) -> None:
        self._bar.stop()

    def _show(self) -> None:
        left = self.seconds_left()
        text = f"{self.done.records:,}/{self.totals.records:,} records, {self.residues_per_second():,.0f} residues/s"
        text += "" if left is None else f", {_duration(left)} left"
        self._bar.update(self._task, completed=self.done.residues, text=text)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{seconds:02}"
