"""The forward pass with everything it makes: every row, all 33 logits, every attention map. The look-alike's door.

`ESM2.encode` and its kin give residues only and never hold more than they need; this is for those who ask for the
whole, of tokens that nobody has checked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .batch import Batch
from .encoder import encode_batch, lm_logits
from .heads import FullAttention

if TYPE_CHECKING:
    from .model import ESM2

Array = npt.NDArray[Any]


@dataclass
class FullOutput:
    """Outputs of one sequence of T tokens, `<cls>` and `<eos>` included.

    Attributes
    ----------
    representations : dict of int to ndarray (T, D)
    logits : ndarray (T, 33) or None
    contacts : ndarray (T - 2, T - 2) or None
    """

    representations: dict[int, Array] = field(default_factory=dict)
    logits: Array | None = None
    contacts: Array | None = None


def full_outputs(
    model: ESM2,
    tokens: Sequence[npt.NDArray[np.uint8]],
    layers: Collection[int] = (),
    *,
    logits: bool = False,
    contacts: bool = False,
    attentions: Sequence[Array] | None = None,
) -> Iterator[FullOutput]:
    """Outputs of each sequence in order, computed pass by pass.

    Parameters
    ----------
    model : ESM2
        With the heads that are needed.
    tokens : sequence of ndarray (T,)
        Token ids from 0 to 32, none of them `<pad>`; at least three where contacts are wanted, whose map leaves out
        the first and the last whatever they are.
    layers : collection of int
        0 to num_layers.
    logits, contacts : bool
    attentions : list of ndarray (num_layers, H, T, T), optional
        One a sequence, to be filled.
    """
    from .model import _ROWS_PER_PASS, _passes

    done = 0
    for chunk in _passes(tokens, _ROWS_PER_PASS) if tokens else ():
        maps = None if attentions is None else list(attentions[done : done + len(chunk)])
        yield from _one_pass(model, chunk, layers, logits, contacts, maps)
        done += len(chunk)


def _one_pass(
    model: ESM2,
    tokens: Sequence[Array],
    layers: Collection[int],
    logits: bool,
    contacts: bool,
    attentions: list[Array] | None,
) -> list[FullOutput]:
    kernels, pool, last = model._kernels_for(tokens), model._pool, model.config.num_layers
    batch = Batch.pack(tokens)
    outputs = [FullOutput() for _ in tokens]

    def take(layer: int, rows: Array) -> None:
        if layer in layers:
            for output, (first, stop) in zip(outputs, batch.spans, strict=True):
                output.representations[layer] = rows[first:stop].copy()
        if layer == last and logits:
            projected = lm_logits(kernels, pool, rows)
            for output, (first, stop) in zip(outputs, batch.spans, strict=True):
                output.logits = projected[first:stop]

    head = model._contact_head(batch) if contacts else None
    encode_batch(
        kernels,
        pool,
        batch,
        representations={*layers, *([last] if logits else [])},
        take=take,
        contacts=head,
        full=None if attentions is None else FullAttention(attentions),
    )
    if head is not None:
        with kernels.session(model.threads):
            for i, output in enumerate(outputs):
                output.contacts = head.result(i)
    return outputs
