"""The one FASTA reader: it is lenient about how FASTA is written, and names the format of files that are not FASTA.

Headers with sequences below them, or sequences alone: one per line, or one that is wrapped at a fixed width. A line
counts as sequence only if it looks like one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import BinaryIO, NamedTuple

from .config import MAX_RESIDUES
from .errors import InputWarning, InvalidSequence, warn
from .text_input import UnreadableFile, decoded, unpacked

# In a line or a record. The longest known protein has 46,000 residues; chromosomes and gzip bombs are refused.
MAX_LETTERS = 1_000_000
# What is kept of a longer record: without a trailing `*` it is still too long.
_TOO_MANY = MAX_LETTERS + 2
_MASK = re.compile("<mask>", re.IGNORECASE)
# ASCII only: str.upper would make SS of the letter ß.
_UPPER = str.maketrans(ascii_lowercase, ascii_uppercase)

# A headerless sequence wrapped at one of these is one sequence even if its last line is full, or its only other one.
_USUAL_WIDTHS = frozenset({40, 50, 60, 70, 72, 75, 76, 80, 100, 120})
_LEAST_WIDTH = 30  # of any other

# What the first line of a file in another format looks like.
_OTHER_FORMATS = (
    ("SAM", r"@(HD|SQ|RG|PG|CO)\t"),
    ("FASTQ", "@"),
    ("GenBank or GenPept", r"LOCUS\s"),
    ("a flat file of UniProt or EMBL", r"(ID|AC|DT|DE)   "),
    ("a PDB file", r"(HEADER|TITLE|COMPND|REMARK|ATOM|HETATM|SEQRES|CRYST1|MODEL|EXPDTA|DBREF)\s+\S"),
    ("mmCIF", r"(data_\S|loop_|_[a-z]\S*\.\S)"),
    ("a Clustal alignment", r"(CLUSTAL\w?|MUSCLE|PROBCONS|T-?COFFEE|KALIGN)[ (]"),
    ("a PHYLIP alignment", r"\d+\s+\d+(\s|$)"),
    ("a Stockholm alignment", "# STOCKHOLM"),
    ("NEXUS", "#NEXUS"),
    ("MEGA", "#MEGA"),
    ("A3M", r"#A3M#|#\d+(,\d+)*\s\d"),
    ("an MSF alignment", r"!!\w+ALIGNMENT|.*\bMSF:"),
    ("GFF", "##GFF"),
    ("VCF", "##FILEFORMAT=VCF"),
    ("an HMMER profile", r"HMMER\d"),
    ("a BLAST report", r"#?\s*T?BLAST[NPX]\s"),
    ("ASN.1", r"[\w-]+ ::="),
    ("JSON", r"\{|\[(?!MASK\])"),
    ("HTML or XML", r"<[!?/]|<(?!MASK)[A-Z]\w*[\s>/]"),
    ("a Newick tree", r"\("),
    ("RTF", r"\{\\RTF"),
    ("a Git LFS pointer", "version https://git-lfs"),
)
_PIR_HEADER = re.compile(r">(P1|F1|D[LC1]|R[LC1]|N[13]|XX);")
# In capitals only SEQUENCE: PEPTIDE and ID are peptides, too.
_TITLE = re.compile(
    r"SEQUENCES?|(([Pp]rotein|[Pp]eptide|[Mm]utated|[Mm]utant|aa|[Ff]ull|wt)[_ -]?)?[Ss]eq(uence)?s?"
    r"|([Pp]rotein|[Pp]eptide|[Nn]ame|[Ii]d|[Ee]ntry|[Aa]ccession|[Mm]utant)s?"
)
_MISSING = frozenset({"nan", "NaN", "none", "None", "null", "Null", "NULL", "N/A", "n/a", "#N/A"})
_ACCESSION = re.compile(r"(?:gi\|\d+\|)?(?:sp|tr|ref|gb|emb|dbj|lcl|pir|prf)\|([^|\s]+)")
# How records may be named, see `record_name`.
IDS = ("first-word", "accession")
_TOO_LONG = f"more than {MAX_LETTERS} letters, not read to the end"
_EXPECTED = "expected FASTA (>name, and the sequence below it) or one sequence per line"


class Record(NamedTuple):
    """One sequence with its name: `id` is the header's first word, `description` the whole header."""

    id: str
    description: str
    sequence: str


