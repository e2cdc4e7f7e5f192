"""`esm.ESM2`: padded tokens in, a dictionary of arrays out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ...alphabet import EOS, MASK, PAD, TOKENS
from ...errors import InvalidSequence, NotEnoughMemory, warn
from ...heads import sigmoid
from ...kernels.blas import blas_threads
from ...memory import Sizes, format_memory
from ...model import ESM2 as Core
from ...options import require_head
from ...reference import contact_features, embed, language_model, layer_norm, nested, transformer_layer
from ...results import FullOutput
from ...weights.checkpoint import Checkpoint
from .data import Alphabet, NotSupported, without_padding

Array = npt.NDArray[Any]


class ESM2:
    """fair-esm's ESM-2 model, made by `esm.pretrained` or from a `numpyesm.ESM2`.

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
        """Return fair-esm's dictionary, as NumPy arrays of float32.

        Parameters
        ----------
        tokens : array of int (B, T)
            Any length, any of the 33 tokens. A row with `<pad>` between other tokens is computed more slowly.
        repr_layers : iterable of int
            0 to `num_layers`; others (negative ones too) are ignored, as in fair-esm.
        need_head_weights, return_contacts : bool
            Contacts come with attentions.

        Returns
        -------
        dict
            `logits` (B, T, 33), absent if the weights have no LM head; `representations`, {layer: (B, T, D)};
            `attentions` (B, num_layers, H, T, T); `contacts` (B, T - 2, T - 2). After the last token of a sequence the
            first two are zero (fair-esm has numbers without meaning there), attentions are zero as in fair-esm, and
            contacts are what fair-esm has: the regression's probability for no attention at all.

        Raises
        ------
        InvalidSequence
            Not a matrix of token numbers, or a row of padding alone.
        NotEnoughMemory
            The call would exceed the model's `max_memory`; nothing was allocated.
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
        """Compute these outputs and no others."""
        ids = check_tokens(tokens)
        if contacts:
            require_head(self.core.checkpoint, "contacts")
        layers = sorted({int(layer) for layer in repr_layers} & set(range(self.num_layers + 1)))
        usual = np.array([_is_usual(row, contacts) for row in ids])
        lengths = [int(np.count_nonzero(row != PAD)) for row in ids]
        (batch, width), inside = ids.shape, max(ids.shape[1] - 2, 0)
        wanted: list[tuple[bool, str, tuple[int, ...]]] = [
            (logits, "logits", (batch, width, self.alphabet_size)),
            (attentions, "attentions", (batch, self.num_layers, self.attention_heads, width, width)),
            (contacts, "contacts", (batch, inside, inside)),
        ]
        shapes = {name: shape for asked, name, shape in wanted if asked}
        sizes = self._sizes(ids, lengths, len(layers), shapes, exact=not usual.all())

        zeros = partial(np.zeros, dtype=np.float32)
        result: dict[str, Any] = {"logits": zeros(shapes["logits"])} if logits else {}
        result["representations"] = {layer: zeros((*ids.shape, self.embed_dim)) for layer in layers}
        result |= {name: zeros(shapes[name]) for name in ("attentions", "contacts") if name in shapes}
        if contacts:
            result["contacts"][:] = sigmoid(self.core.checkpoint.array("contact_head.bias"))
        usual_rows = np.flatnonzero(usual).tolist()
        places = [_place(result, i, lengths[i], lengths[i]) for i in usual_rows]
        self.core.passes.full([ids[i, : lengths[i]] for i in usual_rows], places, sizes)
        if not usual.all():
            _fill_rows(self.core, ids, np.flatnonzero(~usual), result)
        return result

    def _sizes(
        self, ids: Array, lengths: list[int], layers: int, shapes: dict[str, tuple[int, ...]], exact: bool
    ) -> Sizes:
        """Choose how to split the call, or raise NotEnoughMemory if the arrays would exceed the limit."""
        held = 4 * (sum(map(math.prod, shapes.values())) + layers * ids.size * self.embed_dim)
        held += _exact_bytes(self.core.checkpoint, ids.shape[1]) if exact else 0
        try:
            return self.core.passes.full_sizes(lengths, contacts="contacts" in shapes, held=held)
        except NotEnoughMemory as error:
            if "attentions" not in shapes:
                raise
            size = format_memory(4 * math.prod(shapes["attentions"]))
            hint = "; predict_contacts does without them" if "contacts" in shapes else ""
            raise NotEnoughMemory(f"{error} (all attention maps are {size} of it{hint})") from error

    # -- the rest of a torch module's interface ------------------------------------------------------------------

    def eval(self, *_: object) -> ESM2:
        """Return the model: it has no dropout, no gradients, and stays in float32 on the CPU."""
        return self

    cpu = float = requires_grad_ = eval

    def train(self, mode: bool = True) -> ESM2:
        """`train(False)` is `eval()`; this model cannot be trained."""
        if mode:
            raise NotSupported("numpyesm computes outputs only: models cannot be trained")
        return self

    def to(self, *args: object, **kwargs: object) -> ESM2:
        """Stay on the CPU in float32, with a warning if something else is asked."""
        asked = [str(value).removeprefix("torch.") for value in (*args, *kwargs.values())]
        if all(value.split(":")[0] in ("cpu", "float32", "float", "None", "True", "False") for value in asked):
            return self
        return self._ignored(f"to({', '.join(asked)})")

    def cuda(self, device: object = None) -> ESM2:
        """Stay on the CPU, with a warning."""
        return self._ignored("cuda()")

    def half(self) -> ESM2:
        """Keep the precision in which the model was loaded, with a warning."""
        return self._ignored("half()")

    def bfloat16(self) -> ESM2:
        """Keep the precision in which the model was loaded, with a warning."""
        return self._ignored("bfloat16()")

    def __getattr__(self, name: str) -> Any:
        """Say where the weights of a torch module are here."""
        raise AttributeError(
            f"numpyesm's ESM2 is not a torch module and has no {name!r}: it stays on the CPU and gives float32; its "
            "weights are in core.checkpoint",
            name=name,
            obj=self,
        )

    def _ignored(self, what: str) -> ESM2:
        hint = 'numpyesm runs on the CPU and gives float32; load with precision="bf16" for speed'
        warn(f"{what} changes nothing: {hint}")
        return self


class ProteinBertModel:
    """fair-esm's ESM-1 and ESM-1b, for `isinstance` only."""

    def __init__(self, *_: object, **__: object) -> None:
        raise NotSupported("numpyesm has ESM-2 only")


