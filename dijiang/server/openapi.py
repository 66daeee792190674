"""/openapi.json: the routes, and the table that checks their requests."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..version import __version__
from .failures import TYPES
from .fields import CHAT, COMPLETION, OBJECT, TEXT, TOKENIZE, Shape, options

#: Statuses of any request -> when; the others are in docs/serve.md.
REFUSALS = {
    "400": "A field is wrong.",
    "401": "No key, or a wrong one.",
    "403": "Another site asks.",
    "404": "No such model.",
    "405": "Another method.",
    "408": "Too slow.",
    "413": "Too many bytes.",
    "415": "A compressed body.",
    "429": "Slots and queue are full.",
    "503": "A step failed, or the chat template is busy.",
}
ERROR: Shape = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": TEXT,
                "type": {"enum": sorted({"invalid_request_error", *TYPES.values()})},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
JSON, EVENTS, PLAIN = "application/json", "text/event-stream", "text/plain"


def document(models: Collection[str]) -> dict[str, Any]:
    """OpenAPI 3.1 of a server of these models."""
    names = {"model": {"enum": sorted(models)}}
    sampling = options()
    bodies = {
        "/v1/completions": (COMPLETION | sampling, ("model", "prompt"), (JSON, EVENTS)),
        "/v1/chat/completions": (CHAT | sampling, ("model", "messages"), (JSON, EVENTS)),
        "/tokenize": (TOKENIZE, ("model", "prompt"), (JSON,)),
    }
    asked = {
        path: {"post": {"requestBody": _body(table | names, needed), "responses": _responses(kinds)}}
        for path, (table, needed, kinds) in bodies.items()
    }
    name = {"name": "name", "in": "path", "required": True, "schema": names["model"]}
    told: dict[str, Any] = {
        path: {"get": {"responses": _responses((JSON,))}}
        for path in ("/v1/models", "/healthz", "/readyz", "/health")
    }
    told["/v1/models/{name}"] = {"get": {"parameters": [name], "responses": _responses((JSON,))}}
    told["/metrics"] = {"get": {"responses": _responses((PLAIN,))}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "dijiang serve", "version": __version__},
        "security": [{"key": []}, {}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": ERROR},
        },
        "paths": asked | told,
    }


def _body(table: dict[str, Shape], needed: tuple[str, ...]) -> dict[str, Any]:
    fields = {name: shape if name in needed else _or_null(shape) for name, shape in table.items()}
    return {
        "required": True,
        "content": {JSON: {"schema": OBJECT | {"required": list(needed), "properties": fields}}},
    }


def _or_null(shape: Shape) -> Shape:
    return {"anyOf": [shape, {"type": "null"}]}


def _responses(kinds: tuple[str, ...]) -> dict[str, Any]:
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    good = {"200": {"description": "The answer.", "content": {kind: {} for kind in kinds}}}
    return good | {status: {"description": when, "content": refused} for status, when in REFUSALS.items()}
