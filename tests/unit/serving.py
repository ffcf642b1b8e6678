"""A service over the contract world: tiny models, a store in memory, a client on this machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import torch
from starlette.testclient import TestClient

from scalerec.inference.engine import Engine
from scalerec.inference.retrieval import Popular, Retriever
from scalerec.models import hstu, rankmixer
from scalerec.serving.app import create_app
from scalerec.serving.models import Models, Served, serve
from scalerec.serving.service import Service
from scalerec.serving.settings import Settings
from scalerec.serving.states import States
from scalerec.serving.tables import UserTable
from tests.contract.world import ITEMS, USERS, World, row

NOW = 1e9 + 2000  # of the world's rows
CONFIGS = {"rankmixer": rankmixer.tiny(), "hstu": hstu.tiny()}
OF_ITEM = ("item", "author", "words", "price")  # `views` belongs to the moment
OF_USER = ("user", "city", "age", "income", "interests")


def items() -> pa.Table:
    """One row an item, most popular first: from the largest id down."""
    found = {}
    for number in range(8):
        for user in range(USERS):
            logged = row(user, number)
            found[logged["item"]] = {name: logged[name] for name in OF_ITEM}
    assert len(found) == ITEMS
    return pa.Table.from_pylist([{**found[item], "popularity": item + 1} for item in range(ITEMS - 1, -1, -1)])


def users() -> UserTable:
    return UserTable(
        pa.Table.from_pylist([{name: row(user, 0)[name] for name in OF_USER} for user in range(6)]), "user"
    )


def bundle_of(
    world: World, kind: str, *, name: str = "", version: str = "v1", folder: Path = Path("/bundles/b")
) -> Any:
    torch.manual_seed(len(version))
    model = CONFIGS[kind].build(world.encoder.layout).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        vectors = model.catalogue() if model.retrieves else None
    types = {column: str(world.rows.schema.field(column).type) for column in world.encoder.schema.input_columns()}
    return SimpleNamespace(
        name=name or kind, version=version, precision="fp32", encoder=world.encoder, layout=world.encoder.layout,
        model=model, items=items(), context={"views": 7}, fusion={"click": 1.0, "buy": 0.5}, vectors=vectors,
        folder=folder, manifest=SimpleNamespace(types=types),
    )  # fmt: skip


def served_of(bundle: Any, settings: Settings) -> Served:
    popular = Popular(bundle.items, "item")
    retriever = Retriever(bundle, popular=popular) if bundle.vectors is not None else None
    return serve(bundle, Engine(bundle), popular, retriever, settings)


def settings_of(**changes: Any) -> Settings:
    return Settings(bundles=(Path("/bundles/b"),), **{"drain_seconds": 0.0, "batch_wait_ms": 0.5, **changes})


def service_of(
    world: World, kinds: tuple[str, ...] = ("rankmixer", "hstu"), *, states: States | None = None, loading: Any = None,
    **changes: Any,
) -> Service:  # fmt: skip
    settings = settings_of(**changes)
    models = Models([served_of(bundle_of(world, kind), settings) for kind in kinds], settings)
    return Service(settings, models, states or States(settings.state), [users()], loading)


def client_of(service: Service) -> TestClient:
    app = create_app(service.settings, service)
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


def event(number: int = 0, user: str = "u1", **changes: Any) -> dict[str, Any]:
    """A click of a user on an item, ten seconds after the one before."""
    columns = {"item": number % ITEMS, "click": 1, "buy": 0, "worth": 1.0, "city": "c1"}
    return {"event_id": f"e{number}", "user": user, "time": NOW + 10 * number, **columns, **changes}
