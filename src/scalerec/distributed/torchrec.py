"""The tables of a single-device model split over processes by TorchRec; the model's own code stays as it is.

k ids   n lists   D width of a table
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalerec.distributed.ranks import rank, world
from scalerec.errors import InputError
from scalerec.features.layout import Layout, Table
from scalerec.layers.embedding import EmbeddingCollection, Lookup
from scalerec.models.base import Model

try:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingBagCollection as BagCollection
    from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType
    from torchrec import EmbeddingCollection as VectorCollection
    from torchrec.distributed import sharding_plan
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.types import ShardingEnv
except ImportError as error:
    raise InputError(
        f"sharded training needs TorchRec ({error}). With CUDA: pip install 'scalerec[distributed]'. On a CPU: "
        "pip install fbgemm-gpu-cpu==1.8.0 pyre-extensions tensordict torchmetrics iopath tqdm && "
        "pip install --no-deps torchrec==1.8.0"
    ) from error

Sharding = Literal["table_wise", "column_wise", "row_wise"]
OPTIMIZERS = {"adagrad": EmbOptimType.EXACT_ADAGRAD, "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
COLUMNS = 4  # TorchRec takes widths that are multiples of it


class EmbeddingOptimizer(Protocol):
    """What fused updates have to know, as in `OptimizerConfig`."""

    @property
    def embedding(self) -> Literal["adagrad", "rowwise_adagrad"]: ...
    @property
    def embedding_lr(self) -> float: ...
    @property
    def embedding_eps(self) -> float: ...


def shard(model: Model, optimizer: EmbeddingOptimizer, sharding: Sharding, device: torch.device | str) -> Model:
    """Split the model's tables over all processes, in place; every process calls this with the same model.

    From then on the tables are updated by `optimizer` in the backward pass, and `state_dict` is for all processes to
    call together. The dense part is copied from process 0.

    Raises:
        InputError: the processes have not been joined, or the tables cannot be split so.
    """
    if not dist.is_initialized():
        raise InputError("no processes to share the tables: start with torchrun, and call `join` first")
    model.embeddings = ShardedEmbeddings(model.embeddings, optimizer, sharding, torch.device(device))
    model.to(device)
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor, 0)
    return model


def gather(model: Model) -> dict[str, Tensor]:
    """The state dict of the same model unsharded, on process 0; empty on the others, which must call it too.

    `model.load_state_dict` is the way back: every process takes its part of an unsharded state dict.
    """
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    return state if rank() == 0 else {}


class ShardedEmbeddings(EmbeddingCollection):
    """An EmbeddingCollection whose tables lie in TorchRec's sharded modules.

    Tables that only multi-valued features read are pooled where they lie, before anything is sent; all others are
    looked up id by id. Each table has one home and is looked up once a step, so that it is updated once a step.
    """

    def __init__(
        self, whole: EmbeddingCollection, optimizer: EmbeddingOptimizer, sharding: Sharding, device: torch.device
    ):
        nn.Module.__init__(self)
        self.layout, self.linear, tables = whole.layout, whole.linear, whole.layout.tables
        _check(tables, optimizer, sharding)
        self.ways = {name: _way(owners, sharding) for name, owners in place(tables, sharding, world()).items()}
        self.fused = {
            "optimizer": OPTIMIZERS[optimizer.embedding],
            "learning_rate": optimizer.embedding_lr,
            "eps": optimizer.embedding_eps,
        }
        # Row-wise, TorchRec 1.8 pools only equal batches, and takes means for sums beside tables that are not split.
        pooling = {} if sharding == "row_wise" else pooled_tables(self.layout)
        pooled = [table for table in tables if table.name in pooling]
        widths: dict[int, list[Table]] = {}  # TorchRec wants one width where it does not pool
        for table in tables:
            if table.name not in pooling:
                widths.setdefault(table.dim, []).append(table)
        # Kept from nn.Module's sight: these weights update themselves; no optimiser and no state dict may list them.
        bags: list[_Home] = [_Bags(pooled, self, device, pooling)] if pooled else []
        self.homes = (*bags, *(_Vectors(group, self, device) for group in widths.values()))
        found = {shards.table.name: shards for home in self.homes for shards in home.shards}
        self.shards = [found[table.name] for table in tables]
        for name, weight in whole.table_weights():
            found[name].scatter(weight, found[name].weight)

    def look_up(self, lookups: list[Lookup]) -> list[Tensor]:
        places: dict[str, list[int]] = {table.name: [] for table in self.layout.tables}
        for i, lookup in enumerate(lookups):
            places[lookup.table].append(i)
        asked = []
        vectors: dict[int, Tensor] = {}
        # On a CPU, FBGEMM's lookups exist only as differentiable functions, which inference mode does not find.
        with _no_gradients() if torch.is_inference_mode_enabled() else nullcontext():
            for home in self.homes:
                groups = [[lookups[i] for i in places[table.name]] for table in home.tables]
                asked.append((home, groups, home.ask(groups)))
            for home, groups, waiting in asked:
                for table, found in zip(home.tables, home.answer(waiting, groups)):
                    vectors |= zip(places[table.name], found)
        return list(_Together.apply(*(vectors[i] for i in range(len(lookups)))))

    def sparse_parameters(self) -> list[nn.Parameter]:
        return []

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for shards in self.shards:
            weight = shards.gather(shards.weight, shards.table.dim)
            if weight is not None:
                destination[f"{prefix}tables.{shards.table.name}"] = weight

    def _load_from_state_dict(self, state_dict, prefix, _metadata, _strict, missing, unexpected, errors) -> None:
        for shards in self.shards:
            table = shards.table
            value = state_dict.pop(f"{prefix}tables.{table.name}", None)
            if value is None:
                missing.append(f"{prefix}tables.{table.name}")
            elif value.shape != (table.rows, table.dim):
                found = tuple(value.shape)
                errors.append(f"table {table.name!r}: {found} in the checkpoint, {(table.rows, table.dim)} here")
            else:
                shards.scatter(value, shards.weight)


class TableOptimizer:
    """What a sharded model's tables have for an optimiser: its state as that of `RowAdagrad`, and nothing to do.

    The updates themselves happen in the backward pass. `state_dict` is for all processes to call together, and is
    empty except on process 0.
    """

    def __init__(self, model: Model):
        assert isinstance(model.embeddings, ShardedEmbeddings)
        self.shards: dict[int, list[_Shards]] = {}  # by width, as one process keeps them
        for shards in model.embeddings.shards:
            self.shards.setdefault(shards.table.dim, []).append(shards)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The backward pass leaves no gradients."""

    def step(self) -> None:
        """The backward pass has made it."""

    def state_dict(self) -> dict[str, Any]:
        sums = [[shards.gather(shards.sums, shards.sums_width) for shards in group] for group in self.shards.values()]
        state = {i: {"sum": torch.cat(group)} for i, group in enumerate(sums)} if rank() == 0 else {}
        return {"state": state, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, group in enumerate(self.shards.values()):
            parts = state_dict["state"][i]["sum"].split([shards.table.rows for shards in group])
            for shards, part in zip(group, parts):
                shards.scatter(part, shards.sums)


class _Shards:
    """One table: which process holds which rectangle of it, and what this process holds."""

    def __init__(self, table: Table, weight: Any, sums: Any, rowwise: bool, device: torch.device):
        self.table, self.device = table, device
        self.sums_width = 1 if rowwise else table.dim
        self.pieces = [
            (shard.placement.rank(), shard.shard_offsets, shard.shard_sizes)
            for shard in weight.metadata().shards_metadata
        ]
        self.weight = _local(weight)  # [rows, columns] or None
        self.sums = None if sums is None else _local(sums).view(-1, self.sums_width and -1)

    def gather(self, local: Tensor | None, width: int) -> Tensor | None:
        ...


