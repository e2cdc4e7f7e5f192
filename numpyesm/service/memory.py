"""How much memory a request will take, before it does."""

from __future__ import annotations

from .. import memory
from .jobs import Work

# One piece of an answer as text, compressed, and in the socket's buffer; and Python's own needs.
_SENDING = 16 * 2**20


def result_bytes(work: Work) -> int:
    """Bytes of the arrays of all results; they live until the answer is sent."""
    total = 4096 * len(work.sequences)
    for length in work.lengths:
        if work.action == "encode":
            total += memory.result_bytes(work.served.model.config, length, work.include, len(work.layers))
        elif work.action == "predict":
            total += (20 * 4 + 16) * length  # tokens are a list of shared strings
    return total


def pass_bytes(work: Work, rows: int) -> int:
    """Bytes that the engine needs while it computes `rows` rows of this work, results apart."""
    model, longest = work.served.model, max(work.lengths) + 2
    wanted = work.include if work.action == "encode" else {"logits"}
    return memory.pass_bytes(model.config, max(rows, longest), longest, wanted, model.threads)


class MemoryBudget:
    """Bytes that requests may take together: the limit less what the process takes idle."""

    def __init__(self, limit: int, pass_rows: int) -> None:
        # What `ulimit -v` leaves is known only once the models are loaded.
        self.limit = min(limit, memory.memory_limit() or limit)
        self.idle = memory.resident_memory()
        self._pass_rows = pass_rows
        self.held = 0

    def need(self, work: Work) -> int:
        """Bytes of the whole process while this request is alone in it."""
        return self.idle + _SENDING + pass_bytes(work, self._pass_rows) + result_bytes(work)

    def fits(self, work: Work, results: int) -> bool:
        """Whether the request may start now."""
        # Alone it may always start: whether it fits at all was settled when it came.
        need = self.idle + _SENDING + pass_bytes(work, self._pass_rows) + results
        return self.held == 0 or self.held + need <= self.limit
