"""The API's description (/openapi.json), where FastAPI cannot see for itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from hrm_text.infer.server.responses import ErrorBody
from hrm_text.infer.server.schemas import Asked, ChatRequest, CompletionRequest
from hrm_text.infer.server.service import Service

_SCHEMAS = "#/components/schemas/"


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that a route may answer with."""
    return {status: {"model": ErrorBody} for status in statuses}


def asks(model: type[Asked]) -> dict[str, Any]:
    """Options of a route that reads such a body: it does so itself, within limits, so FastAPI does not know."""
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": _SCHEMAS + model.__name__}}}}
    streamed = {"description": "The answer, or with stream: true its chunks", "content": {"text/event-stream": {}}}
    return {
        "openapi_extra": {"requestBody": body},
        "responses": {200: streamed} | errors_of(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
    }


def describe_bodies(app: FastAPI, service: Service) -> None:
    """Put in what ``asks`` refers to, and that keys are needed where they are."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            _, schema = models_json_schema(
                [(CompletionRequest, "validation"), (ChatRequest, "validation")], ref_template=_SCHEMAS + "{model}"
            )
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(schema["$defs"])
            if service.keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, operations in document["paths"].items():
                    if path == "/metrics" or path.startswith("/v1"):
                        for operation in operations.values():
                            operation["security"] = [{"key": []}]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
