"""The API as JSON Schema and OpenAPI 3.1: the schema of one action's request, and `/openapi.json`."""

from __future__ import annotations

from typing import Any, TypeAlias

from .._version import __version__
from ..alphabet import AMINO_ACIDS, ENCODE_LETTERS, MASK_TOKEN, PREDICT_LETTERS
from ..config import MAX_RESIDUES
from ..options import POSITIONS
from .catalog import ACTIONS, MAX_ITEMS, Catalog, ServedModel
from .media import JSON_TYPE, NPZ_TYPE
from .requests import INCLUDE_NAMES, MAX_LIST

Schema: TypeAlias = dict[str, Any]

# Read by the `biolmai` SDK, which holds back requests beyond it. This service sets no rate: whoever fills the queue is
# answered 429. The figure is above anything that it could compute.
THROTTLE_RATE = "1000/second"

_SUMMARIES = {
    "encode": "Embeddings, contacts, logits and attentions of sequences",
    "predict": "Logits of sequences with masks",
    "log_prob": "Log-probability of sequences, from one pass",
}
_ERRORS = {
    401: "No API key, or an unknown one",
    403: "The Host header names another machine (services without keys only)",
    404: "No such model or action",
    405: "Wrong method",
    408: "The body did not arrive in time",
    413: "The body is too large, or the request would take too much memory",
    415: "Not JSON, or an unknown Content-Encoding",
    422: "The request is not valid; every bad item is named",
    429: "Too many requests of this client are waiting; see Retry-After",
    500: "The service failed",
    503: "The queue is full, the deadline passed, or the service is shutting down; see Retry-After",
}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "encode": {
        "params": {"repr_layers": [-1], "include": ["mean"]},
        "items": [{"sequence": "MKTFFVLVLLLSGALAAPVA"}],
    },
    "predict": {"items": [{"sequence": "MKTFFV<mask>LVLLLSGALAAPVA"}]},
    "log_prob": {"items": [{"sequence": "MKTFFVLVLLLSGALAAPVA"}]},
}


def _object(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    needed = {} if required == [] else {"required": required or list(properties)}
    return {"type": "object", "additionalProperties": False, "properties": properties} | needed | more


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items} | more


# -- requests --------------------------------------------------------------------------------------------------------


