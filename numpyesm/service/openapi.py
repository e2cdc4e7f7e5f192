"""The machine-readable description: `/openapi.json`, and the JSON Schema of one action."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .._version import __version__
from .catalog import Catalog, ServedModel
from .negotiation import NPZ_TYPE
from .schemas import ANSWERS, MAX_ITEMS, REQUESTS, ErrorAnswer

_REFERENCE = "#/components/schemas/{model}"
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


def action_schema(served: ServedModel, action: str) -> dict[str, Any]:
    """JSON Schema of the request; clients read `properties.items.maxItems`."""
    schema = REQUESTS[action].model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"{served.slug} {action}"
    schema["examples"] = [_EXAMPLES[action]]
    last = served.model.config.num_layers
    if action == "encode":
        layers = schema["$defs"]["EncodeParams"]["properties"]["repr_layers"]["items"]
        layers |= _layers(last)
    assert schema["properties"]["items"]["maxItems"] == MAX_ITEMS
    return schema


def openapi_document(catalog: Catalog) -> dict[str, Any]:
    """The whole API as OpenAPI 3.1."""
    models: list[type[BaseModel]] = [*REQUESTS.values(), *ANSWERS.values(), ErrorAnswer]
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCE)
    schemas = definitions["$defs"]
    layers = [served.model.config.num_layers for served in catalog]
    # What every served model has; one with more layers takes more.
    schemas["EncodeParams"]["properties"]["repr_layers"]["items"] |= _layers(min(layers))
    errors = {status: _error(text) for status, text in _ERRORS.items()}
    paths: dict[str, Any] = {}
    for action in REQUESTS:
        slugs = [served.slug for served in catalog if action in served.actions]
        if not slugs:
            continue
        paths[f"/api/v3/{{slug}}/{action}/"] = {
            "post": {
                "operationId": action,
                "summary": _SUMMARIES[action],
                "parameters": [_slug(slugs)],
                "security": [{"token": []}, {}],
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {
                            "schema": {"$ref": _REFERENCE.format(model=REQUESTS[action].__name__)},
                            "example": _EXAMPLES[action],
                        }
                    },
                },
                "responses": {
                    "200": {
                        "description": "Results in the order of the items",
                        "content": {
                            "application/json": {"schema": {"$ref": _REFERENCE.format(model=ANSWERS[action].__name__)}},
                            NPZ_TYPE: {
                                "schema": {"type": "string", "contentMediaType": NPZ_TYPE},
                            },
                        },
                    },
                    **{str(status): error for status, error in errors.items()},
                },
            }
        }
    get_errors = {str(status): errors[status] for status in (403, 404, 405, 500)}
    paths["/api/v3/schema/{slug}/{action}/"] = {
        "get": {
            "operationId": "schema",
            "summary": "JSON Schema of an action's request",
            "parameters": [
                _slug(catalog.slugs),
                {"name": "action", "in": "path", "required": True, "schema": {"enum": list(REQUESTS)}},
            ],
            "responses": {"200": _json_answer("A JSON Schema"), **get_errors},
        }
    }
    for path, summary, failures in (
        ("/api/v3/models/", "The models that are served", get_errors),
        ("/healthz", "Whether the service is alive", get_errors | {"503": errors[503]}),
        ("/readyz", "Whether the service takes requests", get_errors | {"503": errors[503]}),
    ):
        paths[path] = {
            "get": {
                "operationId": path.strip("/").split("/")[-1],
                "summary": summary,
                "responses": {"200": _json_answer(summary), **failures},
            }
        }
    paths["/metrics"] = {
        "get": {
            "operationId": "metrics",
            "summary": "Counters for Prometheus",
            "responses": {
                "200": {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}},
                **get_errors,
            },
        }
    }
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
                "token": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "Token KEY (only if the service has keys)",
                }
            },
        },
    }


def _layers(last: int) -> dict[str, Any]:
    """One by one: by its type alone, an integer may be written 1.0 in JSON Schema, and here it may not."""
    return {"enum": list(range(-(last + 1), last + 1))}


def _slug(slugs: list[str]) -> dict[str, Any]:
    return {"name": "slug", "in": "path", "required": True, "schema": {"enum": slugs}}


def _error(text: str) -> dict[str, Any]:
    return {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="ErrorAnswer")}}},
    }


def _json_answer(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