def read_fasta(source: str | Path | BinaryIO, *, first: int = 1) -> Iterator[Record]:
    """Yield the records of a file, or of an open binary stream.

    The file may be compressed (gzip, bzip2, xz, a zip archive of one file) and in UTF-8, UTF-16 or Latin-1, in any
    locale. Lower case becomes upper case (`<mask>` is kept); blanks between blocks of residues, one trailing `*` per
    record, comment lines (`;`) and grep's separators (`--`) are dropped. A record without a name is called `sequence_N`
    after its place. Letters are not checked here: the model's error names item and position.

    Without any header each line is a sequence; lines of equal width, the last one shorter, are one wrapped sequence.

    Parameters
    ----------
    source : str, path or binary stream
    first : int
        Place of the first record, for names.

    Raises
    ------
    InvalidSequence
        With file and line: another format, text before the first header, a line that is not a sequence, a record
        without a residue or with more than a million letters, no record at all, or damaged compressed data.
    OSError
        The file cannot be read.

    Warns
    -----
    InputWarning
        Lines that were dropped or joined; once per file.
    """
    name, place = _name_of(source), first - 1
    for place, draft in enumerate(read_drafts(source, strict=True), start=first):
        record, problem = draft.finish(place)
        if problem is not None:
            raise InvalidSequence(f"{name}, {problem} (record {record.id[:80]!r})")
        yield record
    if place < first:
        raise InvalidSequence(f"{name}: no sequences in it")


def scan_fasta(source: str | Path | BinaryIO, *, first: int = 1) -> Iterator[tuple[Record, str | None]]:
    """As `read_fasta`, but yield a record that is not a sequence with its line and the reason, and go on.

    For bulk work, where one odd record must not stop a million others. A record that is too long is cut to a little
    more than `MAX_LETTERS` letters. A file without records is not an error.
    """
    for place, draft in enumerate(read_drafts(source), start=first):
        yield draft.finish(place)


def read_drafts(source: str | Path | BinaryIO, strict: bool = False, *, verbatim: bool = False) -> Iterator[Draft]:
    """Yield the records of a file as they are written in it, unpacked and decoded as in `read_fasta`.

    `verbatim` is for fair-esm's readers: every record has a header, and lower case may mean insertions (A3M).
    """
    name = _name_of(source)
    if isinstance(source, str | Path) and Path(source).is_dir():
        raise InvalidSequence(f"{name} is a folder, expected a file")
    try:
        with open(source, "rb") if isinstance(source, str | Path) else nullcontext(source) as file:
            text = decoded(unpacked(file, name), name)
            yield from _split_records(_lines(text, name, strict), name, strict, verbatim=verbatim)
    except UnreadableFile as error:
        raise InvalidSequence(str(error)) from error


def packaged(name: str) -> list[Record]:
    """Return the records of a file that comes with this package."""
    from importlib.resources import files

    return list(read_fasta(io.BytesIO(files(__package__).joinpath("data", name).read_bytes())))


def clean_sequence(text: str) -> str:
    """Return the text in upper case (`<mask>` kept), without blanks and without one trailing `*`."""
    residues = "".join(text.split()).removesuffix("*")
    residues = residues.upper() if residues.isascii() else residues.translate(_UPPER)
    return residues.replace("<MASK>", "<mask>")


def nameless(place: int) -> str:
    """Name a record that has no name: `sequence_3` for the third."""
    return f"sequence_{place}"


def record_name(name: str, ids: str) -> str:
    """Return the id of a record: `sp|P12345|NAME_HUMAN` as it is or, with `ids="accession"`, `P12345`."""
    match = _ACCESSION.match(name) if ids == "accession" else None
    return match[1] if match else name


@dataclass
class _Source:
    """The text being read: its name, whether a record that is too long is an error, and the warnings given so far."""

    name: str
    strict: bool
    warned_of: set[str] = field(default_factory=set)

    def error(self, number: int, what: str) -> InvalidSequence:
        """Return an error that names file and line."""
        return InvalidSequence(f"{self.name}, line {number}: {what}")

    def warn(self, what: str, number: int) -> None:
        """Warn once per kind."""
        if what not in self.warned_of:
            warn(f"{self.name}: {what} line {number}", InputWarning)
        self.warned_of.add(what)

    def is_comment(self, number: int, text: str) -> bool:
        """Whether a line is dropped: a comment or, with a warning, the `--` that `grep -A` puts between groups."""
        if text == "--":
            self.warn("lines of -- (grep's separator) are left out, the first in", number)
            return True
        return text.startswith(";")


