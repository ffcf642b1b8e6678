"""A LitServe service around a scalerec model, run in the environment of `serving_litserve.txt` by peers_serving.py.

    python serving_litserve.py --versions
    python serving_litserve.py --world DIR --port N --threads N [--batch N --wait MS]

What a user of LitServe writes: the rows of the request are put together from tables in memory (items, users, their
pasts), encoded as in training, scored by the model. With `--batch` requests are joined by LitServe's own batching.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import litserve  # pyright: ignore[reportMissingImports]
import pyarrow as pa
import pyarrow.parquet as pq
import torch


class Ranking(litserve.LitAPI):
    """{"user", "candidates"} -> {"scores": [[p of a task] of a candidate]} in the order asked."""

    def __init__(self, world: str, threads: int, **batching: Any):
        super().__init__(**batching)
        self.world, self.threads = world, threads

    def setup(self, device: str) -> None:
        from scalerec.inference.bundle import load

        torch.set_num_threads(self.threads)
        bundle = load(Path(self.world) / "bundle", verify=False)
        self.encoder, self.model = bundle.encoder, bundle.model
        schema = self.encoder.schema
        self.key, self.time = schema.item, schema.time
        self.items = bundle.items.drop_columns(["popularity"]).combine_chunks().to_batches()[0]
        self.item_row = {value: i for i, value in enumerate(self.items.column(schema.item).to_pylist())}
        users = pq.read_table(Path(self.world) / "pasts.parquet").combine_chunks().to_batches()[0]
        self.users, self.user_row = users, {v: i for i, v in enumerate(users.column(schema.user).to_pylist())}
        rest = [c for c in schema.input_columns() if c not in (*self.items.schema.names, *users.schema.names)]
        self.context = {name: bundle.context.get(name) for name in rest}

    def decode_request(self, request):  # LitServe reads a body as JSON where there is no annotation
        candidates = request["candidates"]
        count = len(candidates)
        items = self.items.take(pa.array([self.item_row[item] for item in candidates]))
        user = self.users.take(pa.array([self.user_row[request["user"]]] * count))
        context = {**self.context, self.time: request["time"]} if "time" in request else self.context
        more = [pa.array([value] * count) for value in context.values()]
        names = [*items.schema.names, *user.schema.names, *context]
        return pa.RecordBatch.from_arrays([*items.columns, *user.columns, *more], names=names)

    def batch(self, inputs: list[pa.RecordBatch]) -> tuple[pa.RecordBatch, list[int]]:
        whole = pa.Table.from_batches(inputs).combine_chunks().to_batches()[0]
        return whole, [rows.num_rows for rows in inputs]

    def predict(self, asked: Any) -> Any:
        rows, lengths = asked if isinstance(asked, tuple) else (asked, [asked.num_rows])
        with torch.inference_mode():
            scores = torch.sigmoid(self.model(self.encoder.encode(rows, labels=False)).logits).split(lengths)
        return list(scores) if isinstance(asked, tuple) else scores[0]

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: torch.Tensor) -> dict[str, Any]:
        return {"scores": output.tolist()}


def main() -> None:
    if "--versions" in sys.argv:
        return print(json.dumps({name: version(name) for name in ("litserve", "torch", "pyarrow", "fastapi")}))
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", required=True)
    for name, default in (("port", 8000), ("threads", 1), ("batch", 1), ("wait", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    batching = {"max_batch_size": given.batch, "batch_timeout": given.wait / 1e3} if given.batch > 1 else {}
    api = Ranking(given.world, given.threads, **batching)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    print(json.dumps({"url": f"http://127.0.0.1:{given.port}"}), flush=True)
    server.run(host="127.0.0.1", port=given.port, generate_client_file=False, log_level="error")


if __name__ == "__main__":
    main()
