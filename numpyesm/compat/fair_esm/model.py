"""`esm.ESM2` as a callable from padded tokens to a dictionary of arrays."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...alphabet import EOS, MASK, TOKENS
from ...errors import InvalidSequence
from ...heads import sigmoid
from ...model import ESM2 as Core
from ...options import require_contact_head
from ...passes import FullOutput
from .data import Alphabet, NotSupported

Array = npt.NDArray[Any]
_PAD = TOKENS.index("<pad>")


class ESM2:
    """fair-esm's ESM-2 model. Made by `esm.pretrained`, or from a `numpyesm.ESM2`.

    Attributes
    ----------
    num_layers, embed_dim, attention_heads : int
    alphabet : Alphabet
    core : numpyesm.ESM2
        The model that computes.
    """

    training = False
    token_dropout = True

    def __init__(self, core: Core, *others: object, **named: object) -> None:
        if not isinstance(core, Core) or others or named:  # fair-esm's own takes layers, width and heads
            raise NotSupported("models are made from weights: esm.pretrained.esm2_t12_35M_UR50D(), or a numpyesm.ESM2")
        self.core = core
        self.num_layers = core.config.num_layers
        self.embed_dim = core.config.embed_dim
        self.attention_heads = core.config.num_heads
        self.alphabet = Alphabet.from_architecture("ESM-1b")
        self.alphabet_size = len(self.alphabet)
        self.padding_idx = self.alphabet.padding_idx
        self.mask_idx = self.alphabet.mask_idx
        self.cls_idx = self.alphabet.cls_idx
        self.eos_idx = self.alphabet.eos_idx
        self.prepend_bos = self.alphabet.prepend_bos
        self.append_eos = self.alphabet.append_eos

    def __repr__(self) -> str:
        return f"fair_esm.{self.core!r}"

    def __call__(
        self,
        tokens: npt.ArrayLike,
        repr_layers: Iterable[int] = (),
        need_head_weights: bool = False,
        return_contacts: bool = False,
    ) -> dict[str, Any]:
        """fair-esm's dictionary, as NumPy arrays of float32.

        Parameters
        ----------
        tokens : array of int (B, T)
            As a batch converter makes them: `<pad>` behind a sequence only. Any length, any of the 33 tokens.
        repr_layers : iterable of int
            Of 0 to `num_layers`; others are left out, as in fair-esm (negative ones too).
        need_head_weights, return_contacts : bool
            The second brings the first with it.

        Returns
        -------
        dict
            `logits` (B, T, 33), absent if the weights have no LM head; `representations`, {layer: (B, T, D)};
            `attentions` (B, num_layers, H, T, T); `contacts` (B, T - 2, T - 2). Where a sequence is padded, the first
            two are zero (fair-esm has numbers without meaning there), attentions are zero as in fair-esm, and contacts
            are what fair-esm has: the regression's probability for no attention at all.

        Raises
        ------
        InvalidSequence
            Not a matrix of token numbers, padding that is not at the end, or a row of padding alone.
        MissingHead
            Contacts, and the weights have no contact head.
        """
        return self.outputs(
            tokens,
            repr_layers,
            logits=self.core.checkpoint.has_lm_head,
            attentions=bool(need_head_weights or return_contacts),
            contacts=bool(return_contacts),
        )

    forward = __call__

    def predict_contacts(self, tokens: npt.ArrayLike) -> Array:
        """Contact probabilities (B, T - 2, T - 2), without holding the attention maps."""
        contacts: Array = self.outputs(tokens, contacts=True)["contacts"]
        return contacts

    def outputs(
        self,
        tokens: npt.ArrayLike,
        repr_layers: Iterable[int] = (),
        *,
        logits: bool = False,
        attentions: bool = False,
        contacts: bool = False,
    ) -> dict[str, Any]:
        """The outputs that are asked for, and nothing more computed."""
        ids = check_tokens(tokens)
        if contacts:
            require_contact_head(self.core.checkpoint)
        layers = {int(layer) for layer in repr_layers} & set(range(self.num_layers + 1))
        (batch, width), dtype = ids.shape, np.float32
        rows = [row[row != _PAD] for row in ids]

        result: dict[str, Any] = {}
        if logits:
            result["logits"] = np.zeros((batch, width, self.alphabet_size), dtype)
        result["representations"] = {layer: np.zeros((batch, width, self.embed_dim), dtype) for layer in sorted(layers)}
        if attentions:
            shape = (batch, self.num_layers, self.attention_heads, width, width)
            result["attentions"] = np.zeros(shape, dtype)
        if contacts:
            size = max(width - 2, 0)
            result["contacts"] = np.full((batch, size, size), self._no_contact(), dtype)

        # The core's contacts leave out first and last; rows where fair-esm leaves out others are done from their maps.
        usual = [i for i, row in enumerate(rows) if not contacts or _ends_as_usual(row, width)]
        unusual = [i for i in range(batch) if i not in set(usual)]
        for indices, from_maps in ((usual, False), (unusual, True)):
            maps: list[Array] | None = None
            if attentions:
                maps = [result["attentions"][i, :, :, : len(rows[i]), : len(rows[i])] for i in indices]
            elif from_maps:
                sizes = [len(rows[i]) for i in indices]
                maps = [np.zeros((self.num_layers, self.attention_heads, n, n), dtype) for n in sizes]
            outputs = self.core.passes.full(
                [rows[i] for i in indices],
                layers,
                logits=logits,
                contacts=contacts and not from_maps,
                attentions=maps,
            )
            for place, (i, output) in enumerate(zip(indices, outputs, strict=True)):
                if from_maps and maps is not None:
                    output.contacts = self._contacts_from_maps(rows[i], maps[place], width)
                _put(output, i, result)
        return result

    def _no_contact(self) -> float:
        return float(sigmoid(self.core.checkpoint.array("contact_head.bias", np.float64))[0])

    def _contacts_from_maps(self, row: Array, maps: Array, width: int) -> Array:
        """fair-esm's contact head on one sequence: `<eos>` blotted out wherever it is, first and last column cut.

        (n,), (num_layers, H, n, n) -> (m, m), m the residues that are left of `width`.
        """
        kept = (row != EOS).astype(np.float64)
        inside = slice(1, min(len(row), width - 1))
        maps = (maps * (kept[:, None] * kept))[..., inside, inside]
        maps = maps + maps.swapaxes(-1, -2)
        sums = maps.sum(axis=-1)
        total = sums.sum(axis=-1)
        weight = self.core.checkpoint.array("contact_head.weight", np.float64).reshape(total.shape)
        bias = float(self.core.checkpoint.array("contact_head.bias", np.float64)[0])
        factor = np.divide(weight, total, out=np.zeros_like(total), where=total > 0)
        logits = np.einsum("lh,lhij->ij", weight, maps) - np.einsum("lh,lhi,lhj->ij", factor, sums, sums)
        return sigmoid(logits + bias)

    # -- what a torch module has besides ------------------------------------------------------------------------

    def eval(self) -> ESM2:
        """Nothing to do: there is no dropout."""
        return self

    def train(self, mode: bool = True) -> ESM2:
        """`train(False)` is `eval()`; this model cannot be trained."""
        if mode:
            raise NotSupported("numpyesm computes outputs only: models cannot be trained")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ESM2:
        """Accepted: there are no gradients."""
        return self

    def cpu(self) -> ESM2:
        """Where it is anyway."""
        return self

    def float(self) -> ESM2:
        """What it gives anyway."""
        return self

    def cuda(self, device: object = None) -> ESM2:
        """Stays on the CPU, and says so."""
        return self._ignored("cuda()", "numpyesm runs on the CPU")

    def half(self) -> ESM2:
        """Stays in the precision it was loaded in, and says so."""
        return self._ignored("half()", 'outputs are float32; load with precision="bf16" for speed')

    bfloat16 = half

    def to(self, *args: object, **kwargs: object) -> ESM2:
        """Accepted; a device other than the CPU, or another dtype, is refused with a warning."""
        asked = [str(value).removeprefix("torch.") for value in (*args, *kwargs.values())]
        if all(value.split(":")[0] in ("cpu", "float32", "float", "None", "True", "False") for value in asked):
            return self
        return self._ignored(f"to({', '.join(asked)})", "numpyesm runs on the CPU and gives float32")

    def _ignored(self, what: str, why: str) -> ESM2:
        warnings.warn(f"{what} changes nothing: {why}", stacklevel=3)
        return self


class ProteinBertModel:
    """fair-esm's ESM-1 and ESM-1b, for `isinstance` only: numpyesm has ESM-2."""

    def __init__(self, *_: object, **__: object) -> None:
        raise NotSupported("numpyesm has ESM-2 only")


