"""A whole run: read, compute what is missing, write, and leave nothing behind but the output."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import BulkError, InvalidOption, InvalidSequence
from ..files import WriteError, overwritten_files
from ..model import ESM2
from ..options import Outputs, one_of
from ..printable import in_words
from ..streaming.batches import LongSequences
from ..streaming.packing import check_budget, token_budget
from .journal import FILE, Journal, Totals, readable_error
from .lock import FolderLock
from .output import Output
from .progress import Progress
from .ray_engine import check_ray, compute_on_ray
from .reader import Item, Reader
from .settings import Settings, Shard, describe, difference
from .writers import DEFAULT_INCLUDE

# `kill -9` loses the current batch and at most this many seconds of work. Commits take at most 2 % of the run.
COMMIT_SECONDS = 0.5
COMMIT_SHARE = 0.02
COMMIT_BYTES = 64 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# Batches: the number and the packed outputs of each sequence that a journal still lacks, in any order.
Computed: TypeAlias = Generator[Iterable[tuple[int, bytes]], None, None]


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes
    ----------
    output : Path
    records : int
        Rows of the output.
    sequences : int
        Distinct sequences among them.
    rejected : int
        Records that could not be embedded; they are listed in `rejected_file`.
    rejected_file : Path or None
    computed : int
        Sequences that this run computed; the others were left from a run that was interrupted.
    residues : int
        Residues that this run computed.
    seconds : float
    already_complete : bool
        The output was there before; nothing was done.
    """

    output: Path
    records: int
    sequences: int
    rejected: int
    rejected_file: Path | None
    computed: int
    residues: int
    seconds: float
    already_complete: bool = False


