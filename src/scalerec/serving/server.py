"""uvicorn with a port that is bound first, and a shutdown that tells the load balancer before it closes the door."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from scalerec.errors import InputError
from scalerec.serving import logs
from scalerec.serving.service import Service


class Server(uvicorn.Server):
    """On SIGTERM /readyz says 503 while requests are still taken, then the port closes and those in flight finish."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self.sockets: list[socket.socket] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def bound(self) -> Iterator[str]:
        """The port, taken; gives the URL. InputError where it cannot be had."""
        host = self.config.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        door = socket.socket(family, socket.SOCK_STREAM)
        try:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                door.bind((host, self.config.port))
                door.listen(self.config.backlog)  # who reads the URL may connect at once
            except (OSError, UnicodeError) as error:
                raise InputError(f"--host {host} --port {self.config.port}: {error}") from None
            self.sockets = [door]
            yield f"http://{f'[{host}]' if ':' in host else host}:{door.getsockname()[1]}"
        finally:
            door.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining or sig == signal.SIGINT or self._loop is None:
            self.should_exit = True
            return
        self.service.draining = True
        logs.say("draining", seconds=self.service.settings.drain_seconds)
        self._loop.call_soon_threadsafe(self._loop.call_later, self.service.settings.drain_seconds, self._leave)

    def _leave(self) -> None:
        self.should_exit = True
