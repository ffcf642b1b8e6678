"""What every request passes before it reaches a route: where it comes from, whose key, how many, how long.

Host and Origin     a page of another site must not talk to a service on this machine (DNS rebinding, forms)
key                 where there are keys: 401 without one, 403 where it may not do that
rate                a token bucket a key: 429
in flight           so many at once and no more: 503
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from scalerec.serving import logs
from scalerec.serving.keys import Key, Keys
from scalerec.serving.requests import Refused
from scalerec.serving.service import Service
from scalerec.serving.settings import is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

EXACT = frozenset(
    ("/v1/rank", "/v1/recommend", "/v1/events", "/v1/explain", "/v1/users", "/v1/models", "/healthz", "/readyz")
    + ("/metrics", "/openapi.json", "/")
)
BEGINNINGS = {"/v1/users/": "/v1/users/{user}", "/v1/items/": "/v1/items/{id}", "/page/": "/page/{file}"}
ACTIVATE = "/v1/models/{name}/activate"
HEALTH = frozenset(("/healthz", "/readyz"))
WITHOUT_KEY = HEALTH | {"/", "/page/{file}"}
ADMIN = frozenset(("/v1/users", "/v1/users/{user}", ACTIVATE))
PEOPLE = frozenset(("/", "/page/{file}", "/v1/users", "/v1/users/{user}"))


def route_of(path: str) -> str:
    """The template of a path, a label that does not grow with ids."""
    if path in EXACT:
        return path
    for beginning, template in BEGINNINGS.items():
        if path.startswith(beginning):
            return template
    return ACTIVATE if path.startswith("/v1/models/") and path.endswith("/activate") else "other"


class Gate:
    """ASGI middleware; also counts and times, and turns what is refused or breaks into JSON."""

    def __init__(self, app: Any, service: Service, keys: Keys | None):
        self.app, self.service, self.keys = app, service, keys
        settings = service.settings
        self._names = None if settings.exposed and not settings.names else frozenset(settings.names)
        self._people, self._rate = settings.shows_people, settings.limits.rate
        self._most = settings.limits.in_flight
        self._tokens: dict[str, tuple[float, float]] = {}  # key -> tokens left, when that was
        self._failing = logs.Once("requests")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        route, status = route_of(scope["path"]), 500
        began = False

        async def out(message: MutableMapping[str, Any]) -> None:
            nonlocal status, began
            if message["type"] == "http.response.start":
                status, began = message["status"], True
            await send(message)

        self.service.in_flight += 1
        try:
            await self._let_in(scope, route)
            await self.app(scope, receive, out)
            self._failing.worked()
        except Refused as refused:
            await answer_refused(refused, out)
        except Exception as error:
            self._failing.failed(error)
            if began:
                raise
            await answer_refused(Refused(500, "the service failed; its log says where"), out)
        finally:
            self.service.in_flight -= 1
            self.service.metrics.answered(route, status, time.perf_counter() - started)

    async def _let_in(self, scope: Scope, route: str) -> None:
        """Refused unless the request may go on."""
        if route in HEALTH:
            return
        host = origin = authorization = own = None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"authorization":
                authorization = value
            elif name == b"x-api-key":
                own = value
        self._check_host(host, origin)
        if route in PEOPLE and not self._people:
            raise Refused(404, "not here: the service was started without --page")
        if self.service.in_flight > self._most:
            raise Refused(503, "too many requests at once", retry_after=1)
        if self.keys is not None and route not in WITHOUT_KEY:
            key = await self._key(own, authorization)
            if route in ADMIN and key.role != "admin":
                raise Refused(403, "this key may not do that: make one with `scalerec key add NAME FILE --admin`")
            self._spend(key)
        if route == "other":  # the router's patterns take more than this table: a path that ends in a line break
            raise Refused(404, "no such path")

    def _check_host(self, host: bytes | None, origin: bytes | None) -> None:
        """A browser says in Host which name it took this machine for, and in Origin whose page asks."""
        if self._names is not None:
            name = _name(host or b"")
            if name not in self._names and not is_loopback(name):
                raise Refused(421, "this service is not at that host: name it with --name", "Host")
        if origin is not None and origin.partition(b"://")[2] != host:
            raise Refused(403, "pages of other sites may not ask this service", "Origin")

    async def _key(self, own: bytes | None, authorization: bytes | None) -> Key:
        assert self.keys is not None
        given = own
        if given is None and authorization is not None:
            kind, _, value = authorization.partition(b" ")
            given = value.strip() if kind.lower() == b"bearer" else None
        if given is None:
            raise Refused(401, "give a key: `X-API-Key: KEY` or `Authorization: Bearer KEY`")
        text = given.decode("latin-1")
        found = self.keys.known(text) or await asyncio.to_thread(self.keys.check, text)
        if found is None:
            raise Refused(401, "not a key of this service, or too many wrong ones")
        return found

    def _spend(self, key: Key) -> None:
        """One token of the key's bucket, which holds a second's worth."""
        if not self._rate:
            return
        now = time.monotonic()
        most = max(self._rate, 1.0)
        left, when = self._tokens.get(key.id, (most, now))
        left = min(left + (now - when) * self._rate, most)
        if left < 1:
            self._tokens[key.id] = (left, now)
            raise Refused(429, f"more than {self._rate:g} requests a second", retry_after=(1 - left) / self._rate)
        self._tokens[key.id] = (left - 1, now)


async def answer_refused(refused: Refused, send: Send) -> None:
    """Say why, as JSON, with the field that has to change."""
    body = orjson.dumps(refusal(refused))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in refusal_headers(refused).items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def refusal(refused: Refused) -> dict[str, str]:
    message = f"{refused.field}: {refused.message}" if refused.field else refused.message
    # A field may be named by the request, and half a surrogate pair has no UTF-8.
    return {
        name: text.encode(errors="replace").decode() for name, text in (("error", message), ("field", refused.field))
    }


def refusal_headers(refused: Refused) -> dict[str, str]:
    headers = {"cache-control": "no-store"}
    if refused.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(refused.retry_after)))
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refused.status in (408, 413):
        headers["connection"] = "close"
    return headers


def _name(host: bytes) -> str:
    """The name or address of a Host header, without the port."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if ":" in text else text