class MSATransformer(ProteinBertModel):
    """fair-esm's MSA Transformer, for `isinstance` only."""


def check_tokens(tokens: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Return token numbers (B, T), or raise InvalidSequence."""
    ids = np.asarray(tokens)
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise InvalidSequence(
            f"expected tokens as whole numbers of shape (batch, length), got {ids.dtype} of shape {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= len(TOKENS):
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise InvalidSequence(f"there is no token {wrong}: they are 0 to {len(TOKENS) - 1}")
    padding = ids == PAD
    for item, row in enumerate(padding):
        if row.all():
            raise InvalidSequence("nothing but padding", item=item)
        if (row | (ids[item] == MASK)).all():  # token dropout would divide by zero, and fair-esm gives NaN
            raise InvalidSequence("nothing but <mask>, not even <cls>", item=item)
    return ids.astype(np.uint8)


def _is_usual(row: npt.NDArray[np.uint8], contacts: bool) -> bool:
    """Whether a row has `<pad>` only at its end and, for contacts, residues between `<cls>` and `<eos>` or the edge."""
    tokens = without_padding(row)
    if PAD in tokens:
        return False
    whole = len(tokens) == len(row) or tokens[-1] == EOS
    return not contacts or (len(tokens) >= 3 and whole and EOS not in tokens[1:-1])


def _place(result: dict[str, Any], row: int, rows: int, length: int) -> FullOutput:
    """Where the outputs of a row of a batch go that has this many tokens; its map of contacts has `length - 2`."""
    return FullOutput(
        {layer: values[row, :rows] for layer, values in result["representations"].items()},
        result["logits"][row, :rows] if "logits" in result else None,
        result["attentions"][row, :, :, :rows, :rows] if "attentions" in result else None,
        result["contacts"][row, : max(length - 2, 0), : max(length - 2, 0)] if "contacts" in result else None,
    )


def _exact_bytes(checkpoint: Checkpoint, length: int) -> int:
    """Memory that `_fill_rows` needs for rows of this many tokens, in bytes."""
    config = checkpoint.config
    maps = 8 * config.num_heads * length**2
    weights = 0 if checkpoint.precision == "fp32" else checkpoint.num_parameters
    return 4 * (maps + 8 * length * (config.ffn_dim + config.embed_dim) + weights)


def _fill_rows(model: Core, tokens: npt.NDArray[np.uint8], rows: npt.NDArray[np.intp], result: dict[str, Any]) -> None:
    """Compute rows of a batch (B, T) that the kernels do not accept, step by step: slower, but any tokens in any order.

    `result` is fair-esm's dictionary; what is not in it is not computed. Padding after the last token is left alone.
    """
    weights = nested(model.checkpoint, np.float32)
    with blas_threads(model.threads):
        for row in rows:
            stop = len(without_padding(tokens[row]))
            some = tokens[row, : stop + 1]  # with one <pad>, if there is any: contacts leave out the last column
            _fill_row(weights, some, stop, _place(result, row, stop, len(some)))


def _fill_row(weights: dict[str, Any], tokens: npt.NDArray[np.uint8], stop: int, place: FullOutput) -> None:
    """Compute the outputs of one row (T,), whose last token that is not `<pad>` is before `stop`."""
    real = (tokens != PAD)[:stop]
    x = embed(tokens, **weights["embed_tokens"])
    contacts: Array = np.zeros(1, np.float32)
    for number, layer in enumerate(weights["layers"]):
        if number in place.representations:
            place.representations[number][...] = x[:stop]
        x, attention = transformer_layer(x, tokens, weights["rotary"], **layer)
        if place.attentions is not None:
            place.attentions[number] = attention[:, :stop, :stop] * (real & real[:, None])
        if place.contacts is not None:
            coefficients = weights["contact_head"]["weight"].reshape(len(weights["layers"]), -1)[number]
            with np.errstate(invalid="ignore"):  # fair-esm divides 0 by 0 where no attention falls on residues
                features = np.nan_to_num(contact_features(attention, tokens), copy=False)
            contacts = contacts + np.tensordot(coefficients, features, axes=1)
    x = layer_norm(x, **weights["final_norm"]) if "final_norm" in weights else x
    if len(weights["layers"]) in place.representations:
        place.representations[len(weights["layers"])][...] = x[:stop]
    if place.logits is not None:
        place.logits[...] = language_model(x[:stop], weights["embed_tokens"]["weight"], **weights["lm_head"])
    if place.contacts is not None:
        place.contacts[...] = sigmoid(contacts + weights["contact_head"]["bias"])
