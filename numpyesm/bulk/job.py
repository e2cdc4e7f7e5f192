"""A whole run: read, compute what is missing, write, and leave nothing behind but the output."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import BulkError, InvalidOption, InvalidSequence
from ..files import atomic_write, same_file, sync_folder
from ..model import ESM2
from .journal import Journal, Rejected, readable_error
from .layout import Layout
from .local import LocalEngine
from .lock import FolderLock
from .packing import check_budget
from .progress import Progress
from .provenance import describe, difference
from .reader import Item, Reader
from .settings import DEFAULT_OVERLAP, Settings
from .shard import Shard
from .tables import tsv_line
from .writers import DEFAULT_INCLUDE, ENDINGS, make_writer, output_format
from .writers.base import Writer
from .writers.folder import is_ours

ENGINES = ("local", "ray")
_REJECTED_HEADER = tsv_line("record", "id", "description", "length", "reason")
# The batch in hand and so much more is lost to a `kill -9`, or fifty times what a commit takes where the disk is slow.
_COMMIT_SECONDS = 0.5
_COMMIT_SHARE = 0.02
_COMMIT_BYTES = 64 << 20


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
        Records that could not be embedded; they stand in `rejected_file`.
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


class Engine(Protocol):
    """Computes what a journal still lacks."""

    def run(self, journal: Journal) -> Iterator[tuple[int, bytes]]:
        """Number and numbers of each pending sequence, in any order."""

    def close(self) -> None:
        """Put away what was started."""


def embed_fasta(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: ESM2 | str | os.PathLike[str] = "esm2-35m",
    *,
    repr_layers: Iterable[int] = (-1,),
    include: Iterable[str] | None = None,
    dtype: str = "fp32",
    long: str = "error",
    overlap: int = DEFAULT_OVERLAP,
    tokens_per_batch: int | None = None,
    shard: str | Shard | None = None,
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

    Interrupted at any moment, the same call goes on where it stood. Identical sequences are computed once. Memory does
    not grow with the input; the folder `OUTPUT.partial` beside the output holds what is done until all is.

    Parameters
    ----------
    inputs : path, or several
        FASTA, plain or gzip; `-` is standard input.
    output : path
        `.parquet`, `.h5`, or a folder.
    model : ESM2, or what `ESM2.from_pretrained` takes
    repr_layers : iterable of int
        As for `ESM2.encode`.
    include : iterable of str, optional
        As for `ESM2.encode`; by default `mean` and `bos` for Parquet, `mean` and `per_token` for HDF5, `mean` else.
    dtype : {"fp32", "fp16"}
        Of the stored numbers.
    long : {"error", "truncate", "windows"}
        Records of more than 2048 residues are rejected, cut, or averaged over overlapping windows.
    overlap : int
        Least number of residues that neighbouring windows share.
    tokens_per_batch : int, optional
        Chosen from threads and free memory by default.
    shard : str, optional
        `i/n`: only the records of this share.
    strict : bool
        Raise at the first record that cannot be embedded; by default they go to `OUTPUT.rejected.tsv`.
    engine : {"local", "ray"}
    address, workers : optional
        Of the Ray engine: a running cluster (one on this machine by default), and the number of actors.
    threads : int, optional
        Of the model, or of each Ray worker.
    overwrite : bool
        Replace an output that is there already.
    restart : bool
        Forget what an interrupted run left.
    progress : Progress, optional
        Hears how far the run is.

    Returns
    -------
    Summary

    Raises
    ------
    InvalidSequence
        The input cannot be read, or with `strict` a record cannot be embedded.
    InvalidOption, MissingExtra
    BulkError
        Another run holds the output; or what is there belongs to another run.
    OSError
        A file cannot be read or written. What was computed is kept.
    """
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    form = output_format(os.fspath(output))
    if engine not in ENGINES:
        raise InvalidOption(f"engine={engine!r}: allowed are {', '.join(ENGINES)}")
    if engine == "local" and (address is not None or workers is not None):
        raise InvalidOption("address and workers belong to engine='ray'")
    if tokens_per_batch is not None:
        check_budget(tokens_per_batch)
    if engine == "ray":  # before anything is read
        from .ray_engine import RayEngine, check_ray

        check_ray(address, workers)
    writer = make_writer(form)
    if not isinstance(model, ESM2):
        model = ESM2.from_pretrained(model, threads=threads)
    settings = Settings.check(
        model,
        repr_layers=repr_layers,
        include=DEFAULT_INCLUDE[form] if include is None else include,
        dtype=dtype,
        long=long,
        overlap=overlap,
        shard=shard,
    )
    target = Path(output)
    if target.name in ("", ".."):  # "." and the like: a folder all the same, by its name
        target = Path(os.path.abspath(target))
        if not target.name:
            raise InvalidOption(f"output {os.fspath(output)!r}: expected a file or a folder of its own")
    if target.is_symlink():  # the file behind the link is what is replaced
        target = target.resolve()
    job = _Job(paths, target, form, writer, model, settings, strict, progress or Progress())

    def make_engine() -> Engine:
        if engine == "local":
            return LocalEngine(model, settings, job.layout, tokens_per_batch)
        return RayEngine(
            model, settings, job.layout, tokens_per_batch, address=address, workers=workers, threads=threads
        )

    try:
        return job.run(make_engine, overwrite=overwrite, restart=restart)
    except sqlite3.Error as error:
        raise readable_error(error, job.folder) from error


