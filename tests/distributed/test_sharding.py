"""Sharded = whole: two processes train what one process trains, and checkpoints move both ways.

pytest starts this very file under torchrun, where `work` writes what `runs` then reads.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import scalerec
from scalerec import checkpoint, evaluate
from scalerec.distributed.placement import check, place, pooled_tables
from scalerec.distributed.ranks import add_over_ranks, average_gradients, join, leave, rank, world
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.features.layout import Table
from scalerec.losses import total
from scalerec.models import rankmixer
from scalerec.schema import (
    Categorical,
    Cross,
    Group,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
    SequenceField,
    Task,
)  # fmt: skip
from scalerec.training.optim import OptimizerConfig, load_state_tensors, state_tensors

needs_torchrec = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("torchrec") is None, reason="torchrec is not installed"),
]

CASES = [
    ("table_wise", "adagrad"), ("table_wise", "rowwise_adagrad"), ("column_wise", "adagrad"),
    ("row_wise", "adagrad"), ("row_wise", "rowwise_adagrad"),
]  # fmt: skip
SIZES = (48, 48, 37, 1, 48)  # rows of the steps; of the single row, process 1 gets nothing
FIRST = 3  # steps before the checkpoint from which a run goes on

SCHEMA = Schema(
    user="user",
    item="video",
    groups=(
        Group(name="who", side="user", features=(
            Categorical(name="user"), MultiCategorical(name="interests", pooling="sum"),
            Numeric(name="age", buckets=8), Numeric(name="income", encoding="linear"),
        )),
        Group(name="past", side="user", features=(
            Sequence(name="seen", fields=(SequenceField(of="video"), SequenceField(of="genre"))),
        )),
        Group(name="what", side="item", features=(
            Categorical(name="video"), Categorical(name="genre", dim=8), MultiCategorical(name="tags", dim=8),
            Cross(name="genre.user", of=("genre", "user"), buckets=50),
        )),
    ),
    tasks=(Task(name="click"), Task(name="like")),
)  # fmt: skip


def make_batches():
    """An encoder and the batches of five steps; labels are masked, and pasts empty, much more on some rows."""
    random = np.random.default_rng(0)
    n, users, videos = sum(SIZES), 14, 40
    user, video = random.integers(0, users, n), random.integers(0, videos, n)
    user[:48] = np.arange(48) % users  # in the first step odd rows, those of process 1, have no past
    user[sum(SIZES[:3])] = 1  # in the step of one row nobody has one: no gradient for the attention over it
    pasts = [random.integers(0, videos, 0 if u % 2 else random.integers(1, 9)).tolist() for u in range(users)]
    interests = [random.integers(0, 6, random.integers(0, 4)).tolist() for _ in range(users)]
    like = random.integers(0, 2, n).astype(float)
    like[(np.arange(n) % 2 == 0) & (random.random(n) < 0.8)] = np.nan
    rows = pa.RecordBatch.from_pydict({
        "user": user, "video": video, "genre": video % 5,
        "tags": [random.integers(0, 7, random.integers(0, 5)).tolist() for _ in range(n)],
        "interests": [interests[u] for u in user],
        "age": random.normal(size=users)[user],
        "income": pa.array([None if u % 3 == 0 else float(u) for u in user], pa.float64()),
        "seen_video": [pasts[u] for u in user],
        "seen_genre": [[v % 5 for v in pasts[u]] for u in user],
        "click": random.integers(0, 2, n).astype(float), "like": like,
    })  # fmt: skip
    encoder = Encoder.fit(SCHEMA, [rows])
    whole = encoder.encode(rows)
    ends = np.cumsum(SIZES)
    return encoder, [whole.take(torch.arange(end - size, end)) for size, end in zip(SIZES, ends)]


def mine(batch):
    """This process's rows, cut as the Loader does."""
    return batch.take(torch.arange(len(batch))[rank() :: world()])


def options(embedding):
    # Larger epsilons than the defaults: they damp the sign of gradients that are zero but for rounding.
    return OptimizerConfig(embedding=embedding, eps=1e-3, embedding_eps=1e-3)


def train(model, optimizers, batches, add=add_over_ranks, scale=1.0):
    """The steps of a training loop, the same for one process and for many; their losses."""
    dense = model.dense_parameters()
    losses = []
    for batch in map(mine, batches):
        terms = add(model.loss(model(batch), batch))
        loss = total(terms)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        (loss * scale).backward()
        average_gradients(dense)
        for optimizer in optimizers.values():
            optimizer.step()
        losses.append(loss.item())
    return losses


def build(encoder, seed=0):
    torch.manual_seed(seed)
    return rankmixer.tiny().build(encoder.layout)


