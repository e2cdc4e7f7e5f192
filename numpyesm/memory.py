"""Staying below a given amount of memory: how much the process has, how much a call will take, which sizes fit.

`max_memory` is for the whole process: the interpreter, NumPy, every page of the weights (mapped pages count, though
processes share them), the buffers of a pass, and the results of the call. Block sizes change no result.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .batch import BLOCK_ROWS
from .config import MAX_RESIDUES, ModelConfig
from .errors import InvalidOption, NotEnoughMemory
from .weights.checkpoint import Checkpoint

_UNITS = {
    "": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "kb": 10**3, "m": 1 << 20, "mib": 1 << 20, "mb": 10**6,
    "g": 1 << 30, "gib": 1 << 30, "gb": 10**9, "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip

# What a block is cut down to, at least; below, products are too small to be worth a call.
_BLOCK_SIZES = (BLOCK_ROWS, 128, 64)
# Of one thread beside its block: scores, GELU, a widened piece, BLAS's packing buffers.
_PER_THREAD = 6 << 20
# Allocator, byte code that is still to be loaded, a thread's stack.
_MARGIN = 10 << 20
# Numba, LLVM and the compiled kernels.
_NUMBA = 330 << 20
_NUMBA_ADDRESS_SPACE = 900 << 20


def parse_memory(value: int | str) -> int:
    """Bytes, from a number of bytes or text such as `512M`, `400MB`, `1.5G`.

    Raises
    ------
    InvalidOption
        If it is neither, or not positive.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = float(value)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
        if match is None or match[2] not in _UNITS:
            raise InvalidOption(f"max_memory={value!r}: expected bytes, or a size such as 512M or 1.5G")
        size = float(match[1]) * _UNITS[match[2]]
    if not 1 <= size < 1 << 60:
        raise InvalidOption(f"max_memory={value!r}: expected a positive size")
    return int(size)


def megabytes(size: float) -> str:
    """A size for people; 2**20 bytes a MB, as `ps` and `ulimit` count."""
    return f"{size / (1 << 20):.0f} MB"


def resident_memory() -> int:
    """Bytes of memory that this process has now; of systems that do not say, its highest so far or a guess."""
    try:
        with open("/proc/self/status") as status:
            return int(re.findall(r"VmRSS:\s+(\d+)", status.read())[0]) << 10
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows, Pyodide
        return 60 << 20
    highest: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest << 10


def unread_weights(checkpoint: Checkpoint) -> int:
    """Bytes of mapped weights that are not in memory yet and will be once the model has run."""
    addresses = sorted(tensor.raw.__array_interface__["data"][0] for tensor in checkpoint.tensors.values())
    unread = 0
    try:
        with open("/proc/self/smaps") as maps:
            size = None
            for line in maps:
                if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]\d*", line):
                    first, last = int(header[1], 16), int(header[2], 16)
                    size = last - first if any(first <= address < last for address in addresses) else None
                elif size is not None and line.startswith("Rss:"):
                    unread += max(0, size - (int(line.split()[1]) << 10))
                elif re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):  # memory of no file
                    size = None
    except OSError:
        return sum(tensor.raw.nbytes for tensor in checkpoint.tensors.values())
    return unread


def numba_fits(limit: int | None, checkpoint: Checkpoint) -> bool:
    """Whether the numba backend, which keeps packed weights of its own, has room.

    Within `limit`, within what the control group allows, and within the address space that `ulimit -v` leaves: LLVM
    ends the process without a word where it cannot get what it asks for.
    """
    weights = 4 * checkpoint.num_parameters
    limits = [size for size in (limit, _control_group_limit()) if size is not None]
    if limits and resident_memory() + _NUMBA + 2 * weights >= min(limits):
        return False
    address_space = _address_space_limit()
    return address_space is None or _NUMBA_ADDRESS_SPACE + 3 * weights < address_space


def _control_group_limit() -> int | None:
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return int(file.read())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _address_space_limit() -> int | None:
    """The least of what `ulimit -v` and `ulimit -d` set."""
    try:
        import resource
    except ImportError:
        return None
    found = [resource.getrlimit(getattr(resource, name))[0] for name in ("RLIMIT_AS", "RLIMIT_DATA")]
    return min((size for size in found if size != resource.RLIM_INFINITY), default=None)


