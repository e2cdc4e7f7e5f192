"""The 33 ESM-2 tokens: what may be in a sequence, and how it becomes token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .config import MAX_RESIDUES
from .errors import InvalidSequence

TOKENS: tuple[str, ...] = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWC",
    *"XBUZO.-",
    *("<null_1>", "<mask>"),
)
TOKEN_ID: dict[str, int] = {token: index for index, token in enumerate(TOKENS)}
CLS, EOS, MASK = TOKEN_ID["<cls>"], TOKEN_ID["<eos>"], TOKEN_ID["<mask>"]

# The 20 amino acids are columns 4 to 23 of the vocabulary; all logits that leave the model are these columns.
AMINO_ACID_COLUMNS = slice(4, 24)
AMINO_ACIDS: tuple[str, ...] = TOKENS[AMINO_ACID_COLUMNS]

ENCODE_LETTERS = "ACDEFGHIKLMNPQRSTVWYBXZUO-"
PREDICT_LETTERS = "ACDEFGHIKLMNPQRSTVWYBXZUO"
MASK_TOKEN = "<mask>"

_ENCODE_IDS = {letter: TOKEN_ID[letter] for letter in ENCODE_LETTERS}
_PREDICT_IDS = {letter: TOKEN_ID[letter] for letter in (*PREDICT_LETTERS, MASK_TOKEN)}
_RESIDUE = re.compile(r"<mask>|.", re.DOTALL)


def tokenize(sequences: Iterable[str], *, masks: bool = False) -> list[npt.NDArray[np.uint8]]:
    """Token ids of a batch, `<cls>` in front and `<eos>` behind each sequence.

    Parameters
    ----------
    sequences : iterable of str
        For `encode` (`masks=False`): the 20 amino acids, `B X Z U O` and `-`.
        For `predict` (`masks=True`): the same letters without `-`, and at least one `<mask>`, which counts as one
        residue. 1 to 2048 residues each; upper case.
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
    return [_tokenize_one(sequence, index, masks) for index, sequence in enumerate(as_batch(sequences))]


def as_batch(sequences: Iterable[str]) -> list[str]:
    """The sequences as a list of at least one, or InvalidSequence; a lone string is not taken for its letters."""
    if isinstance(sequences, str | bytes):
        raise InvalidSequence(
            f"expected a list of sequences, got one {type(sequences).__name__}; put it into a list: [sequence]"
        )
    try:
        items = list(sequences)
    except TypeError:
        raise InvalidSequence(f"expected a list of sequences, got {type(sequences).__name__}") from None
    if not items:
        raise InvalidSequence("the batch is empty; give at least one sequence")
    return items


def _tokenize_one(sequence: object, item: int, masks: bool) -> npt.NDArray[np.uint8]:
    """Token ids (residues + 2,) of one sequence, or InvalidSequence naming `item`."""
    if not isinstance(sequence, str):
        raise InvalidSequence(f"expected a string, got {type(sequence).__name__}", item=item)
    if not sequence:
        raise InvalidSequence(f"the sequence is empty; 1 to {MAX_RESIDUES} residues are allowed", item=item)
    if len(sequence) > 4 * MAX_RESIDUES * len(MASK_TOKEN):  # far too long even if all masks: not worth taking apart
        raise InvalidSequence(f"{len(sequence)} characters, at most {MAX_RESIDUES} residues are allowed", item=item)
    allowed = _PREDICT_IDS if masks else _ENCODE_IDS
    residues = residue_tokens(sequence)
    ids = [allowed.get(residue) for residue in residues]
    if None in ids:
        index = ids.index(None)
        raise InvalidSequence(
            f"{residues[index]!r} at position {index + 1} is not allowed{_hint(residues[index], masks)}; expected "
            + ("one of ACDEFGHIKLMNPQRSTVWY, BXZUO or <mask>" if masks else "one of ACDEFGHIKLMNPQRSTVWY, BXZUO or -"),
            item=item,
            position=index + 1,
            character=residues[index],
        )
    if len(ids) > MAX_RESIDUES:
        raise InvalidSequence(f"{len(ids)} residues, at most {MAX_RESIDUES} are allowed", item=item)
    if masks and MASK not in ids:
        raise InvalidSequence("no <mask> in the sequence; predict needs at least one", item=item)
    return np.array([CLS, *ids, EOS], dtype=np.uint8)


def _hint(residue: str, masks: bool) -> str:
    """What the user probably meant, in brackets; empty if there is no telling."""
    if residue == MASK_TOKEN:
        return " (<mask> belongs to predict)"
    if residue == "-" and masks:
        return " (gaps are for encode only)"
    if residue.isspace():
        return " (a blank)"
    if residue.islower() and residue.upper() in ENCODE_LETTERS:
        return " (lower case; write sequences in upper case)"
    return ""


def residue_tokens(sequence: str) -> list[str]:
    """The residues of a sequence as a list, `<mask>` being one: `M<mask>F` is `["M", "<mask>", "F"]`."""
    return _RESIDUE.findall(sequence)
