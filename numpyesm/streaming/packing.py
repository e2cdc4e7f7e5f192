"""Decide which sequences share a batch: sort by length within a bounded look-ahead, and fill a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..batch import equal_parts, rows_for
from ..config import MAX_RESIDUES, ModelConfig
from ..memory import available_memory
from ..options import Outputs, number_within

Item = TypeVar("Item")

# Batches that are read ahead: sorting among these fills them and keeps similar lengths together.
LOOK_AHEAD_BATCHES = 16
_MOST_TOKENS = 65536


def token_budget(config: ModelConfig, threads: int, outputs: Outputs) -> int:
    """Choose the tokens of a batch: enough to keep all threads busy, in at most an eighth of the available memory."""
    # x, context, query, key and value, and each representation, twice while it is copied out.
    per_token = 4 * config.embed_dim * (6 + 2 * max(1, len(outputs.layers)))
    per_token += 12 * MAX_RESIDUES * ("contacts" in outputs.include)
    affordable = available_memory() // 8 // per_token
    return int(max(MAX_RESIDUES + 2, min(rows_for(threads), affordable, _MOST_TOKENS)))


def check_budget(tokens: object) -> int | None:
    """Return the tokens of a batch that the caller asks for, None to let `token_budget` choose; or InvalidOption."""
    return None if tokens is None else number_within("tokens_per_batch", tokens, 1, 1 << 24)


def pack(items: Iterable[Item], length: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Yield batches of at most `budget` tokens (or one item), the longest first within each look-ahead.

    `length` gives the residues of an item, which takes two tokens more.
    """
    waiting: list[Item] = []
    tokens = 0
    for item in items:
        waiting.append(item)
        tokens += length(item) + 2
        if tokens >= LOOK_AHEAD_BATCHES * budget:
            yield from _filled(waiting, length, budget)
            waiting, tokens = [], 0
    yield from _filled(waiting, length, budget)


def _filled(items: list[Item], length: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Sort by length and cut into batches of nearly equal size."""
    ordered = sorted(items, key=length, reverse=True)
    for part in equal_parts([length(item) + 2 for item in ordered], budget):
        yield ordered[part]
