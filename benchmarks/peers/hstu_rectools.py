"""HSTU of RecTools, trained and asked for its best ten: runs in an environment of its own and imports no scalerec.

    python hstu_rectools.py --versions
    python hstu_rectools.py DATA --epochs 10 --threads 2 --out result.json --evaluate 1 5 10

DATA holds three files by user: `train.parquet` (interactions in order), `seen.parquet` (those before the event that is
asked for, which are also not to be recommended) and `asked.parquet` (user and time of that event, not its item).
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow  # what pandas reads Parquet with
import pytorch_lightning as lightning
import rectools
import torch
from rectools.dataset import Dataset
from rectools.dataset.context import get_context
from rectools.models import HSTUModel

BEST = 10
MODEL = {
    "n_blocks": 2, "n_heads": 1, "n_factors": 50, "session_max_len": 200, "dropout_rate": 0.2,
    "relative_time_attention": True, "relative_pos_attention": True, "use_pos_emb": True,
    "loss": "sampled_softmax", "n_negatives": 128, "lr": 1e-3, "batch_size": 128,
    "similarity_module_kwargs": {"distance": "cosine"}, "lightning_module_kwargs": {"logits_t": 0.05},
}  # fmt: skip


class Clock(lightning.Callback):
    """Seconds of each epoch, the first from the start of training, the others from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.last = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def trainer() -> lightning.Trainer:
    """The trainer that RecTools makes by default, on the CPU and with a clock."""
    return lightning.Trainer(
        max_epochs=1, min_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Clock()],
    )  # fmt: skip


def best(model: HSTUModel, seen: Dataset, asked: pd.DataFrame) -> list[list[int]]:
    """The best ten items of each asked user, best first, without those that are seen."""
    users = asked["user_id"].to_numpy()
    found = model.recommend(users=users, dataset=seen, k=BEST, filter_viewed=True, context=get_context(asked))
    by_user = found.sort_values("rank", kind="stable").groupby("user_id")["item_id"].agg(list)
    return by_user.loc[users].tolist()


def versions() -> dict[str, str]:
    names = {"rectools": rectools.VERSION, "torch_peer": torch.__version__, "lightning": lightning.__version__}
    return names | {"pyarrow": pyarrow.__version__, "python_peer": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--evaluate", type=int, nargs="*", default=[], help="epochs after which to ask")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--versions", action="store_true")
    chosen = parser.parse_args()
    if chosen.versions:
        return print(json.dumps(versions()))
    warnings.simplefilter("ignore")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    lightning.seed_everything(chosen.seed)

    train = Dataset.construct(pd.read_parquet(chosen.data / "train.parquet"))
    seen = Dataset.construct(pd.read_parquet(chosen.data / "seen.parquet"))
    asked = pd.read_parquet(chosen.data / "asked.parquet")
    model = HSTUModel(**MODEL, epochs=1, recommend_torch_device="cpu", get_trainer_func=trainer)
    done, top = 0, {}
    for until in sorted({*chosen.evaluate, chosen.epochs}):
        model.fit_partial(train, min_epochs=until - done, max_epochs=until - done)
        done = until
        if until in chosen.evaluate:
            top[until] = best(model, seen, asked)
    clock = next(callback for callback in model.fit_trainer.callbacks if isinstance(callback, Clock))
    weights = sum(weight.numel() for weight in model.torch_model.parameters())
    items = len(model.data_preparator.get_known_item_ids())
    found = {"seconds": clock.seconds, "top": top, "peer_items": items, "peer_parameters": weights, **versions()}
    chosen.out.write_text(json.dumps(found | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