def request_schema(served: ServedModel, action: str) -> Schema:
    """Make the JSON Schema of a request; clients read `properties.items.maxItems` and `throttle_rate`."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{served.slug} {action}"}
    tail = {"examples": [_EXAMPLES[action]], "throttle_rate": THROTTLE_RATE}
    return head | _request(action, served.model.config.num_layers) | tail


def _request(action: str, num_layers: int) -> Schema:
    return _object(
        {
            "params": _object(_params(action, num_layers), required=[]),
            "items": _list(_object({"sequence": _sequence(action)}), minItems=1, maxItems=MAX_ITEMS),
        },
        required=["items"],
    )


def _params(action: str, num_layers: int) -> Schema:
    if action == "predict":
        text = "Logits of all residues, or of the masks only."
        return {"positions": {"type": "string", "enum": list(POSITIONS), "default": "all", "description": text}}
    if action == "log_prob":
        return {}
    # One by one: as JSON Schema has it, an integer may be written 1.0, and a layer may not.
    layers = {"enum": list(range(-(num_layers + 1), num_layers + 1))}
    return {
        "repr_layers": _list(
            layers,
            default=[-1],
            maxItems=MAX_LIST,
            description="Layers of the embeddings: 0 is the embedding, -1 the last layer.",
        ),
        "include": _list(
            {"type": "string", "enum": list(INCLUDE_NAMES)},
            default=["mean"],
            maxItems=MAX_LIST,
            description="Outputs; per_residue is per_token.",
        ),
    }


def _sequence(action: str) -> Schema:
    if action == "predict":
        token = f"(?:[{PREDICT_LETTERS}]|{MASK_TOKEN})"
        return {
            "type": "string",
            "minLength": len(MASK_TOKEN),
            "maxLength": MAX_RESIDUES * len(MASK_TOKEN),
            "pattern": f"^{token}*{MASK_TOKEN}{token}*$",
            "description": f"1 to {MAX_RESIDUES} residues, with at least one {MASK_TOKEN}, which counts as one.",
        }
    return {
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_RESIDUES,
        "pattern": f"^[{ENCODE_LETTERS}]+$",  # the hyphen is the last of the letters
        "description": f"1 to {MAX_RESIDUES} residues: the 20 amino acids, B X Z U O and -, upper case.",
    }


# -- answers ---------------------------------------------------------------------------------------------------------


def _answers() -> dict[str, Schema]:
    vector = _list({"type": "number"})
    matrix = _list(vector)
    vocabulary = _list({"type": "string"}, examples=[list(AMINO_ACIDS)])
    by_layer = _list(_object({"layer": {"type": "integer"}, "embedding": vector}))
    results = {
        "encode": _object(
            {
                "sequence_index": {"type": "integer", "description": "Place of the item in the request."},
                "embeddings": by_layer | {"description": "`mean`: over the residues."},
                "bos_embeddings": by_layer | {"description": "`bos`: of the <cls> token."},
                "per_token_embeddings": _list(
                    _object({"layer": {"type": "integer"}, "embeddings": matrix}),
                    description="`per_token`: one row per residue.",
                ),
                "contacts": matrix | {"description": "L×L contact probabilities."},
                "logits": matrix | {"description": "L×20, columns in the order of `vocab_tokens`."},
                "vocab_tokens": vocabulary,
                "attentions": matrix | {"description": "layers×L: mean over heads and query positions."},
            },
            required=["sequence_index"],
            description="What was not requested is absent.",
        ),
        "predict": _object(
            {
                "logits": matrix | {"description": "One row per residue, or per mask with `positions: masked`."},
                "sequence_tokens": _list({"type": "string"}, description="The residues, <mask> as one token."),
                "vocab_tokens": vocabulary,
            }
        ),
        "log_prob": _object(
            {
                "log_prob": {
                    "type": ["number", "null"],
                    "description": "null for a sequence without any of the 20 amino acids.",
                }
            }
        ),
    }
    return {action: _object({"results": _list(result)}) for action, result in results.items()}


def _error_answer() -> Schema:
    text = {"type": "string"}
    problem = _object({"loc": _list({"type": ["string", "integer"]}), "field": text, "msg": text})
    return _object(
        {
            "detail": text,
            "errors": _list(problem),
            "status_code": {"type": "integer"},
            "code": text | {"examples": ["user.validation"]},
            "error": {
                "type": "object",
                "additionalProperties": _list(text),
                "examples": [{"items__0__sequence": ["the sequence is empty"]}],
            },
        }
    )


# -- OpenAPI ---------------------------------------------------------------------------------------------------------


def openapi_document(catalog: Catalog) -> Schema:
    """Describe the whole API as OpenAPI 3.1."""
    # What every served model has; one with more layers takes more.
    layers = min(served.model.config.num_layers for served in catalog)
    served_actions = [action for action in ACTIONS if any(action in served.actions for served in catalog)]
    schemas = {f"{_title(action)}Request": _request(action, layers) for action in served_actions}
    schemas |= {f"{_title(action)}Answer": schema for action, schema in _answers().items() if action in served_actions}
    paths: Schema = {}
    for action in served_actions:
        slugs = [served.slug for served in catalog if action in served.actions]
        paths[f"/api/v3/{{slug}}/{action}/"] = {"post": _action_operation(action, slugs)}
    action_parameter = _path_parameter("action", list(ACTIONS))
    paths["/api/v3/schema/{slug}/{action}/"] = {
        "get": _get_operation("schema", "JSON Schema of an action's request", _path_parameter("slug", catalog.slugs))
    }
    paths["/api/v3/schema/{slug}/{action}/"]["get"]["parameters"].append(action_parameter)
    paths["/api/v3/models/"] = {"get": _get_operation("models", "The models that are served")}
    paths["/healthz"] = {"get": _get_operation("healthz", "Whether the service is alive", may_be_down=True)}
    paths["/readyz"] = {"get": _get_operation("readyz", "Whether the service takes requests", may_be_down=True)}
    paths["/metrics"] = {"get": _get_operation("metrics", "Counters for Prometheus", media="text/plain")}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "numpyesm",
            "version": __version__,
            "description": "The hosted ESM-2 API on your own machine. Paths work with and without the last slash, and "
            "under /api/v1 as well. Bodies may be gzipped; answers are gzipped when asked, and come as .npz with "
            f"Accept: {NPZ_TYPE}.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas | {"ErrorAnswer": _error_answer()},
            "securitySchemes": {
                "token": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "Token KEY (only if the service has keys)",
                }
            },
        },
    }


def _title(action: str) -> str:
    return action.title().replace("_", "")


def _action_operation(action: str, slugs: list[str]) -> Schema:
    request = {"schema": _reference(f"{_title(action)}Request"), "example": _EXAMPLES[action]}
    answer = {
        JSON_TYPE: {"schema": _reference(f"{_title(action)}Answer")},
        NPZ_TYPE: {"schema": {"type": "string", "contentMediaType": NPZ_TYPE}},
    }
    return {
        "operationId": action,
        "summary": _SUMMARIES[action],
        "parameters": [_path_parameter("slug", slugs)],
        "security": [{"token": []}, {}],
        "requestBody": {"required": True, "content": {JSON_TYPE: request}},
        "responses": {"200": {"description": "Results in the order of the items", "content": answer}}
        | _error_responses(*_ERRORS),
    }


def _get_operation(
    name: str, summary: str, *parameters: Schema, media: str = JSON_TYPE, may_be_down: bool = False
) -> Schema:
    kind = "object" if media == JSON_TYPE else "string"
    return {
        "operationId": name,
        "summary": summary,
        "parameters": list(parameters),
        "responses": {"200": {"description": summary, "content": {media: {"schema": {"type": kind}}}}}
        | _error_responses(403, 404, 405, 500, *([503] if may_be_down else [])),
    }


def _error_responses(*statuses: int) -> Schema:
    content = {JSON_TYPE: {"schema": _reference("ErrorAnswer")}}
    return {str(status): {"description": _ERRORS[status], "content": content} for status in statuses}


def _path_parameter(name: str, values: list[str]) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"enum": values}}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
