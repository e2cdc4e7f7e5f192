"""Alphabet, batches and FASTA as fair-esm's `esm.data` has them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...alphabet import PAD, TOKENS, letter_hint, warn_of_odd_sequences
from ...errors import InvalidSequence, NumpyesmError
from ...fasta import Draft, read_drafts, split_records

TokenArray = npt.NDArray[np.int64]

_STANDARD = TOKENS[4:31]  # L … C X B U Z O . -

# First and last tokens, whether <cls> is prepended and <eos> appended, whether for alignments; by fair-esm's names.
_ESM_1 = (("<null_0>", "<pad>", "<eos>", "<unk>"), ("<cls>", "<mask>", "<sep>"), True, False, False)
_ESM_1B = (("<cls>", "<pad>", "<eos>", "<unk>"), ("<mask>",), True, True, False)
_MSA = (("<cls>", "<pad>", "<eos>", "<unk>"), ("<mask>",), True, False, True)
_INVERSE_FOLDING = (("<null_0>", "<pad>", "<eos>", "<unk>"), ("<mask>", "<cath>", "<af2>"), True, False, False)
_ARCHITECTURES = {
    "ESM-1": _ESM_1,
    "protein_bert_base": _ESM_1,
    "ESM-1b": _ESM_1B,
    "roberta_large": _ESM_1B,
    "MSA Transformer": _MSA,
    "msa_transformer": _MSA,
}


class UnknownToken(InvalidSequence, KeyError):
    """A letter or word that is not a token; also a KeyError, as in fair-esm."""

    def __str__(self) -> str:  # KeyError would put quotes around the message
        return str(self.args[0])


class Alphabet:
    """Tokens and their numbers; ESM-2's is `Alphabet.from_architecture("ESM-1b")`, 33 tokens.

    Attributes
    ----------
    all_toks : list of str
    tok_to_idx : dict of str to int
    padding_idx, mask_idx, cls_idx, eos_idx, unk_idx : int
    prepend_bos, append_eos : bool
        Whether `<cls>` is put before each sequence of a batch, and `<eos>` after it.
    """

    def __init__(
        self,
        standard_toks: Sequence[str],
        prepend_toks: Sequence[str] = _ESM_1[0],
        append_toks: Sequence[str] = _ESM_1[1],
        prepend_bos: bool = True,
        append_eos: bool = False,
        use_msa: bool = False,
    ) -> None:
        self.standard_toks = list(standard_toks)
        self.prepend_toks = list(prepend_toks)
        self.append_toks = list(append_toks)
        self.prepend_bos = prepend_bos
        self.append_eos = append_eos
        self.use_msa = use_msa
        named = [*self.prepend_toks, *self.standard_toks]
        fill = [f"<null_{i + 1}>" for i in range(-len(named) % 8)]  # up to a multiple of eight
        self.all_toks = [*named, *fill, *self.append_toks]
        self.tok_to_idx = {token: index for index, token in enumerate(self.all_toks)}
        self.unk_idx = self.tok_to_idx["<unk>"]
        self.padding_idx = self.get_idx("<pad>")
        self.cls_idx = self.get_idx("<cls>")
        self.mask_idx = self.get_idx("<mask>")
        self.eos_idx = self.get_idx("<eos>")
        self.all_special_tokens = ["<eos>", "<unk>", "<pad>", "<cls>", "<mask>"]
        self.unique_no_split_tokens = self.all_toks
        self._pattern = re.compile("|".join(map(re.escape, self.all_toks)))

    @classmethod
    def from_architecture(cls, name: str) -> Alphabet:
        """The alphabet of one of fair-esm's architectures; ESM-2 has that of `ESM-1b`."""
        parts = _INVERSE_FOLDING if "invariant_gvp" in name.lower() else _ARCHITECTURES.get(name)
        if parts is None:
            raise ValueError(f"unknown architecture {name!r}: ESM-2 has the alphabet of 'ESM-1b'")
        return cls(_STANDARD, *parts)

    def __len__(self) -> int:
        return len(self.all_toks)

    def get_idx(self, tok: str) -> int:
        """Number of a token, `unk_idx` if there is none."""
        return self.tok_to_idx.get(tok, self.unk_idx)

    def get_tok(self, ind: int) -> str:
        """The token of a number."""
        return self.all_toks[ind]

    def to_dict(self) -> dict[str, int]:
        """A copy of `tok_to_idx`."""
        return self.tok_to_idx.copy()

    def get_batch_converter(self, truncation_seq_length: int | None = None) -> BatchConverter:
        """Make a converter that cuts sequences to `truncation_seq_length` tokens."""
        if self.use_msa:
            raise NotSupported("alignments are for the MSA Transformer; numpyesm has ESM-2 only")
        return BatchConverter(self, truncation_seq_length)

    def tokenize(self, text: str, **_: Any) -> list[str]:
        """Split a text into tokens; anything else is split at blanks."""
        return self._pattern.sub(r" \g<0> ", text).split()

    def encode(self, text: str) -> list[int]:
        """Numbers of the tokens of a text; UnknownToken for lower case, `J`, `*` and the like."""
        tokens = self.tokenize(text)
        try:
            return [self.tok_to_idx[token] for token in tokens]
        except KeyError as error:
            token = str(error.args[0])
            position = tokens.index(token) + 1
            raise UnknownToken(
                f"{token!r} at position {position} is not a token{letter_hint(token, masks=True)}; "
                f"expected {''.join(_STANDARD)} or one such as <mask>",
                position=position,
                character=token,
            ) from None


