"""ESM2: the class that users meet. It checks its input and passes it on."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .alphabet import has_amino_acid, nothing_to_score, tokenize, warn_of_odd_sequences
from .config import ModelConfig
from .errors import CheckpointError, InputWarning, InvalidOption, warn
from .given import Sequences, texts
from .options import POSITIONS, Outputs, one_of, require_head
from .passes import Passes
from .results import ClassifyResult, EncodeResult, PredictResult
from .weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from .errors import InvalidSequence
    from .fasta import Record
    from .scoring.methods import MutationScan
    from .streaming.stream import Records


class SyntheticWeightsWarning(UserWarning):
    """The weights are random: every number that comes out means nothing."""


class ESM2:
    """An ESM-2 protein language model.

    Make one with `ESM2.from_pretrained`. Calls from several threads are safe and share the model's worker threads.

    Parameters
    ----------
    checkpoint : Checkpoint
        Weights in the canonical layout.
    backend : {"auto", "numpy", "compiled"}
        `auto` takes compiled kernels if they are installed, or Numba is, and there is enough memory for them (with
        Numba, 450 MB for 35M and 1.3 GB of address space). `numba` is the old name of `compiled`.
    precision : {"fp32", "bf16", "int8"}
        Arithmetic of the matrix products; "bf16" and "int8" need the compiled backend.
    threads : int, optional
        Worker threads; all available CPUs by default.
    max_memory : int or str, optional
        Limit for the whole process: bytes, or text such as `"300M"` (300·2^20 bytes, like `"300MiB"`; `"300MB"` is
        300·10^6). It determines block sizes, threads and (with `backend="auto"`) the backend; a call that cannot stay
        below it raises `NotEnoughMemory` before it starts. Results are the same except for rounding.

    Attributes
    ----------
    passes : Passes
        Computes the results, from token arrays and options that have been checked.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        backend: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        max_memory: int | str | None = None,
        _reload_from: tuple[str, Path | None] | None = None,
    ) -> None:
        if not isinstance(checkpoint, Checkpoint):
            raise InvalidOption(f"expected loaded weights, got {checkpoint!r}: write ESM2.from_pretrained(…)")
        self.passes = Passes(checkpoint, backend=backend, precision=precision, threads=threads, max_memory=max_memory)
        self._reload_from = _reload_from
        if checkpoint.synthetic:
            warn(
                f"{checkpoint.source}: SYNTHETIC random weights. The numbers that come out mean nothing; "
                "use them for timing and trying out only.",
                SyntheticWeightsWarning,
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        adapter: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        max_memory: int | str | None = None,
    ) -> ESM2:
        """Load a model.

        Parameters
        ----------
        source : str or path, optional
            A name (`esm2-8m`, `-35m`, `-150m`, `-650m`, `-3b`, `-15b`), a Hub id (`facebook/esm2_t12_35M_UR50D`), a
            `.safetensors` or `.pt` file, a folder, or `synthetic[:name[:seed]]` for random weights. A name is looked
            up in `NUMPYESM_WEIGHTS`, `weights/`, the cache, and the Hub. The folder or Hub id of a PEFT adapter
            means the base that it names, with the adapter merged in. By default, the model of `NUMPYESM_WEIGHTS`,
            whichever that is, or else `esm2-35m`.
        adapter : str or path, optional
            Folder or Hub id of a PEFT adapter (LoRA, rsLoRA) to merge into `source`. Models of one process that are
            made from the same base in this way share the weights that their adapters do not touch.
        backend, precision, threads, max_memory
            See `ESM2`.

        Raises
        ------
        WeightsNotFound
            Nothing was found; the message says what can be done.
        CheckpointError
            The file is not an ESM-2 checkpoint, or is damaged.
        InvalidOption
            An unknown backend or precision.
        """
        # Imported here: a model made from a loaded checkpoint needs no search.
        from .weights.locate import default_weights, load_found, resolve

        source = default_weights() if source is None else source
        found = resolve(source)
        place = None if adapter is None else Path(resolve(adapter)).absolute()
        return cls(
            load_found(source, found, adapter=place),
            backend=backend,
            precision=precision,
            threads=threads,
            max_memory=max_memory,
            _reload_from=(str(found.absolute()) if isinstance(found, Path) else found, place),
        )

    # -- properties ---------------------------------------------------------------------------------------------

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.passes.config

    @property
    def name(self) -> str:
        """`esm2-35m` and so on; `custom` for other shapes."""
        return self.config.name

    @property
    def head(self) -> str | None:
        """`sequence` or `token`: the classification head of a fine-tuned model; None if there is none."""
        return None if self.config.classifier is None else self.config.classifier.head

    @property
    def labels(self) -> list[str]:
        """Names of the classification head's outputs; empty if there is no head."""
        return [] if self.config.classifier is None else list(self.config.classifier.labels)

    @property
    def backend(self) -> str:
        """`numpy` or `compiled`."""
        return self.passes.kernels.name

    @property
    def precision(self) -> str:
        """Precision of the arithmetic."""
        return self.passes.kernels.precision

    @property
    def threads(self) -> int:
        """Worker threads."""
        return self.passes.pool.threads

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights, with where they came from."""
        return self.passes.checkpoint

    def __repr__(self) -> str:
        config = self.config
        synthetic = ", SYNTHETIC WEIGHTS" if self.checkpoint.synthetic else ""
        stored = self.checkpoint.precision
        narrow = f" stored as {stored}" if stored != "fp32" else ""
        return (
            f"ESM2({self.name}: {config.num_layers} layers, width {config.embed_dim}, {config.num_heads} heads, "
            f"backend={self.backend} ({self.passes.kernels.origin}), precision={self.precision}, "
            f"threads={self.threads}, source={self.checkpoint.source!r}{narrow}{synthetic})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self._reload_from is None:
            raise pickle.PicklingError("this model was not loaded from a file: save it, load it from there, and pickle")
        from .weights.integrity import fingerprint

        source, adapter = self._reload_from
        options = {
            "backend": self.backend,
            "precision": self.precision,
            "threads": self.threads,
            "max_memory": None if self.passes.budget is None else self.passes.budget.limit,
        }
        return _reload, (source, adapter, options, fingerprint(self.checkpoint))

    def __copy__(self) -> ESM2:
        """Return the model itself: nothing can change it."""
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> ESM2:
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights as a canonical `.safetensors` file, in the precision in which they are stored."""
        from .weights.canonical import save_canonical

        save_canonical(Path(path), self.checkpoint)

    # -- methods ------------------------------------------------------------------------------------------------

    def encode(
        self,
        sequences: Sequences,
        repr_layers: Iterable[int] = (-1,),
        include: Iterable[str] = ("mean",),
    ) -> list[EncodeResult]:
        """Compute embeddings, contacts, logits and attentions.

        Parameters
        ----------
        sequences : iterable of str, mapping from ids to str, Series, or frame of one column
            Letters `ACDEFGHIKLMNPQRSTVWY`, `BXZUO` and `-`, upper case, 1 to 2048 residues each. Ambiguous input (a
            frame of several columns, a set, a single text) is refused.
        repr_layers : iterable of int
            Layers of the embeddings, each from -(n+1) to n for n layers: 0 is the scaled embedding, -1 the last layer.
        include : iterable of str
            Of `mean`, `per_token` (also `per_residue`), `bos`, `contacts`, `logits`, `attentions`, `classes` (the
            probabilities of `classify`). Only what is asked for is computed.

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
            Logits, contacts or classes were asked for and the weights have no such head.
        """
        outputs = Outputs.check(self.checkpoint, repr_layers, include)
        return list(self.passes.encode(_tokens(sequences), outputs))

    def embed_iter(
        self,
        records: Records,
        repr_layers: Iterable[int] = (-1,),
        include: Iterable[str] = ("mean",),
        *,
        long: str = "error",
        overlap: int | None = None,
        tokens_per_batch: int | None = None,
        rejected: Callable[[Record, InvalidSequence], None] | None = None,
    ) -> Iterator[tuple[Record, EncodeResult]]:
        """As `encode`, for any number of records: results come one by one, in order, with bounded memory.

        Parameters
        ----------
        records : iterable of Record, (id, sequence) or str; mapping from ids to str; Series; frame of one column
            May be an endless generator. String labels of a Series are ids. `numpyesm.fasta.read_fasta(path)` gives
            the records of a file.
        repr_layers, include
            As for `encode`.
        long : {"error", "truncate", "windows"}
            What to do with more than 2048 residues: refuse, take the first 2048, or average overlapping windows.
        overlap : int, optional
            Least number of residues that neighbouring windows share, 512 by default.
        tokens_per_batch : int, optional
            Chosen from threads and free memory by default.
        rejected : callable, optional
            Called with each record that cannot be embedded and the reason; the record is skipped. Without it the
            reason is raised.

        Yields
        ------
        record : Record
        result : EncodeResult
            `sequence_index` is the record's place in the input.
        """
        from .streaming.stream import embed_iter

        return embed_iter(
            self.passes,
            records,
            repr_layers,
            include,
            long=long,
            overlap=overlap,
            tokens_per_batch=tokens_per_batch,
            rejected=rejected,
        )

    def predict(self, sequences: Sequences, positions: str = "all") -> list[PredictResult]:
        """Compute the logits of sequences with masks.

        Parameters
        ----------
        sequences : as for `encode`
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
        one_of("positions", positions, POSITIONS)
        require_head(self.checkpoint, "predict")
        return list(self.passes.predict(_tokens(sequences, masks=True), positions))

    def log_prob(self, sequences: Sequences) -> npt.NDArray[np.float64]:
        """Sum over the canonical residues of log-softmax over the 20 amino acids, from one unmasked pass.

        Parameters
        ----------
        sequences : as for `encode`
            Residues other than the 20 amino acids serve as context but do not count.

        Returns
        -------
        ndarray (n,) float64
            NaN, with a warning, for a sequence without any of the 20 amino acids.

        Raises
        ------
        InvalidSequence, MissingHead
            As for `encode`.
        """
        require_head(self.checkpoint, "log_prob")
        tokens = _tokens(sequences)
        empty = [f"item {i}" for i, ids in enumerate(tokens) if not has_amino_acid(ids)]
        if empty:
            warn(nothing_to_score(empty), InputWarning)
        return self.passes.log_prob(tokens)

    def classify(self, sequences: Sequences) -> list[ClassifyResult]:
        """Classify each sequence or, if `model.head == "token"`, each residue, with a fine-tuned head.

        Parameters
        ----------
        sequences : as for `encode`

        Returns
        -------
        list of ClassifyResult
            `logits` and `probabilities` (labels,), or (L, labels) per residue; `labels` names the columns.

        Raises
        ------
        InvalidSequence, MissingHead
            As for `encode`.
        """
        require_head(self.checkpoint, "classify")
        return list(self.passes.classify(_tokens(sequences)))

    def score_mutations(
        self,
        wild_type: str,
        mutations: Iterable[str],
        method: str = "masked-marginals",
        *,
        offset: int = 1,
        window: int | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.float64]:
        """Score mutants; the higher, the more likely they are to the model.

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
              difference, and it takes one pass for each residue of each mutant. fair-esm's script intends this sum, but
              looks up the residue after the masked one and leaves out the ends.

            In the first three, `WT` and `A42A` score 0.
        offset : int
            Position of the wild type's first residue in the numbering of the mutations (fair-esm's `--offset-idx`).
        window : int or "proteingym", optional
            How many residues around each position the model sees, in addition to `<cls>` and `<eos>`; by default the
            whole wild type, at most 2048 residues. Not for `log-prob`. "proteingym" is ProteinGym's rule for the two
            marginals: `masked-marginals` see 1024 tokens of the protein with its `<cls>` and `<eos>`, so windows in the
            middle have neither; `wt-marginals` see the whole protein.
        progress : callable (done, total), optional
            Called from time to time.

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

        return score_mutations(
            self.passes, wild_type, mutations, method, offset=offset, window=window, progress=progress
        )

    def scan_mutations(
        self,
        wild_type: str,
        method: str = "masked-marginals",
        *,
        offset: int = 1,
        window: int | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> MutationScan:
        """Score every substitution of a protein: a matrix of L positions × 20 amino acids.

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
        from .scoring.methods import scan_mutations

        return scan_mutations(self.passes, wild_type, method, offset=offset, window=window, progress=progress)


def _reload(source: str, adapter: Path | None, options: dict[str, Any], expected: str) -> ESM2:
    """Load a pickled model; CheckpointError if other weights lie there by now."""
    from .weights.integrity import fingerprint

    model = ESM2.from_pretrained(source, adapter=adapter, **options)
    if fingerprint(model.checkpoint) != expected:
        raise CheckpointError(f"{source} holds other weights than when the model was pickled")
    return model


def _tokens(sequences: Sequences, masks: bool = False) -> list[npt.NDArray[np.uint8]]:
    """Tokenize a batch, and warn of input that is allowed but rarely intended."""
    items = texts(sequences)
    tokens = tokenize(items or sequences, masks=masks)  # an empty generator has an error of its own
    warn_of_odd_sequences(items)
    return tokens
