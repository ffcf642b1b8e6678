"""DCNv2 of FuxiCTR (its layers and training loop) or of torch-rechub, one epoch; imports no scalerec.

    python dcnv2.py --versions
    python dcnv2.py fuxictr DATA --threads 2 --out result.npz

DATA holds `train.npz` and `test.npz` (columns f0, f1, ... of ids and `label`) and `sizes.json`: {"rows": of each
table, "dim", "crosses", "hidden", "batch", "lr"}.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

TRIED, PROBE = (0, 1, 2), 30  # workers of a loader, and the batches by which they are chosen


def fuxictr(folder: Path, sizes: dict[str, Any], workers: int) -> tuple[Any, Any, Any, Any]:
    """A loader of training batches, one of test batches, a training step or epoch, and predictions of a batch."""
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.layers import CrossNetV2, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    names = [f"f{i}" for i in range(len(sizes["rows"]))]
    features = FeatureMap("peer", str(folder))
    features.labels = ["label"]
    features.features = OrderedDict(
        (name, {"type": "categorical", "source": "", "vocab_size": rows, "padding_idx": 0})
        for name, rows in zip(names, sizes["rows"])
    )
    features.num_fields = len(names)
    features.default_emb_dim = sizes["dim"]
    features.set_column_index()

    class DCNv2(BaseModel):
        """As in the library's model zoo: crosses and MLP side by side, then one linear map."""

        def __init__(self) -> None:
            super().__init__(features, verbose=0, model_root=str(folder), metrics=["AUC"])
            width = len(names) * sizes["dim"]
            self.embedding_layer = FeatureEmbedding(features, sizes["dim"])
            self.cross = CrossNetV2(width, sizes["crosses"])
            self.deep = MLP_Block(width, sizes["hidden"], hidden_activations="ReLU")
            self.last = torch.nn.Linear(width + sizes["hidden"][-1], 1)
            self.compile("adam", "binary_crossentropy", sizes["lr"])
            self.reset_parameters()
            self.model_to_device()

        def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            x = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
            found = self.last(torch.cat([self.cross(x), self.deep(x)], 1))
            return {"y_pred": self.output_activation(found)}

    given = {"batch_size": sizes["batch"], "data_format": "npz", "num_workers": workers}
    train = RankDataLoader(features, "train", train_data=str(folder / "train.npz"), shuffle=True, **given)[0]
    test = RankDataLoader(features, "test", test_data=str(folder / "test.npz"), shuffle=False, **given)
    model = DCNv2()
    # What `fit` sets before its epochs; it would end with the best checkpoint of a validation that nobody asked for.
    model._max_gradient_norm, model._total_steps, model._eval_steps, model._stop_training = 10.0, 0, 10**9, False

    def predict(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch)["y_pred"]

    return train, test, (model, model.train_epoch), predict


def rechub(folder: Path, sizes: dict[str, Any], workers: int) -> tuple[Any, Any, Any, Any]:
    """The same of torch-rechub."""
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.ranking import DCNv2
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import DataGenerator

    names = [f"f{i}" for i in range(len(sizes["rows"]))]
    features = [SparseFeature(name, rows, sizes["dim"]) for name, rows in zip(names, sizes["rows"])]
    deep = {"dims": sizes["hidden"], "dropout": 0.0, "activation": "relu"}
    model = DCNv2(features, sizes["crosses"], deep, use_low_rank_mixture=False)
    trainer = CTRTrainer(model, optimizer_params={"lr": sizes["lr"]}, n_epoch=1, model_path=str(folder))
    generators, columns = [], {}
    for part in ("train", "test"):
        with np.load(folder / f"{part}.npz") as loaded:
            columns[part] = {name: loaded[name] for name in names}, loaded["label"]
        generators.append(DataGenerator(*columns[part]))
    train, test = (
        generator.generate_dataloader(
            x_val=x, y_val=y, x_test=x, y_test=y, batch_size=sizes["batch"], num_workers=workers
        )
        for generator, (x, y) in zip(generators, columns.values())
    )

    def predict(batch: tuple[dict[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return model(batch[0])

    return train[0], test[2], (model, trainer.train_one_epoch), predict  # the last of three does not shuffle


LIBRARIES: dict[str, Callable[..., Any]] = {"fuxictr": fuxictr, "rechub": rechub}


class Some:
    """The first batches of a loader."""

    def __init__(self, loader: Any, count: int):
        self.loader, self.count = loader, count

    def __iter__(self) -> Any:
        return (batch for batch, _ in zip(self.loader, range(self.count)))

    def __len__(self) -> int:
        return self.count


def quickest(library: str, folder: Path, sizes: dict[str, Any]) -> int:
    """The number of loader processes with which a few steps take the least time."""
    seconds = {}
    for workers in TRIED:
        train, _, (_, epoch), _ = LIBRARIES[library](folder, sizes, workers)
        start = time.perf_counter()
        epoch(Some(train, PROBE))
        seconds[workers] = time.perf_counter() - start
    return min(seconds, key=lambda workers: seconds[workers])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", nargs="?", choices=LIBRARIES)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--versions", action="store_true")
    parser.add_argument("--workers", type=int, default=-1, help="of the loader; default: the quickest of a few")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("fuxictr", "torch-rechub", "torch")}
    if given.versions:
        print(json.dumps(versions))
        return
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    sizes = json.loads((given.data / "sizes.json").read_text())
    workers = given.workers if given.workers >= 0 else quickest(given.library, given.data, sizes)
    LIBRARIES[given.library](given.data, sizes, workers)  # imports what it needs, torch's optimisers what they do
    start = time.perf_counter()
    train, test, (model, epoch), predict = LIBRARIES[given.library](given.data, sizes, workers)
    ready = time.perf_counter()
    epoch(train)
    end = time.perf_counter()
    model.eval()
    with torch.no_grad():
        scores = torch.cat([predict(batch).flatten() for batch in test]).numpy()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    np.savez(
        given.out, scores=scores, seconds=end - start, loading=ready - start, workers=workers, parameters=parameters
    )


if __name__ == "__main__":
    main()
