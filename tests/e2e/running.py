"""A trained shop with histories, its bundle, and `scalerec serve` as a process on a free port of loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scalerec.cli import main
from scalerec.inference.bundle import export

START = 1_700_000_000
USERS, ITEMS = 60, 40
SCHEMA = {
    "groups": [
        {
            "name": "user", "side": "user",
            "features": [
                {"kind": "categorical", "name": "user_id"},
                {"kind": "categorical", "name": "city"},
                {
                    "kind": "sequence", "name": "seen", "fields": [{"of": "item_id"}], "time": True,
                    "actions": ["click"], "max_len": 10,
                },
            ],
        },
        {
            "name": "item", "side": "item",
            "features": [
                {"kind": "categorical", "name": "item_id"},
                {"kind": "numeric", "name": "price"},
                {"kind": "multi_categorical", "name": "colours"},
                {"kind": "categorical", "name": "hour"},
            ],
        },
    ],
    "tasks": [{"name": "click"}],
    "user": "user_id", "item": "item_id", "time": "time",
}  # fmt: skip


def shop(rows: int = 1_500) -> pa.Table:
    random = np.random.default_rng(0)
    user, item = random.integers(0, USERS, rows), random.integers(0, ITEMS, rows)
    return pa.table(
        {
            "user_id": user,
            "city": [("Ulm", "Bonn", "Jena")[u % 3] for u in user],
            "item_id": item,
            "price": (item * 37 % 100) / 10,
            "colours": [["red", "green", "blue"][: i % 4] for i in item],
            "hour": random.integers(0, 24, rows),
            "time": START + np.arange(rows) * 60,
            "click": (random.random(rows) < 0.2 + 0.6 * (user % 5 == item % 5)).astype(np.int8),
        }
    )


def make_bundles(folder: Path, names: tuple[str, ...] = ("shop",)) -> list[Path]:
    """Train once, export under each name; users.parquet and run/ beside the bundles."""
    pq.write_table(shop(), folder / "shop.parquet", row_group_size=500)
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    data = ["--data.path", str(folder / "shop.parquet"), "--data.schema_file", str(folder / "schema.json")]
    sizes = ["--model.dim", "16", "--model.num_tokens", "4", "--model.ffn_dim", "16", "--training.epochs", "1"]
    more = ["--training.tensorboard", "false", "--quiet"]
    assert main(["train", "rankmixer_parquet", "--out", str(folder / "run"), *data, *sizes, *more]) == 0
    for name in names:
        export(folder / "run", folder / "bundles" / name, name=name)
    users = shop().select(["user_id", "city"]).group_by("user_id").aggregate([("city", "min")])
    pq.write_table(users.rename_columns(["user_id", "city"]), folder / "users.parquet")
    return [folder / "bundles" / name for name in names]


class Running:
    """A service process; `url` says where, `lines` what it logged."""

    def __init__(self, *words: Any):
        arguments = [sys.executable, "-m", "scalerec", "serve", *map(str, words), "--port", "0", "--json"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        if not first:
            self.process.wait(30)
            raise RuntimeError("\n".join(self.lines))
        self.url = json.loads(first)["url"]
        self.client = httpx.Client(base_url=self.url, timeout=30)
        for _ in range(200):
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            threading.Event().wait(0.05)
        raise RuntimeError(f"{self.url} is not ready")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        found = self.client.post(f"/v1/{path}", json=body)
        assert found.status_code == status, found.text
        return found.json()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(how)
        code = self.process.wait(40)
        self.client.close()
        return code

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)
