"""Whether a bundle scores as training code did: synthetic requests, and what came of them step by step.

Kept are, for the requests of `golden_requests`, the ids of every feature, a sketch of every layer's output and the
scores; beside them, of every dictionary and every bucket border which id each value gets, and a checksum of every
weight. A check goes through them in the order of computation, so that the first departure is the cause and not one of
its consequences.

n rows   K numbers of a sketch
"""

from __future__ import annotations

import math
import zlib
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from scalerec.batch import Batch, Rows
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.features.hashing import hash_column, mix
from scalerec.features.numeric import bucket, standardise
from scalerec.inference.golden_requests import from_json, golden_requests, to_json, value_of
from scalerec.inference.precision import Precision
from scalerec.layers.embedding import Embedded
from scalerec.models.base import Model
from scalerec.models.sequential import SequentialModel
from scalerec.schema import Numeric, Sequence

SKETCH = 16  # K


class Tolerance(NamedTuple):
    """How far a result may be from the one of training code."""

    layers: float  # relative error (L2) of a layer's output
    scores: float  # absolute error of a probability


# Rounding to p bits errs by u = 2^-p at most, as a root mean square by u / sqrt(3). A layer's error, relative to its
# output, is that of each product times the root of how many stand one behind the other, some ten.
# fp32: u = 6e-8, and machines differ in the order of sums alone: 4e-7 between AVX512 and SSE4 on five models.
# bf16: u = 4e-3 on both factors and on the product: up to 4e-3 a product, 1.2e-2 for ten; measured 6e-3.
# int8: a step is max / 127 and its error step / sqrt(12), where max is three to six times the root mean square: 0.7e-2
#       to 1.4e-2 a product, half of it an embedding; 4e-2 for ten; measured 1.3e-2.
# Two to three times as much is allowed, of fp32 thirty times. A fault of a conversion (the scale of another channel, a
# table moved by a row) is as large as the output, and what is smaller, in weights or in code, was found in fp32 before.
TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(1e-5, 5e-6),
    "bf16": Tolerance(3e-2, 1e-2),
    "int8": Tolerance(8e-2, 3e-2),
}


def record(model: Model, encoder: Encoder, types: dict[str, str]) -> dict[str, Any]:
    """The golden sample of an fp32 model in evaluation mode, as JSON."""
    rows = golden_requests(encoder, types)
    batch = encoder.encode(rows, where="golden sample", labels=False)
    layers, logits = run(model, batch)
    return {
        "requests": to_json(rows),
        "dictionaries": _dictionaries(encoder),
        "numbers": _numbers(encoder),
        "features": features_of(encoder, batch),
        "weights": _checksums(model),
        "layers": layers,
        "logits": logits.tolist(),
    }


def check(golden: dict[str, Any], model: Model, encoder: Encoder, precision: Precision, tolerance: Tolerance) -> None:
    """InputError that names the first feature, weight or layer which departs from the sample."""
    rows = from_json(golden["requests"])
    batch = encoder.encode(rows, where="golden sample", labels=False)
    _check_features(golden, encoder, batch, rows)
    if precision == "fp32":
        for name, checksum in _checksums(model).items():
            if golden["weights"].get(name) != checksum:
                raise InputError(f"weight {name!r} departs first: it is not the one that was exported")
    layers, logits = run(model, batch)
    for name, sketch in golden["layers"].items():
        if name not in layers:
            raise InputError(f"layer {name!r} departs first: the model has no such layer any more, or skips it")
        error = departure(layers[name], sketch)
        if not error <= tolerance.layers:
            raise InputError(
                f"layer {name!r} departs first: its output differs by {error:.1e} of its size, {precision} explains "
                f"{tolerance.layers:.0e}"
            )
    check_scores(golden, model, logits, precision, tolerance)


def check_scores(
    golden: dict[str, Any], model: Model, logits: Tensor, precision: Precision, tolerance: Tolerance
) -> None:
    """InputError unless logits [n, tasks] of the sample's requests are those of training code."""
    want = torch.tensor(golden["logits"], dtype=torch.float64).reshape(logits.shape)
    if model.ranks:
        gap = (want.sigmoid() - logits.double().sigmoid()).abs()
        if gap.numel() and not bool((gap <= tolerance.scores).all()):
            row, task = divmod(int(gap.nan_to_num(math.inf).argmax()), gap.shape[1])
            raise InputError(
                f"scores depart: request row {row}, task {model.layout.tasks[task]!r}: "
                f"{float(logits[row, task].double().sigmoid()):.6f}, in training code "
                f"{float(want[row, task].sigmoid()):.6f}"
            )
    elif not bool((logits.double() - want).norm() <= tolerance.layers * want.norm()):
        raise InputError("similarities of users and items depart from training code")


