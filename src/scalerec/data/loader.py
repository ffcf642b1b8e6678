"""Rows -> training batches: shuffled within a window, the same for the same seed, resumed at an exact batch."""

from __future__ import annotations

import atexit
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import closing
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from scalerec.batch import Batch
from scalerec.data.reader import ParquetRows, Piece
from scalerec.data.split import Part
from scalerec.features.encoder import Encoder
from scalerec.features.layout import Layout
from scalerec.features.sharing import share
from scalerec.hardware import single_threads

S = TypeVar("S")
T = TypeVar("T")
Transform = Callable[[Batch, Layout, np.random.Generator], Batch]


class Position(NamedTuple):
    """Where the next batch begins: the piece at which its window starts, and a row of that shuffled window."""

    piece: int = 0
    row: int = 0


BEGINNING = Position()
WORKERS = 4  # threads that encode: more would wait for Parquet, and hold more pieces

Cut = tuple[list[tuple[Batch, Tensor]], Position]  # rows of windows that make a batch, and where it ends


class Loader:
    """Batches of one part.

    A window is as many pieces as it takes to hold `window_rows`; an epoch is the windows' shuffled rows one after the
    other, cut into batches of `batch_size` (the last one smaller). With several processes each takes every
    `world`-th row of every batch, so that together they see what one process would.
    """

    def __init__(
        self, rows: ParquetRows, encoder: Encoder, part: Part, batch_size: int, *, seed: int | None = None,
        window_rows: int = 131_072, rank: int = 0, world: int = 1, transforms: Sequence[Transform] = (),
    ):  # fmt: skip
        self.rows, self.encoder, self.batch_size = rows, encoder, batch_size
        self.part: Part = part
        self.seed = seed  # None: the order of the files
        self.window_rows = window_rows if seed is not None else 1  # nothing to shuffle: no window to hold
        self.rank, self.world = rank, world
        self.transforms = transforms  # of every batch, drawn anew each time and the same for the same seed
        columns = [*encoder.schema.input_columns(), *encoder.schema.label_columns()]
        self.columns = list(dict.fromkeys(columns))
        self.counts: Counter[str] = Counter()  # what was unknown, repaired or cut, over all epochs

    def epoch(self, epoch: int = 0, start: Position = BEGINNING) -> Iterator[tuple[Batch, Position]]:
        """Batches from `start` on, each with the position after it."""
        return ahead(self._batches(epoch, start, min(torch.get_num_threads(), WORKERS)), 4)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _ in self.epoch())

    def _batches(self, epoch: int, start: Position, threads: int) -> Generator[tuple[Batch, Position], None, None]:
        # All of torch's work is done in this pool: another thread would share it out among threads of its own, and with
        # more of them than cores OpenMP lets all, those of the training too, sleep between operations.
        with single_threads(threads) as pool, closing(self._cuts(epoch, start, pool, threads)) as cuts:
            yield from in_order(pool, threads, partial(self._batch, epoch), cuts)

    def _cuts(self, epoch: int, start: Position, pool: Executor, threads: int) -> Generator[Cut, None, None]:
        """Which rows of which windows the next batch holds."""
        cut: list[tuple[Batch, Tensor]] = []
        held, row = 0, start.row
        here = start
        with closing(ahead(self._windows(epoch, start.piece, pool, threads), 1)) as windows:
            for piece, window, order in windows:
                while row < len(order):
                    take = min(self.batch_size - held, len(order) - row)
                    cut.append((window, order[row : row + take]))
                    held, row = held + take, row + take
                    here = Position(piece, row)
                    if held == self.batch_size:
                        yield cut, here
                        cut, held = [], 0
                row = 0
        if held:
            yield cut, here

    def _batch(self, epoch: int, cut: Cut) -> tuple[Batch, Position]:
        parts, end = cut
        batch = Batch.cat([window.take(index) for window, index in parts])
        if self.world > 1:
            batch = batch.take(torch.arange(len(batch))[self.rank :: self.world])
        for number, transform in enumerate(self.transforms):
            rng = np.random.default_rng([self.seed or 0, epoch, *end, self.rank, number])
            batch = transform(batch, self.encoder.layout, rng)
        return batch, end

    def _windows(
        self, epoch: int, start: int, pool: Executor, threads: int
    ) -> Generator[tuple[int, Batch, Tensor], None, None]:
        """(first piece, rows, the order in which to take them) of each window."""
        order = None
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows.row_groups)).tolist()
        parts: list[Batch] = []
        first = start
        with closing(ahead(self.rows.pieces(self.part, self.columns, order, start, dictionaries=True), 2)) as pieces:
            filled = (piece for piece in pieces if piece.rows.num_rows)
            for number, batch, counts in in_order(pool, threads, self._encoded, filled):
                self.counts += counts
                if not parts:
                    first = number
                parts.append(batch)
                del batch  # in `parts` alone, which are let go before their window is handed out
                if sum(map(len, parts)) >= self.window_rows:
                    yield first, *pool.submit(self._window, parts, epoch, first).result()
        if parts:
            yield first, *pool.submit(self._window, parts, epoch, first).result()

    def _encoded(self, piece: Piece) -> tuple[int, Batch, Counter[str]]:
        counts, where = Counter[str](), str(piece.group.file)
        first = piece.group.file_first
        batch = self.encoder.encode(piece.rows, index=piece.index, where=where, first=first, counts=counts)
        return piece.number, batch, counts

    def _window(self, parts: list[Batch], epoch: int, first: int) -> tuple[Batch, Tensor]:
        """The rows of `parts`, which is emptied (or they would lie in memory beside their window), and their order."""
        window = share(Batch.cat(parts)) if len(parts) > 1 else parts[0]
        parts.clear()
        if self.seed is None:
            return window, torch.arange(len(window))
        order = np.random.default_rng([self.seed, epoch, first]).permutation(len(window))
        return window, torch.from_numpy(order)


def in_order(pool: Executor, threads: int, work: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
    """work(item) of each item in their order, `threads` of them and one more in the pool's hands.

    An error of `items` comes after what was good.
    """
    waiting: deque[Future[T]] = deque()
    failure: Exception | None = None
    while failure is None:
        try:
            waiting.append(pool.submit(work, next(items)))
        except StopIteration:
            break
        except Exception as error:
            failure = error
        if len(waiting) > threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # or its traceback would keep this frame, and with it whatever made the items


def ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """The same items, made by a thread that stays up to `depth` of them ahead; its errors are raised here.

    When the consumer stops early, or Python ends, the thread is waited for: at work during the end it would abort it.
    """
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Semaphore(depth)  # taken before an item is made: one that waits for a place is held in memory too
    stop = threading.Event()
    done = object()

    def work() -> None:
        try:
            with closing(items):
                while room.acquire() and not stop.is_set():
                    item = next(items, done)
                    if item is done:
                        return
                    ready.put((item, None))
        except BaseException as error:
            ready.put((done, error))
        finally:
            ready.put((done, None))  # whoever still waits: when Python ends, the innermost of several ends first

    worker = threading.Thread(target=work, daemon=True)

    def end() -> None:
        stop.set()
        room.release()
        worker.join()

    atexit.register(end)
    worker.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is done:
                return
            room.release()
            yield item
    finally:
        end()
        atexit.unregister(end)