class _Job:
    """One run on one output."""

    def __init__(
        self,
        inputs: Sequence[str | os.PathLike[str]],
        output: Path,
        form: str,
        writer: Writer,
        model: ESM2,
        settings: Settings,
        strict: bool,
        progress: Progress,
    ) -> None:
        self.inputs, self.output, self.writer, self.settings = inputs, output, writer, settings
        self.strict, self.progress = strict, progress
        self.layout = Layout.of(settings, model.config)
        self.about = describe(model, settings, form)
        self.folder = output.with_name(output.name + ".partial")
        self.rejected_file = self._rejected_file(form)
        self._check_paths(form)

    def _check_paths(self, form: str) -> None:
        for name in self.inputs:
            if os.fspath(name) != "-" and same_file(name, self.output):
                raise InvalidOption(f"output {self.output} is the input itself: choose another output")
        if self.output.exists() and self.output.is_dir() != (form == "folder"):
            kind = "a folder" if self.output.is_dir() else "a file"
            raise InvalidOption(f"output {self.output} is {kind}; {form} was asked for")
        if os.path.ismount(self.output):
            raise InvalidOption(
                f"output {self.output} is a mount point, which cannot be replaced as a whole: "
                f"name a folder in it, {self.output / 'embeddings'}/"
            )

    def _rejected_file(self, form: str) -> Path:
        """`OUT.rejected.tsv`; with the form in its name if another output of that stem lies beside it."""
        stem = self.output.name if form == "folder" else self.output.stem
        others = {stem, *(stem + ending for ending in ENDINGS)} - {self.output.name}
        alone = not any(self.output.with_name(name).exists() for name in others)
        ending = "" if alone else self.output.suffix if form != "folder" else ".folder"
        return self.output.with_name(f"{stem}{ending}.rejected.tsv")

    def run(self, make_engine: Any, *, overwrite: bool, restart: bool) -> Summary:
        """All of it, or what is left of it."""
        started = time.monotonic()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.folder)
        try:
            if restart:
                self._forget()
            about_there = self._finished()
            self._take_over_list(about_there or {})
            if about_there is not None and overwrite and self.output.is_dir():
                self._check_replaceable(about_there)
            if about_there is not None and not overwrite:
                summary = self._already_complete(about_there, started)
                if not self._holds_another_run():
                    lock.remove_folder()
                return summary
            with_journal = self._with_journal(make_engine, started)
            lock.remove_folder()
            return with_journal
        finally:
            if lock.held and not any(entry.name != "lock" for entry in self.folder.iterdir()):
                lock.remove_folder()  # nothing was begun
            lock.release()

    # -- an output that is there already ------------------------------------------------------------------------

    def _finished(self) -> dict[str, Any] | None:
        """Metadata of the output, if it is there; {} if it is not ours."""
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return None
        return self.writer.read_about(self.output) or {}

    def _take_over_list(self, about: dict[str, Any]) -> None:
        """The list of rejected records is where the output that is there says."""
        name = about.get("rejected_file")
        self._replaces_list = False
        if isinstance(name, str) and name and Path(name).name == name:
            self._replaces_list, self.rejected_file = True, self.output.with_name(name)

    def _check_replaceable(self, about: dict[str, Any]) -> None:
        """A folder goes with all that is in it: only if we made all of it."""
        others = [entry.name for entry in self.output.iterdir() if not is_ours(entry)]
        if others or not about:
            what = f"holds other files ({others[0]})" if others else "is not of numpyesm embed"
            raise BulkError(f"{self.output} {what}: it is not replaced, also with --overwrite. Remove it yourself")

    def _already_complete(self, about: dict[str, Any], started: float) -> Summary:
        """The finished run, if it is this one; BulkError if not."""
        if not about:
            # --overwrite would not replace a folder of others.
            way_out = "choose another output" if self.output.is_dir() else "--overwrite replaces it"
            raise BulkError(f"{self.output} exists and is not of numpyesm embed; {way_out}")
        other = difference(self.about, about)
        if other:
            raise BulkError(f"{self.output} exists and is of another run ({other}); --overwrite replaces it")
        if self._fingerprint() != about["input"]:
            raise BulkError(f"{self.output} exists and is of another input; --overwrite replaces it")
        counts = about["counts"]
        if counts["rejected"] and not self.rejected_file.exists():
            reader = Reader(self.inputs, self.settings)
            self._write_list(rejected_of(item) for item in reader if item.reason is not None)
        self.progress.note(f"{self.output} is complete already: {counts['records']} records")
        return Summary(
            output=self.output,
            records=counts["records"],
            sequences=counts["sequences"],
            rejected=counts["rejected"],
            rejected_file=self.rejected_file if counts["rejected"] else None,
            computed=0,
            residues=0,
            seconds=time.monotonic() - started,
            already_complete=True,
        )

    def _fingerprint(self) -> str:
        """Of the input as it is now."""
        reader = Reader(self.inputs, self.settings)
        for count, _ in enumerate(reader):
            if count % 1000 == 0:
                self.progress.reading(reader.records)
        return reader.fingerprint()

    # -- what an interrupted run left ---------------------------------------------------------------------------

    def _holds_another_run(self) -> bool:
        """Whether the folder is not what this run left, but one that was to replace the output."""
        if not (self.folder / "journal.sqlite").exists():
            return False
        journal = Journal(self.folder)
        try:
            about = journal.get("about")
        finally:
            journal.close()
        return about is not None and bool(difference(self.about, json.loads(about)))

    def _forget(self) -> None:
        for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name != "journal.sqlite"):
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _with_journal(self, make_engine: Any, started: float) -> Summary:
        journal = Journal(self.folder)
        try:
            try:
                self._read(journal)
            except BaseException:
                if journal.get("input") is None:  # nothing to go on from
                    journal.close()
                    self._forget()
                raise
            computed = self._compute(journal, make_engine)
            return self._write(journal, computed, started)
        finally:
            journal.close()

    # -- the three stages ---------------------------------------------------------------------------------------

    def _read(self, journal: Journal) -> None:
        """Take in the input, or make sure that it is the one which was taken in before."""
        before = journal.get("about")
        if before is not None:
            other = difference(self.about, json.loads(before))
            if other:
                raise BulkError(
                    f"{self.folder} holds an interrupted run of another kind ({other}): repeat that command, "
                    "or begin anew with --restart"
                )
        if journal.read_completely:
            if self._fingerprint() != journal.get("input"):
                raise BulkError(
                    f"{self.folder} holds an interrupted run of another input: the input has changed since. "
                    "Begin anew with --restart"
                )
            if self.strict:
                for rejected in journal.rejected():
                    raise self._strict_error(rejected)
            return
        journal.begin_reading()
        reader = Reader(self.inputs, self.settings)
        for item in reader:
            if item.reason is not None:
                rejected = rejected_of(item)
                if self.strict:
                    raise self._strict_error(rejected)
                journal.add_rejected(rejected)
            else:
                journal.add_record(item.position, item.id, item.description, item.sequence, item.digest)
            if item.position % 256 == 0:
                self.progress.reading(reader.records)
        journal.put("about", json.dumps(self.about))
        journal.finish_reading(reader.fingerprint())

    @staticmethod
    def _strict_error(rejected: Rejected) -> InvalidSequence:
        return InvalidSequence(f"record {rejected.position} ({rejected.id}): {rejected.reason}")

    def _compute(self, journal: Journal, make_engine: Any) -> tuple[int, int]:
        """Number and residues of the sequences computed here."""
        journal.begin_computing()
        totals, done = journal.totals(), journal.done()
        if done.sequences:
            self.progress.note(f"going on: {done.records} of {totals.records} records are done")
        self.progress.start(totals, done)
        before = done
        while done.sequences < totals.sequences:
            engine: Engine = make_engine()
            due = time.monotonic() + _COMMIT_SECONDS
            try:
                for number, data in engine.run(journal):
                    self.progress.advance(journal.add_result(number, data))
                    now = time.monotonic()
                    if now > due or journal.waiting_bytes > _COMMIT_BYTES:
                        journal.commit()
                        due = time.monotonic() + max(_COMMIT_SECONDS, (time.monotonic() - now) / _COMMIT_SHARE)
                journal.commit()
            except BaseException:
                with suppress(OSError, sqlite3.Error):  # what is done is done
                    journal.commit()
                raise
            finally:
                engine.close()
            previous, done = done, journal.done()
            if done.sequences == previous.sequences:
                raise BulkError(f"the engine returned nothing for {totals.sequences - done.sequences} sequences")
        return done.sequences - before.sequences, done.residues - before.residues

    def _write(self, journal: Journal, computed: tuple[int, int], started: float) -> Summary:
        self.progress.writing()
        totals, num_rejected = journal.totals(), journal.num_rejected()
        counts = {"records": totals.records, "sequences": totals.sequences, "rejected": num_rejected}
        about = self.about | {"input": journal.get("input"), "counts": counts}
        if num_rejected:
            about["rejected_file"] = self.rejected_file.name
        temporary = self.folder / "output"
        try:
            self.writer.write(journal.rows(), self.layout, about, temporary)
        except OSError:
            with suppress(OSError):  # room for others on a full disk
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
            raise
        self._write_rejected(journal, num_rejected)
        if self.output.is_dir() and any(self.output.iterdir()):
            # A folder that is not empty cannot be replaced at once.
            replaced = self.folder / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.output, replaced)
        os.replace(temporary, self.output)
        sync_folder(self.output.parent)
        return Summary(
            output=self.output,
            records=totals.records,
            sequences=totals.sequences,
            rejected=num_rejected,
            rejected_file=self.rejected_file if num_rejected else None,
            computed=computed[0],
            residues=computed[1],
            seconds=time.monotonic() - started,
        )

    def _write_rejected(self, journal: Journal, count: int) -> None:
        if count:
            self._write_list(journal.rejected())
        elif self._replaces_list and self.rejected_file.is_file():
            # Of an earlier run on this output; only ever remove what we wrote.
            with open(self.rejected_file, "rb") as old:
                ours = old.readline() == _REJECTED_HEADER.encode()
            if ours:
                self.rejected_file.unlink()

    def _write_list(self, rejected: Iterable[Rejected]) -> None:
        with atomic_write(self.rejected_file) as file:
            file.write(_REJECTED_HEADER.encode())
            for record in rejected:
                file.write(tsv_line(*record).encode())


def rejected_of(item: Item) -> Rejected:
    """What is kept of a record that cannot be embedded."""
    assert item.reason is not None
    return Rejected(item.position, item.id, item.description, len(item.sequence), item.reason)
