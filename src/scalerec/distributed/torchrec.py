"""The tables of a single-device model split over processes by TorchRec; the model's own code stays as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalerec.distributed.placement import EmbeddingOptimizer, Sharding, check, place, pooled_tables
from scalerec.distributed.ranks import rank, world
from scalerec.errors import InputError
from scalerec.features.layout import Table
from scalerec.layers.embedding import EmbeddingCollection, Lookup, beside
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
        f"sharded training needs TorchRec ({error}). With CUDA: pip install -e '.[distributed]'. On a CPU: "
        "pip install fbgemm-gpu-cpu==1.8.0 pyre-extensions tensordict torchmetrics iopath tqdm && "
        "pip install --no-deps torchrec==1.8.0"
    ) from error

OPTIMIZERS = {"adagrad": EmbOptimType.EXACT_ADAGRAD, "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}


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
        check(tables, optimizer, sharding)
        ways = {name: _way(owners, sharding) for name, owners in place(tables, sharding, world()).items()}
        plan = _Plan(ways, optimizer, device)
        # Row-wise, TorchRec 1.8 pools only equal batches, and takes means for sums beside tables that are not split.
        pooling = {} if sharding == "row_wise" else pooled_tables(self.layout)
        pooled = [table for table in tables if table.name in pooling]
        widths: dict[int, list[Table]] = {}  # TorchRec wants one width where it does not pool
        for table in tables:
            if table.name not in pooling:
                widths.setdefault(table.dim, []).append(table)
        # Kept from nn.Module's sight: these weights update themselves; no optimiser and no state dict may list them.
        bags: list[_Home] = [_Bags(pooled, plan, pooling)] if pooled else []
        self.homes = (*bags, *(_Vectors(group, plan) for group in widths.values()))
        found = {shards.table.name: shards for home in self.homes for shards in home.shards}
        self.shards = [found[table.name] for table in tables]
        for name, weight in whole.table_weights():
            found[name].scatter(weight, found[name].weight)

    def look_up(self, lookups: list[Lookup]) -> list[Tensor]:
        columns = [column for lookup in lookups for column in lookup.apart()]
        places: dict[str, list[int]] = {table.name: [] for table in self.layout.tables}
        for i, column in enumerate(columns):
            places[column.tables[0]].append(i)
        asked = []
        vectors: dict[int, Tensor] = {}
        gradients = torch.is_grad_enabled()
        # On a CPU, FBGEMM's lookups exist only as differentiable functions, which inference mode does not find.
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            for home in self.homes:
                groups = [[columns[i] for i in places[table.name]] for table in home.tables]
                asked.append((home, groups, home.ask(groups)))
            for home, groups, waiting in asked:
                for table, found in zip(home.tables, home.answer(waiting, groups)):
                    vectors |= zip(places[table.name], found)
        parts = iter(_Together.apply(*(vectors[i] for i in range(len(columns)))))
        return [beside([next(parts) for _ in lookup.tables]) for lookup in lookups]

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
        state = {}
        for i, group in enumerate(self.shards.values()):
            sums = [shards.gather(shards.sums, shards.sums_width) for shards in group]
            if rank() == 0:
                state[i] = {"sum": torch.cat([of_table for of_table in sums if of_table is not None])}
        return {"state": state, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, group in enumerate(self.shards.values()):
            parts = state_dict["state"][i]["sum"].split([shards.table.rows for shards in group])
            for shards, part in zip(group, parts):
                shards.scatter(part, shards.sums)


class _Plan(NamedTuple):
    ways: dict[str, Any]  # table -> TorchRec's way of splitting it
    optimizer: EmbeddingOptimizer
    device: torch.device

    @property
    def fused(self) -> dict[str, Any]:
        kind, lr, eps = self.optimizer.embedding, self.optimizer.embedding_lr, self.optimizer.embedding_eps
        return {"optimizer": OPTIMIZERS[kind], "learning_rate": lr, "eps": eps}


class _Shards:
    """One table: which process holds which rectangle of it, and what this process holds."""

    def __init__(self, table: Table, weight: Any, sums: Any, plan: _Plan):
        self.table, self.device = table, plan.device
        self.sums_width = 1 if plan.optimizer.embedding == "rowwise_adagrad" else table.dim
        shards = weight.metadata().shards_metadata
        self.pieces = [(shard.placement.rank(), shard.shard_offsets, shard.shard_sizes) for shard in shards]
        self.weight, self.sums = _local(weight), _local(sums)  # [rows, columns]; Adagrad's sums, [rows, 1] if row-wise

    def gather(self, local: Tensor | None, width: int) -> Tensor | None:
        """The whole [rows, width] on process 0, None elsewhere, of what each process holds of it."""
        whole = torch.empty(self.table.rows, width) if rank() == 0 else None
        for owner, (row, column), (rows, columns) in self.pieces:
            columns = min(columns, width)
            if whole is not None:
                piece = local
                if owner != 0:
                    piece = torch.empty(rows, columns, device=self.device)
                    dist.recv(piece, owner)
                assert piece is not None
                whole[row : row + rows, column : column + columns] = piece
            elif owner == rank():
                assert local is not None
                dist.send(local.contiguous(), 0)
        return whole

    def scatter(self, whole: Tensor, local: Tensor | None) -> None:
        """This process's part of the whole."""
        for owner, (row, column), (rows, columns) in self.pieces:
            if owner == rank():
                assert local is not None
                local.copy_(whole[row : row + rows, column : column + columns])


