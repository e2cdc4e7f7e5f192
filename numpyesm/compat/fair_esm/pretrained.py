"""`esm.pretrained`: the ESM-2 models that numpyesm supports, and checkpoints on disk.

Every function also takes `backend`, `precision`, `threads` and `max_memory` by name, see `numpyesm.ESM2`.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from ...config import OFFICIAL_NAMES, preset_name
from ...model import ESM2 as Core
from .data import Alphabet, NotSupported
from .model import ESM2

_FAIR_ESM_NAME = re.compile(r"(esm1|esm_|esmfold|esm2_t)\w*")


def load_model_and_alphabet(model_name: str | os.PathLike[str], **options: Any) -> tuple[ESM2, Alphabet]:
    """Load a model by fair-esm's name (`esm2_t12_35M_UR50D`), or by what `numpyesm.ESM2.from_pretrained` takes."""
    name = os.fspath(model_name)
    if _FAIR_ESM_NAME.fullmatch(name) and preset_name(name) is None and not Path(name).exists():
        raise NotSupported(f"{name}: numpyesm has {', '.join(OFFICIAL_NAMES.values())}")
    model = ESM2(Core.from_pretrained(model_name, **options))
    return model, model.alphabet


def load_model_and_alphabet_local(model_location: str | os.PathLike[str], **options: Any) -> tuple[ESM2, Alphabet]:
    """Load a file, with fair-esm's `-contact-regression.pt` if that is next to it."""
    return load_model_and_alphabet(Path(model_location), **options)


load_model_and_alphabet_hub = load_model_and_alphabet


def __getattr__(name: str) -> Any:
    """Return the loader of a fair-esm model; for a model that numpyesm lacks, calling it raises NotSupported."""
    if _FAIR_ESM_NAME.fullmatch(name):
        return partial(load_model_and_alphabet, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
