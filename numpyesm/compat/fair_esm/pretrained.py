"""`esm.pretrained`: the four ESM-2 models that numpyesm publishes support for, and checkpoints on disk.

Every function also takes `backend`, `precision`, `threads` and `max_memory` by name, see `numpyesm.ESM2`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ...config import OFFICIAL_NAMES, preset_name
from ...model import ESM2 as Core
from .data import Alphabet, NotSupported
from .model import ESM2

_OTHER_MODELS = re.compile(r"(esm1|esm_|esmfold|esm2_t)\w*")


def load_model_and_alphabet(model_name: str | os.PathLike[str], **options: Any) -> tuple[ESM2, Alphabet]:
    """A model by fair-esm's name, or from a file; also whatever else `numpyesm.ESM2.from_pretrained` takes.

    Parameters
    ----------
    model_name : str or path
        `esm2_t12_35M_UR50D` and so on, a `.pt` or `.safetensors` file, a folder, or `synthetic:…`.
    **options
        `backend`, `precision`, `threads`, `max_memory`.
    """
    name = os.fspath(model_name)
    if _OTHER_MODELS.fullmatch(name) and preset_name(name) is None and not Path(name).exists():
        raise NotSupported(f"{name}: numpyesm has {', '.join(OFFICIAL_NAMES.values())}")
    model = ESM2(Core.from_pretrained(model_name, **options))
    return model, model.alphabet


def load_model_and_alphabet_local(model_location: str | os.PathLike[str], **options: Any) -> tuple[ESM2, Alphabet]:
    """From a file; fair-esm's `-contact-regression.pt` is looked for beside it."""
    return load_model_and_alphabet(Path(model_location), **options)


def load_model_and_alphabet_hub(model_name: str, **options: Any) -> tuple[ESM2, Alphabet]:
    """By name, looked up and, if need be, downloaded as `numpyesm.ESM2.from_pretrained` does."""
    return load_model_and_alphabet(model_name, **options)


def esm2_t6_8M_UR50D(**options: Any) -> tuple[ESM2, Alphabet]:
    """6 layers, 8M parameters."""
    return load_model_and_alphabet("esm2_t6_8M_UR50D", **options)


def esm2_t12_35M_UR50D(**options: Any) -> tuple[ESM2, Alphabet]:
    """12 layers, 35M parameters."""
    return load_model_and_alphabet("esm2_t12_35M_UR50D", **options)


def esm2_t30_150M_UR50D(**options: Any) -> tuple[ESM2, Alphabet]:
    """30 layers, 150M parameters."""
    return load_model_and_alphabet("esm2_t30_150M_UR50D", **options)


def esm2_t33_650M_UR50D(**options: Any) -> tuple[ESM2, Alphabet]:
    """33 layers, 650M parameters."""
    return load_model_and_alphabet("esm2_t33_650M_UR50D", **options)


def __getattr__(name: str) -> Any:
    if _OTHER_MODELS.fullmatch(name):

        def missing(*_: object, **__: object) -> None:
            raise NotSupported(f"{name}: numpyesm has {', '.join(OFFICIAL_NAMES.values())}")

        return missing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
