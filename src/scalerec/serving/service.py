"""What the service does with a request: who asks, what is known of them, which model, its scores, what is said of them.

Checking, reading the history and writing the answer happen on the event loop; models work in the threads of their
batchers, stores that are not in this process and all writes in threads of their own.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scalerec.inference.engine import Ask
from scalerec.serving import logs
from scalerec.serving.answers import items_of, model_of, order_of
from scalerec.serving.deadline import Lane, within
from scalerec.serving.events import kinds_of
from scalerec.serving.exposure import ExposureLog, Shown
from scalerec.serving.metrics import Metrics, Reading
from scalerec.serving.models import Models, Search, Served
from scalerec.serving.requests import (
    ActivateRequest,
    Candidate,
    EventsRequest,
    ExplainRequest,
    RankRequest,
    RecommendRequest,
    Refused,
)
from scalerec.serving.settings import Settings
from scalerec.serving.states import States, clock, moment
from scalerec.serving.store import Known, StoreUnavailable
from scalerec.serving.tables import UserTable

Answer = dict[str, Any]
ROWS = 65_536  # of users that are kept as dicts


class Moment(NamedTuple):
    """A request with what is known of its user."""

    ask: Ask
    known: Known
    behind: bool  # its time was before the user's last event


class Service:
    """All that a running service holds; routes call its coroutines, on one event loop."""

    def __init__(
        self, settings: Settings, models: Models, states: States, users: Sequence[UserTable],
        loading: Callable[[Path], Served],
    ):  # fmt: skip
        """Of a column that several tables of `users` have the first one's counts; `loading` is for activations."""
        self.settings, self.models, self.states, self.users, self._loading = settings, models, states, users, loading
        self._row = lru_cache(ROWS, typed=True)(self._joined)
        for served in models.by_name.values():
            self._keep(served)
        states.all_used()
        self.metrics = Metrics(self._readings)
        self.exposures = ExposureLog(settings, self.metrics) if settings.exposures else None
        self.draining = False
        self.in_flight = 0
        self._reads = Lane("reads", workers=16, waiting=settings.limits.in_flight)
        self._writes = Lane("writes", workers=4, waiting=settings.limits.writes)
        self._explains = Lane("explains", workers=1, waiting=8)
        self._numbers, self._prefix = count(), os.urandom(6).hex()
        self._watching: asyncio.Task | None = None

    # -- scores

    async def rank(self, request: RankRequest) -> Answer:
        started = time.perf_counter()
        served, bucket = self.models.pick(request.user, request.model)
        ids, own = self._candidates(request, served, self.settings.limits.candidates)
        wanted = self._tasks(request, served)
        served.admit(len(ids), self._deadline())
        with served.held():
            found = await self._moment(served, request, ids, own)
            stored = time.perf_counter()
            ranked = await self._within(served.ranking.submit(found.ask, deadline=self._deadline()))
        order, fused = order_of(served, ranked.scores)
        answer = self._answer(served, bucket, found)
        answer["items"] = items_of(served, ids, order, fused, ranked.scores, wanted)
        self._say(answer, started, {"store": 1e3 * (stored - started)} | ranked.milliseconds, ranked.cached)
        if self.exposures is not None:
            self._expose(answer, served, found.ask, order, fused, ranked.scores)
        return answer

    async def recommend(self, request: RecommendRequest) -> Answer:
        started = time.perf_counter()
        ranker, bucket = self.models.pick(request.user, request.model)
        most = self.settings.limits.candidates
        for field in ("retrieve", "k"):
            if getattr(request, field) > most and field in request.model_fields_set:
                raise Refused(422, f"at most {most:,} here", field)
        request = request.model_copy(update={"retrieve": min(request.retrieve, most), "k": min(request.k, most)})
        for field in ("allow", "deny"):
            ranker.columns.candidates(getattr(request, field) or (), field)
        finder = self.models.retriever(request.retriever, ranker)
        ranker.admit(request.retrieve, self._deadline())
        with ranker.held(), (finder or ranker).held():
            known = found = await self._moment(ranker, request, (), ())
            if finder is not None and finder is not ranker:
                its = request.model_copy(update={"context": finder.columns.own(request.context)})
                known = await self._moment(finder, its, (), ())
            stored = time.perf_counter()
            items, source = await self._retrieve(request, ranker, finder, known)
            retrieved = time.perf_counter()
            ids = [item for item, _ in items]
            found = found._replace(ask=found.ask._replace(candidates=ids))
            spent = {"store": 1e3 * (stored - started), "retrieve": 1e3 * (retrieved - stored)}
            tasks = ranker.engine.tasks if ranker.ranks else ()
            cached, scores = "", np.zeros((len(ids), len(tasks)), np.float32)
            order, fused = np.arange(len(ids)), np.array([likeness for _, likeness in items], np.float64)
            if ranker.ranks and ids:
                ranked = await self._within(ranker.ranking.submit(found.ask, deadline=self._deadline()))
                spent, cached, scores = spent | ranked.milliseconds, ranked.cached, ranked.scores
                order, fused = order_of(ranker, scores)
        order = order[: request.k]
        answer = self._answer(ranker, bucket, found)
        answer["items"] = items_of(ranker, ids, order, fused, scores, tasks)
        answer["retrieved"] = [
            {"id": item, "place": place, "similarity": None if source == "popularity" else likeness}
            for place, (item, likeness) in enumerate(items, 1)
        ]
        answer["source"], answer["removed"] = source, items.removed
        if source == "popularity":
            self.metrics.popular.inc()
        self._say(answer, started, spent, cached)
        if self.exposures is not None and len(order):
            self._expose(answer, ranker, found.ask, order, fused, scores)
        return answer

    async def _retrieve(
        self, request: RecommendRequest, ranker: Served, finder: Served | None, known: Moment
    ) -> tuple[Any, str]:
        """Items (id, likeness) that the filters leave, best first, and who found them."""
        count = max(request.k, request.retrieve)
        seen = known.known.seen if request.filter_seen else ()
        if finder is None or finder.searching is None or not any(known.known.history.values()):
            popular = (finder or ranker).popular
            filters = {"exclude": seen, "allow": request.allow, "deny": request.deny}
            if len(popular) < 50_000:
                return popular.search(count, **filters), "popularity"
            return await self._reads.run(lambda: popular.search(count, **filters)), "popularity"
        search = Search(known.ask, count, seen, request.allow, request.deny)
        return await self._within(finder.searching.submit(search, deadline=self._deadline())), finder.name

    async def explain(self, request: ExplainRequest) -> Answer:
        served, bucket = self.models.pick(request.user, request.model)
        ids, own = self._candidates(request, served, self.settings.limits.explained)
        self._tasks(request, served)
        with served.held():
            found = await self._moment(served, request, ids, own)
            parts = await self._within(self._explains.run(lambda: served.engine.ablations(found.ask)))
        whole = served.engine.fused(parts.pop(""))
        effect = [(whole - served.engine.fused(scores)).tolist() for scores in parts.values()]
        answer = self._answer(served, bucket, found)
        return {name: answer[name] for name in ("request_id", "model", "version")} | {
            "tokens": list(parts), "tasks": list(served.engine.tasks), "scores": whole.tolist(), "effect": effect,
            "reason": "" if parts else "this model has no tokens or groups that can be left out one at a time",
        }  # fmt: skip

    # -- what happened, and to whom

    async def events(self, request: EventsRequest) -> Answer:
        limits = self.settings.limits
        if len(request.events) > limits.events:
            raise Refused(422, f"at most {limits.events:,} at once", "events")
        rows = self.states.checked(request.events, time.time(), limits.ahead_seconds)
        new = await self._within(self._writes.run(lambda: self.states.append(rows)))
        appended = sum(new)
        self.metrics.events.labels("appended").inc(appended)
        self.metrics.events.labels("repeated").inc(len(new) - appended)
        return {"appended": appended, "repeated": len(new) - appended}

    async def find_users(self, prefix: str, limit: int) -> Answer:
        found: dict[Any, None] = {}
        for one in self.states.kept:
            found |= dict.fromkeys(await self._within(self._reads.run(lambda one=one: one.store.users(prefix, limit))))
        for table in self.users:
            found |= dict.fromkeys(await self._reads.run(lambda table=table: table.users(prefix, limit)))
        return {"users": sorted(found, key=lambda user: (str(user) != prefix, str(user)))[:limit]}

    async def user(self, text: str) -> Answer:
        """A user by the text of a path: a number where the log's ids are numbers or one of that number is known."""
        tried: list[Any] = []
        for one in self.states.kept:
            tried += [one.columns.parsed(text, one.columns.users), text]
        for user in dict.fromkeys(tried):
            lists: dict[str, list[dict[str, Any]]] = {}
            for one in self.states.kept:
                known = await self._within(self._reads.run(lambda one=one, user=user: one.store.known(user)))
                lists |= one.columns.as_rows(known.history)
            columns = dict(self._row(user))
            if columns or any(lists.values()):
                return {"user": user, "columns": columns, "history": lists}
        raise Refused(404, "nothing is known of this user", "user")

    def item(self, text: str, model: str | None) -> Answer:
        served = self.models.named(model or self.models.first)
        for item in (served.columns.parsed(text, served.columns.items), text):
            columns = served.engine.catalogue.row(item)
            if columns:
                return {"id": item, "columns": columns}
        raise Refused(404, "no such item in this bundle", "id")

    # -- models

    def list_models(self) -> Answer:
        weights = self.models.weights
        usual = max(weights, key=lambda name: weights[name])
        return {
            "models": [model_of(one, weights, one.name == usual) for one in self.models.by_name.values()],
            "weights": weights,
        }

    async def activate(self, name: str, request: ActivateRequest) -> Answer:
        version, previous = await self.models.activate(name, request.path, self._open)
        self._keep(self.models.by_name[name])
        return {"name": name, "version": version, "previous": previous}

    def _keep(self, served: Served) -> None:
        """Take up events as this model needs them."""
        self.states.add(served.name, served.columns, kinds_of(served.bundle.encoder), served.engine.catalogue.row)

    def _open(self, folder: Path) -> Served:
        """A bundle whose histories this service keeps."""
        served = self._loading(folder)
        if not self.states.has(served.engine.schema):
            served.close()
            raise Refused(422, "not activated: its schema keeps other histories than this service's store", "path")
        return served

    # -- life

    def ready(self) -> Answer:
        found = {"store": self.states.well, "models": len(self.models.by_name), "draining": self.draining}
        return {"ready": self.states.well and bool(self.models.by_name) and not self.draining, **found}

    async def start(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Ask the stores once a second, so that /readyz never waits for them."""
        while True:
            try:
                await self._reads.run(self.states.look)
            except Refused:
                pass
            await asyncio.sleep(1.0)

    async def stop(self) -> None:
        """After the last request: write the exposures, close models and stores."""
        self.draining = True
        if self._watching is not None:
            self._watching.cancel()
        await self.models.drained()
        await asyncio.to_thread(self._close)
        logs.say("stopped")

    def _close(self) -> None:
        self.models.close()
        if self.exposures is not None:
            self.exposures.close()
        for lane in (self._writes, self._reads, self._explains):
            lane.close()
        self.states.close()

    def _readings(self) -> list[Reading]:
        found: list[Reading] = [
            ("in_flight", "requests being answered", {}, float(self.in_flight)),
            ("store_healthy", "1 while every store answers", {}, float(self.states.well)),
            ("draining", "1 after SIGTERM", {}, float(self.draining)),
        ]
        if self.exposures is not None:
            found.append(("exposure_queue", "requests that wait to be logged", {}, float(self.exposures.depth())))
        for one in self.models.by_name.values():
            info = {"model": one.name, "version": one.bundle.version, "precision": one.bundle.precision}
            found.append(("model", "1 for each loaded model", info, 1.0))
            found.append(("model_weight", "share of users", {"model": one.name}, self.models.weights[one.name]))
            found.append(("queue_depth", "requests that wait for a model", {"model": one.name}, float(one.depth())))
        return found

    # -- parts of an answer

    def _joined(self, user: Any) -> dict[str, Any]:
        """The user's columns; {} where no table has them."""
        return {name: value for table in reversed(self.users) for name, value in table.row(user).items()}

    def _deadline(self) -> float:
        return time.monotonic() + self.settings.limits.wait_ms / 1e3

    async def _within(self, work: Any) -> Any:
        return await within((self.settings.limits.wait_ms + self.settings.limits.work_ms) / 1e3, work)

    def _candidates(self, request: RankRequest, served: Served, most: int) -> tuple[list[Any], Sequence[Mapping]]:
        """Ids, and the columns that only the request knows of each; Refused where they are not of the log's kind."""
        if not served.ranks:
            raise Refused(422, f"model {served.name!r} retrieves and does not rank: name another", "model")
        if len(request.candidates) > most:
            raise Refused(422, f"at most {most:,} here, not {len(request.candidates):,}", "candidates")
        ids, own = list[Any](), list[Mapping[str, Any]]()
        if not set(map(type, request.candidates)) & {Candidate}:  # nearly always: ids alone
            ids = request.candidates
            served.columns.candidates(ids)
            return ids, ()
        for place, one in enumerate(request.candidates):
            if isinstance(one, Candidate):
                extra = one.__pydantic_extra__ or {}
                served.columns.context(extra, f"candidates[{place}]")
                own += [{}] * (place - len(own)) + [extra]
                one = one.id
            ids.append(one)
        served.columns.candidates(ids)
        return ids, own + [{}] * (len(ids) - len(own)) if own else ()

    def _tasks(self, request: RankRequest, served: Served) -> Sequence[str]:
        for place, task in enumerate(request.tasks or ()):
            if task not in served.engine.tasks:
                raise Refused(422, f"no such task; it has {', '.join(served.engine.tasks)}", f"tasks[{place}]")
        return request.tasks or served.engine.tasks

    async def _moment(
        self, served: Served, request: RankRequest | RecommendRequest, ids: Sequence[Any], own: Sequence[Mapping]
    ) -> Moment:
        """The request as the engine takes it, with the user's history and row."""
        columns, schema = served.columns, served.engine.schema
        kept = self.states.of(schema)
        columns.user(request.user)
        columns.context(request.context)
        known: Known = await self._known(kept, request.user, None)
        last = known.last
        now, behind = None, False
        if schema.time is not None:
            now = clock(columns) if request.time is None else moment(request.time, columns, "time")
            if last is not None and isinstance(last, datetime) != isinstance(now, datetime):
                raise Refused(422, "is not of the kind of the times in the history", "time")
            behind = last is not None and now < last
            if behind:
                now = last
            elif request.time is not None and now == last:
                # As in training, where a row sees strictly earlier events: of the same moment it knows nothing yet.
                known = await self._known(kept, request.user, now)
        row = self._row(request.user)
        ask = Ask(request.user, {**row, **request.context}, known.history, ids, own, now)
        return Moment(ask, known, behind)

    async def _known(self, kept: Any, user: Any, before: Any) -> Known:
        """Of a store that cannot be read, and does not remember, nothing: scores go on without a history."""
        try:
            if kept.local:
                return kept.store.known(user, before)
            return await self._within(self._reads.run(lambda: kept.store.known(user, before)))
        except StoreUnavailable as error:
            kept.well = False
            kept.health.failed(error)
            return Known({}, [], True)

    def _answer(self, served: Served, bucket: int | None, found: Moment) -> Answer:
        places, ask = served.places, found.ask
        unknown = [item for item in ask.candidates if item not in places]
        if unknown:
            self.metrics.unknown.inc(len(unknown))
        if found.behind:
            self.metrics.moved.inc()
        if found.known.stale:
            self.metrics.stale.inc()
        self.metrics.served.labels(served.name).inc()
        return {
            "request_id": f"{self._prefix}-{next(self._numbers):x}", "model": served.name,
            "version": served.bundle.version, "bucket": bucket, "items": [],
            "cold": not any(found.known.history.values()), "stale": found.known.stale, "time": ask.now,
            "clock_behind": found.behind, "unknown_items": unknown, "defaults": served.defaults(ask),
        }  # fmt: skip

    def _say(self, answer: Answer, started: float, spent: dict[str, float], cached: str) -> None:
        spent["total"] = 1e3 * (time.perf_counter() - started)
        answer["timing"] = {name: round(value, 3) for name, value in spent.items()}
        self.metrics.timed(spent)
        if cached:
            self.metrics.cache.labels(cached).inc()

    def _expose(
        self, answer: Answer, served: Served, ask: Ask, order: np.ndarray, fused: np.ndarray, scores: np.ndarray
    ) -> None:
        assert self.exposures is not None
        own = [ask.own[i] for i in order] if ask.own else ()
        shown = ask._replace(candidates=[ask.candidates[i] for i in order], own=own)
        number, bucket = answer["request_id"], answer["bucket"]
        self.exposures.offer(Shown(number, time.time(), served.engine, bucket, shown, fused[order], scores[order]))
