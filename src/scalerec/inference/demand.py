"""What is asked for, against what can be answered: whether a queue is a burst that passes or grows without end."""

from __future__ import annotations

from collections import deque
from statistics import median

WHILE = 2.0  # seconds over which is counted
BATCHES = 100  # among the last so many is the best pace: small batches, of a quiet moment, are far from it
# So much more than can be answered is overload: chance alone brings less, and clients who wait for their answers ask
# for no more than is answered.
MARGIN = 1.25


class Demand:
    """Items asked for in the last while, and the pace at which workers answer them; not safe without a lock."""

    def __init__(self, workers: int):
        self.workers = workers
        self._asked: deque[tuple[float, int]] = deque()
        self._items = 0
        self._paces: deque[float] = deque(maxlen=BATCHES)  # seconds an item, of the last batches
        self.pace: float | None = None  # median of the last five, which a slow first or one long pause does not move

    def ask(self, now: float, items: int) -> None:
        """So many were asked for, whether or not they are taken."""
        self._asked.append((now, items))
        self._items += items
        self._forget(now)

    def answer(self, seconds: float, items: int) -> None:
        """A worker has answered a batch."""
        self._paces.append(seconds / items)
        latest = list(self._paces)[-5:]
        self.pace = median(latest) if len(latest) > 2 else None

    def exceeds(self, now: float) -> bool:
        """Whether more was asked for in the last while than workers at their best pace answer in it, by MARGIN."""
        self._forget(now)
        return self.pace is not None and self._items * min(self._paces) > MARGIN * WHILE * self.workers

    def _forget(self, now: float) -> None:
        while self._asked and self._asked[0][0] < now - WHILE:
            self._items -= self._asked.popleft()[1]
