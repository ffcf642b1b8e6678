"""The dense part of a model, exported and compiled ahead of time, scores as the model does, whatever the sizes."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.inference.export import Dense, compile_dense, compiler, dense_inputs, export_dense, load_dense
from scalerec.models import dcnv2, dlrm_mlp, rankmixer
from scalerec.schema import Categorical, Group, MultiCategorical, Numeric, Schema, Sequence, SequenceField, Task

LENGTHS = (0, 1, 5, 12, 0, 3)  # events of the users' pasts
ROWS = 90


@pytest.fixture(scope="module")
def encoder_and_batch():
    who = (Categorical(name="user"), Numeric(name="age", encoding="linear"))
    pasts = (
        Sequence(name="seen", fields=(SequenceField(of="video"), SequenceField(of="genre"))),
        Sequence(name="liked", fields=(SequenceField(of="video"),)),
    )
    what = (Categorical(name="video"), Categorical(name="genre", dim=8), MultiCategorical(name="tags", dim=8))
    schema = Schema(
        user="user",
        item="video",
        groups=(
            Group(name="who", side="user", features=who),
            Group(name="past", side="user", features=pasts),
            Group(name="what", side="item", features=what),
        ),
        tasks=(Task(name="click"), Task(name="like")),
    )
    random = np.random.default_rng(0)
    seen = [random.integers(0, 20, length).tolist() for length in LENGTHS]
    user, video = np.arange(ROWS) % len(LENGTHS), random.integers(0, 20, ROWS)
    rows = pa.RecordBatch.from_pydict(
        {
            "user": user,
            "age": user * 10.0,
            "video": video,
            "genre": video % 4,
            "tags": [random.integers(0, 5, n % 3).tolist() for n in range(ROWS)],
            "seen_video": [seen[u] for u in user],
            "seen_genre": [[v % 4 for v in seen[u]] for u in user],
            "liked_video": [seen[u][::2] for u in user],
            "click": random.integers(0, 2, ROWS),
            "like": random.integers(0, 2, ROWS),
        }
    )
    encoder = Encoder.fit(schema, [rows])
    return encoder, encoder.encode(rows)


def cases(batch):
    """Batches of many shapes: (what, batch)."""
    for rows in (1, 2, 7, 64, ROWS):
        yield f"{rows} rows", batch.take(torch.arange(rows))
    yield "a user for each row", batch.take(torch.arange(7)).unshared()
    for user, length in enumerate(LENGTHS):
        yield f"a request of a user with {length} events", batch.take((batch.user_of_row == user).nonzero()[:, 0])
    without = torch.tensor([length == 0 for length in LENGTHS])[batch.user_of_row]
    yield "only empty pasts", batch.take(without.nonzero()[:, 0])


def build(config, encoder):
    torch.manual_seed(0)
    return config.build(encoder.layout).eval()


def assert_scores_equal(dense, model, batch):
    for what, part in cases(batch):
        with torch.no_grad():
            user, items = model.embeddings(part.user, part.items)
            found = dense(*dense_inputs(user, items, part.user_of_row))
            torch.testing.assert_close(found, model(part).logits, rtol=0, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [rankmixer.tiny(), rankmixer.tiny().model_copy(update={"sequence": "mean"}), dcnv2.tiny(), dlrm_mlp.tiny()],
    ids=["rankmixer", "rankmixer-mean", "dcnv2", "dlrm_mlp"],
)
def test_exported_equals_eager(config, encoder_and_batch):
    encoder, batch = encoder_and_batch
    model = build(config, encoder)
    program = export_dense(model)
    assert_scores_equal(program.module(), model, batch)


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler is installed")
def test_compiled_equals_eager(encoder_and_batch, tmp_path):
    encoder, batch = encoder_and_batch
    model = build(rankmixer.tiny(), encoder)
    assert "seen" in model.join.din
    path = compile_dense(export_dense(model), tmp_path / "dense.pt2")
    assert_scores_equal(load_dense(path), model, batch)


@pytest.mark.slow
def test_tables_stay_outside(encoder_and_batch):
    model = build(rankmixer.tiny(), encoder_and_batch[0])
    program = export_dense(model)
    dense = {name for name, _ in model.named_parameters() if not name.startswith("embeddings.")}
    assert {name.removeprefix("model.") for name in program.state_dict} == dense


def test_dense_module_shares_weights_and_leaves_the_model_alone(encoder_and_batch):
    encoder, batch = encoder_and_batch
    model = build(rankmixer.tiny(), encoder)
    dense = Dense(model)
    with torch.no_grad():
        model.heads.bias.fill_(3.0)
    assert_scores_equal(dense, model, batch)
    assert "embeddings.tables.video" in model.state_dict()


@pytest.mark.slow
def test_exporting_in_training_is_of_the_evaluation_mode(encoder_and_batch):
    encoder, batch = encoder_and_batch
    model = build(rankmixer.tiny().model_copy(update={"dropout": 0.5}), encoder).train()
    program = export_dense(model)
    assert model.training and model.blocks[0].dropout.training
    assert_scores_equal(program.module(), model.eval(), batch)


def test_without_a_compiler_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "nothing-here"))
    with pytest.raises(InputError, match="no C\\+\\+ compiler"):
        compile_dense(None, tmp_path / "dense.pt2")