class BatchConverter:
    """Converts (label, sequence) pairs to labels, sequences and tokens (B, T), padded at the end."""

    def __init__(self, alphabet: Alphabet, truncation_seq_length: int | None = None) -> None:
        self.alphabet = alphabet
        self.truncation_seq_length = truncation_seq_length

    def __call__(self, raw_batch: Iterable[tuple[str, str]]) -> tuple[list[str], list[str], TokenArray]:
        labels, strs, tokens = self.convert(raw_batch)
        warn_of_odd_sequences(strs)
        return labels, strs, tokens

    def convert(self, raw_batch: Iterable[tuple[str, str]]) -> tuple[list[str], list[str], TokenArray]:
        """Convert without warnings about unusual input."""
        alphabet = self.alphabet
        pairs = list(raw_batch)
        if not pairs:
            raise InvalidSequence("the batch is empty; give at least one (label, sequence) pair")
        labels, strs = [label for label, _ in pairs], [sequence for _, sequence in pairs]
        encoded = []
        for item, sequence in enumerate(strs):
            try:
                encoded.append(alphabet.encode(sequence)[: self.truncation_seq_length or None])
            except UnknownToken as error:
                raise UnknownToken(
                    error.reason, item=item, position=error.position, character=error.character
                ) from None
        first, last = [alphabet.cls_idx] * alphabet.prepend_bos, [alphabet.eos_idx] * alphabet.append_eos
        framed = [[*first, *ids, *last] for ids in encoded]
        tokens = np.full((len(pairs), max(map(len, framed))), alphabet.padding_idx, np.int64)
        for row, ids in zip(tokens, framed, strict=True):
            row[: len(ids)] = ids
        return labels, strs, tokens


def without_padding(row: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A row of tokens (T,) up to its last token that is not `<pad>`."""
    return row[: np.flatnonzero(row != PAD)[-1] + 1]


class FastaBatchedDataset:
    """Labels and sequences, and batches of about equal length."""

    def __init__(self, sequence_labels: Iterable[str], sequence_strs: Iterable[str]) -> None:
        self.sequence_labels = list(sequence_labels)
        self.sequence_strs = list(sequence_strs)

    @classmethod
    def from_file(cls, fasta_file: str | os.PathLike[str]) -> FastaBatchedDataset:
        """Read a file as `numpyesm.fasta` does, but with whole header lines as labels and no change of case.

        InvalidSequence: two records of one label, text before the first header, or a line that is not a sequence.
        """
        drafts = list(read_drafts(Path(fasta_file), strict=True, verbatim=True))
        labels = [draft.header.strip() or f"seqnum{draft.line - 1:09d}" for draft in drafts]
        if len(set(labels)) < len(labels):
            twice = Counter(labels).most_common(1)[0][0]
            raise InvalidSequence(f"{fasta_file}: two records are called {twice!r}")
        return cls(labels, [draft.text() for draft in drafts])

    def __len__(self) -> int:
        return len(self.sequence_labels)

    def __getitem__(self, idx: int) -> tuple[str, str]:
        return self.sequence_labels[idx], self.sequence_strs[idx]

    def get_batch_indices(self, toks_per_batch: int, extra_toks_per_seq: int = 0) -> list[list[int]]:
        """Batch indices in order of length: at most `toks_per_batch` tokens with padding, or one sequence."""
        batches: list[list[int]] = []
        for size, index in sorted((len(sequence), index) for index, sequence in enumerate(self.sequence_strs)):
            # Ascending: the new one is the longest of its batch.
            if not batches or (size + extra_toks_per_seq) * (len(batches[-1]) + 1) > toks_per_batch:
                batches.append([])
            batches[-1].append(index)
        return batches


class NotSupported(NumpyesmError, NotImplementedError):
    """Something that fair-esm has and numpyesm does not."""


def read_fasta(
    path: str | os.PathLike[str], keep_gaps: bool = True, keep_insertions: bool = True, to_upper: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield (header, sequence) of a FASTA or A3M file, optionally without `-` or lower-case insertions."""
    return _alignment(read_drafts(Path(path), strict=True, verbatim=True), keep_gaps, keep_insertions, to_upper)


def read_alignment_lines(
    lines: Iterable[str], keep_gaps: bool = True, keep_insertions: bool = True, to_upper: bool = False
) -> Iterator[tuple[str, str]]:
    """As `read_fasta`, from lines of text."""
    return _alignment(split_records(lines, "input", True, verbatim=True), keep_gaps, keep_insertions, to_upper)


def _alignment(
    drafts: Iterable[Draft], keep_gaps: bool, keep_insertions: bool, to_upper: bool
) -> Iterator[tuple[str, str]]:
    draft = None
    for draft in drafts:
        sequence = draft.text() if keep_gaps else draft.text().replace("-", "")
        if not keep_insertions:
            sequence = re.sub("[a-z]", "", sequence)
        yield draft.header.lstrip(">"), sequence.upper() if to_upper else sequence
    if draft is None:
        raise InvalidSequence("no sequences")
