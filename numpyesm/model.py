"""ESM2: packs sequences, runs the encoder once a chunk, and hands each output to its head."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .alphabet import MASK, as_batch, residue_tokens, tokenize
from .batch import Batch
from .config import ModelConfig
from .encoder import encode_batch, lm_logits
from .errors import InvalidOption, MissingHead
from .heads import AttentionSummary, ContactHead, log_prob
from .kernels import make_kernels
from .options import BY_LAYER, check_includes, check_layers, check_positions
from .results import EncodeResult, PredictResult
from .threads import WorkerPool, check_threads, default_threads
from .weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from .errors import InvalidSequence
    from .fasta import Record

Array = npt.NDArray[Any]

# Rows of one pass through the layers: enough to keep many threads busy, few enough that buffers stay near 50 MB.
_ROWS_PER_PASS = 4096


class SyntheticWeightsWarning(UserWarning):
    """The weights are random: every number that comes out means nothing."""


class ESM2:
    """An ESM-2 protein language model.

    Make one with `ESM2.from_pretrained`. Calls from several threads are safe and share the model's worker threads.

    Parameters
    ----------
    checkpoint : Checkpoint
        Weights in the canonical layout.
    backend : {"auto", "numpy", "numba"}
    precision : {"fp32", "bf16", "int8"}
        Arithmetic of the matrix products; "bf16" and "int8" need the numba backend.
    threads : int, optional
        Worker threads; all available CPUs by default.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        backend: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        _reload_from: str | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._pool = WorkerPool(default_threads() if threads is None else check_threads(threads))
        self._kernels = make_kernels(checkpoint, backend, precision)
        self._reload_from = _reload_from
        if checkpoint.synthetic:
            warnings.warn(
                f"{checkpoint.source}: SYNTHETIC random weights. The numbers that come out mean nothing; "
                "use them for timing and trying out only.",
                SyntheticWeightsWarning,
                stacklevel=2 if _reload_from is None else 3,  # the caller of from_pretrained
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = "esm2-35m",
        *,
        backend: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> ESM2:
        """Load a model.

        Parameters
        ----------
        source : str or path
            A name (`esm2-8m`, `esm2-35m`, `esm2-150m`, `esm2-650m`), a Hub id (`facebook/esm2_t12_35M_UR50D`), a
            `.safetensors` or `.pt` file, a folder, or `synthetic[:name[:seed]]` for random weights. A name is looked
            up in `NUMPYESM_WEIGHTS`, `weights/`, the cache, and the Hub.
        backend, precision, threads
            See `ESM2`.

        Raises
        ------
        WeightsNotFound
            Nothing was found; the message names the ways out.
        CheckpointError
            The file is not an ESM-2 checkpoint, or is damaged.
        InvalidOption
            An unknown backend or precision.
        """
        # Here, not above: who makes a model from a checkpoint in hand needs no search.
        from .weights.locate import load_found, resolve

        found = resolve(source)
        return cls(
            load_found(source, found),
            backend=backend,
            precision=precision,
            threads=threads,
            _reload_from=str(found.absolute()) if isinstance(found, Path) else found,
        )

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._checkpoint.config

    @property
    def name(self) -> str:
        """`esm2-35m` and so on; `custom` for other shapes."""
        return self.config.name

    @property
    def backend(self) -> str:
        """`numpy` or `numba`."""
        return self._kernels.name

    @property
    def precision(self) -> str:
        """Precision of the arithmetic."""
        return self._kernels.precision

    @property
    def threads(self) -> int:
        """Worker threads."""
        return self._pool.threads

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights, with where they came from."""
        return self._checkpoint

    def __repr__(self) -> str:
        config = self.config
        synthetic = ", SYNTHETIC WEIGHTS" if self._checkpoint.synthetic else ""
        stored = self._checkpoint.precision
        narrow = f" stored as {stored}" if stored != "fp32" else ""
        return (
            f"ESM2({self.name}: {config.num_layers} layers, width {config.embed_dim}, {config.num_heads} heads, "
            f"backend={self.backend}, precision={self.precision}, threads={self.threads}, "
            f"source={self._checkpoint.source!r}{narrow}{synthetic})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self._reload_from is None:
            raise pickle.PicklingError("this model was not loaded from a file: save it, load it from there, and pickle")
        return _reload, (self._reload_from, self.backend, self.precision, self.threads)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights as a canonical `.safetensors` file, in the precision in which they are stored."""
        from .weights.canonical import save_canonical

        save_canonical(Path(path), self._checkpoint)

    # -- what it does -------------------------------------------------------------------------------------------

    def encode(
        self,
        sequences: Iterable[str],
        repr_layers: Iterable[int] = (-1,),
        include: Iterable[str] = ("mean",),
    ) -> list[EncodeResult]:
        """Embeddings, contacts, logits and attentions.

        Parameters
        ----------
        sequences : iterable of str
            Letters `ACDEFGHIKLMNPQRSTVWY`, `BXZUO` and `-`, upper case, 1 to 2048 residues each.
        repr_layers : iterable of int
            Layers of the embeddings, each from -(n+1) to n for n layers: 0 is the scaled embedding, -1 the last layer.
        include : iterable of str
            Of `mean`, `per_token` (also `per_residue`), `bos`, `contacts`, `logits`, `attentions`. Nothing is
            computed that was not asked for.

        Returns
        -------
        list of EncodeResult
            In the order of the sequences.

        Raises
        ------
        InvalidSequence
            Names the item, the position and what is allowed.
        InvalidOption
            A layer out of range, or an unknown include.
        MissingHead
            Logits or contacts were asked for and the weights have no such head.
        """
        wanted = check_includes(include)
        layers = check_layers(repr_layers, self.config.num_layers)
        if not layers and wanted & BY_LAYER:
            asked = ", ".join(sorted(wanted & BY_LAYER))
            raise InvalidOption(f"repr_layers is empty, but include asks for {asked}: name at least one layer")
        if "logits" in wanted:
            self._require_lm_head("logits")
        if "contacts" in wanted and not self._checkpoint.has_contact_head:
            raise MissingHead(f"contacts: the weights ({self._checkpoint.source}) have no contact head")
        return self._encode_tokens(tokenize(sequences), layers, wanted)

    def embed_iter(
        self,
        records: Iterable[str | tuple[str, str] | Record],
        repr_layers: Iterable[int] = (-1,),
        include: Iterable[str] = ("mean",),
        *,
        long: str = "error",
        overlap: int = 512,
        tokens_per_batch: int | None = None,
        rejected: Callable[[Record, InvalidSequence], None] | None = None,
    ) -> Iterator[tuple[Record, EncodeResult]]:
        """As `encode`, for any number of records: results come one by one, in order, with bounded memory.

        Parameters
        ----------
        records : iterable of Record, (id, sequence) or str
            May be a generator, and endless; `numpyesm.fasta.read_fasta(path)` gives the records of a file.
        repr_layers, include
            As for `encode`.
        long : {"error", "truncate", "windows"}
            Of more than 2048 residues: refuse, take the first 2048, or average overlapping windows.
        overlap : int
            Least number of residues that neighbouring windows share.
        tokens_per_batch : int, optional
            Chosen from threads and free memory by default.
        rejected : callable, optional
            Called with a record that cannot be embedded and the reason; the record is left out. Without it the
            reason is raised.

        Yields
        ------
        record : Record
        result : EncodeResult
            `sequence_index` is the record's place in the input.
        """
        from .bulk.stream import embed_iter

        return embed_iter(
            self,
            records,
            repr_layers,
            include,
            long=long,
            overlap=overlap,
            tokens_per_batch=tokens_per_batch,
            rejected=rejected,
        )

    def predict(self, sequences: Iterable[str], positions: str = "all") -> list[PredictResult]:
        """Logits of sequences with masks.

        Parameters
        ----------
        sequences : iterable of str
            Letters `ACDEFGHIKLMNPQRSTVWY` and `BXZUO`, with at least one `<mask>` each (one residue), 1 to 2048
            residues.
        positions : {"all", "masked"}
            One row of logits for each residue, or for each mask only.

        Returns
        -------
        list of PredictResult

        Raises
        ------
        InvalidSequence, InvalidOption, MissingHead
            As for `encode`.
        """
        masked_only = check_positions(positions) == "masked"
        self._require_lm_head("predict")
        batch = as_batch(sequences)
        tokens = tokenize(batch, masks=True)
        rows = [np.flatnonzero(ids == MASK) if masked_only else np.arange(1, len(ids) - 1) for ids in tokens]
        return [
            PredictResult(
                sequence_index=index,
                logits=logits,
                sequence_tokens=residue_tokens(sequence),
                mask_positions=(np.flatnonzero(ids == MASK) - 1).tolist(),
            )
            for index, (sequence, ids, logits) in enumerate(zip(batch, tokens, self._logits(tokens, rows), strict=True))
        ]

    def log_prob(self, sequences: Iterable[str]) -> npt.NDArray[np.float64]:
        """Sum over the canonical residues of log-softmax over the 20 amino acids, from one unmasked pass.

        Parameters
        ----------
        sequences : iterable of str
            As for `encode`; residues other than the 20 amino acids are context and count nothing.

        Returns
        -------
        ndarray (n,) float64

        Raises
        ------
        InvalidSequence, MissingHead
            As for `encode`.
        """
        self._require_lm_head("log_prob")
        tokens = tokenize(sequences)
        rows = [np.arange(1, len(ids) - 1) for ids in tokens]
        scores = [log_prob(logits, ids[1:-1]) for ids, logits in zip(tokens, self._logits(tokens, rows), strict=True)]
        return np.array(scores, dtype=np.float64)

    # -- how ----------------------------------------------------------------------------------------------------

    def _require_lm_head(self, output: str) -> None:
        if not self._checkpoint.has_lm_head:
            raise MissingHead(f"{output}: the weights ({self._checkpoint.source}) have no LM head")

    def _encode_tokens(
        self, tokens: Sequence[Array], layers: list[int], wanted: frozenset[str], rows_per_pass: int = _ROWS_PER_PASS
    ) -> list[EncodeResult]:
        """Outputs of checked sequences for checked options, pass by pass."""
        results: list[EncodeResult] = []
        for chunk in _passes(tokens, rows_per_pass):
            results += self._encode_pass(chunk, layers, wanted, first_index=len(results))
        return results

    def _encode_pass(
        self, tokens: Sequence[Array], layers: list[int], wanted: frozenset[str], first_index: int
    ) -> list[EncodeResult]:
        """All outputs of the sequences of one pass."""
        config, kernels = self.config, self._kernels
        batch = Batch.pack(tokens)
        results = [EncodeResult(first_index + i) for i in range(len(tokens))]
        contacts = None
        if "contacts" in wanted:
            weight = self._checkpoint.array("contact_head.weight", kernels.dtype)
            bias = float(self._checkpoint.array("contact_head.bias", kernels.dtype)[0])
            contacts = ContactHead(config, weight, bias, batch, kernels.dtype)
        summary = AttentionSummary(config, batch, kernels.dtype) if "attentions" in wanted else None

        by_layer = layers if wanted & BY_LAYER else []
        needed = {*by_layer, *([config.num_layers] if "logits" in wanted else [])}

        def take(layer: int, rows: Array) -> None:
            if layer in by_layer:
                _pool_rows(results, batch, layer, rows, wanted)
            if layer == config.num_layers and "logits" in wanted:
                residues = [rows[first + 1 : last - 1] for first, last in batch.spans]
                for result, logits in zip(results, self._project(residues), strict=True):
                    result.logits = logits

        encode_batch(kernels, self._pool, batch, representations=needed, take=take, contacts=contacts, summary=summary)
        with kernels.session(self.threads):
            for i, result in enumerate(results):
                if contacts is not None:
                    result.contacts = contacts.result(i)
                if summary is not None:
                    result.attentions = summary.result(i)
        return results

    def _logits(self, tokens: Sequence[Array], rows: Sequence[Array]) -> list[Array]:
        """Logits (len(rows[i]), 20) of the named rows of each sequence."""
        logits: list[Array] = []
        for chunk in _passes(tokens):
            batch = Batch.pack(chunk)
            wanted = rows[len(logits) : len(logits) + len(chunk)]

            def take(_: int, x: Array, batch: Batch = batch, wanted: Sequence[Array] = wanted) -> None:
                logits.extend(self._project([x[a:b][keep] for (a, b), keep in zip(batch.spans, wanted, strict=True)]))

            encode_batch(self._kernels, self._pool, batch, representations=[self.config.num_layers], take=take)
        return logits

    def _project(self, rows: list[Array]) -> list[Array]:
        """LM head over the rows of several sequences at once."""
        logits = lm_logits(self._kernels, self._pool, np.concatenate(rows))
        return [part.copy() for part in np.split(logits, np.cumsum([len(part) for part in rows])[:-1])]


def _passes(tokens: Sequence[Array], rows_per_pass: int = _ROWS_PER_PASS) -> Iterator[Sequence[Array]]:
    """Cut a batch into passes of at most `rows_per_pass` rows (or one sequence), in order."""
    start = rows = 0
    for i, ids in enumerate(tokens):
        if i > start and rows + len(ids) > rows_per_pass:
            yield tokens[start:i]
            start, rows = i, 0
        rows += len(ids)
    yield tokens[start:]


def _pool_rows(results: Sequence[EncodeResult], batch: Batch, layer: int, rows: Array, wanted: frozenset[str]) -> None:
    """Keep what was asked of one layer's rows (T, D)."""
    for result, (first, last) in zip(results, batch.spans, strict=True):
        residues = rows[first + 1 : last - 1]
        if "mean" in wanted:
            result.embeddings = (result.embeddings or {}) | {layer: residues.mean(axis=0)}
        if "bos" in wanted:
            result.bos_embeddings = (result.bos_embeddings or {}) | {layer: rows[first].copy()}
        if "per_token" in wanted:
            result.per_token_embeddings = (result.per_token_embeddings or {}) | {layer: residues.copy()}


def _reload(source: str, backend: str, precision: str, threads: int) -> ESM2:
    return ESM2.from_pretrained(source, backend=backend, precision=precision, threads=threads)
