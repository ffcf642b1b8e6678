"""Work that may not take forever: a limit in time, and threads with a limit to how much waits for them."""

from __future__ import annotations

import asyncio
import threading
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
    """A few threads for work that blocks; Refused (503) when too much of it waits already.

    Work that its request has given up keeps its place until its thread has ended it.
    """

    def __init__(self, name: str, *, workers: int, waiting: int):
        self.name, self._places = name, threading.BoundedSemaphore(workers + waiting)
        self._threads = ThreadPoolExecutor(workers, f"scalerec-{name}")

    async def run(self, work: Callable[[], Result]) -> Result:
        if not self._places.acquire(blocking=False):
            raise Refused(503, f"too many {self.name} wait", retry_after=1)
        job = self._threads.submit(work)
        job.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