class MSATransformer(ProteinBertModel):
    """fair-esm's MSA Transformer, for `isinstance` only."""


def check_tokens(tokens: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Token numbers (B, T), or InvalidSequence."""
    ids = np.asarray(tokens)
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise InvalidSequence(
            f"expected tokens as whole numbers of shape (batch, length), got {ids.dtype} of shape {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= len(TOKENS):
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise InvalidSequence(f"there is no token {wrong}: they are 0 to {len(TOKENS) - 1}")
    padding = ids == _PAD
    for item, row in enumerate(padding):
        if row.all():
            raise InvalidSequence("nothing but padding", item=item)
        if (row | (ids[item] == MASK)).all():  # token dropout would divide by zero, and fair-esm gives NaN
            raise InvalidSequence("nothing but <mask>, not even <cls>", item=item)
        if (row[:-1] & ~row[1:]).any():
            raise InvalidSequence("<pad> stands before other tokens; padding belongs at the end", item=item)
    return ids.astype(np.uint8)


def _ends_as_usual(row: Array, width: int) -> bool:
    """Whether fair-esm's contacts of this row are those between first and last token."""
    whole = len(row) == width or row[-1] == EOS
    return len(row) >= 3 and whole and EOS not in row[1:-1]


def _put(output: FullOutput, index: int, result: dict[str, Any]) -> None:
    """Copy one sequence's outputs to its place in the padded arrays."""
    for layer, rows in output.representations.items():
        result["representations"][layer][index, : len(rows)] = rows
    if output.logits is not None:
        result["logits"][index, : len(output.logits)] = output.logits
    if output.contacts is not None:
        size = len(output.contacts)
        result["contacts"][index, :size, :size] = output.contacts
