"""Requests and answers as pydantic models: the checks, and the JSON Schema that documents them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from ..alphabet import AMINO_ACIDS, ENCODE_LETTERS, MASK_TOKEN, PREDICT_LETTERS, tokenize
from ..config import MAX_RESIDUES
from ..errors import InvalidOption, InvalidSequence
from ..options import check_layers
from .errors import ApiError, invalid

MAX_ITEMS = 8
_MAX_LIST = 256


def _checked(masks: bool) -> Callable[[str], str]:
    def check(sequence: str) -> str:
        try:
            tokenize([sequence], masks=masks)
        except InvalidSequence as error:
            raise PydanticCustomError("sequence", "{reason}", {"reason": error.reason}) from None
        return sequence

    return check


def _check_layer(layer: int, info: ValidationInfo) -> int:
    if info.context is not None:  # the model's own limits are known only when a request is checked
        try:
            check_layers([layer], info.context["num_layers"])
        except InvalidOption as error:
            raise PydanticCustomError("layer", "{reason}", {"reason": str(error)}) from None
    return layer


_PREDICT_TOKEN = f"(?:[{PREDICT_LETTERS}]|{MASK_TOKEN})"

Sequence = Annotated[
    str,
    AfterValidator(_checked(masks=False)),
    WithJsonSchema(
        {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_RESIDUES,
            "pattern": f"^[{ENCODE_LETTERS.replace('-', '')}-]+$",
            "description": f"1 to {MAX_RESIDUES} residues: the 20 amino acids, B X Z U O and -, upper case.",
            "examples": ["MKTFFVLVLLLSGALAAPVA"],
        }
    ),
]
MaskedSequence = Annotated[
    str,
    AfterValidator(_checked(masks=True)),
    WithJsonSchema(
        {
            "type": "string",
            "minLength": len(MASK_TOKEN),
            "maxLength": MAX_RESIDUES * len(MASK_TOKEN),
            "pattern": f"^{_PREDICT_TOKEN}*{MASK_TOKEN}{_PREDICT_TOKEN}*$",
            "description": f"1 to {MAX_RESIDUES} residues, each <mask> being one, with at least one <mask>.",
            "examples": ["MKTFFV<mask>LVLLLSGALAAPVA"],
        }
    ),
]
Layer = Annotated[int, AfterValidator(_check_layer)]
Include = Literal["mean", "per_token", "per_residue", "bos", "contacts", "logits", "attentions"]
Positions = Literal["all", "masked"]


class _Strict(BaseModel):
    """Nothing is converted, nothing unknown is let through."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Item(_Strict):
    """A sequence."""

    sequence: Sequence


class MaskedItem(_Strict):
    """A sequence with masks."""

    sequence: MaskedSequence


_NO_LAYER_NEEDED: dict[str, Any] = {"not": {"contains": {"enum": ["mean", "per_token", "per_residue", "bos"]}}}


class EncodeParams(_Strict):
    """What `encode` returns."""

    # No layers at all only where no output is of a layer; `_check_possible` in app.py says it in words.
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"repr_layers": {"minItems": 1}}},
                {"required": ["include"], "properties": {"include": _NO_LAYER_NEEDED}},
            ]
        }
    )

    repr_layers: list[Layer] = Field(
        default=[-1],
        max_length=_MAX_LIST,
        description="Layers of the embeddings: 0 is the embedding, -1 the last layer.",
    )
    include: list[Include] = Field(
        default=["mean"], min_length=1, max_length=_MAX_LIST, description="Outputs; per_residue is per_token."
    )


class PredictParams(_Strict):
    """What `predict` returns."""

    positions: Positions = Field(default="all", description="Logits of all residues, or of the masks only.")


class LogProbParams(_Strict):
    """`log_prob` has no parameters."""


class EncodeRequest(_Strict):
    """Body of `encode`."""

    params: EncodeParams = Field(default_factory=EncodeParams)
    items: list[Item] = Field(min_length=1, max_length=MAX_ITEMS)


class PredictRequest(_Strict):
    """Body of `predict`."""

    params: PredictParams = Field(default_factory=PredictParams)
    items: list[MaskedItem] = Field(min_length=1, max_length=MAX_ITEMS)


class LogProbRequest(_Strict):
    """Body of `log_prob`."""

    params: LogProbParams = Field(default_factory=LogProbParams)
    items: list[Item] = Field(min_length=1, max_length=MAX_ITEMS)


