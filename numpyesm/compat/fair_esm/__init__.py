"""fair-esm's Python interface for ESM-2, on NumPy arrays and without torch.

    import numpyesm.compat.fair_esm as esm

    model, alphabet = esm.pretrained.esm2_t12_35M_UR50D()
    batch_labels, batch_strs, batch_tokens = alphabet.get_batch_converter()([("one", "MKT<mask>YIAK")])
    results = model(batch_tokens, repr_layers=[12], return_contacts=True)

Arrays are NumPy's: remove what only torch has (`torch.no_grad()`, `.cpu()`, `.numpy()`) from a script. See
`docs/from-fair-esm.md`.
"""

from ..._version import __version__
from . import data, model, pretrained
from .data import Alphabet, BatchConverter, FastaBatchedDataset
from .model import ESM2, MSATransformer, ProteinBertModel

__all__ = [
    "ESM2",
    "Alphabet",
    "BatchConverter",
    "FastaBatchedDataset",
    "MSATransformer",
    "ProteinBertModel",
    "__version__",
    "data",
    "model",
    "pretrained",
]
