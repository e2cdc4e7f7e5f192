"""Fixtures shared by the tests: small synthetic models and protein-like sequences."""

from __future__ import annotations

import random
import signal

import pytest
import trained_weights

from numpyesm import ESM2, SyntheticWeightsWarning
from numpyesm.alphabet import AMINO_ACIDS
from numpyesm.config import ModelConfig
from numpyesm.weights.synthetic import random_checkpoint

# A shell that starts the tests in the background makes them, and all that they start, deaf to Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Small, but with every part of the real thing: several layers, 20 heads, some contact coefficients zero.
SMALL = ModelConfig(num_layers=3, embed_dim=80, num_heads=20, ffn_dim=320)


def random_sequence(length: int, seed: int = 0, letters: str = "".join(AMINO_ACIDS)) -> str:
    return "".join(random.Random(f"{length} {seed}").choices(letters, k=length))


def small_model(**options: object) -> ESM2:
    with pytest.warns(SyntheticWeightsWarning):
        return ESM2(random_checkpoint(SMALL, seed=1), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def model() -> ESM2:
    """A small model on the NumPy backend."""
    return small_model(backend="numpy", threads=2)


@pytest.fixture(scope="session")
def reference() -> ESM2:
    """The same model in float64."""
    return small_model(backend="numpy", precision="fp64", threads=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of weights that are not on this machine, without asking the network."""
    from numpyesm.weights import find_local

    missing = {}
    if find_local("esm2-35m") is None:
        missing["official_weights"] = "official ESM-2 35M weights are not on this machine (numpyesm fetch)"
    if trained_weights.folder() is None:
        missing["trained_weights"] = trained_weights.HOW_TO_GET
    for item in items:
        for marker in missing.keys() & item.keywords:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))