def save(folder, encoder, weights, optimizers, predictions, losses):
    run = {"model": rankmixer.tiny().model_dump(mode="json")}
    tensors = state_tensors(optimizers)
    tensors["predictions"] = torch.from_numpy(predictions)
    if rank() == 0:
        checkpoint.save(folder, run, encoder, encoder.layout, weights, tensors, {"losses": losses})


def whole(folder, encoder, batches, embedding):
    """One process: a checkpoint after the first steps in `folder`-first, and after all of them in `folder`."""
    model, config = build(encoder), options(embedding)
    optimizers = {
        "dense": config.build_dense(model.dense_parameters()),
        "embedding": config.build_embedding(model.embeddings.sparse_parameters()),
    }
    losses = []
    for part, name in ((batches[:FIRST], f"{folder.name}-first"), (batches[FIRST:], folder.name)):
        losses += train(model, optimizers, part)
        predictions = evaluate.predict(model, batches).probabilities
        target = folder.with_name(name)
        save(target, encoder, model.state_dict(), optimizers, predictions, losses)


def sharded(folder, encoder, batches, embedding, sharding, start=None, **broken):
    """The same by all processes together, or only the steps after the checkpoint `start`."""
    from scalerec.distributed.torchrec import TableOptimizer, gather, shard

    config = options(embedding)
    model = build(encoder, seed=1 if start else 0)
    with torch.no_grad():
        for parameter in model.dense_parameters():
            parameter += rank()  # the dense part of process 0 is the one that counts
    model = shard(model, config, sharding, "cpu")
    optimizers = {"dense": config.build_dense(model.dense_parameters()), "embedding": TableOptimizer(model)}
    if start:
        earlier = checkpoint.load(start)
        model.load_state_dict(earlier.weights)
        tensors = earlier.state_tensors()
        load_state_tensors(optimizers, {name: value for name, value in tensors.items() if name != "predictions"})
        batches = batches[FIRST:]
    losses = train(model, optimizers, batches, **broken)
    predictions = evaluate.predict(model, make_batches()[1]).probabilities
    save(folder, encoder, gather(model), optimizers, predictions, losses)
    return model


def work(out):
    """What each of the two processes does."""
    torch.use_deterministic_algorithms(True)  # as the training loop has it
    torch.utils.deterministic.fill_uninitialized_memory = False
    join()
    encoder, batches = make_batches()
    homes = {}
    for sharding, embedding in CASES:
        model = sharded(out / f"{sharding}-{embedding}", encoder, batches, embedding, sharding)
        homes[sharding] = {
            type(home).__name__: [table.name for table in home.tables] for home in model.embeddings.homes
        }
        held = [shards.weight is not None for shards in model.embeddings.shards]
        counts = torch.tensor(held).int()
        dist.all_reduce(counts)
        homes[sharding]["holders"] = counts.tolist()
        start = out / f"whole-{embedding}-first"
        sharded(out / f"{sharding}-{embedding}-on", encoder, batches, embedding, sharding, start)
    sharded(out / "own-means", encoder, batches, "adagrad", "table_wise", add=lambda terms: terms)
    sharded(out / "half-gradients", encoder, batches, "adagrad", "table_wise", scale=0.5)
    # A gradient for one table only, on one process only: the exchanges of the others must take place all the same.
    lookups = model.embeddings.lookups(batches[0].user)
    vectors = model.embeddings.look_up(lookups)
    (vectors[0] if rank() else torch.cat([v.flatten() for v in vectors])).sum().backward()
    if rank() == 0:
        (out / "homes.json").write_text(json.dumps(homes))
    leave()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    encoder, batches = make_batches()
    for embedding in ("adagrad", "rowwise_adagrad"):
        whole(out / f"whole-{embedding}", encoder, batches, embedding)
    source = str(Path(scalerec.__file__).parent.parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, _ = process.communicate(timeout=80)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the processes hang: {process.communicate()[0][-3000:]}")
    assert process.returncode == 0, said[-5000:]
    return out


def read(folder):
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "state.safetensors")
    return SimpleNamespace(weights=load_file(folder / "weights.safetensors"), tensors=tensors, losses=state["losses"])


def differences(run, reference):
    """How far losses (relative), weights and the optimisers' sums are from those of one process."""
    assert run.weights.keys() == reference.weights.keys()
    assert run.tensors.keys() == reference.tensors.keys()
    losses = reference.losses[-len(run.losses) :]
    return SimpleNamespace(
        loss=max(abs(a - b) / b for a, b in zip(run.losses, losses)),
        weight=max((run.weights[name] - value).abs().max().item() for name, value in reference.weights.items()),
        state=max((run.tensors[name] - value).abs().max().item() for name, value in reference.tensors.items()),
    )


