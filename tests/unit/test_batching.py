"""Requests scored together: who is batched with whom, limits, deadlines, failures, and one answer for each."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalerec.errors import InputError
from scalerec.inference import demand
from scalerec.inference.batching import Batcher, Overloaded, TooLate


class Work:
    """Twice the number; waits while the gate is closed, fails on negative numbers, and remembers the batches."""

    def __init__(self, seconds: float = 0.0, closed: bool = False):
        self.batches: list[list[int]] = []
        self.seconds, self.gate, self.entered = seconds, threading.Event(), threading.Semaphore(0)
        if not closed:
            self.gate.set()

    def __call__(self, asks: list[int]) -> list[int]:
        self.batches.append(list(asks))
        self.entered.release()
        self.gate.wait(10)
        time.sleep(self.seconds)
        if min(asks) < 0:
            raise ValueError(f"negative: {min(asks)}")
        return [2 * ask for ask in asks]


async def busy(work: Work, batcher: Batcher) -> asyncio.Task:
    """A first request that keeps the only worker until the gate opens."""
    first = asyncio.create_task(batcher.submit(1))
    await asyncio.to_thread(work.entered.acquire, timeout=10)
    return first


async def queued(batcher: Batcher, number: int) -> None:
    while batcher.depth() < number:
        await asyncio.sleep(0.001)


def test_requests_gather_while_the_worker_is_busy_and_each_gets_its_own_answer():
    async def story() -> None:
        work = Work(closed=True)
        batcher = Batcher(work)
        first = await busy(work, batcher)
        others = [asyncio.create_task(batcher.submit(ask)) for ask in range(2, 12)]
        await queued(batcher, 10)
        work.gate.set()
        assert await asyncio.gather(first, *others) == [2 * ask for ask in range(1, 12)]
        assert work.batches == [[1], list(range(2, 12))]
        batcher.close()

    asyncio.run(story())


def test_a_lone_request_starts_at_once_and_an_expected_one_is_waited_for():
    async def story() -> None:
        work = Work(closed=True)
        batcher = Batcher(work, max_wait_ms=2_000)
        for ask in range(3):  # one after another: nobody else is expected
            start = time.monotonic()
            task = asyncio.create_task(batcher.submit(ask))
            work.gate.set()
            await task
            assert time.monotonic() - start < 1
        work.gate.clear()
        while work.entered.acquire(blocking=False):
            pass
        first = await busy(work, batcher)
        pair = [asyncio.create_task(batcher.submit(ask)) for ask in (5, 6)]
        await queued(batcher, 2)
        work.gate.set()
        await asyncio.gather(first, *pair)
        early = asyncio.create_task(batcher.submit(7))  # directly after a batch of two
        await asyncio.sleep(0.05)
        assert not early.done()
        assert await asyncio.gather(early, batcher.submit(8)) == [14, 16]
        assert work.batches[-1] == [7, 8]
        batcher.close()

    asyncio.run(story())


def test_nobody_waits_longer_than_the_limit_for_others():
    async def story() -> None:
        work = Work(closed=True)
        batcher = Batcher(work, max_wait_ms=50)
        first = await busy(work, batcher)
        pair = [asyncio.create_task(batcher.submit(ask)) for ask in (5, 6)]
        await queued(batcher, 2)
        work.gate.set()
        await asyncio.gather(first, *pair)
        start = time.monotonic()
        assert await batcher.submit(7) == 14
        assert time.monotonic() - start < 5
        batcher.close()

    asyncio.run(story())


def test_a_batch_holds_at_most_so_many_items_and_a_larger_request_goes_alone():
    async def story() -> None:
        work = Work(closed=True)
        batcher = Batcher(work, max_items=10, size=lambda ask: ask)
        first = await busy(work, batcher)
        others = [asyncio.create_task(batcher.submit(ask)) for ask in (4, 6, 1, 25, 3, 3, 3, 2)]
        await queued(batcher, 8)
        work.gate.set()
        await asyncio.gather(first, *others)
        assert work.batches == [[1], [4, 6], [1], [25], [3, 3, 3], [2]]
        batcher.close()

    asyncio.run(story())


def test_a_full_queue_refuses_and_has_room_again_after_a_cancellation():
    async def story() -> None:
        work = Work(closed=True)
        batcher = Batcher(work, max_queue=2)
        first = await busy(work, batcher)
        two = [asyncio.create_task(batcher.submit(ask)) for ask in (2, 3)]
        await queued(batcher, 2)
        with pytest.raises(Overloaded, match="2 requests wait"):
            await batcher.submit(4)
        two[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await two[0]
        assert batcher.depth() == 1
        last = asyncio.create_task(batcher.submit(5))
        await queued(batcher, 2)
        work.gate.set()
        assert await asyncio.gather(first, two[1], last) == [2, 6, 10]
        assert [2] not in work.batches and work.batches == [[1], [3, 5]]
        batcher.close()

    asyncio.run(story())


def test_a_client_that_leaves_while_its_batch_runs_disturbs_nobody():
    async def story() -> None:
        work = Work(closed=True)
        batcher = Batcher(work)
        first = await busy(work, batcher)
        pair = [asyncio.create_task(batcher.submit(ask)) for ask in (2, 3)]
        await queued(batcher, 2)
        first.cancel()
        work.gate.set()
        assert await asyncio.gather(*pair) == [4, 6]
        batcher.close()

    asyncio.run(story())


def test_a_deadline_refuses_in_time_even_while_the_worker_is_stuck():
    async def story() -> None:
        work = Work(closed=True)
        batcher = Batcher(work)
        first = await busy(work, batcher)
        start = time.monotonic()
        with pytest.raises(TooLate, match="deadline"):
            await batcher.submit(2, deadline=start + 0.05)
        assert 0.04 < time.monotonic() - start < 5 and batcher.depth() == 0
        with pytest.raises(TooLate):
            await batcher.submit(2, deadline=time.monotonic() - 1)
        work.gate.set()
        assert await first == 2 and work.batches == [[1]]
        assert await batcher.submit(3, deadline=time.monotonic() + 30) == 6
        batcher.close()

    asyncio.run(story())


def test_who_would_not_have_his_turn_in_time_is_refused_at_once():
    async def story() -> None:
        work = Work(seconds=0.1)
        batcher = Batcher(work, max_items=1)
        for ask in range(3):  # 0.1 s an item, as it learns
            await batcher.submit(ask)
        crowd = [asyncio.create_task(batcher.submit(ask)) for ask in range(10)]
        await asyncio.sleep(0.02)
        start = time.monotonic()
        with pytest.raises(Overloaded, match="longer than this one may"):
            await batcher.submit(11, deadline=start + 0.3)
        assert time.monotonic() - start < 0.09
        assert await batcher.submit(12, deadline=start + 30) == 24
        await asyncio.gather(*crowd)
        assert await batcher.submit(13, deadline=time.monotonic() + 0.01) == 26  # nobody before it: never refused
        batcher.close()

    asyncio.run(story())


def test_a_burst_waits_and_under_overload_those_who_are_taken_wait_little(monkeypatch):
    monkeypatch.setattr(demand, "WHILE", 0.5)

    async def story() -> None:
        work = Work(seconds=0.02)
        batcher = Batcher(work, max_items=1, overload_ms=50)
        for ask in range(3):  # 0.02 s an item, as it learns
            await batcher.submit(ask)
        burst = [asyncio.create_task(batcher.submit(ask)) for ask in range(20)]  # 0.4 s of work
        await asyncio.sleep(0.02)
        batcher.admit(1, time.monotonic() + 30)
        await asyncio.gather(*burst)

        outcomes: Counter[str] = Counter()
        waits: list[float] = []

        async def client(ask: int) -> None:
            start = time.monotonic()
            try:
                await batcher.submit(ask)
            except Overloaded:
                outcomes["refused"] += 1
            else:
                outcomes["answered"] += 1
                waits.append(time.monotonic() - start)

        tasks = []
        for ask in range(240):  # three times what can be answered
            tasks.append(asyncio.create_task(client(ask)))
            await asyncio.sleep(0.02 / 3)
        await asyncio.gather(*tasks)
        assert outcomes["refused"] > 100 and outcomes["answered"] > 50
        assert max(waits[-20:]) < 0.25, waits  # of which 0.05 in the queue, once it is known
        await asyncio.sleep(0.5)
        assert await asyncio.gather(*(batcher.submit(ask) for ask in range(10))) == [2 * ask for ask in range(10)]
        batcher.close()

    asyncio.run(story())


def test_a_slow_model_near_its_limit_and_clients_that_wait_are_no_overload():
    async def story() -> None:
        batcher = Batcher(Work(seconds=0.03), max_items=1, overload_ms=25)

        async def client(number: int) -> None:
            for _ in range(10):
                await batcher.submit(number)

        await asyncio.gather(*(client(number) for number in range(5)))  # four are always ahead of one: 0.12 s
        batcher.close()

    asyncio.run(story())


def test_what_is_asked_for_against_the_best_pace(monkeypatch):
    monkeypatch.setattr(demand, "WHILE", 2.0)
    one = demand.Demand(workers=2)
    for seconds in (0.3, 0.1):
        one.answer(seconds, 10)
    one.ask(0.0, 10_000)
    assert not one.exceeds(1.0), "two batches say little"
    one.answer(0.2, 10)
    assert one.pace == 0.02 and one.exceeds(1.0) and not one.exceeds(2.1)  # 0.01 s an item at best
    for number in range(500):  # 2 workers answer 400 in two seconds, a quarter more is the limit
        one.ask(3.0, 1)
        assert not one.exceeds(4.0), number
    one.ask(3.5, 1)
    assert one.exceeds(4.9) and not one.exceeds(5.1)


def test_one_failing_request_fails_alone():
    async def story() -> None:
        work = Work(closed=True)
        batcher = Batcher(work)
        first = await busy(work, batcher)
        others = [asyncio.create_task(batcher.submit(ask)) for ask in (2, -3, 4)]
        await queued(batcher, 3)
        work.gate.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        assert found[:2] == [2, 4] and found[3] == 8
        assert isinstance(found[2], ValueError) and str(found[2]) == "negative: -3"
        assert work.batches == [[1], [2, -3, 4], [2], [-3], [4]]
        assert await batcher.submit(9) == 18  # the worker lives
        batcher.close()

    asyncio.run(story())


@pytest.mark.parametrize("raised", [StopIteration(), SystemExit(1)])
def test_whatever_work_raises_reaches_the_client(raised: BaseException):
    def work(asks: list[int]) -> list[int]:
        raise raised

    async def story() -> None:
        batcher = Batcher(work)
        with pytest.raises(RuntimeError, match="while answering"):
            await batcher.submit(1)
        batcher.close()

    asyncio.run(story())


def test_answers_may_be_errors_of_single_requests_and_a_wrong_number_is_an_error():
    async def story() -> None:
        batcher = Batcher(lambda asks: [KeyError("no") if ask == 2 else ask for ask in asks])
        found = await asyncio.gather(*(batcher.submit(ask) for ask in (1, 2, 3)), return_exceptions=True)
        assert found[0] == 1 and isinstance(found[1], KeyError) and found[2] == 3
        batcher.close()
        batcher = Batcher(lambda asks: [])
        with pytest.raises(RuntimeError, match="0 answers to 1"):
            await batcher.submit(1)
        batcher.close()

    asyncio.run(story())


def test_closing_finishes_what_waits_and_refuses_what_comes():
    async def story() -> None:
        work = Work(seconds=0.01)
        batcher = Batcher(work, max_items=1)
        tasks = [asyncio.create_task(batcher.submit(ask)) for ask in range(10)]
        await asyncio.sleep(0)
        await asyncio.to_thread(batcher.close)
        assert await asyncio.gather(*tasks) == [2 * ask for ask in range(10)]
        with pytest.raises(Overloaded, match="closing"):
            await batcher.submit(1)
        batcher.close()

    asyncio.run(story())


def test_closing_with_a_stuck_worker_answers_everybody_when_the_grace_is_over():
    async def story() -> None:
        work = Work(closed=True)
        batcher = Batcher(work)
        first = await busy(work, batcher)
        other = asyncio.create_task(batcher.submit(2))
        await queued(batcher, 1)
        await asyncio.to_thread(batcher.close, 0.05)
        for task in (first, other):
            with pytest.raises(Overloaded, match="closed before"):
                await task
        work.gate.set()  # its late answer is dropped
        await asyncio.sleep(0.05)

    asyncio.run(story())


def test_clients_of_several_event_loops_share_batches():
    work = Work(closed=True)
    batcher = Batcher(work)
    found: dict[int, int] = {}

    def client(ask: int) -> None:
        found[ask] = asyncio.run(batcher.submit(ask))

    threads = [threading.Thread(target=client, args=(ask,)) for ask in range(1, 6)]
    for thread in threads:
        thread.start()
    while batcher.depth() + sum(map(len, work.batches)) < 5:
        time.sleep(0.001)
    work.gate.set()
    for thread in threads:
        thread.join(10)
    assert found == {ask: 2 * ask for ask in range(1, 6)} and len(work.batches) < 5
    batcher.close()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(-3, 20),  # the request; a negative one fails
            st.sampled_from([None, None, 0.0005, 0.003, 10.0]),  # seconds to its deadline
            st.sampled_from([None, None, None, 0.0, 0.001, 0.004]),  # seconds until its client leaves
            st.sampled_from([0.0, 0.0, 0.001]),  # seconds until the next one comes
        ),
        max_size=40,
    ),
    st.integers(1, 3),
    st.integers(1, 8),
    st.booleans(),
)
def test_every_request_gets_exactly_one_answer_or_error(requests, workers, max_queue, close_early):
    async def client(batcher: Batcher, ask: int, deadline: float | None) -> str:
        try:
            limit = None if deadline is None else time.monotonic() + deadline
            assert await batcher.submit(ask, deadline=limit) == 2 * ask
            return "answer"
        except ValueError:
            return "ValueError" if ask < 0 else "wrong"
        except (Overloaded, TooLate, asyncio.CancelledError) as error:
            return type(error).__name__

    async def story() -> Counter:
        work = Work(seconds=0.001)
        batcher = Batcher(work, max_wait_ms=1, max_items=30, size=abs, max_queue=max_queue, workers=workers)
        tasks = []
        for ask, deadline, leaves, pause in requests:
            tasks.append(asyncio.create_task(client(batcher, ask, deadline)))
            if leaves is not None:
                asyncio.get_running_loop().call_later(leaves, tasks[-1].cancel)
            await asyncio.sleep(pause)
        if close_early:
            await asyncio.to_thread(batcher.close, 0.002)
        done, pending = await asyncio.wait(tasks, timeout=20) if tasks else (set(), set())
        assert not pending
        assert batcher.depth() == 0 and batcher._items == 0
        batcher.close()
        assert not batcher._running
        # A client may be cancelled before its first step.
        return Counter("CancelledError" if task.cancelled() else task.result() for task in done)

    outcomes = asyncio.run(story())
    assert sum(outcomes.values()) == len(requests) and not outcomes["wrong"]


@pytest.mark.parametrize("name", ["max_wait_ms", "overload_ms", "max_items", "max_queue", "workers"])
def test_limits_must_make_sense(name: str):
    wrong: dict[str, Any] = {name: -1}
    with pytest.raises(InputError, match="Batcher"):
        Batcher(lambda asks: asks, **wrong)