def batch_of(golden: dict[str, Any], encoder: Encoder) -> Batch:
    """The sample's requests, encoded."""
    return encoder.encode(from_json(golden["requests"]), where="golden sample", labels=False)


# -- features


def features_of(encoder: Encoder, batch: Batch) -> dict[str, Any]:
    """What each feature became: ids [n], numbers [n], or of a list its lengths, ids, times and actions."""
    found: dict[str, Any] = {}
    for side, rows in (("user", batch.user), ("item", batch.items)):
        shape = encoder.layout.sides[side]
        found |= {f.name: rows.ids[:, j].tolist() for j, f in enumerate(shape.ids)}
        found |= {f.name: _json(rows.numbers[:, j]) for j, f in enumerate(shape.numbers)}
        for feature in (*shape.multi, *shape.sequences):
            found[feature.name] = _list_of(rows, feature.name)
    return {feature.name: found[feature.name] for feature in encoder.schema.features}


def _list_of(rows: Rows, name: str) -> dict[str, Any]:
    lengths = rows.lists[name].lengths.tolist()
    found = {"ids": _cut(rows.lists[name].values.tolist(), lengths)}
    if name in rows.times:
        exact = [value.hex() for value in rows.times[name].values.tolist()]
        found["times"] = _cut(exact, lengths)
    if name in rows.actions:
        actions = rows.actions[name].values
        found["actions"] = _cut([_json(event) for event in actions], lengths)
    return found


def _cut(values: list[Any], lengths: list[int]) -> list[list[Any]]:
    """Flat values as lists of these lengths."""
    rest = iter(values)
    return [list(islice(rest, length)) for length in lengths]


def _json(values: Tensor) -> list[Any]:
    """Numbers for JSON, None for NaN, which is not in it."""
    return [None if math.isnan(x) else x for x in values.double().flatten().tolist()]


def _check_features(golden: dict[str, Any], encoder: Encoder, batch: Batch, rows: pa.RecordBatch) -> None:
    """First what features are read through, all values of dictionaries and all borders; then what requests became."""
    found = {"dictionaries": _dictionaries(encoder), "numbers": _numbers(encoder)}
    became = features_of(encoder, batch)
    for feature in encoder.schema.features:
        name = feature.name
        if golden["dictionaries"].get(name) != found["dictionaries"].get(name):
            raise InputError(
                f"feature {name!r} departs first: values of its dictionary have other ids than in training"
            )
        if name in found["numbers"] and not _same(golden["numbers"].get(name), found["numbers"][name]):
            raise InputError(f"feature {name!r} departs first: its bucket borders, mean or spread are not training's")
    # A sequence reads through the dictionaries of other features, so these come first.
    for feature in sorted(encoder.schema.features, key=lambda feature: isinstance(feature, Sequence)):
        want, got = golden["features"].get(feature.name), became[feature.name]
        if not _same(want, got):
            side = next(group.side for group in encoder.schema.groups if feature in group.features)
            what = _first_row(want, got)
            if what is None:
                raise InputError(f"feature {feature.name!r} departs first")
            row, before, now = what
            of_row = row if side == "item" else int((batch.user_of_row == row).nonzero()[0])
            value = value_of(rows, encoder.schema, feature.name, of_row)
            raise InputError(
                f"feature {feature.name!r} departs first: {value} becomes {_short(now)}, in training {_short(before)}"
            )


def _first_row(want: Any, got: Any) -> tuple[int, Any, Any] | None:
    """The first row that differs, what it was and what it is; None where the two cannot be compared row by row."""
    if isinstance(want, dict) and isinstance(got, dict) and want.keys() == got.keys():
        return next((found for key in want if (found := _first_row(want[key], got[key])) is not None), None)
    if not (isinstance(want, list) and isinstance(got, list) and len(want) == len(got)):
        return None
    return next(((row, a, b) for row, (a, b) in enumerate(zip(want, got)) if not _same(a, b)), None)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _same(want: Any, got: Any) -> bool:
    """Equal; numbers with a point up to rounding (the logarithm of another machine)."""
    if isinstance(want, dict) and isinstance(got, dict):
        return want.keys() == got.keys() and all(_same(want[key], got[key]) for key in want)
    if isinstance(want, list) and isinstance(got, list):
        return len(want) == len(got) and all(map(_same, want, got))
    if isinstance(want, float) and isinstance(got, float):
        return math.isclose(want, got, rel_tol=1e-6, abs_tol=1e-6)
    return want == got


