"""How much memory a request will take, before it does."""

from __future__ import annotations

import sys
from pathlib import Path

from .jobs import Work

# One piece of an answer as text, compressed, and in the socket's buffer; and Python's own needs.
_SENDING = 16 * 2**20
_FLOAT = 4


def result_bytes(work: Work) -> int:
    """Bytes of the arrays of all results; they live until the answer is sent."""
    config = work.served.model.config
    layers, width = len(work.layers), config.embed_dim
    total = 0
    for length in work.lengths:
        if work.action != "encode":
            # Tokens of predict are a list of shared strings.
            total += (20 * _FLOAT + 16) * length if work.action == "predict" else 64
            continue
        total += layers * width * _FLOAT * sum(name in work.include for name in ("mean", "bos"))
        total += layers * width * _FLOAT * length * ("per_token" in work.include)
        total += length * length * _FLOAT * ("contacts" in work.include)
        total += 20 * length * _FLOAT * ("logits" in work.include)
        total += config.num_layers * length * _FLOAT * ("attentions" in work.include)
    return total + 4096 * len(work.sequences)


def pass_bytes(work: Work, rows: int) -> int:
    """Bytes that the engine needs while it computes `rows` rows of this work, results apart."""
    config = work.served.model.config
    width, longest = config.embed_dim, max(work.lengths) + 2
    rows = max(rows, longest)
    # The rows, query/key/value twice, the block in hand of every thread, representations taken.
    total = rows * width * _FLOAT * 12 + work.served.model.threads * 256 * (config.ffn_dim + 4 * width) * _FLOAT
    # Scores of a tile of queries against all keys, a thread each.
    total += work.served.model.threads * 128 * longest * _FLOAT * config.num_heads
    if "contacts" in work.include:  # float64: the map, marginals of every head, and a share of the result
        maps = max(1, rows // longest)
        total += maps * longest * longest * 8
        total += 3 * rows * config.num_layers * config.num_heads * 8
    if "attentions" in work.include:
        total += 2 * rows * config.num_layers * 8
    return total


class MemoryBudget:
    """Bytes that requests may take together: the limit less what the process takes idle."""

    def __init__(self, limit: int, pass_rows: int) -> None:
        self.limit = limit
        self.idle = resident_bytes()
        self._pass_rows = pass_rows
        self.held = 0

    def need(self, work: Work) -> int:
        """Bytes of the whole process while this request is alone in it."""
        return self.idle + _SENDING + pass_bytes(work, self._pass_rows) + result_bytes(work)

    def fits(self, work: Work, memory: int) -> bool:
        """Whether the request may start now."""
        # Alone it may always start: whether it fits at all was settled when it came.
        need = self.idle + _SENDING + pass_bytes(work, self._pass_rows) + memory
        return self.held == 0 or self.held + need <= self.limit


def resident_bytes() -> int:
    """Resident memory of this process; 0 where there is no telling."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return _peak_bytes()
    import os

    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
