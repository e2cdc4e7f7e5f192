"""Memory: sizes as text, what the process uses and may use, what a pass takes, and which passes fit a limit.

A limit (`max_memory`) is for the whole process: the interpreter, NumPy, every page of the weights (mapped pages count,
though processes share them), the buffers of a pass, and the results of the call. How a call is split changes results
only by rounding, and not at all on the compiled backend.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .batch import BLOCK_ROWS, TILE_ROWS
from .config import ModelConfig
from .containers import control_groups
from .errors import InvalidOption, NotEnoughMemory
from .files import release_pages
from .options import Outputs, whole_number
from .results import count_numbers
from .weights.checkpoint import Checkpoint
from .weights.rounding import LOW
from .weights.tensor import GROUP, DeferredTensor

resource: Any
try:
    import resource
except ImportError:  # Windows, Pyodide
    resource = None

# K, M, G and T are powers of 1024, as `ulimit`, Slurm and Docker read them, and so are KiB, MiB, …; KB, MB, … are
# powers of 1000, as in SI.
_UNITS = {"": 1, "b": 1} | {
    letter + ending: base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
# Blocks are cut down to these sizes; below the last, products are too small to be worth a call.
_BLOCK_SIZES = (BLOCK_ROWS, 320, 128, 64)
# Per thread, beside its block: scores, GELU, a widened piece of weights, BLAS's packing buffers.
_PER_THREAD = 6 << 20
# The allocator, byte code that is still to be loaded, a thread's stack.
_MARGIN = 10 << 20
# A result without its arrays.
_RESULT_OBJECT = 600
# Memory and address space that the compiled backend takes in addition to its weights: with Numba and LLVM, and with a
# library of kernels.
_NUMBA, _NUMBA_ADDRESS_SPACE = 330 << 20, 900 << 20
_LIBRARY, _LIBRARY_ADDRESS_SPACE = 20 << 20, 150 << 20


# -- sizes as text -------------------------------------------------------------------------------------------------


def parse_memory(value: int | str, option: str = "max_memory") -> int:
    """Read a size: a number of bytes, or text such as `512M`, `400MB`, `1.5GiB`.

    K, M, G and T, also written KiB, MiB, GiB and TiB, are powers of 1024; KB, MB, GB and TB are powers of 1000. Case
    does not matter. InvalidOption, which names `option`, if the value is neither, or not positive.
    """
    size: float
    if (number := whole_number(value)) is not None:
        size = number
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
        if match is None or match[2] not in _UNITS:
            raise InvalidOption(f"{option}={value!r}: expected bytes, or a size such as 512M, 400MB or 1.5G")
        size = float(match[1]) * _UNITS[match[2]]
    if not 1 <= size < 1 << 60:
        raise InvalidOption(f"{option}={value!r}: expected a positive size")
    return int(size)


def format_memory(size: float) -> str:
    """Write a size for people; `parse_memory` reads it back."""
    return f"{size / (1 << 20):.0f} MiB"


# -- what the process uses and may use -----------------------------------------------------------------------------


def resident_memory() -> int:
    """Memory that this process uses now, in bytes; its peak, or a guess, where the system does not say."""
    if (size := _proc("self/status", "VmRSS")) is not None:
        return size
    if resource is None:
        return 60 << 20
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _proc(file: str, field: str) -> int | None:
    """Return a size from a file in /proc, in bytes; None if it is not there."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _text(f"/proc/{file}"), re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text()
    return ""