class TestTwoProcesses:
    pytestmark = needs_torchrec

    @pytest.mark.parametrize(("sharding", "embedding"), CASES)
    def test_train_as_one(self, runs, sharding, embedding):
        found = differences(read(runs / f"{sharding}-{embedding}"), read(runs / f"whole-{embedding}"))
        assert found.loss < 1e-5
        assert found.weight < 1e-5
        assert found.state < 1e-5

    @pytest.mark.parametrize(("sharding", "embedding"), CASES)
    def test_go_on_from_a_checkpoint_of_one(self, runs, sharding, embedding):
        found = differences(read(runs / f"{sharding}-{embedding}-on"), read(runs / f"whole-{embedding}"))
        assert found.loss < 1e-5
        assert found.weight < 1e-5
        assert found.state < 1e-5

    @pytest.mark.parametrize(("sharding", "embedding"), CASES)
    def test_write_a_checkpoint_for_one(self, runs, sharding, embedding):
        loaded = checkpoint.load(runs / f"{sharding}-{embedding}")
        predictions = evaluate.predict(loaded.model(), make_batches()[1]).probabilities
        sharded_predictions = read(runs / f"{sharding}-{embedding}").tensors["predictions"].numpy()
        np.testing.assert_allclose(predictions, sharded_predictions, rtol=0, atol=1e-6)

    def test_means_of_each_process_are_found_out(self, runs):
        found = differences(read(runs / "own-means"), read(runs / "whole-adagrad"))
        assert found.loss > 1e-3
        assert found.weight > 1e-3

    def test_gradients_too_small_are_found_out(self, runs):
        assert differences(read(runs / "half-gradients"), read(runs / "whole-adagrad")).weight > 1e-3

    def test_tables_are_split_and_pooled(self, runs):
        homes = json.loads((runs / "homes.json").read_text())
        assert homes["table_wise"]["_Bags"] == homes["column_wise"]["_Bags"] == ["interests", "tags"]
        assert "_Bags" not in homes["row_wise"]
        assert set(homes["table_wise"]["holders"]) == {1}
        assert set(homes["column_wise"]["holders"]) == set(homes["row_wise"]["holders"]) == {2}


def test_the_batches_are_hard_enough():
    _, batches = make_batches()
    first = batches[0]
    halves = [first.take(torch.arange(len(first))[part::2]) for part in (0, 1)]
    assert halves[0].weights[:, 1].sum() < halves[1].weights[:, 1].sum() / 2
    assert halves[0].user.lists["seen"].lengths.min() > 0
    assert halves[1].user.lists["seen"].lengths.max() == 0
    assert len(first.user) < len(first)
    assert len(batches[3]) == 1 and batches[3].user.lists["seen"].lengths.tolist() == [0]


def test_tables_lie_evenly():
    tables = [Table(name=str(i), rows=rows, dim=16) for i, rows in enumerate((100, 60, 50, 30, 5))]
    owners = place(tables, "table_wise", 2)
    assert owners == {"0": [0], "1": [1], "2": [1], "3": [0], "4": [1]}
    assert all(ranks == [0, 1, 2, 3] for ranks in place(tables[:4], "column_wise", 4).values())


def test_tables_that_cannot_be_split_stay_whole():
    tables = [Table(name="narrow", rows=1000, dim=8), Table(name="short", rows=5, dim=64)]
    assert [len(ranks) for ranks in place(tables, "column_wise", 4).values()] == [2, 4]
    assert [len(ranks) for ranks in place(tables, "row_wise", 4).values()] == [4, 1]


def test_what_only_lists_read_is_pooled():
    assert pooled_tables(make_batches()[0].layout) == {"interests": "sum", "tags": "mean"}


def test_what_would_train_otherwise_is_refused():
    tables = [Table(name="a", rows=9, dim=16), Table(name="odd", rows=9, dim=6)]
    with pytest.raises(InputError, match="whole rows"):
        check(tables[:1], options("rowwise_adagrad"), "column_wise")
    with pytest.raises(InputError, match="'odd' is 6 wide"):
        check(tables, options("adagrad"), "table_wise")


def test_without_torchrec_the_error_says_what_to_install(monkeypatch):
    for module in ("torchrec", "fbgemm_gpu"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "scalerec.distributed.torchrec", raising=False)
    with pytest.raises(InputError, match="pip install --no-deps torchrec"):
        importlib.import_module("scalerec.distributed.torchrec")


def test_one_process_changes_nothing():
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.full((2,), 5.0)
    average_gradients(parameters)
    assert parameters[0].grad.tolist() == [5.0, 5.0] and parameters[1].grad is None
    terms = {"click": object()}
    assert add_over_ranks(terms) is terms
    assert (rank(), world()) == (0, 1)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