def embed_fasta(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: ESM2 | str | os.PathLike[str] | None = None,
    *,
    repr_layers: Iterable[int] = (-1,),
    include: Iterable[str] | None = None,
    dtype: str = "fp32",
    long: str = "error",
    overlap: int | None = None,
    ids: str = "first-word",
    tokens_per_batch: int | None = None,
    shard: str | None = None,
    strict: bool = False,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Embed all sequences of FASTA files into one Parquet file, HDF5 file or folder.

    If it is interrupted, at any moment, the same call resumes. Identical sequences are computed once. Memory does not
    grow with the input; the folder `OUTPUT.partial` beside the output holds what is done until everything is.

    Parameters
    ----------
    inputs : path, or several
        FASTA, plain or gzip; `-` is standard input.
    output : path
        `.parquet`, `.h5`, or a folder.
    model : ESM2, or what `ESM2.from_pretrained` takes; optional
    repr_layers : iterable of int
        As for `ESM2.encode`.
    include : iterable of str, optional
        As for `ESM2.encode`; by default `mean` and `bos` for Parquet, `mean` and `per_token` for HDF5, else `mean`.
    dtype : {"fp32", "fp16"}
        Of the stored numbers.
    long, overlap, tokens_per_batch
        As for `ESM2.embed_iter`.
    ids : {"first-word", "accession"}
        Name records by the first word of their header, or `sp|P12345|NAME` by its accession `P12345`.
    shard : str, optional
        `i/n`: only the records of this share.
    strict : bool
        Raise at the first record that cannot be embedded; by default they go to `OUTPUT.rejected.tsv`.
    engine : {"local", "ray"}
    address, workers : optional
        Of the Ray engine: a running cluster (by default one is started here), and the number of workers.
    threads : int, optional
        Of a model that is loaded here, or of each Ray worker.
    overwrite : bool
        Replace an output that is there already.
    restart : bool
        Discard what an interrupted run left.
    progress : Progress, optional
        Receives the state of the run.

    Returns
    -------
    Summary

    Raises
    ------
    InvalidSequence
        The input cannot be read, or with `strict` a record cannot be embedded.
    InvalidOption, MissingExtra
    BulkError
        Another run holds the output; what is there belongs to another run or is damaged; or the weights file was
        overwritten during the run. What was computed before is kept.
    OSError
        A file cannot be read or written. What was computed is kept.
    """
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    one_of("engine", engine, ("local", "ray"))
    if engine == "local" and (address is not None or workers is not None):
        raise InvalidOption("address and workers belong to engine='ray'")
    tokens_per_batch = check_budget(tokens_per_batch)
    ray = check_ray(address, workers) if engine == "ray" else None  # before anything is read
    target = Output(output, paths)
    if not isinstance(model, ESM2):
        model = ESM2.from_pretrained(model, threads=threads)
    elif ray is None and threads not in (None, model.threads):
        raise InvalidOption(f"threads={threads!r}: the model that was given computes with {model.threads}")
    settings = Settings(
        model.config,
        Outputs.check(model.checkpoint, repr_layers, DEFAULT_INCLUDE[target.form] if include is None else include),
        LongSequences.chosen(long, overlap),
        dtype,
        Shard.parse(shard),
        ids,
    )

    def compute(journal: Journal) -> Computed:
        if ray is not None:
            yield from compute_on_ray(ray, journal, model, settings, tokens_per_batch, address, workers, threads)
            return
        budget = tokens_per_batch or token_budget(model.config, model.threads, settings.outputs)
        for batch in journal.batches(budget):
            yield settings.encode(model.passes, batch, budget)

    run = _Run(paths, target, model, settings, compute, strict, progress or Progress())
    return run.run(overwrite=overwrite, restart=restart)


@dataclass
class _Run:
    """One run on one output."""

    inputs: Sequence[str | os.PathLike[str]]
    output: Output
    model: ESM2
    settings: Settings
    compute: Callable[[Journal], Computed]
    strict: bool
    progress: Progress

    def __post_init__(self) -> None:
        self.about = describe(self.model, self.settings, self.output.form)
        self.folder = self.output.path.with_name(self.output.path.name + ".partial")
        self.started = time.monotonic()

    def run(self, *, overwrite: bool, restart: bool) -> Summary:
        """Do all of the work, or what is left of it."""
        try:
            with FolderLock(self.folder) as lock:
                if restart:
                    lock.empty()
                if self.output.about is None or overwrite:
                    self.output.check_replaceable()
                    summary = self._with_journal(lock)
                else:
                    summary = self._already_complete(self.output.about)
                    if self._holds_another_run():
                        return summary
                lock.empty()
                return summary
        except (sqlite3.Error, OSError) as error:
            told = readable_error(error, self.folder) if isinstance(error, sqlite3.Error) else error
            if isinstance(told, OSError) and told.errno in _FULL:
                kept = "what is done is kept" if (self.folder / FILE).exists() else "nothing is done yet"
                told = OSError(f"{in_words(told)}: {kept}, and the same command resumes once there is space")
            if told is error:
                raise
            raise told from error

    # -- an output that is there already ------------------------------------------------------------------------

    def _already_complete(self, about: dict[str, Any]) -> Summary:
        """Return the summary of the finished run if it is this one; else raise BulkError."""
        path = self.output.path
        if not about:
            # --overwrite does not replace a folder that we did not make.
            way_out = "choose another output" if path.is_dir() else "--overwrite replaces it"
            raise BulkError(f"{path} exists and was not made by numpyesm embed; {way_out}")
        if other := difference(self.about, about):
            raise BulkError(f"{path} exists and belongs to another run ({other}); --overwrite replaces it")
        rejected_lost = bool(about["counts"]["rejected"]) and not self.output.rejected_file.exists()
        reader = self._reader()
        rejected = [item._replace(sequence="") for item in reader if item.reason is not None and rejected_lost]
        reader.notes.warn()
        if reader.fingerprint() != about["input"]:
            raise BulkError(f"{path} exists and was made from another input; --overwrite replaces it")
        if rejected_lost:
            self.output.write_rejected(rejected)
        self.progress.note(f"{path} is complete already: {about['counts']['records']} records")
        return self._summary(about["counts"], already_complete=True)

    def _holds_another_run(self) -> bool:
        """Whether the folder was left by a run that was to replace the output, not by the one that made it."""
        if not (self.folder / FILE).exists():
            return False
        with closing(Journal(self.folder)) as journal:
            return bool(journal.about and difference(self.about, journal.about))

    # -- the three stages ---------------------------------------------------------------------------------------

    def _with_journal(self, lock: FolderLock) -> Summary:
        with closing(Journal(self.folder)) as journal:
            if journal.fingerprint is not None:
                self._compare(journal)
            else:
                try:
                    self._read(journal)
                except BaseException:  # nothing to resume from
                    journal.close()
                    lock.empty()
                    raise
            totals, before = journal.totals(), journal.totals(done=True)
            if before.sequences < totals.sequences:
                self._compute(journal, totals, before)
            return self._write(journal, totals, before)

    def _reader(self) -> Reader:
        return Reader(self.inputs, self.settings, self.progress.reading)

    def _read(self, journal: Journal) -> None:
        """Read the input into the journal, all of it or nothing."""
        reader = self._reader()
        for item in reader:
            self._check_strict(item)
            journal.add_record(item)
        journal.finish_reading(self.about, reader.fingerprint())
        reader.notes.warn()

    def _check_strict(self, item: Item) -> None:
        if self.strict and item.reason is not None:
            raise InvalidSequence(f"record {item.position} ({item.id}): {item.reason}")

    def _compare(self, journal: Journal) -> None:
        """Make sure that the journal belongs to this run and holds the records of the input."""
        if other := difference(self.about, journal.about):
            raise BulkError(
                f"{self.folder} holds an interrupted run of another kind ({other}): repeat that command, "
                "or start over with --restart"
            )
        reader = self._reader()
        differing = None
        for item, record in zip_longest(reader, journal.records()):
            if item is None or item._replace(sequence="") != record:
                differing = differing or (item or record).position
        if reader.fingerprint() != journal.fingerprint:
            raise BulkError(
                f"{self.folder} holds an interrupted run on another input: the input has changed since. "
                "Start over with --restart"
            )
        reader.notes.warn()
        if differing is not None:
            raise BulkError(
                f"{journal.path} is damaged: record {differing} differs from the input. Start over with --restart"
            )
        for item in journal.records(rejected=True):
            self._check_strict(item)

    def _compute(self, journal: Journal, totals: Totals, before: Totals) -> None:
        if before.sequences:
            self.progress.note(f"resuming: {before.records} of {totals.records} records are done")
        self.progress.start(totals, before)
        due = time.monotonic() + COMMIT_SECONDS
        waiting = 0
        with closing(self.compute(journal)) as computed:
            try:
                for batch in computed:
                    for number, data in batch:
                        self.progress.advance(journal.add_result(number, data))
                        waiting += len(data)
                        if waiting > COMMIT_BYTES:
                            self._commit(journal)
                            waiting = 0
                    now = time.monotonic()
                    if now > due:  # at the end of a batch, or its results would wait for the next one
                        self._commit(journal)
                        due = time.monotonic() + max(COMMIT_SECONDS, (time.monotonic() - now) / COMMIT_SHARE)
                        waiting = 0
                self._commit(journal)
            except BaseException:
                with suppress(OSError, sqlite3.Error, BulkError):  # what is done is done
                    self._commit(journal)
                raise

    def _commit(self, journal: Journal) -> None:
        """Keep what was added, unless the weights changed under it.

        A file that was replaced by a new one is still mapped as it was. Once one was overwritten in place, results
        since the last commit may mix two models.
        """
        tensors = self.model.checkpoint.tensors.values()
        if changed := overwritten_files(array for tensor in tensors for array in tensor.arrays):
            journal.rollback()
            raise BulkError(
                f"{changed[0]} was overwritten during the run: what was computed before is kept in {self.folder}. "
                "Restore the weights and repeat the command, or start over with --restart"
            )
        journal.commit()

    def _write(self, journal: Journal, totals: Totals, before: Totals) -> Summary:
        self.progress.writing()
        done = journal.totals(done=True)
        rejected = sum(1 for _ in journal.records(rejected=True))
        if missing := totals.sequences - done.sequences:
            raise BulkError(f"the engine returned nothing for {missing} sequences")
        counts = {"records": totals.records, "sequences": totals.sequences, "rejected": rejected}
        about = self.about | {"input": journal.fingerprint, "counts": counts}
        if rejected:
            about["rejected_file"] = self.output.rejected_file.name
        made = self.folder / "output"
        try:
            self.output.writer.write(journal.rows(), self.settings, about, made)
        except OSError as error:
            with suppress(OSError):  # room for others on a full disk
                shutil.rmtree(made) if made.is_dir() else made.unlink()
            raise WriteError(error.errno, error.strerror or str(error), str(made)) from error
        if rejected:
            self.output.write_rejected(journal.records(rejected=True))
        else:
            self.output.remove_rejected()
        self.output.replace(made, self.folder)
        return self._summary(counts, done.sequences - before.sequences, done.residues - before.residues)

    def _summary(
        self, counts: dict[str, int], computed: int = 0, residues: int = 0, already_complete: bool = False
    ) -> Summary:
        return Summary(
            output=self.output.path,
            **counts,
            rejected_file=self.output.rejected_file if counts["rejected"] else None,
            computed=computed,
            residues=residues,
            seconds=time.monotonic() - self.started,
            already_complete=already_complete,
        )
