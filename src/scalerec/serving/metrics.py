"""What /metrics tells Prometheus; one registry for each service, no labels that grow with users or items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STAGES = ("store", "features", "user", "candidates", "retrieve", "total")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Reading = tuple[str, str, dict[str, str], float]  # name, help, labels, value


class Metrics:
    """Counters and histograms that requests move, and readings that are taken when somebody looks."""

    def __init__(self, readings: Callable[[], Iterable[Reading]]):
        self.registry = CollectorRegistry()
        self.registry.register(_Readings(readings))

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"scalerec_{name}", help, labels, registry=self.registry)

        def histogram(name: str, help: str, label: str) -> Histogram:
            return Histogram(f"scalerec_{name}", help, (label,), registry=self.registry, buckets=BUCKETS)

        self.requests = counter("requests", "requests answered", "route", "status")
        self.seconds = histogram("request_seconds", "time from the request's head to the end of its answer", "route")
        self.stages = histogram("stage_seconds", "time of a scored request by stage", "stage")
        self.stage = {name: self.stages.labels(name) for name in STAGES}
        self.cache = counter("history_cache", "outcomes of the cache of users' states", "outcome")
        self.served = counter("served", "requests scored, by model", "model")
        self.popular = counter("popular", "recommendations from the popularity list")
        self.stale = counter("stale", "requests served from the last known state, the store being unavailable")
        self.moved = counter("clock_behind", "requests earlier than their user's last event, served as of that event")
        self.unknown = counter("unknown_items", "candidates that the bundle does not know")
        self.events = counter("events", "events", "outcome")
        self.exposed = counter("exposure_rows", "rows of the exposure log", "outcome")
        self._children: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one request; `route` is a template, never a path."""
        pair = self._children.get((route, status))
        if pair is None:
            pair = (self.requests.labels(route, str(status)), self.seconds.labels(route))
            self._children[route, status] = pair
        pair[0].inc()
        pair[1].observe(seconds)

    def timed(self, milliseconds: dict[str, float]) -> None:
        """The stages of one request."""
        for name, value in milliseconds.items():
            self.stage[name].observe(value / 1e3)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Readings:
    """Gauges read at the moment of asking."""

    def __init__(self, readings: Callable[[], Iterable[Reading]]):
        self.readings = readings

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, help, labels, value in self.readings():
            family = families.get(name)
            if family is None:
                family = families[name] = GaugeMetricFamily(f"scalerec_{name}", help, labels=list(labels))
            family.add_metric(list(labels.values()), value)
        yield from families.values()

    def describe(self) -> list[Metric]:
        return []  # asked before the service is whole
