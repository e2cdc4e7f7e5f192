"""Which sequences share a pass: packed by length to a budget of tokens, within a bounded look-ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..config import MAX_RESIDUES, ModelConfig
from ..errors import InvalidOption
from ..memory import available_memory

Item = TypeVar("Item")

# How many batches are read ahead: sorting among these fills them and keeps like with like.
LOOK_AHEAD_BATCHES = 16
_LEAST_TOKENS = 4096
_MOST_TOKENS = 65536
# Two thousand rows a thread: ten blocks of work for each between two barriers.
_TOKENS_PER_THREAD = 2048


def token_budget(config: ModelConfig, threads: int, *, layers: int = 1, contacts: bool = False) -> int:
    """Tokens of one batch, from the threads that share it and the memory that is free.

    Enough rows to keep all threads busy between two barriers; at most an eighth of the memory that is available.
    """
    wanted = max(_LEAST_TOKENS, _TOKENS_PER_THREAD * threads)
    # x, context, query, key and value, and each representation that is asked for, twice while it is copied out.
    per_token = 4 * config.embed_dim * (6 + 2 * layers) + (12 * MAX_RESIDUES if contacts else 0)
    affordable = available_memory() // 8 // per_token
    return int(max(MAX_RESIDUES + 2, min(wanted, affordable, _MOST_TOKENS)))


def check_budget(tokens: object) -> int:
    """A positive number of tokens, or InvalidOption."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= 1 << 24:
        raise InvalidOption(f"tokens_per_batch={tokens!r}: expected a whole number from 1 to {1 << 24}")
    return tokens


def pack(items: Iterable[Item], length: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Batches of at most `budget` tokens (or one item), longest first within each stretch of the look-ahead.

    Parameters
    ----------
    items : iterable
    length : callable
        Residues of an item; it takes two tokens more.
    budget : int

    Yields
    ------
    list
        Every item once.
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
    """Sorted by length and cut; the share of each batch is set so that none is left nearly empty."""
    total = sum(length(item) + 2 for item in items)
    if not items:
        return
    share = total / -(-total // budget)
    batch: list[Item] = []
    tokens = 0
    for item in sorted(items, key=length, reverse=True):
        size = length(item) + 2
        if batch and (tokens + size > budget or tokens + size / 2 > share):
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += size
    yield batch
