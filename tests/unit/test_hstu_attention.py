"""HSTU's attention: the definition by hand, the jagged path against the padded one, and what must hold of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from scalerec.errors import InputError
from scalerec.ops.hstu_attention import attention_plan, bucket, hstu_attention, hstu_attention_reference

BUCKETS = 129
Case = dict[str, Any]


def case(
    lengths: list[int],
    heads: int = 1,
    d_qk: int = 8,
    d_v: int = 8,
    *,
    biases: str = "pt",
    targets: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Arguments of `hstu_attention`: unix times that rise within a sequence and repeat now and then."""
    draw = torch.Generator().manual_seed(seed)
    total, longest = sum(lengths), max(lengths, default=0) + 1
    gaps = (torch.rand(total + 1, generator=draw) * 14).exp().long() * torch.randint(0, 2, (total + 1,), generator=draw)
    times = 970_000_000 + gaps.cumsum(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    found: Case = {
        "q": normal(total, heads, d_qk),
        "k": normal(total, heads, d_qk),
        "v": normal(total, heads, d_v),
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
        "scale": 1 / longest,
        "alpha": 0.7,
    }
    if "p" in biases:
        found["position"] = normal(2 * longest - 1)
    if "t" in biases:
        found |= {"time": normal(BUCKETS), "query_times": times[1:], "key_times": times[:-1]}
    if targets is not None:
        found["targets"] = torch.tensor(targets)
    return found


def by_hand(c: Case) -> Tensor:
    """Three loops in float64."""
    q, k, v = (c[name].double() for name in ("q", "k", "v"))
    out = torch.zeros_like(v)
    targets = c["targets"].tolist() if "targets" in c else [0] * (len(c["offsets"]) - 1)
    for (a, b), m in zip(pairwise(c["offsets"].tolist()), targets):
        n = b - a - m
        for i in range(b - a):
            seen = [j for j in range(i + 1) if j < n or j == i]
            scores = []
            for j in seen:
                x = c["alpha"] * (q[a + i] * k[a + j]).sum(-1)  # [H]
                if "position" in c:
                    middle = (len(c["position"]) - 1) // 2
                    x = x + c["position"][middle if i == j else middle + j - min(i, n)].double()
                if "time" in c:
                    gap = max(abs(int(c["query_times"][a + i] - c["key_times"][a + j])), 1)
                    x = x + c["time"][min(int(math.log(gap) / 0.301), BUCKETS - 1)].double()
                scores.append(x)
            x = torch.stack(scores)  # [seen, H]
            weights = x.softmax(0) if c.get("normalise") == "softmax" else c["scale"] * x * x.sigmoid()
            out[a + i] = sum(w[:, None] * v[a + j] for w, j in zip(weights, seen))
    return out


def gradients(attention: Callable[..., Tensor], c: Case) -> dict[str, Tensor]:
    """The output and the gradient of everything that has one."""
    names = [name for name in ("q", "k", "v", "position", "time") if name in c]
    leaves = {name: c[name].detach().clone().requires_grad_() for name in names}
    out = attention(**(c | leaves))
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), slope, allow_unused=True)
    return {"out": out.detach()} | {f"d{name}": x for name, x in zip(names, found) if x is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Differences relative to the largest entry of each tensor."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert found[name].dtype == right.dtype or tolerance > 1e-3, name
        error = (found[name].double() - right.double()).abs().max() if right.numel() else torch.tensor(0.0)
        limit = tolerance * float(right.double().abs().max()) if right.numel() else 0.0
        assert error <= limit + 1e-30, f"{name}: {error:.2e} > {limit:.2e}"


# -- the definition

SMALL = [
    {"lengths": [5, 0, 9, 1]},
    {"lengths": [7, 3], "heads": 3, "d_qk": 4, "d_v": 6},
    {"lengths": [6, 8, 4], "heads": 2, "targets": [3, 8, 0]},
    {"lengths": [6, 8], "biases": "p", "targets": [2, 1]},
    {"lengths": [6, 8], "biases": "t"},
    {"lengths": [6, 8], "biases": ""},
]


@pytest.mark.parametrize("attention", [hstu_attention, hstu_attention_reference])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_definition(attention: Callable[..., Tensor], shape: dict[str, Any]) -> None:
    c = case(**shape)
    torch.testing.assert_close(attention(**c).double(), by_hand(c), rtol=1e-5, atol=1e-6)


def test_buckets() -> None:
    hour, day, year = 3600, 86_400, 31_557_600
    seconds = torch.tensor([0, 1, -1, hour, -hour, day, year, 3 * year])
    assert bucket(seconds, BUCKETS).tolist() == [0, 0, 0, 27, 27, 37, 57, 61]
    assert bucket(seconds, 50).max() == 49
    assert bucket(torch.tensor([day]), BUCKETS, log_base=1.0).item() == 11


# -- the jagged path against the padded one

MIXES = [[1], [0, 2, 200], [95, 96, 97], [1, 1, 1, 2, 30], [130, 5, 128, 0, 127, 129], [513, 3]]


@pytest.mark.parametrize("biases", ["pt", "p", "t", ""])
@pytest.mark.parametrize("lengths", MIXES, ids=str)
def test_fp32(lengths: list[int], biases: str) -> None:
    c = case(lengths, heads=1 + len(lengths) % 4, d_qk=10, d_v=6, biases=biases)
    assert_close(gradients(hstu_attention, c), gradients(hstu_attention_reference, c), 1e-5)


@pytest.mark.parametrize("lengths", [[0, 2, 200], [130, 5, 128], [513]], ids=str)
def test_fp32_targets(lengths: list[int]) -> None:
    for targets in ([n // 3 for n in lengths], [min(n, 1) for n in lengths], lengths):
        c = case(lengths, heads=2, targets=targets)
        assert_close(gradients(hstu_attention, c), gradients(hstu_attention_reference, c), 1e-5)


def test_a_plan_changes_nothing() -> None:
    for targets in (None, [4, 100, 0]):
        c = case([20, 150, 60], heads=2, targets=targets)
        times = {name: c[name] for name in ("query_times", "key_times")}
        plan = attention_plan(c["offsets"], targets=c.get("targets"), **times)
        short = {name: value for name, value in c.items() if name not in times} | {"plan": plan}
        assert_close(gradients(hstu_attention, short), gradients(hstu_attention, c), 1e-7)


@pytest.mark.parametrize("biases", ["pt", ""])
@pytest.mark.parametrize("lengths", [[200, 65, 130], [1030, 65, 600]], ids=str)
@pytest.mark.parametrize("targets", [None, [3, 0, 40]])
def test_bf16(biases: str, lengths: list[int], targets: list[int] | None) -> None:
    """Against the definition in float64 on the same rounded numbers: 1 % of the largest entry, a few bf16 roundings."""
    c = case(lengths, heads=2, d_qk=16, d_v=12, biases=biases, targets=targets, dtype=torch.bfloat16)
    exact = {name: x.double() if name in ("q", "k", "v", "position", "time") else x for name, x in c.items()}
    assert_close(gradients(hstu_attention, c), gradients(hstu_attention_reference, exact), 1e-2)


def test_tiles_of_another_format_serve_as_well() -> None:
    c = case([600, 40], heads=2, targets=[5, 0])
    times = {name: c[name] for name in ("query_times", "key_times")}
    plan = attention_plan(c["offsets"], targets=c["targets"], **times, dtype=torch.bfloat16)
    assert len(plan.groups[0].tiles) < len(attention_plan(c["offsets"], targets=c["targets"]).groups[0].tiles)
    assert_close(gradients(hstu_attention, c | {"plan": plan}), gradients(hstu_attention, c), 1e-5)


def test_float64() -> None:
    c = case([30, 70], heads=2, targets=[5, 0], dtype=torch.float64)
    assert_close(gradients(hstu_attention, c), gradients(hstu_attention_reference, c), 1e-12)


def test_slices_of_one_projection() -> None:
    c = case([40, 70, 1], heads=2, d_qk=8, d_v=8)
    mixed = torch.cat([c[name].flatten(1) for name in ("v", "q", "k")], dim=1)
    v, q, k = (x.unflatten(1, (2, 8)) for x in mixed.split(16, dim=1))
    torch.testing.assert_close(hstu_attention(**(c | {"q": q, "k": k, "v": v})), hstu_attention(**c), rtol=0, atol=0)


def test_slopes_that_are_not_laid_out() -> None:
    for lengths in ([40, 70, 1], [300]):
        c = case(lengths, heads=1 + len(lengths) % 2)
        q = c["q"].requires_grad_()
        found, expected = (torch.autograd.grad(f(**c).sum(), q)[0] for f in (hstu_attention, hstu_attention_reference))
        assert_close({"dq": found}, {"dq": expected}, 1e-5)


def test_tables_larger_than_needed() -> None:
    c = case([20, 150], targets=[4, 0])
    wide = c | {"position": torch.nn.functional.pad(c["position"], (7, 7)), "time": torch.randn(300)}
    assert_close(gradients(hstu_attention, wide), gradients(hstu_attention_reference, wide), 1e-5)


def test_softmax() -> None:
    """There is the one way to compute it, so it is held against the loops."""
    c = case([9, 20, 0, 7], heads=2, d_v=6, targets=[3, 0, 0, 7], dtype=torch.float64) | {"normalise": "softmax"}
    assert_close(gradients(hstu_attention, c), gradients(lambda **c: by_hand(c), c), 1e-10)


@pytest.mark.parametrize("attention", [hstu_attention, hstu_attention_reference])
def test_no_sequences_and_no_tokens(attention: Callable[..., Tensor]) -> None:
    for lengths in ([], [0, 0]):
        assert attention(**case(lengths, d_v=3)).shape == (0, 1, 3)


# -- what must hold


def test_a_sequence_alone_is_as_in_a_batch() -> None:
    lengths = [40, 131, 7, 70, 130]
    c = case(lengths, heads=2)
    together = gradients(hstu_attention, c)["out"]
    edges = c["offsets"].tolist()
    for begin, end in pairwise(edges):
        one = {name: c[name][begin:end] for name in ("q", "k", "v", "query_times", "key_times")}
        alone = hstu_attention(**(c | one | {"offsets": torch.tensor([0, end - begin])}))
        torch.testing.assert_close(alone, together[begin:end], rtol=1e-5, atol=1e-6)


def test_doubling_n_halves_the_output() -> None:
    c = case([30, 80])
    twice = hstu_attention(**(c | {"scale": c["scale"] / 2}))
    torch.testing.assert_close(2 * twice, hstu_attention(**c), rtol=1e-6, atol=0)


def test_later_tokens_change_nothing_earlier() -> None:
    c = case([150, 90], heads=2)
    before = hstu_attention(**c)
    changed = {name: c[name].clone() for name in ("q", "k", "v")}
    for x in changed.values():
        x[100:150] += 1
    after = hstu_attention(**(c | changed))
    assert torch.equal(before[:100], after[:100]) and torch.equal(before[150:], after[150:])
    assert not torch.equal(before[100:150], after[100:150])


def test_candidates_see_the_history_and_themselves() -> None:
    c = case([60], heads=2, targets=[20])
    c["query_times"][40:] = c["query_times"][39]  # one request: its time is that of every candidate
    together = hstu_attention(**c)
    for candidate in (40, 47, 59):
        keep = torch.tensor([*range(40), candidate])
        alone = {name: c[name][keep] for name in ("q", "k", "v", "query_times", "key_times")}
        alone |= {"offsets": torch.tensor([0, 41]), "targets": None}
        torch.testing.assert_close(hstu_attention(**(c | alone))[-1], together[candidate], rtol=1e-5, atol=1e-6)


def test_runs_repeat_to_the_bit() -> None:
    c = case([130, 64, 200, 3], heads=2)
    first, second = gradients(hstu_attention, c), gradients(hstu_attention, c)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[130, 64, 200, 3], [600]], ids=str)
def test_any_number_of_threads(threads: int, lengths: list[int]) -> None:
    c = case(lengths, heads=2, targets=[n // 4 for n in lengths])
    expected, before = gradients(hstu_attention_reference, c), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_close(gradients(hstu_attention, c), expected, 1e-5)
        first, second = gradients(hstu_attention, c), gradients(hstu_attention, c)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_after_inference_and_under_autocast() -> None:
    c = case([90, 300], heads=2, seed=3)
    expected = gradients(hstu_attention_reference, c)
    with torch.inference_mode():
        torch.testing.assert_close(hstu_attention(**c), expected["out"], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(gradients(hstu_attention, c), expected, 1e-5)


@pytest.mark.parametrize("made_once", [False, True])
def test_nothing_of_all_pairs_is_kept_for_backward(made_once: bool) -> None:
    n = 700
    c = case([n], heads=2)
    c |= {name: c[name].requires_grad_() for name in ("q", "k", "v", "position", "time")}
    if made_once:
        times = {name: c.pop(name) for name in ("query_times", "key_times")}
        c["plan"] = attention_plan(c["offsets"], **times)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hstu_attention(**c)
    given = sum(c[name].nbytes for name in ("q", "k", "v", "position", "time"))
    assert given <= sum(kept.values()) <= given + 2 * 8 * n + 1000 < n * n


def wrong(c: Case) -> dict[str, Case]:
    times = {name: c[name] for name in ("query_times", "key_times")}
    return {
        "q, k, v": {"k": c["k"][:, :, :2]},
        "one dtype": {"v": c["v"].double()},
        "int64": {"offsets": c["offsets"].int()},
        "rise": {"offsets": c["offsets"] + 1},
        "one per sequence": {"targets": torch.tensor([1])},
        "between 0": {"targets": torch.tensor([6, 0])},
        "position": {"position": c["position"][:9]},
        "time must": {"time": c["time"][None]},
        "needs query_times": {"query_times": None},
        "query_times and key_times": {"key_times": c["key_times"][:3]},
        "other offsets": {"plan": attention_plan(torch.tensor([0, 4, 11]))},
        "or targets": {"plan": attention_plan(c["offsets"], targets=torch.tensor([1, 0]))},
        "the plan has": {"plan": attention_plan(**times, offsets=c["offsets"], buckets=5)},
    }


@pytest.mark.parametrize("words", list(wrong(case([5, 6]))))
def test_wrong_shapes(words: str) -> None:
    c = case([5, 6])
    with pytest.raises(InputError, match=words) as error:
        hstu_attention(**(c | wrong(c)[words]))
    assert "\n" not in str(error.value)
