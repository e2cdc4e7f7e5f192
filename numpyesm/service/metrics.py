"""Counters for Prometheus, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from .engine import Engine

TEXT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What the service counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"numpyesm_{name}", text, labels, registry=self.registry)

        # Labels take few values: paths and slugs that do not exist are all "other".
        self._requests = counter("requests", "Requests answered", "route", "slug", "status")
        self._seconds = Histogram(
            "numpyesm_request_seconds",
            "From the headers to the end of the answer",
            ["route", "slug"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._sent = counter("sent_bytes", "Bytes of answers")
        self._passes = counter("passes", "Forward passes", "slug")
        self._residues = counter("residues", "Rows computed", "slug")
        self._sequences = counter("sequences", "Sequences computed", "slug")
        self._busy = counter("engine_seconds", "Time in forward passes", "slug")
        self._hung_up = counter("hang_ups", "Clients that left before their answer")
        self._queued = Gauge("numpyesm_queue_length", "Requests waiting", registry=self.registry)
        self._held = Gauge("numpyesm_result_bytes", "Memory reserved for results", registry=self.registry)

    def watch(self, engine: Engine) -> None:
        """Show the queue of an engine and the memory that it has given out."""
        self._queued.set_function(lambda: engine.waiting)
        self._held.set_function(lambda: engine.admission.held)

    def request(self, route: str, slug: str, status: int, seconds: float, sent: int) -> None:
        """Count a finished request."""
        self._requests.labels(route, slug, str(status)).inc()
        self._seconds.labels(route, slug).observe(seconds)
        self._sent.inc(sent)
        if status == HUNG_UP:
            self._hung_up.inc()

    def forward_pass(self, slug: str, sequences: int, rows: int, seconds: float) -> None:
        """Count a finished pass."""
        self._passes.labels(slug).inc()
        self._sequences.labels(slug).inc(sequences)
        self._residues.labels(slug).inc(rows)
        self._busy.labels(slug).inc(seconds)

    def page(self) -> bytes:
        """Write all counters in Prometheus's text format."""
        return generate_latest(self.registry)


# Logged and counted for a client that left; nothing is sent. (The same number as nginx.)
HUNG_UP = 499
