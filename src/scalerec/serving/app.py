"""The routes: read a request, call the service, write the answer."""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import StringConstraints
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from scalerec.errors import InputError
from scalerec.inference.batching import Overloaded, TooLate
from scalerec.serving import answers, keys, requests
from scalerec.serving.deadline import within
from scalerec.serving.document import describe, document
from scalerec.serving.events import identity
from scalerec.serving.gate import Gate, refusal, refusal_headers
from scalerec.serving.metrics import CONTENT_TYPE
from scalerec.serving.models import Models, Served, open_bundle
from scalerec.serving.refusals import refused_by
from scalerec.serving.requests import Refused, path, read
from scalerec.serving.service import Service
from scalerec.serving.settings import Limits, Settings
from scalerec.serving.states import States, is_folder, place
from scalerec.serving.store import StoreUnavailable
from scalerec.serving.tables import UserTable

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
NO_STORE = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
Prefix = Annotated[str, StringConstraints(max_length=requests.ID)]


def open_service(settings: Settings) -> Service:
    """Everything that a service needs, loaded and verified; InputError where it cannot start."""
    loading = partial(open_bundle, settings=settings)
    served = [loading(folder) for folder in settings.bundles]
    files = [settings.users] if settings.users is not None else _beside(settings.state, served)
    users = [UserTable.load(file, served[0].engine.schema.user) for file in files]
    return Service(settings, Models(served, settings), States(settings.state), users, loading)


def _beside(states: Sequence[str], served: Sequence[Served]) -> list[Path]:
    """The rows of users that `scalerec export --state` left with the histories."""
    folders: list[Path] = []
    for state in states:
        if is_folder(state):
            folders += [place(state, identity(one.engine.schema)) for one in served]
        elif state.startswith("lmdb:"):
            folders.append(Path(state.removeprefix("lmdb:")))
    return [file for file in dict.fromkeys(folder / "users.parquet" for folder in folders) if file.is_file()]


