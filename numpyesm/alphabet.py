"""The 33 ESM-2 tokens: which letters a sequence may have, and how they become token ids."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from .config import MAX_RESIDUES
from .errors import InputWarning, InvalidSequence, warn
from .given import Sequences, texts
from .printable import listed

TOKENS: tuple[str, ...] = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWC",
    *"XBUZO.-",
    *("<null_1>", "<mask>"),
)
TOKEN_ID: dict[str, int] = {token: index for index, token in enumerate(TOKENS)}
CLS, PAD, EOS, MASK = (TOKEN_ID[token] for token in ("<cls>", "<pad>", "<eos>", "<mask>"))

# The 20 amino acids are columns 4 to 23 of the vocabulary; all logits that leave the model are these columns.
AMINO_ACID_COLUMNS = slice(4, 24)
AMINO_ACIDS: tuple[str, ...] = TOKENS[AMINO_ACID_COLUMNS]

ENCODE_LETTERS = "ACDEFGHIKLMNPQRSTVWYBXZUO-"
PREDICT_LETTERS = ENCODE_LETTERS.removesuffix("-")
MASK_TOKEN = "<mask>"

# Letters as bytes to token ids; `<mask>` is written as one byte for it.
_MASK_BYTE = "\0"
_IDS = bytes([MASK, *(TOKEN_ID.get(chr(byte), 0) for byte in range(1, 256))])


def tokenize(sequences: Sequences, *, masks: bool = False) -> list[npt.NDArray[np.uint8]]:
    """Turn a batch of sequences into token ids, each with `<cls>` at the beginning and `<eos>` at the end.

    Parameters
    ----------
    sequences : iterable of str, mapping from ids to str, or a column of a table
        See `given.labelled`. For `encode` (`masks=False`): the 20 amino acids, `B X Z U O` and `-`.
        For `predict` (`masks=True`): the same letters without `-`, and at least one `<mask>`, which counts as one
        residue. 1 to 2048 residues each, in upper case.
    masks : bool
        Which of the two alphabets.

    Returns
    -------
    list of ndarray of uint8, each (residues + 2,)

    Raises
    ------
    InvalidSequence
        Says which item, which position (counted from 1, `<mask>` being one residue) and what is allowed.
    """
    items = texts(sequences)
    if not items:
        once = " (a generator gives its items only once)" if hasattr(sequences, "__next__") else ""
        raise InvalidSequence(f"the batch is empty; give at least one sequence{once}")
    return [_tokenize_one(sequence, index, masks) for index, sequence in enumerate(items)]


def _tokenize_one(sequence: object, item: int, masks: bool) -> npt.NDArray[np.uint8]:
    """Token ids (residues + 2,) of one sequence, or InvalidSequence naming `item`."""
    if not isinstance(sequence, str):
        raise InvalidSequence(f"expected a string, got {type(sequence).__name__}", item=item)
    if not sequence:
        raise InvalidSequence(f"the sequence is empty; 1 to {MAX_RESIDUES} residues are allowed", item=item)
    check_letters(sequence, besides=MASK_TOKEN if masks else "-", item=item)
    ids = residue_ids(sequence)
    if len(ids) > MAX_RESIDUES:
        raise InvalidSequence(f"{len(ids)} residues, at most {MAX_RESIDUES} are allowed", item=item)
    if masks and MASK not in ids:
        raise InvalidSequence("no <mask> in the sequence; predict needs at least one", item=item)
    return frame(ids)


def check_letters(sequence: str, *, besides: str = "-", item: int | None = None) -> None:
    """Raise InvalidSequence at the first letter that is not allowed, in a sequence of any length.

    `besides` is allowed with `PREDICT_LETTERS`: `-` in `encode`, `<mask>` in `predict`, nothing ("") in a wild type.
    """
    end = re.match(f"(?:[{PREDICT_LETTERS}]+|{besides})*", sequence).end()  # type: ignore[union-attr]
    if end == len(sequence):
        return
    character = MASK_TOKEN if sequence.startswith(MASK_TOKEN, end) else sequence[end]
    position = end - sequence.count(MASK_TOKEN, 0, end) * (len(MASK_TOKEN) - 1) + 1
    raise InvalidSequence(
        f"{character!r} at position {position} is not allowed"
        f"{letter_hint(sequence[end : end + 6], masks=besides == MASK_TOKEN)}; "
        f"expected one of ACDEFGHIKLMNPQRSTVWY, BXZUO{besides and f' or {besides}'}",
        item=item,
        position=position,
        character=character,
    )


def residue_ids(sequence: str) -> npt.NDArray[np.uint8]:
    """Return token ids (L,) of checked letters and `<mask>`, without `<cls>` and `<eos>`."""
    letters = sequence.replace(MASK_TOKEN, _MASK_BYTE).encode("ascii")
    return np.frombuffer(letters.translate(_IDS), np.uint8)


def frame(ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Add `<cls>` at the beginning and `<eos>` at the end: (L,) -> (L + 2,), a new array."""
    framed = np.empty(len(ids) + 2, np.uint8)
    framed[0], framed[1:-1], framed[-1] = CLS, ids, EOS
    return framed


def has_amino_acid(ids: npt.NDArray[np.uint8]) -> bool:
    """Whether any of these tokens is one of the 20 amino acids."""
    return bool(((ids >= AMINO_ACID_COLUMNS.start) & (ids < AMINO_ACID_COLUMNS.stop)).any())