@dataclass(frozen=True)
class Sizes:
    """How a call is cut up: rows of one pass through the layers, rows of one block, threads (all if None)."""

    rows_per_pass: int
    block_rows: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class MemoryBudget:
    """What is left for a call of a process that must stay below `limit`.

    Attributes
    ----------
    limit : int
        Of the whole process, in bytes.
    fixed : int
        What it takes with the model loaded and all weights read.
    config : ModelConfig
    threads : int
    """

    limit: int
    fixed: int
    config: ModelConfig
    threads: int

    @classmethod
    def of(cls, limit: int, checkpoint: Checkpoint, threads: int) -> MemoryBudget:
        """The budget of a process whose model has just been loaded, with as many threads as have room.

        Raises
        ------
        NotEnoughMemory
            Not even one short sequence would fit.
        """
        fixed = resident_memory() + unread_weights(checkpoint) + _MARGIN
        for count in range(threads, 0, -1):
            budget = cls(limit, fixed, checkpoint.config, count)
            # Threads are worth having if a middling protein fits with them, or at least any does.
            if budget._needed(512 if count > 1 else 16, _BLOCK_SIZES[-1]) <= limit:
                return budget
        narrower = {"int8": "", "fp32": "int8 or fp16"}.get(checkpoint.precision, "int8")
        smaller = f"; weights stored as {narrower} take less (convert)" if narrower else ""
        raise NotEnoughMemory(
            f"max_memory is {megabytes(limit)}, but a process with {checkpoint.config.name} stored as "
            f"{checkpoint.precision} takes {megabytes(budget._needed(16, _BLOCK_SIZES[-1]))} for the shortest sequence"
            f"{smaller}"
        )

    def sizes(self, lengths: Sequence[int], wanted: Iterable[str], layers: int, most_rows: int) -> Sizes:
        """Sizes with which a call stays within the limit.

        Parameters
        ----------
        lengths : sequence of int
            Tokens of each sequence.
        wanted : iterable of str
            Outputs, as in `include`.
        layers : int
            Layers whose embeddings are wanted.
        most_rows : int
            Rows of a pass where memory does not matter.

        Raises
        ------
        NotEnoughMemory
            With what the call would take.
        """
        wanted = frozenset(wanted)
        results = sum(self._result(length, wanted, layers) for length in lengths)
        longest = max(lengths)
        # Fewer threads is the dearest way to save memory, so the last to be tried; shorter passes the cheapest.
        for threads, block_rows in itertools.product(range(self.threads, 0, -1), _BLOCK_SIZES):
            budget = replace(self, threads=threads)
            rows = max(most_rows, longest)
            while True:
                least = budget._needed(rows, block_rows, longest) + results + budget._maps(rows, longest, wanted)
                if least <= self.limit:
                    return Sizes(rows, block_rows, threads)
                if rows == longest:
                    break
                rows = max(rows * 3 // 4, longest)
        raise NotEnoughMemory(
            f"max_memory is {megabytes(self.limit)}, but this call takes about {megabytes(least)}: "
            f"{megabytes(self.fixed)} for the process with its weights, {megabytes(results)} for the results, "
            f"the rest for a pass over {longest - 2} residues; ask for fewer outputs or sequences at a time"
        )

    def _needed(self, rows: int, block_rows: int, longest: int = MAX_RESIDUES + 2) -> int:
        """Bytes of the process during a pass of so many rows, results not counted."""
        width, ffn = self.config.embed_dim, self.config.ffn_dim
        longest = min(longest, rows)
        # Rows of x, of query, key and value twice; the rotary table has a complex number a channel and position, and
        # is made in twice the precision.
        per_pass = rows * (28 * width + 64) + longest * 8 * width + longest * 48 * width // 2
        # Normalised rows, attention's output, the feed-forward part and one partial sum of each product.
        per_block = block_rows * 4 * (3 * width + 3 * width + 2 * ffn)
        scores = 64 * longest * 4 * 3
        return self.fixed + per_pass + self.threads * (per_block + scores + _PER_THREAD)

    def _maps(self, rows: int, longest: int, wanted: frozenset[str]) -> int:
        """Bytes that attention maps take during a pass."""
        size = 0
        if "contacts" in wanted:
            heads = self.config.num_layers * self.config.num_heads
            size += rows * longest * 8 + rows * heads * 8 * 2 + self.threads * 64 * longest * 8
        if "attentions" in wanted:
            size += rows * self.config.num_layers * 8
        if "logits" in wanted:
            size += rows * self.config.embed_dim * 4
        return size

    def _result(self, length: int, wanted: frozenset[str], layers: int) -> int:
        """Bytes of one sequence's result."""
        row = self.config.embed_dim * 4 * layers
        size = 600  # the object itself
        size += row * (("mean" in wanted) + ("bos" in wanted) + ("per_token" in wanted) * length)
        size += 4 * length * length * ("contacts" in wanted)
        size += 80 * length * ("logits" in wanted)
        size += 4 * length * self.config.num_layers * ("attentions" in wanted)
        return size
