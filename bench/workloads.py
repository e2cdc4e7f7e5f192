"""What is computed: the sequences of each workload, padded batches, and the arithmetic of a pass.

Runs in every engine's environment: NumPy and the standard library only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWC"
_VOCABULARY = ("<cls>", "<pad>", "<eos>", "<unk>", *AMINO_ACIDS, *"XBUZO.-", "<null_1>", "<mask>")
_INDEX = {token: index for index, token in enumerate(_VOCABULARY)}
LETTERS = slice(4, 24)  # columns of the 20 amino acids in all logits
MAX_BATCH_TOKENS = 4096
VARLEN = Path(__file__).parent / "data" / "varlen256.fasta"
REAL_PROTEINS = Path(__file__).parents[1] / "tests" / "data" / "real_proteins.fasta"

QUICK = ("1x100", "1x512", "8x256", "1x2048", "varlen256")
FULL = (*QUICK, "8x2048")
GROWTH = ("1x64", "1x128", "1x256", "1x512", "1x1024", "1x2048", "4x256", "16x256")  # with length, and with the batch
CONTACT_LENGTHS = (512, 1022)
CHECK_LENGTHS = (33, 20, 57)  # of the sequences on which outputs are compared


def random_sequence(length: int, seed: int) -> str:
    """Return `length` amino acids, always the same for the same seed."""
    return "".join(random.Random(seed).choices(AMINO_ACIDS, k=length))


def read_fasta(path: Path) -> dict[str, str]:
    """Return the sequences of a FASTA file by the first word of their headers, in order."""
    records = [record.splitlines() for record in path.read_text().split(">")[1:]]
    return {header.split()[0]: "".join(lines) for header, *lines in records}


def sequences(name: str) -> list[str]:
    """Return the sequences of a workload: `varlenN` for N of 256 chains, or `NxL` for N sequences of L residues."""
    if match := re.fullmatch(r"varlen([1-9]\d*)", name):
        chains, count = list(read_fasta(VARLEN).values()), int(match[1])
        if count > len(chains):
            raise ValueError(f"workload {name!r}: there are {len(chains)} sequences of different lengths")
        return [chains[i * len(chains) // count] for i in range(count)]
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)):
        raise ValueError(f"workload {name!r}: expected varlenN, or NxL for N sequences of L residues")
    count, length = map(int, match.groups())
    # 2048 stands for tokens: 2046 residues, `<cls>` and `<eos>`.
    return [random_sequence(2046 if length == 2048 else length, seed + 1) for seed in range(count)]


def check_sequences() -> list[str]:
    """Return three short sequences on which the engines' outputs are compared."""
    return [random_sequence(length, 1000 + length) for length in CHECK_LENGTHS]


def encode(sequence: str) -> list[int]:
    """Tokens of one sequence with `<cls>` and `<eos>`."""
    return [0, *(_INDEX[letter] for letter in sequence), 2]


def padded_batches(batch: Sequence[str]) -> list[list[int]]:
    """Indices of the sequences, shortest first, in batches of at most 4096 tokens, padding included."""
    batches: list[list[int]] = []
    current: list[int] = []
    for index in sorted(range(len(batch)), key=lambda i: len(batch[i])):
        if current and (len(batch[index]) + 2) * (len(current) + 1) > MAX_BATCH_TOKENS:
            batches.append(current)
            current = []
        current.append(index)
    return [*batches, current]


def pad(batch: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens (N, T) padded with `<pad>`, and the attention mask (N, T)."""
    encoded = [encode(sequence) for sequence in batch]
    tokens = np.full((len(encoded), max(map(len, encoded))), 1, np.int64)
    mask = np.zeros_like(tokens)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return tokens, mask


def residues(batch: Sequence[str], row: int, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The rows of one sequence's residues in a padded output (N, T, ...)."""
    return values[row, 1 : len(batch[row]) + 1]


def flops(batch: Sequence[str], config: dict[str, int]) -> float:
    """Operations of one pass with logits: linear layers and LM head per token, attention per pair of tokens."""
    width, layers = config["embed_dim"], config["num_layers"]
    linears = 2 * layers * (4 * width**2 + 2 * width * config["ffn_dim"])
    head = 2 * width**2 + 2 * width * len(_VOCABULARY)
    tokens = [len(sequence) + 2 for sequence in batch]
    return float(sum(length * (linears + head + 4 * width * layers * length) for length in tokens))
