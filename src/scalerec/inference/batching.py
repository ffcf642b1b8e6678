"""Requests that arrive together are scored together: asyncio in front, worker threads behind.

A free worker starts a lone request at once. While it is busy, requests gather; and when it is free again directly after
a batch of several, it waits for as many as that one had, at most `max_wait_ms` after the oldest of them came.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from scalerec.errors import InputError
from scalerec.inference.demand import Demand

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


class Overloaded(Exception):
    """Refused: as many requests wait as may, or the service is closing."""


class TooLate(Exception):
    """Refused: the deadline passed before the request's turn came."""


@dataclass(eq=False)
class _Waiting(Generic[Ask]):
    """A request with the place where its answer goes."""

    ask: Ask
    size: int
    deadline: float | None
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[Ask, Answer]):
    """Calls `work` with requests of many clients at once; each gets its own answer, or its own error, exactly once.

    Args:
        work: answers in the order of the requests, called in a worker thread. An exception in an answer's place is
            raised to that client alone; when the call itself fails, its requests are tried one by one.
        max_wait_ms: the longest that a request waits for others, unless all workers are busy.
        max_items: `work` gets at most so many items at once, and everybody in a batch waits for all of it; a larger
            request goes alone.
        size: items of a request, its candidates for one.
        max_queue: so many requests may wait; the next one is refused.
        overload_ms: while more is asked for than can be answered (`demand`), a request for which others would make it
            wait longer than this, and longer than it takes itself, is refused at once.
        workers: threads that call `work`.
    """

    def __init__(
        self,
        work: Callable[[list[Ask]], list[Answer]],
        *,
        max_wait_ms: float = 2.0,
        max_items: int = 256,
        size: Callable[[Ask], int] = lambda ask: 1,
        max_queue: int = 256,
        overload_ms: float = 25.0,
        workers: int = 1,
    ):
        if min(max_wait_ms, overload_ms) < 0 or min(max_items, max_queue, workers) < 1:
            raise InputError(
                "Batcher: max_wait_ms and overload_ms must not be negative; max_items, max_queue, workers at least 1"
            )
        self._work, self._size = work, size
        self._max_wait, self._max_items, self._max_queue = max_wait_ms / 1e3, max_items, max_queue
        self._overload = overload_ms / 1e3
        self._queue: deque[_Waiting] = deque()
        self._items = 0  # of the queue
        self._running: set[_Waiting] = set()
        self._closed = False
        self._last_count, self._last_end = 1, 0.0  # requests of the last batch, and when it was done
        self._began: dict[int, tuple[float, int]] = {}  # thread -> when its batch began, its items
        self._demand = Demand(workers)
        self._wanted = 1  # so many requests end the worker's wait
        self._turn = threading.Lock()  # one worker at a time looks for a batch
        self._changed = threading.Condition()
        names = [f"scalerec-batch-{number}" for number in range(workers)]
        self._threads = [threading.Thread(target=self._serve, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    async def submit(self, ask: Ask, *, deadline: float | None = None) -> Answer:
        """The answer to one request.

        Args:
            deadline: of `time.monotonic()`; the request is dropped when its turn has not come by then, and refused at
                once when, by the pace of the last batches, those before it take longer.

        Raises:
            Overloaded: too many wait, or for too long, or the batcher is closed.
            TooLate: the deadline came first.
            Exception: whatever `work` raised for this request.
        """
        loop = asyncio.get_running_loop()
        one = _Waiting(ask, max(self._size(ask), 1), deadline, loop, loop.create_future())
        with self._changed:
            self.admit(one.size, deadline)
            self._demand.ask(one.since, one.size)
            self._queue.append(one)
            self._items += one.size
            if len(self._queue) == 1 or self._enough():
                self._changed.notify()
        timer = None if deadline is None else loop.call_later(deadline - one.since, self._expire, one)
        try:
            return await one.answer
        finally:
            if timer is not None:
                timer.cancel()
            if one.answer.cancelled():  # the client has gone, and frees its place
                self._leave(one)

    def admit(self, items: int, deadline: float | None = None) -> None:
        """Raise as `submit` would now, before anything is spent on a request of so many items."""
        now = time.monotonic()
        if deadline is not None and deadline <= now:
            raise TooLate("the deadline had passed when the request came")
        with self._changed:
            if self._closed:
                raise Overloaded("closing: no new requests")
            full = len(self._queue) >= self._max_queue
            if full or (self._queue and self._too_long(items, deadline, now)):
                self._demand.ask(now, items)
                raise Overloaded(
                    f"{len(self._queue)} requests wait, {'no more' if full else 'longer than this one'} may"
                )

    def depth(self) -> int:
        """Requests that wait, without those being worked on."""
        return len(self._queue)

    def close(self, grace_s: float = 10.0) -> None:
        """Take no new requests, finish those taken within `grace_s` seconds, refuse the rest; blocks until then."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        end = time.monotonic() + grace_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(end - time.monotonic(), 0.0))
        with self._changed:
            rest = [*self._queue, *self._running]
            self._queue.clear()
            self._items = 0
            self._changed.notify_all()
        _deliver([(one, Overloaded("closed before its answer was ready")) for one in rest])

    # -- the waiting ones

    def _leave(self, one: _Waiting) -> bool:
        """Take a request out of the queue; False when its turn had come."""
        with self._changed:
            try:
                self._queue.remove(one)
            except ValueError:
                return False
            self._items -= one.size
            self._changed.notify()
            return True

    def _expire(self, one: _Waiting) -> None:
        if self._leave(one) and not one.answer.done():
            one.answer.set_exception(_late(one))

    def _ahead(self, now: float) -> float:
        """Seconds, as far as one can tell, until all that is there has begun."""
        pace = self._demand.pace
        if pace is None:
            return 0.0
        left = sum(max(items * pace - (now - began), 0.0) for began, items in self._began.values())
        return (left + self._items * pace) / len(self._threads)

    def _too_long(self, items: int, deadline: float | None, now: float) -> bool:
        """Whether a request of so many items that comes now would wait longer than it may."""
        ahead = self._ahead(now)
        if deadline is not None and now + ahead > deadline:
            return True
        return ahead > max(self._overload, items * (self._demand.pace or 0.0)) and self._demand.exceeds(now)

    def _enough(self) -> bool:
        return len(self._queue) >= self._wanted or self._items >= self._max_items

    # -- worker threads

    def _serve(self) -> None:
        while (batch := self._take()) is not None:
            late = [one for one in batch if one.deadline is not None and one.deadline <= time.monotonic()]
            now = [one for one in batch if one not in late and not one.answer.cancelled()]
            _deliver([(one, _late(one)) for one in late])
            answers = self._answers(now) if now else []
            with self._changed:
                self._running.difference_update(batch)
                began, items = self._began.pop(threading.get_ident())
                self._last_count, self._last_end = len(batch), time.monotonic()
                if len(now) == len(batch):
                    self._demand.answer(self._last_end - began, items)
            _deliver(list(zip(now, answers)))

    def _take(self) -> list[_Waiting] | None:
        """The next requests, oldest first; None when closed and nothing is left."""
        with self._turn, self._changed:
            while not self._queue or not self._gathered():
                if self._closed and not self._queue:
                    return None
                self._changed.wait(self._patience())
            batch = [self._queue.popleft()]
            items = batch[0].size
            while self._queue and items + self._queue[0].size <= self._max_items:
                batch.append(self._queue.popleft())
                items += batch[-1].size
            self._items -= items
            self._running.update(batch)
            self._began[threading.get_ident()] = time.monotonic(), items
            return batch

    def _gathered(self) -> bool:
        """Whether to start: nobody else is expected, or they have come, or the oldest has waited long enough."""
        recent = bool(self._running) or time.monotonic() - self._last_end < self._max_wait
        self._wanted = self._last_count if recent else 1
        return self._enough() or self._closed or self._patience() == 0

    def _patience(self) -> float | None:
        """Seconds that the oldest request may still wait for others; None without one."""
        if not self._queue:
            return None
        return max(self._queue[0].since + self._max_wait - time.monotonic(), 0.0)

    def _answers(self, batch: list[_Waiting]) -> list[Answer | BaseException]:
        try:
            answers = self._work([one.ask for one in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to {len(batch)} requests")
            return list(answers)
        except BaseException as error:  # a worker that died would leave its clients waiting
            if len(batch) == 1:
                return [error]
        return [answer for one in batch for answer in self._answers([one])]


def _late(one: _Waiting) -> TooLate:
    return TooLate(f"waited {1e3 * (time.monotonic() - one.since):.0f} ms, and the deadline passed")


def _deliver(answers: list[tuple[_Waiting, object]]) -> None:
    """Hand answers to the loops of their clients, one call for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Waiting, object]]] = defaultdict(list)
    for one, answer in answers:
        by_loop[one.loop].append((one, answer))
    for loop, its in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, its)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            pass


def _resolve(answers: list[tuple[_Waiting, object]]) -> None:
    for one, answer in answers:
        if one.answer.done():  # cancelled, or refused when closing
            continue
        if isinstance(answer, Exception) and not isinstance(answer, StopIteration):
            one.answer.set_exception(answer)
        elif isinstance(answer, BaseException):  # what a future does not carry, or would end the loop
            error = RuntimeError(f"{type(answer).__name__} while answering")
            error.__cause__ = answer
            one.answer.set_exception(error)
        else:
            one.answer.set_result(answer)
