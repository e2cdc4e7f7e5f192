"""The API as JSON Schema and OpenAPI 3.1: the schema of one action's request, and `/openapi.json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .._version import __version__
from ..alphabet import AMINO_ACIDS
from .bodies import JSON_TYPE, NPZ_TYPE
from .catalog import ACTIONS, Catalog, ServedModel
from .errors import STATUSES
from .requests import Schema, body_schema, list_schema, object_schema

# Read by the `biolmai` SDK, which delays requests beyond it. This service has no rate limit (clients that fill the
# queue get a 429), so the figure is higher than anything that it could compute.
THROTTLE_RATE = "1000/second"

_SUMMARIES = {
    "encode": "Embeddings, contacts, logits and attentions of sequences",
    "predict": "Logits of sequences with masks",
    "log_prob": "Log-probability of sequences, from one pass",
    "classify": "Classes of sequences or residues, by a fine-tuned model",
}
_ONE_ITEM = {"items": [{"sequence": "MKTFFVLVLLLSGALAAPVA"}]}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "encode": {"params": {"repr_layers": [-1], "include": ["mean"]}} | _ONE_ITEM,
    "predict": {"items": [{"sequence": "MKTFFV<mask>LVLLLSGALAAPVA"}]},
    "log_prob": _ONE_ITEM,
    "classify": _ONE_ITEM,
}
_TEXT = {"type": "string"}
_INTEGER = {"type": "integer"}


def request_schema(served: ServedModel, action: str) -> Schema:
    """Make the JSON Schema of a request; clients read `properties.items.maxItems` and `throttle_rate`."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{served.slug} {action}"}
    tail = {"examples": [_EXAMPLES[action]], "throttle_rate": THROTTLE_RATE}
    return head | body_schema(action, served.model.config.num_layers, served.model.head is not None) | tail


# -- answers ---------------------------------------------------------------------------------------------------------

_VECTOR = list_schema({"type": "number"})
_MATRIX = list_schema(_VECTOR)
_CLASSES = list_schema({"anyOf": [{"type": "number"}, _VECTOR]})
_LABELS = list_schema(_TEXT, description="What the columns are called.")
_VOCABULARY = list_schema(_TEXT, examples=[list(AMINO_ACIDS)])
_BY_LAYER = list_schema(object_schema({"layer": _INTEGER, "embedding": _VECTOR}))
_PER_TOKEN = list_schema(object_schema({"layer": _INTEGER, "embeddings": _MATRIX}))
_INDEX = _INTEGER | {"description": "Place of the item in the request."}
_RESULTS = {
    "encode": object_schema(
        {
            "sequence_index": _INDEX,
            "embeddings": _BY_LAYER | {"description": "`mean`: over the residues."},
            "bos_embeddings": _BY_LAYER | {"description": "`bos`: of the <cls> token."},
            "per_token_embeddings": _PER_TOKEN | {"description": "`per_token`: one row per residue."},
            "contacts": _MATRIX | {"description": "L×L contact probabilities."},
            "logits": _MATRIX | {"description": "L×20, columns in the order of `vocab_tokens`."},
            "vocab_tokens": _VOCABULARY,
            "attentions": _MATRIX | {"description": "layers×L: mean over heads and query positions."},
            "classes": _CLASSES | {"description": "Probabilities, as of `classify`."},
            "labels": _LABELS,
        },
        required=["sequence_index"],
        description="What was not requested is absent.",
    ),
    "predict": object_schema(
        {
            "logits": _MATRIX | {"description": "One row per residue, or per mask with `positions: masked`."},
            "sequence_tokens": list_schema(_TEXT, description="The residues, <mask> as one token."),
            "vocab_tokens": _VOCABULARY,
        }
    ),
    "classify": object_schema(
        {
            "sequence_index": _INDEX,
            "logits": _CLASSES | {"description": "A number per label, or a row of them per residue."},
            "probabilities": _CLASSES | {"description": "Softmax or sigmoid of them; of a regression, themselves."},
            "labels": _LABELS,
        }
    ),
    "log_prob": object_schema(
        {"log_prob": {"type": ["number", "null"], "description": "null without any of the 20 amino acids."}}
    ),
}
_PROBLEM = object_schema({"loc": list_schema({"type": ["string", "integer"]}), "field": _TEXT, "msg": _TEXT})
_ERROR = object_schema(
    {
        "detail": _TEXT,
        "errors": list_schema(_PROBLEM),
        "status_code": _INTEGER,
        "code": _TEXT | {"examples": ["user.validation"]},
        "error": {
            "type": "object",
            "additionalProperties": list_schema(_TEXT),
            "examples": [{"items__0__sequence": ["the sequence is empty"]}],
        },
    }
)


# -- OpenAPI ---------------------------------------------------------------------------------------------------------


def openapi_document(catalog: Catalog) -> Schema:
    """Describe the whole API as OpenAPI 3.1."""
    layers = min(served.model.config.num_layers for served in catalog)  # what every served model has
    classifies = all(served.model.head is not None for served in catalog)
    slug, action = _path_parameter("slug", catalog.slugs), _path_parameter("action", list(ACTIONS))
    paths: Schema = {}
    schemas: Schema = {"ErrorAnswer": _ERROR}
    for name, result in _RESULTS.items():
        if slugs := [served.slug for served in catalog if name in served.actions]:
            title = name.title().replace("_", "")
            schemas[f"{title}Request"] = body_schema(name, layers, classifies)
            schemas[f"{title}Answer"] = object_schema({"results": list_schema(result)})
            form = {"schema": _reference(f"{title}Request"), "example": _EXAMPLES[name]}
            content = {
                JSON_TYPE: {"schema": _reference(f"{title}Answer")},
                NPZ_TYPE: {"schema": _TEXT | {"contentMediaType": NPZ_TYPE}},
            }
            operation = _operation(name, _SUMMARIES[name], [_path_parameter("slug", slugs)], content, STATUSES)
            operation["security"] = [{"token": []}, {}]
            operation["requestBody"] = {"required": True, "content": {JSON_TYPE: form}}
            paths[f"/api/v3/{{slug}}/{name}/"] = {"post": operation}
    document, reading = {JSON_TYPE: {"schema": {"type": "object"}}}, (403, 404, 405, 500)
    for path, name, summary, parameters, content, errors in (
        ("/api/v3/schema/{slug}/{action}/", "schema", "JSON Schema of a request", [slug, action], document, reading),
        ("/api/v3/models/", "models", "The models that are served", [], document, reading),
        ("/healthz", "healthz", "Whether the service is alive", [], document, (*reading, 503)),
        ("/readyz", "readyz", "Whether the service takes requests", [], document, (*reading, 503)),
        ("/metrics", "metrics", "Counters for Prometheus", [], {"text/plain": {"schema": _TEXT}}, reading),
    ):
        paths[path] = {"get": _operation(name, summary, parameters, content, errors)}
    text = "Token KEY (only if the service has keys)"
    token = {"type": "apiKey", "in": "header", "name": "Authorization", "description": text}
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
        "components": {"schemas": schemas, "securitySchemes": {"token": token}},
    }


def _operation(
    name: str, summary: str, parameters: Sequence[Schema], content: Schema, errors: Iterable[int]
) -> dict[str, Any]:
    error = {JSON_TYPE: {"schema": _reference("ErrorAnswer")}}
    responses = {"200": {"description": summary, "content": content}}
    responses |= {str(status): {"description": STATUSES[status][1], "content": error} for status in errors}
    return {"operationId": name, "summary": summary, "parameters": list(parameters), "responses": responses}


def _path_parameter(name: str, values: list[str]) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"enum": values}}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
