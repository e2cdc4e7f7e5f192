"""The API as JSON Schema and OpenAPI 3.1: the schema of one action's request, and `/openapi.json`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .._version import __version__
from ..alphabet import AMINO_ACIDS
from .catalog import ACTIONS, Catalog, ServedModel
from .media import JSON_TYPE, NPZ_TYPE
from .requests import Schema, body_schema, object_schema

# Read by the `biolmai` SDK, which holds back requests beyond it. This service sets no rate: whoever fills the queue is
# answered 429. The figure is above anything that it could compute.
THROTTLE_RATE = "1000/second"

_SUMMARIES = {
    "encode": "Embeddings, contacts, logits and attentions of sequences",
    "predict": "Logits of sequences with masks",
    "log_prob": "Log-probability of sequences, from one pass",
    "classify": "Classes of sequences or residues, by a fine-tuned model",
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
    "classify": {"items": [{"sequence": "MKTFFVLVLLLSGALAAPVA"}]},
}
_TEXT = {"type": "string"}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items} | more


def request_schema(served: ServedModel, action: str) -> Schema:
    """Make the JSON Schema of a request; clients read `properties.items.maxItems` and `throttle_rate`."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{served.slug} {action}"}
    tail = {"examples": [_EXAMPLES[action]], "throttle_rate": THROTTLE_RATE}
    return head | body_schema(action, served.model.config.num_layers, served.model.head is not None) | tail


# -- answers ---------------------------------------------------------------------------------------------------------


def _answers() -> dict[str, Schema]:
    vector = _list({"type": "number"})
    matrix = _list(vector)
    vocabulary = _list(_TEXT, examples=[list(AMINO_ACIDS)])
    classes = _list({"anyOf": [{"type": "number"}, vector]})
    labels = _list(_TEXT, description="What the columns are called.")
    by_layer = _list(object_schema({"layer": {"type": "integer"}, "embedding": vector}))
    results = {
        "encode": object_schema(
            {
                "sequence_index": {"type": "integer", "description": "Place of the item in the request."},
                "embeddings": by_layer | {"description": "`mean`: over the residues."},
                "bos_embeddings": by_layer | {"description": "`bos`: of the <cls> token."},
                "per_token_embeddings": _list(
                    object_schema({"layer": {"type": "integer"}, "embeddings": matrix}),
                    description="`per_token`: one row per residue.",
                ),
                "contacts": matrix | {"description": "L×L contact probabilities."},
                "logits": matrix | {"description": "L×20, columns in the order of `vocab_tokens`."},
                "vocab_tokens": vocabulary,
                "attentions": matrix | {"description": "layers×L: mean over heads and query positions."},
                "classes": classes | {"description": "Probabilities, as of `classify`."},
                "labels": labels,
            },
            required=["sequence_index"],
            description="What was not requested is absent.",
        ),
        "predict": object_schema(
            {
                "logits": matrix | {"description": "One row per residue, or per mask with `positions: masked`."},
                "sequence_tokens": _list(_TEXT, description="The residues, <mask> as one token."),
                "vocab_tokens": vocabulary,
            }
        ),
        "classify": object_schema(
            {
                "sequence_index": {"type": "integer", "description": "Place of the item in the request."},
                "logits": classes | {"description": "A number per label, or a row of them per residue."},
                "probabilities": classes | {"description": "Softmax or sigmoid of them; of a regression, themselves."},
                "labels": labels,
            }
        ),
        "log_prob": object_schema(
            {
                "log_prob": {
                    "type": ["number", "null"],
                    "description": "null for a sequence without any of the 20 amino acids.",
                }
            }
        ),
    }
    return {action: object_schema({"results": _list(result)}) for action, result in results.items()}


def _error_answer() -> Schema:
    problem = object_schema({"loc": _list({"type": ["string", "integer"]}), "field": _TEXT, "msg": _TEXT})
    return object_schema(
        {
            "detail": _TEXT,
            "errors": _list(problem),
            "status_code": {"type": "integer"},
            "code": _TEXT | {"examples": ["user.validation"]},
            "error": {
                "type": "object",
                "additionalProperties": _list(_TEXT),
                "examples": [{"items__0__sequence": ["the sequence is empty"]}],
            },
        }
    )


# -- OpenAPI ---------------------------------------------------------------------------------------------------------


def openapi_document(catalog: Catalog) -> Schema:
    """Describe the whole API as OpenAPI 3.1."""
    layers = min(served.model.config.num_layers for served in catalog)  # what every served model has
    slug, action = _path_parameter("slug", catalog.slugs), _path_parameter("action", list(ACTIONS))
    classifies = all(served.model.head is not None for served in catalog)
    paths: Schema = {}
    schemas: Schema = {"ErrorAnswer": _error_answer()}
    for name, answer in _answers().items():
        if slugs := [served.slug for served in catalog if name in served.actions]:
            title = name.title().replace("_", "")
            schemas |= {f"{title}Request": body_schema(name, layers, classifies), f"{title}Answer": answer}
            paths[f"/api/v3/{{slug}}/{name}/"] = {"post": _action_operation(name, title, slugs)}
    for path, name, summary, parameters in (
        ("/api/v3/schema/{slug}/{action}/", "schema", "JSON Schema of an action's request", [slug, action]),
        ("/api/v3/models/", "models", "The models that are served", []),
        ("/healthz", "healthz", "Whether the service is alive", []),
        ("/readyz", "readyz", "Whether the service takes requests", []),
        ("/metrics", "metrics", "Counters for Prometheus", []),
    ):
        paths[path] = {"get": _get_operation(name, summary, parameters)}
    key = "Token KEY (only if the service has keys)"
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
            "schemas": schemas,
            "securitySchemes": {
                "token": {"type": "apiKey", "in": "header", "name": "Authorization", "description": key}
            },
        },
    }


def _action_operation(action: str, title: str, slugs: list[str]) -> Schema:
    answer = {
        JSON_TYPE: {"schema": _reference(f"{title}Answer")},
        NPZ_TYPE: {"schema": {"type": "string", "contentMediaType": NPZ_TYPE}},
    }
    request = {"schema": _reference(f"{title}Request"), "example": _EXAMPLES[action]}
    return {
        "operationId": action,
        "summary": _SUMMARIES[action],
        "parameters": [_path_parameter("slug", slugs)],
        "security": [{"token": []}, {}],
        "requestBody": {"required": True, "content": {JSON_TYPE: request}},
        "responses": _responses("Results in the order of the items", answer, _ERRORS),
    }


def _get_operation(name: str, summary: str, parameters: list[Schema]) -> Schema:
    content = {"text/plain": {"schema": _TEXT}} if name == "metrics" else {JSON_TYPE: {"schema": {"type": "object"}}}
    errors = (403, 404, 405, 500, *([503] if name in ("healthz", "readyz") else []))
    return {
        "operationId": name,
        "summary": summary,
        "parameters": parameters,
        "responses": _responses(summary, content, errors),
    }


def _responses(description: str, content: Schema, errors: Iterable[int]) -> Schema:
    error = {JSON_TYPE: {"schema": _reference("ErrorAnswer")}}
    good = {"200": {"description": description, "content": content}}
    return good | {str(status): {"description": _ERRORS[status], "content": error} for status in errors}


def _path_parameter(name: str, values: list[str]) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"enum": values}}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