@dataclass
class Draft:
    """A record as it is written in the file."""

    source: _Source
    header: str  # without `>`; empty if there is none
    line: int  # where it begins
    parts: list[str] = field(default_factory=list)  # sequence lines, stripped of blanks at their ends
    problem: tuple[int, str] | None = None  # the line, and why it is not a sequence
    letters: int = 0

    def add(self, text: str) -> None:
        """Append a line of sequence."""
        if self.letters >= _TOO_MANY:
            return
        if len(self.parts) == 1000:  # a record of a million lines costs no more than its letters
            self.parts = ["".join(self.parts)]
        self.parts.append(text)
        self.letters += len(text)
        if self.letters > MAX_LETTERS:
            if self.source.strict:
                raise self.source.error(self.line, f"{_TOO_LONG} (record {self.header[:80]!r})")
            self.parts = ["".join("".join(self.parts).split())[:_TOO_MANY]]
            self.letters = len(self.parts[0])

    def add_checked(self, number: int, text: str, headed: bool) -> None:
        """Append a line if it is sequence; else note the problem."""
        unlike = _unlike_sequence(text, headed)
        if unlike is None:
            self.add(text)
        else:
            self.problem = self.problem or (number, unlike)

    def text(self) -> str:
        """Return the sequence as written; InvalidSequence, with file and line, if one of its lines is not one."""
        if self.problem is not None:
            raise self.source.error(*self.problem)
        return "".join(self.parts)

    def finish(self, place: int) -> tuple[Record, str | None]:
        """Return the record and, if it is not a sequence, the line and the reason."""
        sequence = clean_sequence("".join(self.parts))
        words = self.header.split(maxsplit=1)
        record = Record(words[0] if words else nameless(place), self.header.strip(), sequence)
        line, problem = self.problem or (self.line, self._amiss(sequence))
        return record, None if problem is None else f"line {line}: {problem}"

    def _amiss(self, sequence: str) -> str | None:
        """Say why the whole is not a sequence, although each line looks like one."""
        text = "".join(self.parts)
        if text in _MISSING:
            return f"no sequence: {text} stands for a missing value"
        if sequence.strip("-.*"):
            return _TOO_LONG if len(sequence) > MAX_LETTERS else None
        if sequence:
            return "no residue, only gaps"
        return "no sequence" + (" (is it in the header's line?)" if "\t" in self.header else "")


def _split_records(lines: Iterable[str], name: str, strict: bool, *, verbatim: bool) -> Iterator[Draft]:
    """Split lines into records; without headers, each line or each wrapped sequence is one.

    With `verbatim`, text without headers is refused, and A3M is not. InvalidSequence: the text is in another format, or
    begins before its first header.
    """
    numbered = enumerate(map(str.strip, lines), start=1)
    source = _Source(name, strict)
    for number, text in numbered:
        if text.startswith(">"):
            if _PIR_HEADER.match(text):
                raise source.error(number, "this is NBRF/PIR, whose second line is a title")
            drafts = _headed(number, text, numbered, source)
            yield from drafts if verbatim else _without_insertions(drafts)
        elif text and not source.is_comment(number, text):
            _check_format(number, text, source)
            if verbatim:
                raise source.error(number, "expected a header, >…, in front of the first sequence")
            yield from _headerless((number, text), numbered, source)


def _headed(number: int, text: str, rest: Iterator[tuple[int, str]], source: _Source) -> Iterator[Draft]:
    draft = Draft(source, text[1:], number)
    for number, text in rest:
        if text.isalpha():  # as nearly all are
            draft.add(text)
        elif text.startswith(">"):
            yield draft
            draft = Draft(source, text[1:], number)
        elif text and not source.is_comment(number, text):
            draft.add_checked(number, text, headed=True)
    yield draft


def _without_insertions(drafts: Iterable[Draft]) -> Iterator[Draft]:
    """Refuse A3M and A2M: without insertions (lower case or `.`), every record is as long as the first."""
    columns, aligned = None, True
    for draft in drafts:
        if aligned:
            text = "".join(draft.parts)
            insertions = sum(map(text.count, ascii_lowercase + "."))
            if columns is None:
                columns, aligned = len(text), not insertions
            elif len(text) - insertions != columns:
                aligned = False
            elif insertions:
                raise draft.source.error(
                    draft.line,
                    f"this is an A3M or A2M alignment (record {draft.header[:80]!r} has insertions in lower case); "
                    "take gaps and insertions out, or write it in upper case",
                )
        yield draft


