"""Arrays that are made from weights, once for all models of this process that have the same tensor.

Adapters of one base share the tensors that they do not touch (`Checkpoint.base`), and so what a backend makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy.typing as npt

from ..threads import Lock
from ..weights.tensor import StoredTensor

_made: WeakKeyDictionary[StoredTensor, WeakValueDictionary[Hashable, npt.NDArray[Any]]] = WeakKeyDictionary()
_lock = Lock()


def shared(tensor: StoredTensor, form: Hashable, make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return `make()` or what an earlier call returned for the same tensor and form, if some model still has it."""
    with _lock:
        forms = _made.setdefault(tensor, WeakValueDictionary())
    array = forms.get(form)
    if array is None:
        array = forms[form] = make()
    return array