class _Home(ABC):
    """Tables that TorchRec looks up in one call; to it they are t0, t1, ..., each with one feature of that name."""

    def __init__(self, tables: list[Table], whole: nn.Module, sharder: Any, key: str, plan: _Plan):
        self.tables, self.names, self.device = tables, _names(tables), plan.device
        ways = {name: plan.ways[table.name] for name, table in zip(self.names, tables)}
        parts = sharding_plan.construct_module_sharding_plan(whole, ways, sharder, device_type=plan.device.type)
        assert dist.group.WORLD is not None
        self.module = sharder.shard(whole, parts, ShardingEnv.from_process_group(dist.group.WORLD), plan.device)
        weights = self.module.state_dict()
        sums = self.module.fused_optimizer.state_dict()["state"]  # of the tables that have a shard here
        self.shards = []
        for name, table in zip(self.names, tables):
            path = f"{key}.{name}.weight"
            self.shards.append(_Shards(table, weights[path], sums.get(path, {}).get(f"{name}.momentum1"), plan))

    def ids(self, groups: list[list[Lookup]]) -> tuple[Tensor, list[int]]:
        """The ids of all lookups, table by table, and how many each table has."""
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        ids = torch.cat([none, *(lookup.ids.flatten() for group in groups for lookup in group)])
        return ids, [sum(lookup.ids.numel() for lookup in group) for group in groups]

    @abstractmethod
    def ask(self, groups: list[list[Lookup]]) -> Any:
        """Start the lookups of each table."""

    @abstractmethod
    def answer(self, waiting: Any, groups: list[list[Lookup]]) -> list[list[Tensor]]:
        """Their vectors, as `EmbeddingCollection.look_up` returns them."""


class _Vectors(_Home):
    """Tables of one width, looked up id by id: a batch of one row, whose list for a table holds all ids of a step."""

    def __init__(self, tables: list[Table], plan: _Plan):
        configs = [
            EmbeddingConfig(name=name, feature_names=[name], num_embeddings=table.rows, embedding_dim=table.dim)
            for name, table in zip(_names(tables), tables)
        ]
        whole = VectorCollection(tables=configs, device=torch.device("meta"))
        super().__init__(tables, whole, EmbeddingCollectionSharder(plan.fused), "embeddings", plan)

    def ask(self, groups: list[list[Lookup]]) -> Any:
        ids, counts = self.ids(groups)
        lengths = torch.tensor(counts, device=ids.device)
        return self.module(KeyedJaggedTensor(self.names, ids, lengths=lengths, stride=1, length_per_key=counts))

    def answer(self, waiting: Any, groups: list[list[Lookup]]) -> list[list[Tensor]]:
        answers = []
        for name, group in zip(self.names, groups):
            parts = waiting[name].values().split([lookup.ids.numel() for lookup in group])
            answers.append([lookup.pooled(part) for lookup, part in zip(group, parts)])
        return answers


class _Bags(_Home):
    """Tables of multi-valued features: only sums and means are sent, of as many rows as the longest feature has."""

    def __init__(self, tables: list[Table], plan: _Plan, pooling: dict[str, str]):
        kinds = {"mean": PoolingType.MEAN, "sum": PoolingType.SUM}
        configs = [
            EmbeddingBagConfig(
                name=name, feature_names=[name], num_embeddings=table.rows, embedding_dim=table.dim,
                pooling=kinds[pooling[table.name]],
            )
            for name, table in zip(_names(tables), tables)
        ]  # fmt: skip
        whole = BagCollection(tables=configs, device=torch.device("meta"))
        super().__init__(tables, whole, EmbeddingBagCollectionSharder(plan.fused), "embedding_bags", plan)

    def ask(self, groups: list[list[Lookup]]) -> Any:
        ids, counts = self.ids(groups)
        lengths = [torch.cat([ids.new_empty(0), *(_lengths(lookup) for lookup in group)]) for group in groups]
        rows = max(map(len, lengths))
        padded = torch.cat([nn.functional.pad(one, (0, rows - len(one))) for one in lengths])
        return self.module(KeyedJaggedTensor(self.names, ids, lengths=padded, stride=rows, length_per_key=counts))

    def answer(self, waiting: Any, groups: list[list[Lookup]]) -> list[list[Tensor]]:
        found = waiting.to_dict()
        answers = []
        for name, group in zip(self.names, groups):
            sizes = [len(_lengths(lookup)) for lookup in group]
            answers.append(list(found[name][: sum(sizes)].split(sizes)))
        return answers


class _Together(torch.autograd.Function):
    """The same tensors; as soon as one gets a gradient all do, so that no process misses an exchange of the others."""

    @staticmethod
    def forward(ctx: Any, *vectors: Tensor) -> tuple[Tensor, ...]:
        return vectors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradients


def _way(owners: list[int], sharding: Sharding) -> Any:
    kernel = EmbeddingComputeKernel.FUSED.value  # TorchRec's own choice would be another, whose lists crash on a CPU
    if len(owners) == 1:
        return sharding_plan.table_wise(rank=owners[0], compute_kernel=kernel)
    if sharding == "column_wise":
        return sharding_plan.column_wise(ranks=owners, compute_kernel=kernel)
    return sharding_plan.row_wise(compute_kernel=kernel)


def _local(table: Any) -> Tensor | None:
    """What this process holds of a ShardedTensor, as a matrix."""
    shards = table.local_shards() if table is not None else []
    return shards[0].tensor.detach().view(len(shards[0].tensor), -1) if shards else None


def _lengths(lookup: Lookup) -> Tensor:
    assert lookup.lengths is not None, f"table {lookup.tables[0]} holds multi-valued features"
    return lookup.lengths


def _names(tables: list[Table]) -> list[str]:
    return [f"t{i}" for i in range(len(tables))]
