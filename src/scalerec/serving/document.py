"""The OpenAPI document: routes read their bodies themselves, so what they take and give is written into it here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from scalerec.serving import answers, requests

REFERENCE = "#/components/schemas/{model}"
SAYS = {
    400: "not JSON",
    401: "no key, or a wrong one",
    403: "the key may not do that, or a page of another site asks",
    404: "unknown",
    408: "the body came too slowly",
    409: "another activation is under way",
    413: "the body is too long",
    415: "not application/json",
    421: "not a host of this service",
    422: "a field is wrong: `field` names it",
    429: "too many requests a second for this key",
    503: "too busy or not ready: `Retry-After` says when to try again",
}
WITH_BODY = (400, 401, 403, 408, 413, 415, 421, 422, 429, 503)
WITHOUT_BODY = (401, 403, 421, 422, 429, 503)
READ = (
    requests.RankRequest,
    requests.RecommendRequest,
    requests.ExplainRequest,
    requests.EventsRequest,
    requests.ActivateRequest,
)


def describe(takes: type[BaseModel] | None, gives: type[BaseModel], *also: int) -> dict[str, Any]:
    """What a route's decorator needs so that the document says what it takes and gives."""
    statuses = sorted({*(WITH_BODY if takes else WITHOUT_BODY), *also})
    found: dict[str, Any] = {
        "response_model": None,
        "responses": {200: {"model": gives}}
        | {status: {"model": answers.Refusal, "description": SAYS[status]} for status in statuses},
    }
    if gives is answers.Ready:
        found["responses"][503] = {"model": gives, "description": "not ready"}
    if takes is not None:
        schema = {"$ref": REFERENCE.format(model=takes.__name__)}
        required = takes is not requests.ActivateRequest
        content = {"application/json": {"schema": schema}}
        found["openapi_extra"] = {"requestBody": {"required": required, "content": content}}
    return found


def document(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema([(model, "validation") for model in READ], ref_template=REFERENCE)
        components = found.setdefault("components", {})
        components["schemas"] = {**definitions["$defs"], **components.get("schemas", {})}
        components["securitySchemes"] = {
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "bearer": {"type": "http", "scheme": "bearer"},
        }
        found["security"] = [{"key": []}, {"bearer": []}, {}]
        app.openapi_schema = found
    return app.openapi_schema
