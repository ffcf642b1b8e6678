"""Predictions are those of one large batch, however the rows are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scalerec import evaluate
from scalerec.batch import MISSING, UNKNOWN, Batch, Outputs, Rows
from scalerec.errors import InputError
from scalerec.models.hstu import HSTUConfig
from scalerec.models.sasrec import SASRecConfig
from scalerec.models.sequential import SequentialConfig
from scalerec.models.two_tower import TwoTowerConfig
from tests.unit import sequences
from tests.unit.sequences import RESEARCH, awake, layout, model_of


def rows_of(side: str, count: int) -> Rows:
    return Rows(side, torch.arange(count)[:, None], torch.zeros(count, 0), {}, {})


def batch_of(count: int) -> Batch:
    """Rows numbered from 0, of one user each; label, weight and user code follow from the number."""
    index = torch.arange(count)
    labels = torch.stack([index % 2, index % 3 == 0], 1).float()
    return Batch(rows_of("user", count), rows_of("item", count), index, labels, labels + 1, index * 7, index)


def model(batch: Batch) -> Outputs:
    return Outputs(torch.cat([batch.items.ids, -batch.items.ids], 1) / 100)


@pytest.mark.parametrize("sizes", [[57], [1] * 57, [16, 16, 16, 9], [3, 0, 20, 0, 0, 34], [40, 10, 5, 1, 1]])
def test_rows_come_in_order_however_they_are_cut(sizes):
    whole = batch_of(57)
    cuts = [whole.take(index) for index in torch.arange(57).split(sizes)]
    found, expected = evaluate.predict(model, cuts), evaluate.predict(model, [whole])
    for name in found._fields:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6)
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert found.index.tolist() == list(range(57)) and found.users.tolist() == list(range(0, 57 * 7, 7))
    np.testing.assert_allclose(found.probabilities[:, 0], 1 / (1 + np.exp(-np.arange(57) / 100)), rtol=1e-6)


def test_no_rows_are_an_error_of_the_input():
    with pytest.raises(InputError, match="no rows to evaluate"):
        evaluate.predict(model, [])


def test_small_arrays_are_not_kept(monkeypatch):
    joined = evaluate._joined
    held: list[int] = []

    def counted(parts: list[evaluate.Predictions]) -> evaluate.Predictions:
        held.append(len(parts))
        return joined(parts)

    monkeypatch.setattr(evaluate, "_joined", counted)
    whole = batch_of(1023)
    assert len(evaluate.predict(model, (whole.take(index) for index in torch.arange(1023).split(1))).index) == 1023
    assert max(held) == 10


@pytest.mark.parametrize("goal", ["joint", "retrieval", "ranking"])
def test_histories_are_encoded_once(goal: str, monkeypatch: pytest.MonkeyPatch):
    """For logits and places alike, and both are what each alone would be."""
    both = model_of(goal=goal)
    batches = [sequences.batch([5, 3], [0, 1, 1], seed=0), sequences.batch([2, 7], seed=1)]
    calls, encode = [], both.encode_user
    with torch.no_grad():
        logits = torch.cat([both(batch).logits for batch in batches])
        states = [both.encode_user(both.embeddings(batch.user)[0]) for batch in batches]
        if both.retrieves:
            catalogue = both.catalogue()
            places = torch.cat([both.places(state, batch, catalogue) for state, batch in zip(states, batches)])
    monkeypatch.setattr(both, "encode_user", lambda user: calls.append(len(user.flat)) or encode(user))
    found = evaluate.predict(both, batches)
    assert calls == [2, 2]
    assert found.probabilities.shape == ((5, 1) if both.ranks else (5, 0))
    if both.ranks:
        np.testing.assert_array_equal(found.probabilities, torch.sigmoid(logits).numpy())
    assert found.places.shape == ((5, 1) if both.retrieves else (5, 0))
    if both.retrieves:
        np.testing.assert_array_equal(found.places[:, 0], places.numpy())


@pytest.mark.parametrize("kind", [HSTUConfig(**RESEARCH), SASRecConfig(dim=8), TwoTowerConfig(dim=8, hidden=(16,))])
def test_a_row_without_an_item_asks_for_none(kind: SequentialConfig):
    """An unknown item is one that is not found."""
    batch = sequences.batch([3, 4, 5])
    batch.items.ids[:2, 0] = torch.tensor([MISSING, UNKNOWN])
    found = evaluate.predict(awake(kind, layout()), [batch])
    assert np.isnan(found.places[0, 0]) and np.isinf(found.places[1, 0]) and np.isfinite(found.places[2, 0])
    assert evaluate.tables(found, ("like",))["next"]["hr@10"] <= 0.5
