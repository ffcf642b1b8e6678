"""What a service is started with: the files it serves, where it listens, and every limit it keeps."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from scalerec.schema import Frozen

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Limits(Frozen):
    """What a request may ask for and how long it may wait; beyond them it is refused, never queued without end."""

    body_bytes: PositiveInt = 4 << 20  # 413
    body_seconds: PositiveFloat = 10.0  # 408: a body that trickles in
    candidates: Annotated[int, Field(ge=1, le=16_384)] = 4_096  # 422
    events: Annotated[int, Field(ge=1, le=10_000)] = 1_000  # 422
    explained: PositiveInt = 100  # candidates of one explanation
    ahead_seconds: PositiveFloat = 86_400.0  # 422: an event later than this after the service's clock
    wait_ms: PositiveFloat = 2_000.0  # 503: a request that had not begun by then
    overload_ms: PositiveFloat = 25.0  # 503: one that would wait longer, while more is asked than can be answered
    work_ms: PositiveFloat = 30_000.0  # 503: a request that had begun and was not done
    queue: PositiveInt = 256  # 503: requests that wait for a model
    writes: PositiveInt = 64  # 503: batches of events that wait for the store
    in_flight: PositiveInt = 2_048  # 503: requests of any kind
    rate: Annotated[float, Field(ge=0)] = 1_000.0  # 429: requests a second and key; 0 for any number


class Settings(Frozen):
    """All that `create_app` needs; ValueError where what they say together is not safe."""

    bundles: Annotated[tuple[Path, ...], Field(min_length=1)]
    weights: dict[str, Weight] = {}  # by model; none: the first bundle gets all requests
    salt: str = "scalerec"  # of the A/B buckets; another salt deals users anew
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    index: Literal["exact", "faiss"] = "exact"
    state: tuple[str, ...] = ("memory:",)  # lmdb:FOLDER, redis://HOST:PORT/0, memory: or a folder; one for each schema
    users: Path | None = None

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    names: tuple[str, ...] = ()  # host names that requests may carry beside loopback's, behind a proxy on this machine
    keys: Path | None = None
    without_keys: bool = False
    page: bool = False  # also where others can reach it; on loopback it is there anyway

    exposures: Path | None = None
    exposure_rate: Share = 1.0
    exposure_rows: PositiveInt = 20_000  # rows of one file
    exposure_seconds: PositiveFloat = 60.0  # the longest that a row waits to be written
    exposure_queue: PositiveInt = 1_000  # requests that wait for the writer; more are dropped and counted

    batch_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    batch_rows: PositiveInt = 256  # candidates scored together; larger batches only make everybody in them wait
    cache_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    drain_seconds: Annotated[float, Field(ge=0)] = 2.0  # between SIGTERM and closing the port, /readyz saying 503
    limits: Limits = Limits()

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        return is_loopback(self.host)

    @property
    def exposed(self) -> bool:
        """Whether people on other machines may be at the other end."""
        return not self.loopback or bool(self.names)

    @property
    def shows_people(self) -> bool:
        """Whether the page and what it reads of users are there."""
        return self.page or not self.exposed

    @model_validator(mode="after")
    def _safe(self) -> Settings:
        if self.exposed and self.keys is None and not self.without_keys:
            raise ValueError(
                f"host {self.host}{' behind ' + self.names[0] if self.names else ''}: others can reach it, so it needs "
                "--keys FILE (make one with `scalerec key add NAME FILE`), or say --without-keys"
            )
        if self.page and self.exposed and self.keys is None:
            raise ValueError("page: it shows people's histories, so it needs --keys FILE where others can reach it")
        return self


def is_loopback(host: str) -> bool:
    """Whether a name or address of a host means this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
