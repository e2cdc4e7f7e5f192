"""Alphabet, batches and FASTA as fair-esm's `esm.data` has them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...alphabet import CLS, EOS, MASK, PAD, TOKEN_ID, TOKENS, letter_hint, warn_of_odd_sequences
from ...errors import InvalidSequence, NumpyesmError
from ...fasta import read_drafts

TokenArray = npt.NDArray[np.int64]


class UnknownToken(InvalidSequence, KeyError):
    """A letter or word that is not a token; also a KeyError, as in fair-esm."""

    def __str__(self) -> str:  # KeyError would put quotes around the message
        return str(self.args[0])


class Alphabet:
    """The 33 tokens of ESM-2 and their numbers: `Alphabet.from_architecture("ESM-1b")`.

    Attributes
    ----------
    all_toks : list of str
    tok_to_idx : dict of str to int
    padding_idx, mask_idx, cls_idx, eos_idx, unk_idx : int
    prepend_bos, append_eos : bool
        Whether `<cls>` is put before each sequence of a batch, and `<eos>` after it.
    """

    def __init__(self) -> None:
        self.prepend_toks, self.standard_toks, self.append_toks = list(TOKENS[:4]), list(TOKENS[4:31]), ["<mask>"]
        self.all_toks = self.unique_no_split_tokens = list(TOKENS)
        self.tok_to_idx = TOKEN_ID.copy()
        self.unk_idx, self.padding_idx = TOKEN_ID["<unk>"], PAD
        self.cls_idx, self.mask_idx, self.eos_idx = CLS, MASK, EOS
        self.all_special_tokens = ["<eos>", "<unk>", "<pad>", "<cls>", "<mask>"]
        self.prepend_bos = self.append_eos = True
        self.use_msa = False
        self._pattern = re.compile("|".join(map(re.escape, self.all_toks)))

    @classmethod
    def from_architecture(cls, name: str) -> Alphabet:
        """The alphabet of ESM-2, by fair-esm's names of it: `ESM-1b`, `roberta_large`."""
        if name not in ("ESM-1b", "roberta_large"):
            raise ValueError(f"architecture {name!r}: numpyesm has ESM-2 only, whose alphabet is that of 'ESM-1b'")
        return cls()

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
                f"expected {''.join(self.standard_toks)} or one such as <mask>",
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
        labels, strs, encoded = [], [], []
        for item, pair in enumerate(raw_batch):
            label, sequence = pair if len(pair) == 2 else ("", None)
            if not isinstance(sequence, str):
                raise InvalidSequence(f"expected (label, sequence), the sequence a string, got {pair!r:.80}", item=item)
            labels.append(label)
            strs.append(sequence)
            try:
                encoded.append(self.alphabet.encode(sequence)[: self.truncation_seq_length or None])
            except UnknownToken as error:
                raise UnknownToken(
                    error.reason, item=item, position=error.position, character=error.character
                ) from None
        if not encoded:
            raise InvalidSequence("the batch is empty; give at least one (label, sequence) pair")
        tokens = np.full((len(encoded), max(map(len, encoded)) + 2), PAD, np.int64)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids) + 2] = [CLS, *ids, EOS]
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
    draft = None
    for draft in read_drafts(Path(path), strict=True, verbatim=True):
        sequence = draft.text() if keep_gaps else draft.text().replace("-", "")
        if not keep_insertions:
            sequence = re.sub("[a-z]", "", sequence)
        yield draft.header.lstrip(">"), sequence.upper() if to_upper else sequence
    if draft is None:
        raise InvalidSequence("no sequences")
