"""The tables of a single-device model split over processes by TorchRec; the model's own code stays as it is.

k ids   n lists   R rows   D width
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal, Protocol

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

Sharding = Literal["table_wise", "column_wise"]
OPTIMIZERS = {"adagrad": EmbOptimType.EXACT_ADAGRAD, "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
COLUMNS = 4  # FBGEMM moves floats by four
Owners = dict[str, list[int]]  # table -> ranks


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
    """The state dict of the same model unsharded, on process 0; empty on the others, which must call it too."""
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
        self.layout, self.linear = whole.layout, whole.linear
        _check(self.layout.tables, optimizer, sharding)
        fused = {
            "optimizer": OPTIMIZERS[optimizer.embedding],
            "learning_rate": optimizer.embedding_lr,
            "eps": optimizer.embedding_eps,
        }
        owners = place(self.layout.tables, world(), columns=sharding == "column_wise")
        pooling = pooled_tables(self.layout)
        pooled = [table for table in self.layout.tables if table.name in pooling]
        widths: dict[int, list[Table]] = {}  # TorchRec wants one width where it does not pool
        for table in self.layout.tables:
            if table.name not in pooling:
                widths.setdefault(table.dim, []).append(table)
        # Kept from nn.Module's sight: these weights update themselves; no optimiser and no state dict may list them.
        homes: list[_Home] = [_Bags(pooled, pooling, owners, fused, device)] if pooled else []
        self.homes = (*homes, *(_Vectors(tables, owners, fused, device) for tables in widths.values()))
        self._fill(dict(whole.table_weights()))

    def look_up(self, lookups: list[Lookup]) -> list[Tensor]:
        places: dict[str, list[int]] = {table.name: [] for table in self.layout.tables}
        for i, lookup in enumerate(lookups):
            places[lookup.table].append(i)
        asked = []
        vectors: dict[int, Tensor] = {}
        # FBGEMM has its lookups on a CPU as differentiable functions only: not in inference mode, but without gradients.
        with nullcontext() if not torch.is_inference_mode_enabled() else _no_gradients():
            for home in self.homes:
                groups = [[lookups[i] for i in places[table.name]] for table in home.tables]
                asked.append((home, groups, home.ask(groups)))
            for home, groups, waiting in asked:
                for table, found in zip(home.tables, home.answer(waiting, groups)):
                    vectors |= zip(places[table.name], found)
        return list(_Together.apply(*(vectors[i] for i in range(len(lookups)))))

    def sparse_parameters(self) -> list[nn.Parameter]:
        return []

    def _fill(self, weights: dict[str, Tensor]) -> None:
        for home in self.homes:
            home.module.load_state_dict({key: weights[table.name] for key, table in zip(home.keys, home.tables)})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for home in self.homes:
            shards = home.module.state_dict()
            for key, table in zip(home.keys, home.tables):
                weight = _whole(shards[key])
                if weight is not None:
                    destination[f"{prefix}tables.{table.name}"] = weight

    def _load_from_state_dict(self, state_dict, prefix, _metadata, _strict, missing, unexpected, errors) -> None:
        weights = {}
        for table in self.layout.tables:
            value = state_dict.pop(f"{prefix}tables.{table.name}", None)
            if value is None:
                missing.append(f"{prefix}tables.{table.name}")
            elif value.shape != (table.rows, table.dim):
                found = tuple(value.shape)
                errors.append(f"table {table.name!r}: {found} in the checkpoint, {(table.rows, table.dim)} here")
            else:
                weights[table.name] = value
        if len(weights) == len(self.layout.tables):
            self._fill(weights)


class _Home:
    """Tables that TorchRec looks up in one call; to it they are t0, t1, ..., each with one feature of that name."""

    keys: list[str]  # of the tables in the module's state dict

    def __init__(self, tables: list[Table], whole: nn.Module, sharder: Any, owners: Owners, device: torch.device):
        self.tables, self.names = tables, _names(tables)
        fused = EmbeddingComputeKernel.FUSED.value  # not TorchRec's own choice on a CPU, whose unpooled form crashes
        ways = {
            name: sharding_plan.column_wise(ranks=owners[table.name], compute_kernel=fused)
            if len(owners[table.name]) > 1
            else sharding_plan.table_wise(rank=owners[table.name][0], compute_kernel=fused)
            for name, table in zip(self.names, tables)
        }
        plan = sharding_plan.construct_module_sharding_plan(whole, ways, sharder, device_type=device.type)
        assert dist.group.WORLD is not None
        self.module = sharder.shard(whole, plan, ShardingEnv.from_process_group(dist.group.WORLD), device)

    def ask(self, groups: list[list[Lookup]]) -> Any:
        """Start the lookups of each table."""
        raise NotImplementedError

    def answer(self, waiting: Any, groups: list[list[Lookup]]) -> list[list[Tensor]]:
        """Their vectors, as `EmbeddingCollection.look_up` returns them."""
        raise NotImplementedError


class _Vectors(_Home):
    """Tables of one width, looked up id by id: a batch of one row, whose list for a table holds all ids of a step."""

    def __init__(self, tables: list[Table], owners: Owners, fused: dict[str, Any], device: torch.device):
        configs = [
            EmbeddingConfig(name=name, feature_names=[name], num_embeddings=table.rows, embedding_dim=table.dim)
            for name, table in zip(_names(tables), tables)
        ]
        whole = VectorCollection(tables=configs, device=torch.device("meta"))
        super().__init__(tables, whole, EmbeddingCollectionSharder(fused), owners, device)
        self.keys = [f"embeddings.{name}.weight" for name in self.names]

    def ask(self, groups: list[list[Lookup]]) -> Any:
        ids = torch.cat([lookup.ids for group in groups for lookup in group])
        counts = [sum(lookup.ids.numel() for lookup in group) for group in groups]
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

    def __init__(
        self, tables: list[Table], pooling: dict[str, str], owners: Owners, fused: dict[str, Any], device: torch.device
    ):
        configs = [
            EmbeddingBagConfig(
                name=name, feature_names=[name], num_embeddings=table.rows, embedding_dim=table.dim,
                pooling=PoolingType.MEAN if pooling[table.name] == "mean" else PoolingType.SUM,
            )
            for name, table in zip(_names(tables), tables)
        ]  # fmt: skip
        whole = BagCollection(tables=configs, device=torch.device("meta"))
        super().__init__(tables, whole, EmbeddingBagCollectionSharder(fused), owners, device)
        self.keys = [f"embedding_bags.{name}.weight" for name in self.names]

    def ask(self, groups: list[list[Lookup]]) -> Any:
        ids = torch.cat([lookup.ids for group in groups for lookup in group])
        counts = [sum(lookup.ids.numel() for lookup in group) for group in groups]
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
    """The same tensors; as soon as one gets a gradient all do, so that no process skips a step of the others."""

    @staticmethod
    def forward(ctx: Any, *vectors: Tensor) -> tuple[Tensor, ...]:
        return vectors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradients


@contextmanager
def _no_gradients():
    with torch.inference_mode(False), torch.no_grad():
        yield


def place(tables: Iterable[Table], ranks: int, columns: bool) -> Owners:
    """The ranks of each table's column shards, in order: largest tables first, each to the ranks that hold least."""
    held = [0] * ranks
    owners = {}
    for table in sorted(tables, key=lambda table: -table.rows * table.dim):
        pieces = max(n for n in range(1, ranks + 1) if table.dim % (n * COLUMNS) == 0) if columns else 1
        owners[table.name] = sorted(sorted(range(ranks), key=held.__getitem__)[:pieces])
        for owner in owners[table.name]:
            held[owner] += table.rows * table.dim // pieces
    return owners