Request = EncodeRequest | PredictRequest | LogProbRequest
REQUESTS: dict[str, type[EncodeRequest] | type[PredictRequest] | type[LogProbRequest]] = {
    "encode": EncodeRequest,
    "predict": PredictRequest,
    "log_prob": LogProbRequest,
}


def check_request(action: str, document: Any, num_layers: int) -> Request:
    """The request in `document`, or ApiError 422 naming everything that is wrong with it."""
    model = REQUESTS[action]
    try:
        request: Request = model.model_validate(document, context={"num_layers": num_layers})
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=False)
        raise _refusal(details) from None
    return request


def _refusal(details: list[ErrorDetails]) -> ApiError:
    return invalid([(detail["loc"], _message(detail)) for detail in details])


def _message(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "expected an object"
    if kind == "list_type":
        return "expected a list"
    if kind == "string_type":
        return "expected a string"
    if kind == "string_unicode":
        return "the string is not valid Unicode"
    if kind == "int_type":
        return "expected a whole number"
    if kind == "missing":
        return "this field is required"
    if kind == "extra_forbidden":
        return "unknown field"
    if kind == "too_long":
        return f"at most {context['max_length']} are allowed"
    if kind == "too_short":
        return f"at least {context['min_length']} is needed"
    if kind == "literal_error":
        return f"expected one of {context['expected']}"
    return detail["msg"]


# -- answers: only for the documentation; results are written straight from their arrays -----------------------------

Vector = list[float]
Matrix = list[list[float]]


class LayerEmbedding(BaseModel):
    """One vector."""

    layer: int
    embedding: Vector


class LayerEmbeddings(BaseModel):
    """One vector a residue."""

    layer: int
    embeddings: Matrix


class EncodeResultModel(BaseModel):
    """What was not asked for is absent."""

    model_config = ConfigDict(title="EncodeResult", extra="forbid")
    sequence_index: int = Field(description="Place of the item in the request.")
    embeddings: list[LayerEmbedding] = Field(default=[], description="`mean`: over the residues.")
    bos_embeddings: list[LayerEmbedding] = Field(default=[], description="`bos`: of the <cls> token.")
    per_token_embeddings: list[LayerEmbeddings] = Field(default=[], description="`per_token`: one row a residue.")
    contacts: Matrix = Field(default=[], description="L×L contact probabilities.")
    logits: Matrix = Field(default=[], description="L×20, columns in the order of `vocab_tokens`.")
    vocab_tokens: list[str] = Field(default=[], examples=[list(AMINO_ACIDS)])
    attentions: Matrix = Field(default=[], description="layers×L: mean over heads and query positions.")


class PredictResultModel(BaseModel):
    """Logits of one sequence."""

    model_config = ConfigDict(title="PredictResult", extra="forbid")
    logits: Matrix = Field(description="One row a residue, or one a mask with `positions: masked`.")
    sequence_tokens: list[str] = Field(description="The residues, <mask> as one token.")
    vocab_tokens: list[str] = Field(examples=[list(AMINO_ACIDS)])


class LogProbResultModel(BaseModel):
    """Log-probability of one sequence."""

    model_config = ConfigDict(title="LogProbResult", extra="forbid")
    log_prob: float


class EncodeAnswer(BaseModel):
    """Results in the order of the items."""

    model_config = ConfigDict(extra="forbid")
    results: list[EncodeResultModel]


class PredictAnswer(BaseModel):
    """Results in the order of the items."""

    model_config = ConfigDict(extra="forbid")
    results: list[PredictResultModel]


class LogProbAnswer(BaseModel):
    """Results in the order of the items."""

    model_config = ConfigDict(extra="forbid")
    results: list[LogProbResultModel]


class Problem(BaseModel):
    """One fault and its place."""

    loc: list[str | int]
    field: str = Field(examples=["items__0__sequence"])
    msg: str


class ErrorAnswer(BaseModel):
    """The shape of every error."""

    model_config = ConfigDict(extra="forbid")
    detail: str
    errors: list[Problem]
    status_code: int
    code: str = Field(examples=["user.validation"])
    error: dict[str, list[str]] = Field(examples=[{"items__0__sequence": ["the sequence is empty"]}])


ANSWERS: dict[str, type[BaseModel]] = {"encode": EncodeAnswer, "predict": PredictAnswer, "log_prob": LogProbAnswer}