def _dictionaries(encoder: Encoder) -> dict[str, list[Any]]:
    """Of each dictionary its size and a checksum of all pairs of a value and its id, whatever their order."""
    found: dict[str, list[Any]] = {}
    for name, vocabulary in encoder.vocabularies.items():
        ids = vocabulary.ids(vocabulary.values, name).astype(np.uint64)
        with np.errstate(over="ignore"):
            total = mix(hash_column(vocabulary.values, name) + mix(ids)).sum(dtype=np.uint64)
        found[name] = [len(vocabulary.values), f"{int(total):016x}"]
    return found


def _numbers(encoder: Encoder) -> dict[str, dict[str, Any]]:
    """Of each number its buckets at and just above every border, or a few values standardised."""
    found: dict[str, dict[str, Any]] = {}
    for feature in encoder.schema.features:
        if not isinstance(feature, Numeric):
            continue
        fit = encoder.numerics[feature.name]
        if feature.encoding == "linear":
            at = np.array([-1.0, 0.0, 1.0, 1000.0])
            found[feature.name] = {"at": at.tolist(), "gives": standardise(at, fit, feature.log).tolist()}
        else:
            edges = np.asarray(fit.edges, np.float32)
            at = np.stack([edges, np.nextafter(edges, np.float32(np.inf))], 1).ravel().astype(np.float64)
            found[feature.name] = {"borders": [float.hex(x) for x in at], "gives": bucket(at, fit).tolist()}
    return found


# -- layers


def run(model: Model, batch: Batch) -> tuple[dict[str, list[float]], Tensor]:
    """Sketches of the outputs of all layers in the order in which they end, and the logits [n, tasks]."""
    layers: dict[str, list[float]] = {}

    def keep(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            times = sum(key.partition(" #")[0] == name for key in layers)
            layers[f"{name} #{times + 1}" if times else name] = sketch(value)

    def hook(name: str) -> Any:
        return lambda module, inputs, output: keep(name, output)

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            user, items = model.embeddings(batch.user, batch.items)
            for side, embedded in (("user", user), ("item", items)):
                for feature, vectors in _by_feature(model, side, embedded):
                    keep(f"embedding of {feature}", vectors)
            state = model.encode_user(user)
            if isinstance(model, SequentialModel) and model.retrieves:
                keep("user vectors", state.at_end)
                keep("catalogue", model.catalogue())
            logits = model.score(state, items, batch.user_of_row).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    return layers, logits


def _by_feature(model: Model, side: str, embedded: Embedded) -> Any:
    first = 0
    for feature in model.layout.sides[side].flat:
        yield feature.name, embedded.flat[:, first : first + feature.width]
        first += feature.width
    for name, past in embedded.sequences.items():
        yield name, past.values


def sketch(x: Tensor) -> list[float]:
    """The norm of a tensor and K random projections of it, sums with random signs, [1 + K].

    The projections of a difference have its norm as their root mean square, so two sketches tell how far two tensors
    are from each other: to a sixth for K = 16, and hardly ever less than half.
    """
    flat = x.detach().double().flatten().numpy()
    signs = _signs(len(flat))
    found = [float(np.linalg.norm(flat))]
    for k in range(SKETCH):
        found.append(float(flat.sum() - 2 * flat @ ((signs >> np.uint16(k)) & np.uint16(1))))
    return found


@lru_cache(maxsize=8)
def _signs(n: int) -> np.ndarray:
    """[n] uint16, bit k of which says whether projection k turns an element's sign."""
    return (mix(np.arange(n)) >> np.uint64(48)).astype(np.uint16)


def departure(found: list[float], want: list[float]) -> float:
    """The relative distance of two tensors by their sketches; infinite where one is not finite."""
    if not all(map(math.isfinite, found)):
        return math.inf
    distance = float(np.sqrt(np.mean((np.array(found[1:]) - np.array(want[1:])) ** 2)))
    if distance == 0:
        return 0.0
    return distance / want[0] if want[0] else math.inf


def _checksums(model: nn.Module) -> dict[str, int]:
    """CRC-32 of every weight's bytes, a table each."""
    found = {}
    for name, weight in model.state_dict().items():
        array = weight.detach().contiguous().numpy()
        found[name] = zlib.crc32(memoryview(array).cast("B")) if array.size else 0
    return found
