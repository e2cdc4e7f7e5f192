"""ESM-2 protein language models on NumPy alone: embeddings, masked predictions, contact maps, without torch."""

from ._version import __version__
from .config import ModelConfig
from .errors import (
    CheckpointError,
    InputWarning,
    InvalidMutation,
    InvalidOption,
    InvalidSequence,
    MissingExtra,
    MissingHead,
    NotEnoughMemory,
    NumpyesmError,
    WeightsNotFound,
)
from .model import ESM2, SyntheticWeightsWarning
from .results import EncodeResult, PredictResult

__all__ = [
    "ESM2",
    "CheckpointError",
    "EncodeResult",
    "InputWarning",
    "InvalidMutation",
    "InvalidOption",
    "InvalidSequence",
    "MissingExtra",
    "MissingHead",
    "ModelConfig",
    "NotEnoughMemory",
    "NumpyesmError",
    "PredictResult",
    "SyntheticWeightsWarning",
    "WeightsNotFound",
    "__version__",
]
