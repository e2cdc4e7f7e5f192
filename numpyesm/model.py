"""ESM2: packs sequences, runs the encoder once a chunk, and hands each output to its head."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .alphabet import AMINO_ACID_COLUMNS, MASK, as_batch, residue_tokens, tokenize
from .batch import Batch
from .config import ModelConfig
from .encoder import encode_batch, lm_logits
from .errors import InvalidOption, MissingHead
from .heads import AttentionSummary, ContactHead, log_prob
from .kernels import make_kernels
from .kernels.base import FEW_TOKENS, Kernels
from .memory import MemoryBudget, Sizes, numba_fits, parse_memory
from .options import BY_LAYER, check_includes, check_layers, check_positions
from .results import EncodeResult, PredictResult
from .threads import WorkerPool, check_threads, default_threads
from .weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from .errors import InvalidSequence
    from .fasta import Record
    from .scoring.scan import MutationScan

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
        `auto` is numba where it is installed and has room (about 450 MB for 35M, and 1.3 GB of address space).
    precision : {"fp32", "bf16", "int8"}
        Arithmetic of the matrix products; "bf16" and "int8" need the numba backend.
    threads : int, optional
        Worker threads; all available CPUs by default.
    max_memory : int or str, optional
        Bytes, or text such as `"300M"` (300·2^20 bytes, as `"300MiB"`; `"300MB"` is 300·10^6), that the whole process
        must stay below. Block sizes, threads and (with
        `backend="auto"`) the backend are chosen by it; a call that cannot stay below it raises `NotEnoughMemory`
        before it starts. Results are the same.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        backend: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        max_memory: int | str | None = None,
        _reload_from: str | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        count = default_threads() if threads is None else check_threads(threads)
        limit = None if max_memory is None else parse_memory(max_memory)
        if backend == "auto" and precision == "fp32" and not numba_fits(limit, checkpoint):
            backend = "numpy"
        self._kernels = make_kernels(checkpoint, backend, precision, in_place=limit is not None)
        self._budget = None if limit is None else MemoryBudget.of(limit, checkpoint, count)
        self._pool = WorkerPool(count if self._budget is None else self._budget.threads)
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
        max_memory: int | str | None = None,
    ) -> ESM2:
        """Load a model.

        Parameters
        ----------
        source : str or path
            A name (`esm2-8m`, `esm2-35m`, `esm2-150m`, `esm2-650m`), a Hub id (`facebook/esm2_t12_35M_UR50D`), a
            `.safetensors` or `.pt` file, a folder, or `synthetic[:name[:seed]]` for random weights. A name is looked
            up in `NUMPYESM_WEIGHTS`, `weights/`, the cache, and the Hub.
        backend, precision, threads, max_memory
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
            max_memory=max_memory,
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
        limit = None if self._budget is None else self._budget.limit
        return _reload, (self._reload_from, self.backend, self.precision, self.threads, limit)

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
        if "contacts" in wanted:
            self._require_contact_head()
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

    def score_mutations(
        self,
        wild_type: str,
        mutations: Iterable[str],
        method: str = "masked-marginals",
        *,
        offset: int = 1,
        window: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.float64]:
        """Scores of mutants; the higher, the more the model likes them.

        Parameters
        ----------
        wild_type : str
            Letters `ACDEFGHIKLMNPQRSTVWY` and `BXZUO`.
        mutations : iterable of str
            Substitutions such as `A42G`, several of one mutant joined as `A42G:V50L`, or `WT` for none. The new
            letter is one of the 20 amino acids.
        method : {"masked-marginals", "wt-marginals", "log-prob", "pseudo-ppl"}
            With x the wild type, m the mutant, and the sum over the substitutions of the mutant:

            - `masked-marginals`: Σ log p(m_i | x without i) - log p(x_i | x without i), each position masked alone
              (Meier et al. 2021; fair-esm's variant-prediction script, ProteinGym);
            - `wt-marginals`: Σ log p(m_i | x) - log p(x_i | x), from one pass without masks (the same sources);
            - `log-prob`: `log_prob` of m minus that of x;
            - `pseudo-ppl`: Σ over all residues of m of log p(m_i | m without i), softmax over the 33 tokens; not a
              difference, and one pass a residue of every mutant. fair-esm's script means this sum, but looks up the
              residue behind the masked one and leaves out the ends.

            In the first three `WT` and `A42A` are worth 0.
        offset : int
            Position of the wild type's first residue in the numbering of the mutations (fair-esm's `--offset-idx`).
        window : int, optional
            Residues around each position that the model sees; by default the whole wild type, at most 2048 residues.
            Not for `log-prob`.
        progress : callable (done, total), optional
            Called now and then.

        Returns
        -------
        ndarray (n,) float64

        Raises
        ------
        InvalidMutation
            Names the item, the mutation and the position.
        InvalidSequence, InvalidOption, MissingHead
            As for `encode`.
        """
        from .scoring.methods import score_mutations

        return score_mutations(self, wild_type, mutations, method, offset=offset, window=window, progress=progress)

    def scan_mutations(
        self,
        wild_type: str,
        method: str = "masked-marginals",
        *,
        offset: int = 1,
        window: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> MutationScan:
        """Scores of every substitution of a protein, as a matrix of L positions × 20 amino acids.

        Parameters
        ----------
        wild_type, offset, window, progress
            As for `score_mutations`.
        method : {"masked-marginals", "wt-marginals"}

        Returns
        -------
        MutationScan
            `scores` (L, 20) with columns `amino_acids`, rows `positions`.
        """
        from .scoring.scan import scan_mutations

        return scan_mutations(self, wild_type, method, offset=offset, window=window, progress=progress)

    # -- how ----------------------------------------------------------------------------------------------------

    def _sizes(self, tokens: Sequence[Array], wanted: Collection[str], layers: int) -> Sizes:
        """How a call is cut up: as is fastest, or as `max_memory` allows."""
        if self._budget is None:
            return Sizes(_ROWS_PER_PASS)
        return self._budget.sizes([len(ids) for ids in tokens], wanted, layers, _ROWS_PER_PASS)

    def _require_lm_head(self, output: str) -> None:
        if not self._checkpoint.has_lm_head:
            raise MissingHead(f"{output}: the weights ({self._checkpoint.source}) have no LM head")

    def _require_contact_head(self) -> None:
        if not self._checkpoint.has_contact_head:
            raise MissingHead(f"contacts: the weights ({self._checkpoint.source}) have no contact head")

    def _contact_head(self, batch: Batch) -> ContactHead:
        weight = self._checkpoint.array("contact_head.weight", self._kernels.dtype)
        bias = float(self._checkpoint.array("contact_head.bias", self._kernels.dtype)[0])
        return ContactHead(self.config, weight, bias, batch, self._kernels.dtype)

    def _encode_tokens(
        self,
        tokens: Sequence[Array],
        layers: list[int],
        wanted: frozenset[str],
        rows_per_pass: int | None = None,
    ) -> list[EncodeResult]:
        """Outputs of checked sequences for checked options, pass by pass."""
        sizes = self._sizes(tokens, wanted, len(layers))
        results: list[EncodeResult] = []
        # A limit of memory outweighs what the caller finds quick.
        most = sizes.rows_per_pass if rows_per_pass is None or self._budget is not None else rows_per_pass
        for chunk in _passes(tokens, most):
            results += self._encode_pass(chunk, layers, wanted, len(results), sizes)
        return results

    def _encode_pass(
        self, tokens: Sequence[Array], layers: list[int], wanted: frozenset[str], first_index: int, sizes: Sizes
    ) -> list[EncodeResult]:
        """All outputs of the sequences of one pass."""
        config, kernels = self.config, self._kernels_for(tokens)
        batch = Batch.pack(tokens)
        results = [EncodeResult(first_index + i) for i in range(len(tokens))]
        contacts = None
        if "contacts" in wanted:
            contacts = self._contact_head(batch)
        summary = AttentionSummary(config, batch, kernels.dtype) if "attentions" in wanted else None

        by_layer = layers if wanted & BY_LAYER else []
        needed = {*by_layer, *([config.num_layers] if "logits" in wanted else [])}

        def take(layer: int, rows: Array) -> None:
            if layer in by_layer:
                _pool_rows(results, batch, layer, rows, wanted)
            if layer == config.num_layers and "logits" in wanted:
                residues = [rows[first + 1 : last - 1] for first, last in batch.spans]
                for result, logits in zip(results, self._project(kernels, residues), strict=True):
                    result.logits = logits

        encode_batch(
            kernels,
            self._pool,
            batch,
            representations=needed,
            take=take,
            contacts=contacts,
            summary=summary,
            block_rows=sizes.block_rows,
            threads=sizes.threads,
        )
        with kernels.session(self.threads):
            for i, result in enumerate(results):
                if contacts is not None:
                    result.contacts = contacts.result(i)
                if summary is not None:
                    result.attentions = summary.result(i)
        return results

    def _logits(
        self, tokens: Sequence[Array], rows: Sequence[Array], columns: slice = AMINO_ACID_COLUMNS
    ) -> list[Array]:
        """Logits (len(rows[i]), 20) of the named rows of each sequence, or of other columns of the 33 tokens."""
        logits: list[Array] = []
        sizes = self._sizes(tokens, {"logits"}, 0)
        for chunk in _passes(tokens, sizes.rows_per_pass):
            batch, kernels = Batch.pack(chunk), self._kernels_for(chunk)
            wanted = rows[len(logits) : len(logits) + len(chunk)]

            def take(
                _: int, x: Array, batch: Batch = batch, wanted: Sequence[Array] = wanted, kernels: Kernels = kernels
            ) -> None:
                named = [x[a:b][keep] for (a, b), keep in zip(batch.spans, wanted, strict=True)]
                logits.extend(self._project(kernels, named, columns))

            final_rows = np.concatenate([keep + first for (first, _), keep in zip(batch.spans, wanted, strict=True)])
            encode_batch(
                kernels,
                self._pool,
                batch,
                representations=[self.config.num_layers],
                take=take,
                final_rows=final_rows,
                block_rows=sizes.block_rows,
                threads=sizes.threads,
            )
        return logits

    def _kernels_for(self, tokens: Sequence[Array]) -> Kernels:
        """What a pass over these sequences, of `_passes`, runs on."""
        return self._kernels.careful if _are_few(tokens[0]) else self._kernels

    def _project(self, kernels: Kernels, rows: list[Array], columns: slice = AMINO_ACID_COLUMNS) -> list[Array]:
        """LM head over the rows of several sequences at once."""
        logits = lm_logits(kernels, self._pool, np.concatenate(rows))[:, columns]
        return [part.copy() for part in np.split(logits, np.cumsum([len(part) for part in rows])[:-1])]


def _are_few(ids: Array) -> bool:
    return len(ids) <= FEW_TOKENS


def _passes(tokens: Sequence[Array], most_rows: int) -> Iterator[Sequence[Array]]:
    """Cut a batch into passes of at most `most_rows` rows (or one sequence), in order; see `Kernels.careful` too."""
    start = rows = 0
    for i, ids in enumerate(tokens):
        if i > start and (rows + len(ids) > most_rows or _are_few(ids) != _are_few(tokens[start])):
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


def _reload(source: str, backend: str, precision: str, threads: int, max_memory: int | None = None) -> ESM2:
    return ESM2.from_pretrained(source, backend=backend, precision=precision, threads=threads, max_memory=max_memory)