def available_memory() -> int:
    """Memory that can be used without swapping, in bytes, within the container's limit."""
    left = [limit - used for limit, used in _containers()]
    if (free := _proc("meminfo", "MemAvailable")) is not None:
        left.append(free)
    return max(0, min(left or [size // 2 for size in _machine_memory()], default=4 << 30))


def memory_limit() -> int | None:
    """The most memory that this process can use, in bytes; None if unknown.

    The least of the machine's memory, the container's limit, and what `ulimit -v` and `ulimit -d` leave. Part of the
    address space is reserved but never used, so what is left of it is added to what is used now.
    """
    limits = _machine_memory() + [limit for limit, _ in _containers()]
    limits += [resident_memory() + limit - used for limit, used in _ulimits()]
    return min(limits, default=None)


def _machine_memory() -> list[int]:
    """One number of bytes; none where the system does not say."""
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        return [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    return []


def _containers() -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that this process is in and that has a limit."""
    for folder, version in control_groups("memory"):
        limit, use = [("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")][version - 1]
        with suppress(OSError, ValueError):  # not visible from within a container, or "max"
            yield int((folder / limit).read_text()), int((folder / use).read_text())


def _ulimits() -> Iterator[tuple[int, int]]:
    """Limit and use of address space (`ulimit -v`) and of data (`ulimit -d`), where they are limited."""
    if resource is None:
        return
    for name, field in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY:
            yield limit, _proc("self/status", field) or resident_memory()


def compiled_fits(limit: int | None, checkpoint: Checkpoint, ahead: bool) -> bool:
    """Whether the compiled backend, which keeps packed weights of its own, has enough memory and address space.

    LLVM, which is needed unless kernels were compiled `ahead` of time, kills the process without an error message if
    it cannot get the memory that it asks for.
    """
    besides, addresses = (_LIBRARY, _LIBRARY_ADDRESS_SPACE) if ahead else (_NUMBA, _NUMBA_ADDRESS_SPACE)
    weights = 4 * checkpoint.num_parameters
    limits = _machine_memory() + [size for size, _ in _containers()] + ([] if limit is None else [limit])
    # Packing briefly holds more than its result; a mapped file leaves the memory while it is packed.
    if limits and resident_memory() + besides + weights * 5 // 4 >= min(limits):
        return False
    return all(addresses + 3 * weights < size for size, _ in _ulimits())


def unread_weights(checkpoint: Checkpoint) -> int:
    """Drop mapped weights from memory, and return their bytes: they will be read again once the model has run."""
    mapped = (tensor for tensor in checkpoint.tensors.values() if not isinstance(tensor, DeferredTensor))
    return release_pages(array for tensor in mapped for array in tensor.arrays)


def require_room(limit: int, checkpoint: Checkpoint, backend: str, precision: str, ahead: bool) -> None:
    """Raise NotEnoughMemory for weights that do not fit a limit, before they are read or packed.

    `ahead` is as in `compiled_fits`.
    """
    if precision in LOW or backend == "compiled":
        weights = packed_bytes(checkpoint, precision)
        weights += _LIBRARY if ahead else _NUMBA * ("numba" not in sys.modules)
    else:
        deferred = (tensor for tensor in checkpoint.tensors.values() if isinstance(tensor, DeferredTensor))
        weights = unread_weights(checkpoint) + sum(tensor.nbytes for tensor in deferred)
    MemoryBudget.of(limit, checkpoint, 1, weights)


def packed_bytes(checkpoint: Checkpoint, precision: str) -> int:
    """Memory of the weights as the compiled backend packs them, in bytes."""
    config = checkpoint.config
    narrow = config.num_layers * 2 * config.embed_dim * (2 * config.embed_dim + config.ffn_dim)
    size = {"bf16": 2.0, "int8": 1 + 4 / GROUP}.get(precision, 4.0)
    return int(narrow * size) + 4 * (checkpoint.num_parameters - narrow)


# -- what a call takes ---------------------------------------------------------------------------------------------


def pass_bytes(
    config: ModelConfig, rows: int, longest: int, wanted: Collection[str], threads: int, block_rows: int = BLOCK_ROWS
) -> int:
    """Memory of one pass through the layers, in bytes, without its results.

    The pass has `rows` tokens, its longest sequence has `longest`. Outputs are `wanted` as in `include`. The threads
    share the pass, and each takes `block_rows` at a time.
    """
    width, longest = config.embed_dim, min(longest, rows)
    # Rows of x, and of query, key and value twice, with a channel of ones for each head; the rotary table has a complex
    # number per channel and position, and is made in twice the precision.
    size = rows * (28 * width + 8 * config.num_heads + 192) + longest * 8 * width + longest * 48 * width // 2
    # Normalised rows, attention's output, the feed-forward part and one partial sum of each product; scores.
    in_blocks = min(threads * block_rows, rows + threads * TILE_ROWS)
    size += in_blocks * 4 * (6 * width + 2 * config.ffn_dim) + threads * (TILE_ROWS * longest * 4 * 3 + _PER_THREAD)
    if "contacts" in wanted:
        heads = config.num_layers * config.num_heads
        size += rows * longest * 8 + rows * heads * 8 * 2 + threads * TILE_ROWS * longest * 8
    if "attentions" in wanted:
        size += rows * config.num_layers * 8
    if "logits" in wanted or "classes" in wanted:
        size += rows * width * 4
    return size


def result_bytes(config: ModelConfig, residues: int, outputs: Outputs) -> int:
    """Memory of the result of one sequence, in bytes."""
    return _RESULT_OBJECT + 4 * count_numbers(outputs, config, residues)


@dataclass(frozen=True)
class Sizes:
    """How to split a call: rows of one pass through the layers, rows of one block, threads (all if None)."""

    rows_per_pass: int
    block_rows: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class MemoryBudget:
    """What is left for a call in a process that must stay below `limit`, in bytes.

    The process takes `fixed` bytes with the model loaded and all weights read; a call uses at most `threads` threads.
    """

    limit: int
    fixed: int
    config: ModelConfig
    threads: int

    @classmethod
    def of(cls, limit: int, checkpoint: Checkpoint, threads: int, unread: int) -> MemoryBudget:
        """Make the budget of a process whose model has just been loaded, with at most `threads` threads.

        `unread` bytes of its weights are still to be read. NotEnoughMemory if not even one short sequence would fit.
        """
        config = checkpoint.config
        fixed = resident_memory() + unread + _MARGIN
        for count in range(threads, 0, -1):
            # A second thread is worth having only if a medium-sized protein still fits; one alone, if any does.
            rows = 512 if count > 1 else 16
            needed = fixed + pass_bytes(config, rows, rows, (), count, _BLOCK_SIZES[-1])
            if needed <= limit:
                return cls(limit, fixed, config, count)
        narrower = {"int8": "", "fp32": "int8 or fp16"}.get(checkpoint.precision, "int8")
        smaller = f"; weights stored as {narrower} take less (convert)" if narrower else ""
        raise NotEnoughMemory(
            f"max_memory is {format_memory(limit)}, but a process with {config.name} stored as "
            f"{checkpoint.precision} takes {format_memory(needed)} for the shortest sequence{smaller}"
        )

    def sizes(
        self, results: int, lengths: Sequence[int], wanted: Collection[str], most_rows: int, row_bytes: int = 0
    ) -> Sizes:
        """Choose sizes with which a call stays within the limit, or raise NotEnoughMemory, which says what it takes.

        All results have `results` bytes, each sequence has one of `lengths` in tokens, and outputs are `wanted` as in
        `include`. If memory did not matter, a pass would have `most_rows`; each row takes `row_bytes` in addition.
        """
        longest = max(lengths)
        # Fewer threads are the most expensive way to save memory, so they come last; shorter passes are the cheapest.
        for threads, block_rows in itertools.product(range(self.threads, 0, -1), _BLOCK_SIZES):
            rows = max(most_rows, longest)
            while True:
                needed = self.fixed + results + rows * row_bytes
                needed += pass_bytes(self.config, rows, longest, wanted, threads, block_rows)
                if needed <= self.limit:
                    return Sizes(rows, block_rows, threads)
                if rows == longest:
                    break
                rows = max(rows * 3 // 4, longest)
        raise NotEnoughMemory(
            f"max_memory is {format_memory(self.limit)}, but this call takes about {format_memory(needed)}: "
            f"{format_memory(self.fixed)} for the process with its weights, {format_memory(results)} for the results, "
            f"the rest for a pass over {longest - 2} residues; ask for fewer outputs or sequences at a time"
        )
