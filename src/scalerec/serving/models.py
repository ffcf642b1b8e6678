"""The models of a service: loaded bundles by name, users dealt to them by weight, and one taken for another in flight.

A request holds the model it began with until it is answered. A new bundle is loaded and verified beside the old one,
takes its name in one step, and the old one is closed when its last request is done: none is dropped.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from scalerec.errors import InputError
from scalerec.inference.batching import Batcher
from scalerec.inference.bundle import Bundle, load
from scalerec.inference.engine import Ask, Engine, Ranked
from scalerec.inference.retrieval import Found, Popular, Retriever
from scalerec.serving import logs
from scalerec.serving.columns import Columns
from scalerec.serving.requests import Refused
from scalerec.serving.settings import Settings

BUCKETS = 10_000


class Search(NamedTuple):
    """What a retrieval is asked for."""

    ask: Ask
    count: int
    seen: Sequence[Any]
    allow: Sequence[Any] | None
    deny: Sequence[Any]


@dataclass
class Served:
    """One bundle at work."""

    bundle: Bundle
    engine: Engine
    popular: Popular
    retriever: Retriever | None
    columns: Columns
    ranking: Batcher[Ask, Ranked]
    searching: Batcher[Search, Found] | None
    in_flight: int = 0
    places: Mapping[Any, int] = field(default_factory=dict)  # of the items it knows

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def ranks(self) -> bool:
        return bool(self.bundle.model.ranks)

    @contextmanager
    def held(self) -> Iterator[Served]:
        """Keeps it open; on the event loop only."""
        self.in_flight += 1
        try:
            yield self
        finally:
            self.in_flight -= 1

    @cached_property
    def _asked(self) -> tuple[str, ...]:
        """The input columns that neither the items nor the histories bring."""
        engine = self.engine
        known = {engine.schema.user, *engine.catalogue.columns}
        known |= {name for sequence in engine.schema.sequences for name in sequence.list_columns()}
        return tuple(name for name in engine.schema.input_columns() if name not in known)

    def defaults(self, ask: Ask) -> list[str]:
        """Input columns that nobody gave, found without walking through the schema."""
        missing = [name for name in self._asked if name not in ask.columns]
        if ask.now is not None and self.engine.schema.time in missing:
            missing.remove(self.engine.schema.time)
        if ask.own:
            own = set.intersection(*map(set, ask.own))
            missing = [name for name in missing if name not in own]
        return missing

    def depth(self) -> int:
        return self.ranking.depth() + (self.searching.depth() if self.searching else 0)

    def admit(self, candidates: int, deadline: float) -> None:
        """Overloaded, before anything is read for a request that could not be ranked in time."""
        if self.ranks:
            self.ranking.admit(candidates, deadline)

    def close(self) -> None:
        """Finish what waits; blocks."""
        self.ranking.close()
        if self.searching is not None:
            self.searching.close()


def open_bundle(folder: Path, settings: Settings) -> Served:
    """A verified bundle with all it needs to serve; InputError names what is wrong with it."""
    bundle = load(folder, settings.precision)
    engine = Engine(bundle, cache_bytes=settings.cache_bytes)
    item = bundle.encoder.schema.item
    assert item is not None  # the engine's catalogue saw to it
    popular = Popular(bundle.items, item)
    retriever = None
    if bundle.vectors is not None and bundle.model.retrieves:
        retriever = Retriever(bundle, settings.index, popular=popular)
    return serve(bundle, engine, popular, retriever, settings)


def serve(bundle: Bundle, engine: Engine, popular: Popular, retriever: Retriever | None, settings: Settings) -> Served:
    """Queues before the engine and the retriever, worked through in threads of their own."""
    wait, queue = settings.batch_wait_ms, settings.limits.queue
    ranking: Batcher[Ask, Ranked] = Batcher(
        engine.rank, max_wait_ms=wait, max_items=settings.batch_rows, size=lambda ask: len(ask.candidates),
        max_queue=queue, overload_ms=settings.limits.overload_ms,
    )  # fmt: skip
    searching = None
    if retriever is not None:
        searching = Batcher(
            _search(engine, retriever), max_wait_ms=wait, max_items=64, max_queue=queue,
            overload_ms=settings.limits.overload_ms,
        )  # fmt: skip
    columns = Columns(bundle.encoder, bundle.items, bundle.manifest.types)
    return Served(bundle, engine, popular, retriever, columns, ranking, searching, places=engine.catalogue.place)


def _search(engine: Engine, retriever: Retriever) -> Callable[[list[Search]], list[Found]]:
    """Queries of all requests in one pass; those with the same filters are searched together."""

    def work(searches: list[Search]) -> list[Found]:
        queries = engine.queries([search.ask for search in searches])
        if all(search.allow is None and not search.deny for search in searches):
            count = max(search.count for search in searches)
            found = retriever.search(queries, count, exclude=[search.seen for search in searches])
            for its, search in zip(found, searches):
                del its[search.count :]
            return list(found)
        return [
            retriever.search(
                queries[i : i + 1], search.count, exclude=[search.seen], allow=search.allow, deny=search.deny
            )[0]
            for i, search in enumerate(searches)
        ]

    return work


class Models:
    """Models by name, and the share of users that each gets."""

    def __init__(self, served: Sequence[Served], settings: Settings):
        self.by_name: dict[str, Served] = {}
        for one in served:
            if one.name in self.by_name:
                raise InputError(
                    f"{one.bundle.folder}: a second bundle named {one.name!r}: give it another name with "
                    "`scalerec export RUN --out BUNDLE --name NAME`"
                )
            self.by_name[one.name] = one
        self.salt = settings.salt
        self.first = served[0].name
        self.weights = self._weights(settings.weights)
        self._roots = {one.bundle.folder.resolve().parent for one in served}
        self._changing = asyncio.Lock()
        self._closing: set[asyncio.Task] = set()

    def _weights(self, given: Mapping[str, float]) -> dict[str, float]:
        unknown = next((name for name in given if name not in self.by_name), None)
        if unknown is not None:
            raise InputError(f"--weights {unknown}: no such model; there is {', '.join(self.by_name)}")
        total = sum(given.values())
        if given and total <= 0:
            raise InputError("--weights: at least one must be above 0")
        ranking = [name for name, one in self.by_name.items() if one.ranks] or [self.first]
        return {name: given.get(name, 0.0) / total if given else float(name == ranking[0]) for name in self.by_name}

    def bucket(self, user: Any) -> int:
        """The user's bucket, the same on every replica with this salt; 1 and "1" are different users."""
        text = f"{self.salt}\0{type(user).__name__}\0{user}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") * BUCKETS >> 64

    def pick(self, user: Any, name: str | None) -> tuple[Served, int | None]:
        """The model that a request names, else that of the user's bucket, which is given with it."""
        if name is not None:
            return self.named(name), None
        bucket = self.bucket(user)
        edge = 0.0
        for model, weight in self.weights.items():
            edge += weight
            if weight and bucket < round(edge * BUCKETS):
                return self.by_name[model], bucket
        return self.by_name[self.first], bucket

    def named(self, name: str, where: str = "model") -> Served:
        found = self.by_name.get(name)
        if found is None:
            raise Refused(422, f"no such model; there is {', '.join(self.by_name)}", where)
        return found

    def retriever(self, name: str | None, ranker: Served) -> Served | None:
        """The model that retrieves: as asked, the ranking one itself, or the first that can; None for popularity."""
        if name == "popularity":
            return None
        if name is not None:
            found = self.named(name, "retriever")
            if found.searching is None:
                raise Refused(422, f"model {name!r} does not retrieve", "retriever")
            return found
        if ranker.searching is not None:
            return ranker
        return next((one for one in self.by_name.values() if one.searching is not None), None)

    async def activate(self, name: str, path: str | None, loading: Callable[[Path], Served]) -> tuple[str, str]:
        """Let `name` stand for the bundle at `path`, by default its own folder read again; versions new and old.

        A model that had no share of the users takes all of them.

        Raises:
            Refused: 404 no such model, 409 another activation is under way, 422 the bundle is not one to serve.
        """
        old = self.by_name.get(name)
        if old is None:
            raise Refused(404, f"no such model; there is {', '.join(self.by_name)}", "name")
        folder = old.bundle.folder if path is None else self._inside(path)
        if self._changing.locked():
            raise Refused(409, "another activation is under way", "", retry_after=5)
        async with self._changing:
            try:
                new = await asyncio.get_running_loop().run_in_executor(None, loading, folder)
            except InputError as error:
                raise Refused(422, f"not activated: {error}", "path") from None
            if new.name != name:
                await asyncio.to_thread(new.close)
                raise Refused(422, f"not activated: that bundle is named {new.name!r}, not {name!r}", "path")
            old = self.by_name[name]
            self.by_name[name] = new
            if not self.weights[name]:
                self.weights = {other: float(other == name) for other in self.weights}
        logs.say("activated", model=name, version=new.bundle.version, previous=old.bundle.version)
        task = asyncio.create_task(_retire(old))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return new.bundle.version, old.bundle.version

    def _inside(self, path: str) -> Path:
        """A bundle's folder beside those that the service was started with: no request reads elsewhere."""
        try:
            folder = Path(path).resolve()
        except (OSError, ValueError, RuntimeError):
            raise Refused(422, "not a path", "path") from None
        if folder.parent not in self._roots:
            roots = ", ".join(sorted(str(root) for root in self._roots))
            raise Refused(422, f"bundles are activated from {roots} only", "path")
        return folder

    async def drained(self) -> None:
        """Wait for models that were replaced."""
        if self._closing:
            await asyncio.wait(self._closing, timeout=30)

    def close(self) -> None:
        for one in self.by_name.values():
            one.close()


async def _retire(old: Served) -> None:
    """Close a model that was replaced once its last request is answered."""
    while old.in_flight:
        await asyncio.sleep(0.02)
    await asyncio.to_thread(old.close)