def pooled_tables(layout: Layout) -> dict[str, str]:
    """The tables that only multi-valued features read, and how they pool."""
    readers: dict[str, set[str]] = {table.name: set() for table in layout.tables}
    for feature in (feature for group in layout.groups for feature in group.features):
        for table in feature.tables:
            readers[table].add(feature.pooling if feature.kind == "multi" else "")
    return {name: found.pop() for name, found in readers.items() if found in ({"mean"}, {"sum"})}


def _check(tables: tuple[Table, ...], optimizer: EmbeddingOptimizer, sharding: Sharding) -> None:
    if sharding == "column_wise" and optimizer.embedding == "rowwise_adagrad":
        # One accumulator for each row of each shard, not for each row: no longer the optimiser of one process.
        raise InputError("row-wise Adagrad needs whole rows: shard table_wise, or use --optimizer.embedding adagrad")
    odd = next((table for table in tables if table.dim % COLUMNS), None)
    if odd is not None:
        raise InputError(f"table {odd.name!r} is {odd.dim} wide: sharded tables need a multiple of {COLUMNS}")


def _whole(table: Any) -> Tensor | None:
    """A table put together on process 0 from its shards, sent one by one; None on the others."""
    weight = torch.empty(table.metadata().size) if rank() == 0 else None
    local = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in table.local_shards()}
    for shard in table.metadata().shards_metadata:
        owner, piece = shard.placement.rank(), local.get(tuple(shard.shard_offsets))
        if weight is not None:
            if piece is None:
                piece = torch.empty(shard.shard_sizes, device=table._get_preferred_device())
                dist.recv(piece, owner)
            (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
            weight[row : row + rows, column : column + columns] = piece
        elif piece is not None:
            dist.send(piece.contiguous(), 0)
    return weight


def _lengths(lookup: Lookup) -> Tensor:
    assert lookup.lengths is not None, f"table {lookup.table} holds multi-valued features"
    return lookup.lengths


def _names(tables: list[Table]) -> list[str]:
    return [f"t{i}" for i in range(len(tables))]
