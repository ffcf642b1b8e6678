"""A click log drawn from a known teacher, so that the best reachable AUC is known.

32 fields in 8 groups of 4, Zipf-distributed: four groups belong to the user, three to the item, one to the moment.
The "grouped" teacher lets groups interact (what semantic tokens assume), the "flat" one lets single fields interact,
with pairs and triples drawn without regard to groups. A row's history is its user's earlier clicks. The files also
hold each row's true probabilities, `p_click` and `p_like`.

n rows   F fields   N units (groups or fields)   R latent width   K tasks
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from scalerec.data.parts import ROW_GROUP, write_parts
from scalerec.data.source import Source
from scalerec.data.split import Split, TimeSplit
from scalerec.features import history
from scalerec.schema import Categorical, Group, Schema, Sequence, SequenceField, Task

USER_GROUPS, ITEM_GROUPS, CONTEXT_GROUPS = 4, 3, 1
GROUPS = ("user_a", "user_b", "user_c", "user_d", "item_a", "item_b", "item_c", "moment")
FIELDS_A_GROUP = 4
FIELDS = tuple(f"{group}_{i}" for group in GROUPS for i in range(FIELDS_A_GROUP))
ITEM = FIELDS.index("item_a_0")  # this field is the item's id
USER_FIELDS = USER_GROUPS * FIELDS_A_GROUP
ITEM_FIELDS = slice(USER_FIELDS, USER_FIELDS + ITEM_GROUPS * FIELDS_A_GROUP)
KEPT = slice(ITEM, ITEM + FIELDS_A_GROUP)  # what a history keeps of an item: the fields of its first group
TASKS = ("click", "like")
CLICK = TASKS.index("click")

RANK = 6
ZIPF = 1.05
SMALLEST, LARGEST = 10, 20_000  # vocabularies
ROWS_A_USER = 20
HISTORY = 20
DOUBT = 4.0  # a taste is the sum over the history divided by its length + DOUBT: one click says little
PERIOD = 1_000_000_000  # the log's time runs from 0 to here, whatever the number of rows
PAIRS_FLAT, TRIPLES = 64, 12
PILOT_USERS = 2_500  # the teacher is scaled on their rows
SHARES = {"pairs": 0.5, "triples": 0.2, "popularity": 0.1, "history": 0.2}  # of the logit's variance
BASE_RATE, BAYES_AUC = 0.3, 0.825


class Synthetic(Source):
    """A log with a known best score: `grouped` and `flat` share fields, marginals, difficulty and base rate."""

    kind: Literal["synthetic"] = "synthetic"
    split: Split = TimeSplit(column="time", validation=PERIOD * 7 // 10, test=PERIOD * 8 // 10)
    teacher: Literal["grouped", "flat"] = "grouped"
    rows: int = Field(default=1_000_000, ge=1_000)
    seed: int = Field(default=0, ge=0)

    def schema(self) -> Schema:
        def fields(group: str) -> tuple[Categorical, ...]:
            return tuple(Categorical(name=name) for name in FIELDS if name.rpartition("_")[0] == group)

        kept = tuple(SequenceField(of=name) for name in FIELDS[KEPT])
        clicked = Sequence(name="clicked", fields=kept, where="click", max_len=HISTORY)
        groups = [Group(name=name, side="user", features=fields(name)) for name in GROUPS[:USER_GROUPS]]
        groups += [Group(name="history", side="user", features=(clicked,))]
        groups += [Group(name=name, side="item", features=fields(name)) for name in GROUPS[USER_GROUPS:]]
        tasks = tuple(Task(name=name) for name in TASKS)
        return Schema(groups=tuple(groups), tasks=tasks, user="user", item=FIELDS[ITEM], time="time")

    def best_scores(self) -> dict[str, str]:
        return {task: f"p_{task}" for task in TASKS}

    def build(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        progress(f"drawing {self.rows:,} rows")
        world = World.draw(self.rows, self.seed)
        teacher = Teacher.draw(self.teacher, world, self.seed)
        fixed = np.concatenate([teacher.fixed(world.values(rows)) for rows in _pieces(self.rows)])
        progress("letting users click, one round after another")
        logits, labels = play(world, teacher, fixed, self.seed)
        p = _sigmoid(logits)
        progress("writing")
        seen = np.zeros((len(FIELDS), LARGEST), np.int64)

        def pieces() -> Iterator[pa.Table]:
            log = pa.table(
                {"user": world.user, "time": np.arange(self.rows) * PERIOD // self.rows}
                | {name: labels[:, k] for k, name in enumerate(TASKS)}
                | {f"p_{name}": p[:, k] for k, name in enumerate(TASKS)}
                | {name: world.items[world.item, i] for i, name in enumerate(FIELDS[KEPT])}
            )
            first = 0
            for piece in history.replay_pieces(self.schema(), log, size=ROW_GROUP):
                values = world.values(slice(first, first + piece.num_rows))
                first += piece.num_rows
                for f, name in enumerate(FIELDS):
                    seen[f] += np.bincount(values[:, f], minlength=LARGEST)
                    if name not in log.column_names:
                        piece = piece.append_column(name, pa.array(values[:, f]))
                yield piece

        write_parts(folder, pieces())
        test = slice(self.rows * 8 // 10, None)
        learnable = [float(counts[counts >= 20].sum() / self.rows) for counts in seen]
        return {
            "rows": self.rows,
            "users": len(world.users),
            "base_rate": {name: round(float(labels[:, k].mean()), 4) for k, name in enumerate(TASKS)},
            "bayes_auc": {name: round(_auc(p[:, k], labels[:, k]), 5) for k, name in enumerate(TASKS)},
            "bayes_auc_last_fifth": {name: round(_auc(p[test, k], labels[test, k]), 5) for k, name in enumerate(TASKS)},
            "vocabularies": dict(zip(FIELDS, world.sizes)),
            "rows_whose_value_occurs_20_times": {name: round(share, 4) for name, share in zip(FIELDS, learnable)},
        }


class World(NamedTuple):
    """Who meets what: everything but the clicks."""

    sizes: list[int]  # [F] values of each field
    users: np.ndarray  # [users, user fields]
    items: np.ndarray  # [items, item fields]
    user: np.ndarray  # [n]
    item: np.ndarray  # [n]
    moment: np.ndarray  # [n, fields of the moment]

    @staticmethod
    def draw(rows: int, seed: int) -> World:
        random = _random(seed, "vocabularies")
        sizes = [round(SMALLEST * (LARGEST / SMALLEST) ** u) for u in random.random(len(FIELDS))]
        sizes[ITEM] = LARGEST
        random = _random(seed, "entities")
        count = max(rows // ROWS_A_USER, 1)
        users = np.stack([_zipf(random, size, count) for size in sizes[:USER_FIELDS]], 1)
        items = np.stack([_zipf(random, size, LARGEST) for size in sizes[ITEM_FIELDS]], 1)
        items[:, 0] = np.arange(LARGEST)
        random = _random(seed, "impressions")
        activity = np.cumsum(-np.log1p(-random.random(count)) + 0.1)  # exponential, nobody quite silent
        user = np.searchsorted(activity / activity[-1], random.random(rows), side="right")
        item = _zipf(random, LARGEST, rows)
        moment = np.stack([_zipf(random, size, rows) for size in sizes[ITEM_FIELDS.stop :]], 1)
        return World(sizes, users, items, user.astype(np.int32), item, moment)

    def of_users(self, count: int) -> World:
        """All rows of the first users."""
        kept = self.user < count
        return self._replace(user=self.user[kept], item=self.item[kept], moment=self.moment[kept])

    def values(self, rows: slice) -> np.ndarray:
        """The value of every field [n, F]."""
        return np.concatenate([self.users[self.user[rows]], self.items[self.item[rows]], self.moment[rows]], 1)


@dataclass(frozen=True)
class Teacher:
    """The true logit of both tasks: pairs, triples and popularity (fixed), and the user's taste for past clicks."""

    latents: list[np.ndarray]  # [F] x [values, R]
    mixing: np.ndarray  # [N, R, R]
    pairs: np.ndarray  # [P, 2] units
    bilinear: np.ndarray  # [P, R, R]
    triples: np.ndarray  # [T, 3] units
    trilinear: np.ndarray  # [T, 3, R, R]
    popularity: np.ndarray  # [items]
    weights: np.ndarray  # [P + T + 1, K]
    bias: np.ndarray  # [K]
    taste: np.ndarray  # [K, users, R] what a user likes
    items: np.ndarray  # [items, R] what an item is, to a history

    @staticmethod
    def draw(kind: Literal["grouped", "flat"], world: World, seed: int) -> Teacher:
        """A teacher whose parts have the variances of SHARES, scaled on a sample to BASE_RATE and BAYES_AUC."""
        random = _random(seed, f"teacher {kind}")
        latents = [_normal(random, size, RANK) for size in world.sizes]
        units = len(GROUPS) if kind == "grouped" else len(FIELDS)
        mixing = _normal(random, units, RANK, RANK) * (2.0 if kind == "grouped" else 1.0) / RANK**0.5
        every_pair = np.stack(np.triu_indices(units, 1), 1)
        pairs = every_pair if kind == "grouped" else every_pair[np.argsort(random.random(len(every_pair)))[:PAIRS_FLAT]]
        triples = np.argsort(random.random((TRIPLES, units)), 1)[:, :3]
        bilinear = _normal(random, len(pairs), RANK, RANK) / RANK
        trilinear = _normal(random, len(triples), 3, RANK, RANK) / RANK**0.5
        weights = _normal(random, len(pairs) + len(triples) + 1, len(TASKS))
        weights[-1] = np.abs(weights[-1])  # popular things are liked
        popularity = -np.log1p(np.arange(LARGEST))
        raw = Teacher(
            latents, mixing, pairs, bilinear, triples, trilinear, popularity, weights,
            bias=np.zeros(0), taste=np.zeros(0), items=np.zeros(0),
        )  # fmt: skip
        return raw._scaled(world, random, seed)

    def units(self, values: np.ndarray, first: int = 0) -> np.ndarray:
        """What interacts [N, n, R]: the fields, or the groups they form; `values` are those of fields `first`, ..."""
        z = np.stack([self.latents[first + f][values[:, f]] for f in range(values.shape[1])])
        fields = len(FIELDS) // len(self.mixing)
        x = z.reshape(-1, fields, len(values), RANK).mean(1)
        return np.tanh(x @ self.mixing[first // fields :][: len(x)])

    def terms(self, values: np.ndarray) -> np.ndarray:
        """The terms of the logit that do not depend on the history [n, P + T + 1]."""
        x = self.units(values)
        columns = [np.einsum("nr,nr->n", x[a] @ matrix, x[b]) for (a, b), matrix in zip(self.pairs, self.bilinear)]
        for triple, matrices in zip(self.triples, self.trilinear):
            p, q, r = (x[unit] @ matrix for unit, matrix in zip(triple, matrices))
            columns.append(np.einsum("nr,nr,nr->n", p, q, r))
        columns.append(self.popularity[values[:, ITEM]])
        return np.stack(columns, 1)

    def fixed(self, values: np.ndarray) -> np.ndarray:
        """The logit without the history's part [n, K]."""
        return self.terms(values) @ self.weights + self.bias

    def _scaled(self, world: World, random: np.random.Generator, seed: int) -> Teacher:
        """The parts at their shares, then all of them scaled on what users really did in a few rounds of clicking."""
        pilot = world.of_users(PILOT_USERS)
        terms = self.terms(pilot.values(slice(None)))
        means, weights, share = terms.mean(0), self.weights.copy(), np.array(list(SHARES.values())) ** 0.5
        for part, wanted in zip(np.split(np.arange(len(means)), [len(self.pairs), len(means) - 1]), share):
            weights[part] *= wanted / (terms[:, part] @ weights[part]).std(0)
        items = _standard(self.units(world.items, USER_FIELDS).mean(0), pilot.item)
        pieces = np.array_split(world.users, len(world.users) // 8_192 + 1)
        users = _standard(np.concatenate([self.units(piece).mean(0) for piece in pieces]), slice(PILOT_USERS))
        taste = users @ _normal(random, len(TASKS), RANK, RANK)
        taste *= share[-1] / (taste[:, pilot.user] * items[pilot.item] / 4).sum(2).std(1)[:, None, None]

        scale, bias = np.ones(len(TASKS)), np.zeros(len(TASKS))
        fixed = (terms - means) @ weights
        for _ in range(4):
            trial = replace(self, taste=taste * scale[:, None, None], items=items)
            logits = play(pilot, trial, fixed * scale + bias, seed).logits
            told = (logits - fixed * scale - bias) / scale  # what the histories said
            taste *= (share[-1] / told.std(0))[:, None, None]
            for k in range(len(TASKS)):
                scale[k], bias[k] = _calibrate(fixed[:, k] + told[:, k] * share[-1] / told[:, k].std())
        weights, taste = weights * scale, taste * scale[:, None, None]
        return replace(self, weights=weights, bias=bias - means @ weights, taste=taste, items=items)


class Played(NamedTuple):
    logits: np.ndarray  # [n, K] true ones
    labels: np.ndarray  # [n, K]


def play(world: World, teacher: Teacher, fixed: np.ndarray, seed: int) -> Played:
    """What users do: round r is the r-th row of every user, given his clicks so far; `fixed` [n, K] is the rest."""
    uniform = _random(seed, "feedback").random(fixed.shape)
    order = np.argsort(world.user, kind="stable")  # rows stand in the order of time
    counts = np.bincount(world.user, minlength=len(world.users))
    first = np.cumsum(counts) - counts
    past = np.zeros((len(world.users), HISTORY, RANK))  # a ring of clicked items for each user
    clicks = np.zeros(len(world.users), np.int64)
    logits, labels = np.empty_like(fixed), np.empty(fixed.shape, np.int8)
    for turn in range(int(counts.max())):
        users = np.flatnonzero(counts > turn)
        rows = order[first[users] + turn]
        told = past[users].sum(1) / (np.minimum(clicks[users], HISTORY) + DOUBT)[:, None]
        logits[rows] = fixed[rows] + (teacher.taste[:, users] * told).sum(2).T
        labels[rows] = uniform[rows] < _sigmoid(logits[rows])
        happy = labels[rows, CLICK] == 1
        past[users[happy], clicks[users[happy]] % HISTORY] = teacher.items[world.item[rows[happy]]]
        clicks[users[happy]] += 1
    return Played(logits, labels)


def _calibrate(logit: np.ndarray) -> tuple[float, float]:
    """Scale and bias that give the `logit` [n] the wanted base rate and the wanted expected AUC."""
    ordered = np.sort(logit)

    def bias(scale: float) -> float:
        return _bisect(-20, 20, lambda b: float(_sigmoid(scale * ordered + b).mean()) < BASE_RATE)

    def too_hard(scale: float) -> bool:
        p = _sigmoid(scale * ordered + bias(scale))
        below = np.cumsum(1 - p) - (1 - p)
        return float((p * below).sum()) < BAYES_AUC * float(p.sum() * (1 - p).sum())

    scale = _bisect(0, 20, too_hard)
    return scale, bias(scale)


def _bisect(low: float, high: float, too_low: Callable[[float], bool]) -> float:
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if too_low(middle) else (low, middle)
    return (low + high) / 2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _standard(values: np.ndarray, sample: np.ndarray | slice) -> np.ndarray:
    """Each column with mean 0 and deviation 1 over the sample."""
    return (values - values[sample].mean(0)) / values[sample].std(0)


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    positive = labels[np.argsort(scores, kind="stable")].astype(np.int64)
    negatives_below = np.cumsum(1 - positive)
    return float((negatives_below * positive).sum() / (positive.sum() * (1 - positive).sum()))


def _pieces(rows: int, size: int = 16_384) -> Iterator[slice]:
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def _random(seed: int, what: str) -> np.random.Generator:
    """A stream of its own for each purpose. Only `random()` is drawn from it: it is the same in every numpy version."""
    return np.random.Generator(np.random.PCG64([seed, *what.encode()]))


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal numbers (Box and Muller)."""
    u, v = random.random((2, *shape))
    return np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)


def _zipf(random: np.random.Generator, size: int, count: int) -> np.ndarray:
    """`count` values of 0..size-1 with P(k) ~ (k + 1)^-ZIPF, int32."""
    mass = np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** -ZIPF)
    return np.minimum(np.searchsorted(mass / mass[-1], random.random(count), side="right"), size - 1).astype(np.int32)
