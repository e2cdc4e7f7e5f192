"""Progress of a run: a bar on a terminal, JSON lines for schedulers, or nothing."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from operator import add
from typing import IO, Any

from ..extras import require
from .journal import Totals

_EVERY = 1.0  # seconds between two lines of progress


class Progress:
    """Report nothing; the base of classes that report.

    Calls come in this order: `reading` while the input is read, `start`, `advance` per sequence, `writing`, `stop`.
    """

    def __init__(self) -> None:
        self.totals = self.done = Totals(0, 0, 0)

    def note(self, message: str) -> None:
        """Tell the user something."""

    def reading(self, records: int) -> None:
        """This many records have been read."""

    def start(self, totals: Totals, done: Totals) -> None:
        """Computing begins; an earlier run has left `done`."""
        self.totals, self.done = totals, done

    def advance(self, step: Totals) -> None:
        """One more sequence is computed; `step` says how many records it stands for."""
        self.done = Totals(*map(add, self.done, step))

    def writing(self) -> None:
        """Everything is computed; the output is being written."""

    def stop(self) -> None:
        """Nothing more will come."""


class JsonProgress(Progress):
    """One JSON object per line: `{"event": "progress", "records": …, "records_total": …, "residues_per_second": …}`.

    They go to `stream`, by default to stderr.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._next = self._started = 0.0
        self._at_start = self.done

    def emit(self, event: str, **values: Any) -> None:
        """Write one line."""
        print(json.dumps({"event": event, **values}), file=self._stream, flush=True)

    def note(self, message: str) -> None:
        self.emit("note", message=message)

    def reading(self, records: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            self.emit("reading", records=records)

    def start(self, totals: Totals, done: Totals) -> None:
        super().start(totals, done)
        self._started, self._at_start = time.monotonic(), done
        self._emit_progress()

    def advance(self, step: Totals) -> None:
        super().advance(step)
        if time.monotonic() >= self._next:
            self._emit_progress()

    def writing(self) -> None:
        self._emit_progress()
        self.emit("writing", records=self.done.records)

    def _emit_progress(self) -> None:
        now = time.monotonic()
        self._next = now + _EVERY
        rate = (self.done.residues - self._at_start.residues) / max(now - self._started, 1e-9)
        self.emit(
            "progress",
            **self.done._asdict(),
            **{f"{name}_total": count for name, count in self.totals._asdict().items()},
            residues_per_second=round(rate, 1),
            seconds_left=round((self.totals.residues - self.done.residues) / rate, 1) if rate else None,
        )


class BarProgress(Progress):
    """A bar for people, on a terminal; or, if it is `quiet`, notes alone."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__()
        tqdm = require("tqdm", "a progress bar", "bulk").tqdm
        self._make = partial(tqdm, leave=False, disable=quiet)
        self._bar = self._make(desc="reading", unit=" records")

    def note(self, message: str) -> None:
        self._bar.write(f"numpyesm: {message}", file=sys.stderr)

    def reading(self, records: int) -> None:
        self._bar.update(records - self._bar.n)

    def start(self, totals: Totals, done: Totals) -> None:
        super().start(totals, done)
        self._bar.close()
        size = {"total": totals.residues, "initial": done.residues}
        self._bar = self._make(desc="embedding", unit=" residues", unit_scale=True, **size)

    def advance(self, step: Totals) -> None:
        super().advance(step)
        self._bar.set_postfix_str(f"{self.done.records:,}/{self.totals.records:,} records", refresh=False)
        self._bar.update(step.residues)

    def writing(self) -> None:
        self._bar.set_description("writing")

    def stop(self) -> None:
        self._bar.close()