def create_app(settings: Settings, service: Service | None = None) -> FastAPI:
    """The service as an ASGI application; `service` where it is there already."""
    held = service or open_service(settings)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await held.start()
        yield
        await held.stop()

    app = FastAPI(title="scalerec", version="1", lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = held
    app.openapi = partial(document, app)  # type: ignore[method-assign]
    _scores(app, held)
    _shorter(app, "/v1/rank", "/v1/recommend", "/v1/events")
    _facts(app, held)
    _life(app, held)
    if settings.shows_people:
        _page(app)
    for kind in (Refused, Overloaded, TooLate, StoreUnavailable, InputError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _refuse)
    known = keys.Keys(settings.keys) if settings.keys is not None else None
    app.add_middleware(Gate, service=held, keys=known)
    return app


def _scores(app: FastAPI, service: Service) -> None:
    limits = service.settings.limits

    @app.post("/v1/rank", **describe(requests.RankRequest, answers.Ranked))
    async def rank(request: Request) -> Response:
        """Scores of candidates for one user, best first."""
        return _json(await service.rank(read(requests.RankRequest, await body(request, limits))))

    @app.post("/v1/recommend", **describe(requests.RecommendRequest, answers.Recommended))
    async def recommend(request: Request) -> Response:
        """The best of all items for one user: retrieved, filtered, ranked."""
        return _json(await service.recommend(read(requests.RecommendRequest, await body(request, limits))))

    @app.post("/v1/explain", **describe(requests.ExplainRequest, answers.Explained))
    async def explain(request: Request) -> Response:
        """What carried the scores: what each loses without one token of the model."""
        return _json(await service.explain(read(requests.ExplainRequest, await body(request, limits))))

    @app.post("/v1/events", **describe(requests.EventsRequest, answers.Appended))
    async def events(request: Request) -> Response:
        """What users did, appended to their histories, each event once; all of them or none."""
        return _json(await service.events(read(requests.EventsRequest, await body(request, limits))))


def _shorter(app: FastAPI, *paths: str) -> None:
    """Let plain Starlette routes go before FastAPI's, which stay for the document: nothing is left to inject here."""
    for route in list(app.router.routes):
        if isinstance(route, APIRoute) and route.path in paths:
            app.router.routes.insert(0, Route(route.path, route.endpoint, methods=["POST"]))


def _facts(app: FastAPI, service: Service) -> None:
    limits = service.settings.limits

    if service.settings.shows_people:

        @app.get("/v1/users", **describe(None, answers.Users))
        async def users(prefix: Prefix = "", limit: Annotated[int, Query(ge=1, le=1_000)] = 20) -> Response:
            """Users whose id begins with a text."""
            return _json(await service.find_users(prefix, limit))

        @app.get("/v1/users/{user:path}", **describe(None, answers.User, 404))
        async def user(user: Prefix) -> Response:
            """What is known of a user: columns and history."""
            return _json(await service.user(user))

    @app.get("/v1/items/{id:path}", **describe(None, answers.ItemRow, 404))
    async def item(id: Prefix, model: Prefix | None = None) -> Response:
        """The columns of an item, of the first bundle or of that of `model`."""
        return _json(service.item(id, model))

    @app.get("/v1/models", **describe(None, answers.Models))
    async def models() -> Response:
        """The loaded bundles, and the share of users of each."""
        return _json(service.list_models())

    @app.post("/v1/models/{name}/activate", **describe(requests.ActivateRequest, answers.Activated, 404, 409))
    async def activate(name: Prefix, request: Request) -> Response:
        """Load a bundle, verify it, and let it take over the name; no request is dropped."""
        return _json(await service.activate(name, read(requests.ActivateRequest, await body(request, limits) or b"{}")))


def _life(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", **describe(None, answers.Health))
    async def healthz() -> Response:
        """Alive."""
        return _json({"status": "ok"})

    @app.get("/readyz", **describe(None, answers.Ready, 503))
    async def readyz() -> Response:
        """Whether requests should come here: a model is loaded, the store is well, no shutdown has begun."""
        found = service.ready()
        return _json(found, 200 if found["ready"] else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE, **NO_STORE})


def _page(app: FastAPI) -> None:
    """The page's files, read once."""
    files = {
        file.name: (file.read_bytes(), mimetypes.guess_type(file.name)[0] or "application/octet-stream")
        for file in sorted(PAGE.glob("*"))
        if file.suffix in (".html", ".css", ".js", ".svg", ".png", ".woff2")
    }

    def answer(name: str) -> Response:
        if name not in files:
            raise Refused(404, "no such file")
        content, kind = files[name]
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return answer("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str) -> Response:
        return answer(name)


async def body(request: Request, limits: Limits) -> bytes:
    """The body, counted while it comes.

    Raises:
        Refused: 408 too slow, 413 too long, 415 not said to be JSON (which a form of another site could send).
    """
    kind = request.headers.get("content-type", "")
    length = request.headers.get("content-length", "")
    if kind.partition(";")[0].strip().lower() != "application/json" and length != "0":
        raise Refused(415, "must be application/json", "Content-Type")
    slow = Refused(408, f"the body did not come within {limits.body_seconds:g} seconds", "body")
    return await within(limits.body_seconds, _whole(request, limits), slow)


async def _whole(request: Request, limits: Limits) -> bytes:
    """All of a body; what is too long is read to its end but not kept, so that the client hears why."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "ended before it was whole", "body")
        more, size = message.get("more_body", False), size + len(message.get("body", b""))
        if size <= limits.body_bytes:
            parts.append(message.get("body", b""))
        elif size > 16 * limits.body_bytes:
            break
    if size > limits.body_bytes:
        raise Refused(413, f"at most {limits.body_bytes:,} bytes", "body")
    return b"".join(parts)


def _json(answer: Any, status: int = 200) -> Response:
    content = orjson.dumps(answer, default=_plain)
    return Response(content, status, headers=NO_STORE, media_type="application/json")


def _plain(value: Any) -> float | str:
    """Decimals as numbers, which is how requests bring them; anything else that JSON has no word for as text."""
    return float(value) if isinstance(value, Decimal) else str(value)


async def _refuse(request: Request, error: Exception) -> Response:
    """Why a request was not answered, in one form whoever refused it."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        refused = Refused(422, first["msg"][:300], path(first["loc"][1:]))
    elif isinstance(error, HTTPException):
        refused = Refused(error.status_code, str(error.detail))
    else:
        refused = refused_by(error)
    response = _json(refusal(refused), refused.status)
    for name, value in refusal_headers(refused).items():
        response.headers[name] = value
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response