# -- hints and notes -----------------------------------------------------------------------------------------------

# Capital letters of Cyrillic and Greek that look like Latin ones, and dashes that look like the gap.
_LOOK_ALIKES = str.maketrans(
    "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u041e\u0420\u0405\u0422\u0425\u0423\u0474"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7"
    "\u2010\u2011\u2012\u2013\u2014\u2212",
    "ABCEHIJKMOPSTXYVABEZHIKMNOPTYX------",
)
_MASK_MEANT = re.compile(r"\[MASK\]|<mask|[_?#\[]|<M", re.IGNORECASE)
_HINTS = {
    "*": "a stop codon: end the sequence before it",
    ".": "a stop codon or a gap: end the sequence there, or write the gap as -",
    "~": "a gap is written -",
    "J": "leucine or isoleucine: write L, I or X",
    ">": "the > of a header belongs at the beginning of a line",
    "<": "<cls> and <eos> are added by the model; the only word in a sequence is <mask>",
    **dict.fromkeys(":|/", "between chains? give each chain as a sequence of its own, or join them by a linker"),
    **dict.fromkeys("0123456789", "a number: remove position numbers"),
    **dict.fromkeys(",;", "a list or a table? give each sequence on its own"),
    **dict.fromkeys("\"'`", "a quotation mark: remove it"),
    **dict.fromkeys("({", "a modified residue? write its unmodified letter"),
}


def letter_hint(text: str, *, masks: bool = False) -> str:
    """Guess, in brackets, what the user meant by the first letter of `text`; return an empty string if unclear.

    That letter is not allowed, and a few letters follow it. With `masks`, `<mask>` is allowed and `-` is not.
    """
    letter = text[0]
    if text.startswith(MASK_TOKEN):
        return " (<mask> belongs to predict)"
    if letter == "-":
        return " (gaps are for encode only)"
    if letter.isspace():
        return " (a blank)"
    if _MASK_MEANT.match(text):
        return " (a mask is written <mask>)" if masks else " (an unknown residue is X; <mask> belongs to predict)"
    if letter in _HINTS:
        return f" ({_HINTS[letter]})"
    if letter.isascii() and letter.upper() in ENCODE_LETTERS:
        return " (lower case; write sequences in upper case)"
    if " " < letter <= "~":
        return ""
    name = f"U+{ord(letter):04X}{', ' + unicodedata.name(letter) if unicodedata.name(letter, '') else ''}"
    meant = unicodedata.normalize("NFKC", letter).upper().translate(_LOOK_ALIKES)
    return f" ({name}{', which looks like ' + meant if meant != letter and meant in ENCODE_LETTERS else ''})"


_NUCLEOTIDES = re.compile(r"[ACGTUN-]{10,}")
_THREE_LETTER_CODES = re.compile(
    "(?:(?:ALA|ARG|ASN|ASP|CYS|GLN|GLU|GLY|HIS|ILE|LEU|LYS|MET|PHE|PRO|SER|THR|TRP|TYR|VAL|ASX|GLX|SEC|PYL|XAA)-?){3,}"
)
_NOTES = (
    "{} of nucleotides? ESM-2 reads amino acids: translate them first",
    "{} in three-letter codes? ESM-2 reads one letter for each residue",
    "{} with gaps (-), as in an alignment: the model takes them as tokens; remove them unless that is meant",
)


def nothing_to_score(names: Sequence[str]) -> str:
    """Say that these sequences have no log-probability, as they contain none of the 20 amino acids."""
    return f"no log-probability (NaN), because they contain none of the 20 amino acids: {listed(names)}"


class SequenceNotes:
    """Collects notes on input that is allowed but rarely intended: nucleotides, three-letter codes, gaps."""

    def __init__(self) -> None:
        self._seen = 0
        self._found: dict[int, tuple[int, str]] = {}  # kind: how many, and the first of them

    def look(self, sequence: str, name: str = "") -> None:
        """Look at one sequence; notes call it by its name, or else by its index, as errors do."""
        letters = sequence.replace(MASK_TOKEN, "")
        found = (
            _NUCLEOTIDES.fullmatch(letters) and len(set(letters) & set("ACGTU")) >= 3,
            _THREE_LETTER_CODES.fullmatch(letters),
            "-" in letters,
        )
        kind = next((kind for kind, yes in enumerate(found) if yes), None)
        if kind is not None:
            count, first = self._found.get(kind, (0, name or f"item {self._seen}"))
            self._found[kind] = count + 1, first
        self._seen += 1

    def texts(self) -> list[str]:
        """Return the notes, at most one of each kind."""
        return [
            _NOTES[kind].format(f"{count} sequence{'s' if count > 1 else ''} (first: {first[:80]})")
            for kind, (count, first) in sorted(self._found.items())
        ]

    def warn(self) -> None:
        """Issue the notes as `InputWarning`."""
        for text in self.texts():
            warn(text, InputWarning)


def warn_of_odd_sequences(sequences: Iterable[str]) -> None:
    """Issue `InputWarning` for sequences that are allowed but rarely intended, see `SequenceNotes`."""
    notes = SequenceNotes()
    for sequence in sequences:
        notes.look(sequence)
    notes.warn()
