"""A client of HTTP/1.1 with kept connections, so small that it does not disturb a service on the same machine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from scalerec.errors import InputError
from scalerec.serving.settings import is_loopback

MOST_BYTES = 64 << 20  # of an answer


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: bytes
    fields: Mapping[str, str] = {}  # of the head, names in small letters


class Lost(Exception):
    """The connection ended, or what came was not HTTP with a Content-Length."""


class _Connection(asyncio.Protocol):
    """One request at a time on one connection."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.answer: asyncio.Future[Answer] | None = None
        self.buffer = bytearray()
        self.used = False  # it has answered before
        self.length = self.status = -1
        self.fields: dict[str, str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the service closed the connection")

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.length < 0 and (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            self._head(bytes(self.buffer[:end]))
            del self.buffer[: end + 4]
        if 0 <= self.length <= len(self.buffer) and self.answer is not None:
            answer, self.answer = self.answer, None
            body = bytes(self.buffer[: self.length])
            self.buffer.clear()
            self.length, self.used = -1, True
            if self.fields.get("connection", "").lower() == "close":
                self.transport.close()
            if not answer.done():
                answer.set_result(Answer(self.status, body, self.fields))

    def _head(self, head: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        parts = (line.partition(":") for line in lines[1:])
        self.fields = {name.strip().lower(): value.strip() for name, _, value in parts}
        try:
            self.status, self.length = int(lines[0].split(" ")[1]), int(self.fields["content-length"])
        except (LookupError, ValueError):
            self.length = -1
        if not 0 <= self.length <= MOST_BYTES:
            self._fail("an answer without a Content-Length, or too long")
            self.transport.close()

    def _fail(self, why: str) -> None:
        answer, self.answer = self.answer, None
        if answer is not None and not answer.done():
            answer.set_exception(Lost(why))

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answer


class Client:
    """Requests to one service, as many connections as requests at the same time, at most `connections`."""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, connections: int = 256):
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise InputError(f"{url!r} is not the address of a service: write http://127.0.0.1:8000")
        self.host, self.tls = parts.hostname, parts.scheme == "https"
        self.port = port or (443 if self.tls else 80)
        self.prefix = parts.path.rstrip("/")
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._head = f"Host: {parts.netloc}\r\nAccept: application/json\r\n{more}"
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._room = asyncio.Semaphore(connections)

    @property
    def loopback(self) -> bool:
        """Whether the service is on this machine."""
        return is_loopback(self.host)

    async def get(self, path: str, timeout_s: float = 10.0) -> Answer:
        """The answer; raises Lost, OSError or asyncio.TimeoutError."""
        return await self._send(f"GET {self.prefix}{path} HTTP/1.1\r\n{self._head}\r\n".encode(), timeout_s)

    async def post(self, path: str, body: bytes, timeout_s: float = 10.0) -> Answer:
        """The answer to a JSON body; raises as `get`."""
        head = f"POST {self.prefix}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
        return await self._send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, timeout_s)

    async def _send(self, request: bytes, timeout_s: float) -> Answer:
        async with self._room:
            return await asyncio.wait_for(self._try(request), timeout_s)

    async def _try(self, request: bytes) -> Answer:
        while True:
            connection = await self._connection()
            try:
                answer = await connection.ask(request)
            except Lost:
                self._drop(connection)
                if connection.used:  # it had been idle for too long: not this request's fault
                    continue
                raise
            except BaseException:  # given up: what still comes belongs to no later request
                self._drop(connection)
                raise
            self._idle.append(connection)
            return answer

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
            self._open.discard(connection)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self.host, self.port, ssl=self.tls or None)
        self._open.add(connection)
        return connection

    def _drop(self, connection: _Connection) -> None:
        connection.transport.abort()
        self._open.discard(connection)

    def close(self) -> None:
        """End all connections."""
        for connection in self._open:
            connection.transport.abort()
        self._open.clear()
        self._idle.clear()
