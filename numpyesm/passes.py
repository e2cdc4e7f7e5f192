"""Passes through the layers: token arrays in, outputs out.

`ESM2`, scoring, streaming, the service and the fair-esm look-alike all compute by `Passes`, which takes tokens and
options that have been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .alphabet import AMINO_ACID_COLUMNS, MASK, TOKENS
from .batch import Batch, equal_parts, rows_for
from .config import VOCAB_SIZE, ModelConfig
from .heads import AttentionReader, AttentionSummary, ClassificationHead, ContactHead, FullAttention, log_prob
from .kernels import make_kernels
from .kernels.base import AttentionMaps, Kernels
from .kernels.blas import blas_threads
from .kernels.compiled.code import Code
from .kernels.compiled.library import find_library
from .kernels.scratch import scratch
from .memory import MemoryBudget, Sizes, compiled_fits, parse_memory, require_room, result_bytes, unread_weights
from .options import Outputs, check_backend, check_precision
from .results import ClassifyResult, EncodeResult, FullOutput, PredictResult
from .threads import WorkerPool, check_threads, default_threads
from .weights.checkpoint import Checkpoint

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.uint8]

# Rows of one pass at most, if nobody says otherwise. At 35M, so many take 30 MB, and 190 MB more where threads share
# sequences.
_MOST_ROWS = 16384
# From this many parameters on, the NumPy backend uses all weights in the mapped file, which costs 2 % of the time.
_LARGE = 300_000_000
# Rows that a thread passes to the LM head at a time, least and most.
_LM_HEAD_ROWS = 32, 192
# Bytes of a layer's rows that one thread copies. It pays to divide more: new memory takes most of the time.
_COPIED_ALONE = 1 << 20


class Passes:
    """Kernels with a checkpoint's weights, the threads that run them, and the memory that they may use.

    Parameters are those of `ESM2`. Calls from several threads are safe and share the worker threads. Sequences are
    token arrays (T,) uint8, `<cls>` and `<eos>` included, none of them `<pad>`; results do not depend on which of them
    share a pass.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        backend: str,
        precision: str,
        threads: int | None,
        max_memory: int | str | None,
    ) -> None:
        backend = check_backend(backend)
        if precision != "fp64":  # for tests; not offered to users
            check_precision(precision)
        count = default_threads() if threads is None else check_threads(threads)
        limit = None if max_memory is None else parse_memory(max_memory)
        ahead = backend != "numpy" and isinstance(find_library(), Code)
        too_large = backend == "auto" and precision == "fp32" and not compiled_fits(limit, checkpoint, ahead)
        if too_large:
            backend = "numpy"
        self.checkpoint = checkpoint
        if limit is not None:
            require_room(limit, checkpoint, backend, precision, ahead)
        in_place = limit is not None or checkpoint.num_parameters > _LARGE
        self.pool = WorkerPool(count)
        # Where memory is limited, matrices are packed one at a time: each has copies beside it meanwhile.
        packers = self.pool if limit is None else None
        self.kernels: Kernels = make_kernels(checkpoint, backend, precision, in_place=in_place, pool=packers)
        if too_large:
            self.kernels.origin = "the compiled backend needs more memory"
        self.budget: MemoryBudget | None = None  # if memory is not limited
        if limit is not None:
            unread = unread_weights(checkpoint) if self.kernels.name == "numpy" else 0  # packed weights are copies
            self.budget = MemoryBudget.of(limit, checkpoint, count, unread)
            self.pool = WorkerPool(self.budget.threads)

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.checkpoint.config

    # -- outputs ------------------------------------------------------------------------------------------------

    def encode(
        self, tokens: Sequence[Tokens], outputs: Outputs, rows_per_pass: int | None = None
    ) -> Iterator[EncodeResult]:
        """Yield the outputs of each sequence, in order.

        At most `rows_per_pass` tokens share a pass; a memory limit may reduce it. NotEnoughMemory if the results, or a
        pass over the longest sequence, would exceed that limit.
        """
        sizes = self.sizes(tokens, outputs, rows_per_pass)
        for part in equal_parts([len(ids) for ids in tokens], sizes.rows_per_pass):
            yield from self._encode_pass(tokens[part], outputs, part.start, sizes)

    def predict(self, tokens: Sequence[Tokens], positions: str = "all") -> Iterator[PredictResult]:
        """Yield the logits of each sequence, at all residues or at its masks (`positions="masked"`)."""
        masks = [np.flatnonzero(ids == MASK) for ids in tokens]
        rows = masks if positions == "masked" else [np.arange(1, len(ids) - 1) for ids in tokens]
        for index, logits in enumerate(self.logits(tokens, rows)):
            yield PredictResult(
                sequence_index=index,
                logits=logits,
                sequence_tokens=[TOKENS[token] for token in tokens[index][1:-1]],
                mask_positions=(masks[index] - 1).tolist(),
            )

    def log_prob(self, tokens: Sequence[Tokens]) -> npt.NDArray[np.float64]:
        """Sum of log p over the canonical residues of each sequence: (n,). See `heads.log_prob`."""
        rows = [np.arange(1, len(ids) - 1) for ids in tokens]
        return np.array([log_prob(x, ids[1:-1]) for ids, x in zip(tokens, self.logits(tokens, rows), strict=True)])

    def logits(
        self, tokens: Sequence[Tokens], rows: Sequence[npt.NDArray[np.intp]], columns: slice = AMINO_ACID_COLUMNS
    ) -> Iterator[Array]:
        """Yield the logits of some rows of each sequence, counted from its first token: (T,), (R,) -> (R, 20) float32.

        `columns` says which of the 33 tokens; by default the 20 amino acids.
        """
        return self._last_rows(tokens, rows, "logits", lambda x, rows: self._lm_head(x, rows)[:, columns])

    def classify(self, tokens: Sequence[Tokens]) -> Iterator[ClassifyResult]:
        """Yield the classification of each sequence; the weights must have a classification head."""
        head = ClassificationHead(self.checkpoint, self.kernels.dtype)
        rows = [head.rows(len(ids)) for ids in tokens]
        for index, found in enumerate(self._last_rows(tokens, rows, "classes", lambda x, rows: head.logits(x[rows]))):
            logits = head.shaped(found)
            yield ClassifyResult(index, logits, head.probabilities(logits), list(head.classifier.labels))

    def full(self, tokens: Sequence[Tokens], outputs: Sequence[FullOutput], sizes: Sizes) -> None:
        """Fill every row, all 33 logits and every attention map of each sequence, as fair-esm returns them.

        All `outputs` ask for the same, and `sizes` is what `full_sizes` gives. For contacts, each sequence has at least
        three tokens: the map leaves out the first and the last, whatever they are.
        """
        for part in equal_parts([len(ids) for ids in tokens], sizes.rows_per_pass):
            batch, places, last = Batch.pack(tokens[part]), outputs[part], self.config.num_layers
            layers, logits = places[0].representations.keys(), places[0].logits is not None
            contacts = [place.contacts for place in places if place.contacts is not None]
            maps = [place.attentions for place in places if place.attentions is not None]
            readers: list[AttentionReader] = []
            if contacts:
                readers.append(ContactHead(self.checkpoint, batch, self.kernels.dtype))
            if maps:
                readers.append(FullAttention(maps))
            for layer, x in self._layers(batch, {*layers, *([last] if logits else [])}, sizes, readers):
                every = self._lm_head(x, np.arange(len(x))) if logits and layer == last else None
                for place, (first, stop) in zip(places, batch.spans, strict=True):
                    if layer in layers:
                        place.representations[layer][...] = x[first:stop]
                    if every is not None and place.logits is not None:
                        place.logits[...] = every[first:stop]
            self._store(readers, places)
            for array, place in zip(contacts, places, strict=False):
                array[...] = place.contacts

    @property
    def _rows_per_pass(self) -> int:
        """Rows of one pass, if nobody says otherwise."""
        return min(rows_for(self.pool.threads), _MOST_ROWS)

    # -- passes -------------------------------------------------------------------------------------------------

    def sizes(self, tokens: Sequence[Tokens], outputs: Outputs, rows_per_pass: int | None = None) -> Sizes:
        """Choose how to split a call: the fastest way that the memory limit allows, or NotEnoughMemory."""
        most = rows_per_pass or self._rows_per_pass
        if self.budget is None:
            return Sizes(most)
        results = sum(result_bytes(self.config, len(ids), outputs) for ids in tokens)
        return self.budget.sizes(results, [len(ids) for ids in tokens], outputs.include, most)

    def full_sizes(self, lengths: Sequence[int], *, contacts: bool, held: int) -> Sizes:
        """Choose how to split a call of `full` whose caller holds `held` bytes of results, or raise NotEnoughMemory."""
        if self.budget is None:
            return Sizes(self._rows_per_pass)
        row_bytes = 4 * (VOCAB_SIZE + (max(lengths) if contacts else 0))
        wanted = ("logits", *(("contacts",) if contacts else ()))
        return self.budget.sizes(held, lengths, wanted, self._rows_per_pass, row_bytes)

    def _last_rows(
        self,
        tokens: Sequence[Tokens],
        rows: Sequence[npt.NDArray[np.intp]],
        output: str,
        compute: Callable[[Array, npt.NDArray[np.intp]], Array],
    ) -> Iterator[Array]:
        """Yield `compute` of some rows of each sequence's last layer; the other rows of that layer are not computed."""
        sizes = self.sizes(tokens, Outputs((output,)))
        for part in equal_parts([len(ids) for ids in tokens], sizes.rows_per_pass):
            batch = Batch.pack(tokens[part])
            flat = np.concatenate([first + keep for (first, _), keep in zip(batch.spans, rows[part], strict=True)])
            for _, x in self._layers(batch, {self.config.num_layers}, sizes, final_rows=flat):
                yield from _split(compute(x, flat), rows[part])

    def _encode_pass(
        self, tokens: Sequence[Tokens], outputs: Outputs, first_index: int, sizes: Sizes
    ) -> list[EncodeResult]:
        """Compute all outputs of the sequences of one pass."""
        batch, last, include = Batch.pack(tokens), self.config.num_layers, outputs.include
        results = [EncodeResult(first_index + i) for i in range(len(tokens))]
        readers: list[AttentionReader] = []
        if "contacts" in include:
            readers.append(ContactHead(self.checkpoint, batch, self.kernels.dtype))
        if "attentions" in include:
            readers.append(AttentionSummary(self.config, batch, self.kernels.dtype))
        wanted = {*outputs.by_layer, *([last] if {"logits", "classes"} & set(include) else [])}
        for layer, x in self._layers(batch, wanted, sizes, readers):
            if layer in outputs.by_layer:
                self._pool_rows(results, batch, layer, x, include)
            if layer == last and "logits" in include:
                residues = [np.arange(first + 1, stop - 1) for first, stop in batch.spans]
                logits = self._lm_head(x, np.concatenate(residues))[:, AMINO_ACID_COLUMNS]
                for result, rows in zip(results, _split(logits, residues), strict=True):
                    result.logits = rows
            if layer == last and "classes" in include:
                classes = ClassificationHead(self.checkpoint, self.kernels.dtype)
                for result, (first, stop) in zip(results, batch.spans, strict=True):
                    found = classes.logits(x[first:stop][classes.rows(stop - first)])
                    result.classes = classes.shaped(classes.probabilities(found))
                    result.labels = list(classes.classifier.labels)
        self._store(readers, results)
        return results

    def _layers(
        self,
        batch: Batch,
        wanted: Collection[int],
        sizes: Sizes,
        readers: Sequence[AttentionReader] = (),
        final_rows: npt.NDArray[np.intp] | None = None,
    ) -> Iterator[tuple[int, Array]]:
        """Run as many layers as the wanted outputs need, and yield number and rows of each wanted representation.

        Layer 0 is the scaled embedding, num_layers is after the final LayerNorm. The rows (T, D) are overwritten by the
        next layer. Readers receive the attention maps of each layer up to their last. Without readers, `final_rows` are
        the only rows of the last layer that matter; others may be left as in the layer before.
        """
        num_layers = self.config.num_layers
        map_layers = max((reader.last_layer for reader in readers), default=0)
        row_layers = max(wanted, default=0)
        last = max(row_layers, map_layers)
        threads = sizes.threads or self.pool.threads
        forward = self.kernels.forward(self.pool, batch, last, threads, sizes.block_rows, whole_tiles=map_layers > 0)
        if 0 in wanted:
            forward.advance(0)
            yield 0, forward.x
        tiles = batch.tiles() if map_layers else []
        layer = 0
        while layer < last:
            if layer < map_layers:
                stop = layer + 1
                maps = [AttentionMaps(tile.residues) for tile in tiles]
                handed = [(reader, tile, kept) for tile, kept in zip(tiles, maps, strict=True) for reader in readers]
                for reader, tile, kept in handed:
                    reader.request(layer, tile, kept)
                forward.advance(stop, maps, maps_only=layer >= row_layers and stop == map_layers)
                for reader, tile, kept in handed:
                    reader.collect(layer, tile, kept)
            else:
                stop = min(number for number in wanted if number > layer)
                forward.advance(stop, rows=final_rows if stop == num_layers else None)
            if stop in wanted:
                yield stop, forward.x
            layer = stop

    def _pool_rows(
        self, results: Sequence[EncodeResult], batch: Batch, layer: int, x: Array, include: Collection[str]
    ) -> None:
        """Store the wanted embeddings of one layer's rows (T, D)."""

        def store(item: tuple[EncodeResult, tuple[int, int]]) -> None:
            result, (first, last) = item
            residues = x[first + 1 : last - 1]
            if "mean" in include:
                result.embeddings = (result.embeddings or {}) | {layer: residues.mean(axis=0)}
            if "bos" in include:
                result.bos_embeddings = (result.bos_embeddings or {}) | {layer: x[first].copy()}
            if "per_token" in include:
                result.per_token_embeddings = (result.per_token_embeddings or {}) | {layer: residues.copy()}

        threads = None if x.nbytes > _COPIED_ALONE else 1
        self.pool.run(store, list(zip(results, batch.spans, strict=True)), threads)

    def _store(self, readers: Sequence[AttentionReader], results: Sequence[EncodeResult | FullOutput]) -> None:
        for reader in readers:
            with blas_threads(self.pool.threads):
                reader.store(results)

    def _lm_head(self, x: Array, rows: npt.NDArray[np.intp]) -> Array:
        """Logits of all tokens for some rows of the last layer: (T, D), (R,) -> (R, 33)."""
        logits = np.empty((len(rows), VOCAB_SIZE), self.kernels.dtype)
        least, most = _LM_HEAD_ROWS
        threads = self.pool.threads
        parts = threads * -(-len(rows) // (threads * most))
        step = max(-(-len(rows) // parts), least)

        def run(start: int) -> None:
            part = rows[start : start + step]
            taken = scratch("lm_head_rows", (len(part), x.shape[1]), x.dtype)
            logits[start : start + step] = self.kernels.lm_head(x.take(part, axis=0, out=taken, mode="clip"))

        with blas_threads(1):
            self.pool.run(run, range(0, len(rows), step))
        return logits


def _split(rows: Array, parts: Sequence[Array]) -> list[Array]:
    """Split consecutive rows into copies that are as long as `parts`."""
    return [part.copy() for part in np.split(rows, np.cumsum([len(part) for part in parts])[:-1])]