def _headerless(first: tuple[int, str], rest: Iterator[tuple[int, str]], source: _Source) -> Iterator[Draft]:
    """Read each paragraph as one wrapped sequence, or as one sequence per line."""
    title: tuple[int, str] | None = first  # perhaps
    held: list[tuple[int, str]] = []  # lines of a paragraph, as long as they may be one wrapped sequence
    one_per_line = False
    for number, text in chain([first], rest):
        if text.startswith(">"):
            raise source.error(number, "a FASTA header after lines that belong to no record")
        if not text or source.is_comment(number, text):
            yield from _paragraph(held, source)
            held, one_per_line = [], False
            continue
        if title is not None and number > title[0]:
            if text.isupper() and title[1].isalpha() and not title[1].isupper():
                raise source.error(title[0], f"{title[1][:40]!r} is a column's title; {_EXPECTED}")
            title = None
        held.append((number, text))
        width = len(held[0][1])
        if one_per_line or len(held[-2:][0][1]) != width or len(held) * width > MAX_LETTERS:
            one_per_line = True
            yield from (_headless([line], source) for line in held)
            held = []
    yield from _paragraph(held, source)


def _paragraph(lines: list[tuple[int, str]], source: _Source) -> Iterator[Draft]:
    """Yield the sequence that is wrapped in these lines, or else a sequence per line."""
    if _is_wrapped([len(text) for _, text in lines]):
        source.warn("lines of equal width without a header are read as one sequence, from", lines[0][0])
        yield _headless(lines, source)
    else:
        yield from (_headless([line], source) for line in lines)


def _headless(lines: list[tuple[int, str]], source: _Source) -> Draft:
    draft = Draft(source, "", lines[0][0])
    for number, text in lines:
        draft.add_checked(number, text, headed=False)
    return draft


def _is_wrapped(widths: list[int]) -> bool:
    """Whether lines, all but the last one of equal width, are one sequence."""
    if len(widths) < 2 or widths[-1] > widths[0]:
        return False
    if widths[0] in _USUAL_WIDTHS:  # many lines of equal width may be a library of peptides
        return widths[-1] < widths[0] or sum(widths) <= MAX_RESIDUES
    return widths[0] >= _LEAST_WIDTH and len(widths) > 2 and widths[-1] < widths[0]


def _check_format(number: int, text: str, source: _Source) -> None:
    """Raise InvalidSequence if the first line of a text without a header shows that it is not FASTA."""
    what = next((f"this is {format}" for format, pattern in _OTHER_FORMATS if re.match(pattern, text, re.I)), None)
    if what is None and _TITLE.fullmatch(text.strip("\"'")):
        what = f"{text[:40]!r} is a column's title"
    if what := what or _unlike_sequence(text, headed=False):
        raise source.error(number, f"{what}; {_EXPECTED}")


def _unlike_sequence(text: str, headed: bool) -> str | None:
    """Say why a line does not look like a sequence, whatever its letters; None if it does."""
    if text.isalpha():
        return None
    for separator, called in (("\t", "tabs"), (",", "commas"), (";", "semicolons")):
        if separator in text and not (headed and separator == "\t"):
            return f"this is a table (columns separated by {called})"
    blocks = _MASK.sub("X", text).split()
    if len(blocks) == 1 or any(block.isdigit() for block in blocks):  # position numbers: the letters' error says so
        return None
    *whole, last = map(len, blocks)
    regular = whole.count(whole[0]) == len(whole) and last <= whole[0]
    # Two words are seldom of one length; blocks of ten are UniProt's, single letters ProtBert's.
    if regular and (whole[0] in (1, 10) or (headed and (len(whole) > 1 or last == whole[0]))):
        return None
    return f"{text[:40]!r} is text or a table, not a sequence"


def _name_of(source: str | Path | BinaryIO) -> str:
    name = str(source if isinstance(source, str | Path) else getattr(source, "name", "input"))
    return "standard input" if name in ("<stdin>", "0") else name


def _lines(text: io.TextIOWrapper, name: str, strict: bool) -> Iterator[str]:
    """Yield lines of bounded length: a small gzip file may hold a line of gigabytes."""
    number = 0
    while line := text.readline(MAX_LETTERS + 1):
        number += 1
        if len(line) > MAX_LETTERS:
            if strict or line.startswith(">"):
                raise InvalidSequence(f"{name}, line {number}: a line of more than {MAX_LETTERS} letters")
            letters = "".join(line.split())
            while not line.endswith("\n") and (line := text.readline(MAX_LETTERS)):
                if len(letters) <= _TOO_MANY:
                    letters += "".join(line.split())
            line = letters[:_TOO_MANY]
        yield line
