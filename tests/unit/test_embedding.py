"""Lookups of many features at once against each row of each table by itself."""

from __future__ import annotations

import torch

from scalerec.batch import Jagged, Rows
from scalerec.features.layout import FeatureLayout, GroupLayout, Layout, Table
from scalerec.layers.embedding import EmbeddingCollection

TABLES = {"a": 4, "b": 4, "c": 4, "d": 8, "m": 4, "e": 4}


def feature(name: str, kind: str, width: int, tables: tuple[str, ...] = ()) -> FeatureLayout:
    return FeatureLayout(name=name, kind=kind, width=width, tables=tables)  # type: ignore[arg-type]


def test_features_side_by_side_are_what_each_table_says():
    torch.manual_seed(0)
    features = (
        feature("a", "id", 4, ("a",)), feature("b", "id", 4, ("b",)), feature("n", "number", 4),
        feature("c", "id", 4, ("c",)), feature("d", "id", 8, ("d",)), feature("m", "multi", 4, ("m",)),
        feature("again", "id", 4, ("a",)), feature("e", "id", 4, ("e",)),
        feature("past", "sequence", 20, ("a", "c", "d", "e")),
    )  # fmt: skip
    layout = Layout(
        tables=tuple(Table(name=name, rows=9, dim=dim) for name, dim in TABLES.items()),
        groups=(GroupLayout(name="all", side="user", features=features),), tasks=("click",),
    )  # fmt: skip
    collection = EmbeddingCollection(layout)
    weights = dict(collection.table_weights())
    ids = torch.randint(9, (5, 6))
    bags, past = [[3, 4], [], [5], [6, 6, 7], [8]], [[], [3, 4], [5], [], [6, 7, 8]]
    lengths = torch.tensor([len(bag) for bag in bags])
    events = torch.randint(9, (6, 4))
    rows = Rows(
        "user", ids, torch.randn(5, 1),
        {
            "m": Jagged.from_lengths(torch.tensor([one for bag in bags for one in bag]), lengths),
            "past": Jagged.from_lengths(events, torch.tensor([len(one) for one in past])),
        },
        {},
    )  # fmt: skip
    (found,) = collection(rows)
    columns = dict(zip(("a", "b", "c", "d", "again", "e"), ids.T))
    number = collection.linear["user"](rows.numbers)[0]
    bag = torch.stack([weights["m"][one].mean(0) if one else torch.zeros(4) for one in bags])
    table = {"again": "a"}
    parts = {name: weights[table.get(name, name)][column] for name, column in columns.items()}
    parts |= {"n": number, "m": bag}
    expected = torch.cat([parts[one.name] for one in features[:-1]], 1)
    torch.testing.assert_close(found.flat, expected)
    vectors = torch.cat([weights[name][events[:, j]] for j, name in enumerate(("a", "c", "d", "e"))], 1)
    torch.testing.assert_close(found.sequences["past"].values[found.sequences["past"].mask], vectors)

    found.flat.sum().backward()
    counted = torch.bincount(torch.cat([columns["a"], columns["again"]]), minlength=9).float()
    first = collection.place["a"][1]
    gradient = collection.weight(4).grad
    assert gradient is not None
    torch.testing.assert_close(gradient.to_dense()[first : first + 9], counted[:, None].expand(9, 4))
