"""What is recorded of each request: a JSON line in the access log, and counters for Prometheus."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from logging.handlers import QueueHandler, QueueListener
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import Scope

from ..formats import json_bytes
from .engine import Engine

# Logged and counted for a client that left; nothing is sent. (The same number as nginx.)
HUNG_UP = 499
# Lines of the log that may wait for a reader of stdout; more are dropped.
_MAX_WAITING = 10_000
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass
class Record:
    """What goes into the log and the counters about a request."""

    id: str
    client: str
    method: str = ""
    path: str = ""
    route: str = "other"
    slug: str = ""
    status: int = 0
    sent: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def record_of(scope: Scope) -> Record:
    """Return the record of the current request."""
    record: Record = scope["numpyesm.record"]
    return record


class _Quiet(logging.Handler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Drop lines that cannot be written: the queue is full, or the reader of the pipe is gone."""


class _ToQueue(_Quiet, QueueHandler): ...


class _ToStream(_Quiet, logging.StreamHandler[TextIO]): ...


class Telemetry:
    """Counters in a registry of their own, and a log to `log_to`, stdout by default.

    A thread writes the log, so that a stuck pipe stops nothing else.
    """

    def __init__(self, log_to: TextIO | None = None) -> None:
        waiting: queue.Queue[Any] = queue.Queue(_MAX_WAITING)
        self._log = logging.Logger("numpyesm.access")
        self._log.addHandler(_ToQueue(waiting))
        self._writer = QueueListener(waiting, _ToStream(log_to or sys.stdout))
        self._writer.start()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"numpyesm_{name}", text, labels, registry=self._registry)

        # Labels take few values: paths and slugs that do not exist are all "other".
        self._requests = counter("requests", "Requests answered", "route", "slug", "status")
        self._seconds = Histogram(
            "numpyesm_request_seconds",
            "From the headers to the end of the answer",
            ["route", "slug"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._sent = counter("sent_bytes", "Bytes of answers")
        self._passes = counter("passes", "Forward passes", "slug")
        self._residues = counter("residues", "Rows computed", "slug")
        self._sequences = counter("sequences", "Sequences computed", "slug")
        self._busy = counter("engine_seconds", "Time in forward passes", "slug")
        self._hung_up = counter("hang_ups", "Clients that left before their answer")
        self._queued = Gauge("numpyesm_queue_length", "Requests waiting", registry=self._registry)
        self._held = Gauge("numpyesm_result_bytes", "Memory reserved for results", registry=self._registry)

    def watch(self, engine: Engine) -> None:
        """Show the queue of an engine and the memory that it has given out."""
        self._queued.set_function(lambda: engine.waiting)
        self._held.set_function(lambda: engine.admission.held)

    def request(self, record: Record, seconds: float = 0.0) -> None:
        """Count and log a finished request, or one that was refused before it became one."""
        self._requests.labels(record.route, record.slug, str(record.status)).inc()
        self._seconds.labels(record.route, record.slug).observe(seconds)
        self._sent.inc(record.sent)
        if record.status == HUNG_UP:
            self._hung_up.inc()
        entry = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "id": record.id,
            "client": record.client,
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "ms": round(seconds * 1e3, 2),
            "bytes": record.sent,
            **record.facts,
        }
        self._log.info("%s", json_bytes(entry).decode())

    def forward_pass(self, slug: str, sequences: int, rows: int, seconds: float) -> None:
        """Count a finished pass."""
        self._passes.labels(slug).inc()
        self._sequences.labels(slug).inc(sequences)
        self._residues.labels(slug).inc(rows)
        self._busy.labels(slug).inc(seconds)

    def page(self) -> bytes:
        """Write all counters in Prometheus's text format."""
        return generate_latest(self._registry)

    def stop(self) -> None:
        """Write the lines of the log that wait, if the reader takes them within two seconds."""
        stopping = threading.Thread(target=self._stop_writer, daemon=True)
        stopping.start()
        stopping.join(timeout=2)

    def _stop_writer(self) -> None:
        with suppress(queue.Full):  # nobody has read for long
            self._writer.stop()
