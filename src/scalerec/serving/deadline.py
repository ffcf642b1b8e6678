"""Work that may not take forever: a limit in time, and threads with a limit to how much waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from scalerec.serving.requests import Refused

Result = TypeVar("Result")


async def within(seconds: float, work: Awaitable[Result], refused: Refused | None = None) -> Result:
    """The result, or Refused (503, or as said) after so many seconds; without a task of its own for each call."""
    task = asyncio.current_task()
    assert task is not None
    late = False

    def expire() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        return await work
    except asyncio.CancelledError:
        if not late:
            raise
        getattr(task, "uncancel", int)()  # Python 3.11 counts cancellations
        raise refused or Refused(503, "took too long and was given up", retry_after=1) from None
    finally:
        timer.cancel()


class Lane:
    """A few threads for work that blocks; Refused (503) when too much of it waits already."""

    def __init__(self, name: str, *, workers: int, waiting: int):
        self.name, self._most, self._now = name, workers + waiting, 0
        self._threads = ThreadPoolExecutor(workers, f"scalerec-{name}")

    async def run(self, work: Callable[[], Result]) -> Result:
        if self._now >= self._most:
            raise Refused(503, f"too many {self.name} wait", retry_after=1)
        self._now += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(self._done)
        return await future

    def _done(self, _: object) -> None:
        self._now -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
