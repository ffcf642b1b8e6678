"""Point-wise attention of HSTU over jagged sequences (arXiv 2402.17152, eq. 2; docs/generative.md).

    x_ij = alpha q_i.k_j + position[j - i + N - 1] + time[bucket(query_time_i - key_time_j)]
    out_i = scale sum_{j <= i} SiLU(x_ij) v_j

T tokens of all sequences   S sequences   H heads   K width of q and k   V width of v   N longest sequence
n tokens of one sequence or of the longest one in a batch
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from scalerec.errors import InputError
from scalerec.ops._hstu_blocks import HSTUAttention
from scalerec.ops._hstu_plan import TIME_LOG_BASE, AttentionPlan, Times, bucket, make_plan, with_buckets

__all__ = ["AttentionPlan", "attention_plan", "bucket", "hstu_attention", "hstu_attention_reference"]

Normalise = Literal["silu", "softmax"]


def attention_plan(
    offsets: Tensor,
    *,
    targets: Tensor | None = None,
    query_times: Tensor | None = None,
    key_times: Tensor | None = None,
    buckets: int = 129,
    time_log_base: float = TIME_LOG_BASE,
    dtype: torch.dtype = torch.float32,
) -> AttentionPlan:
    """What all layers share of one batch: offsets [S + 1], targets [S], times [T]; a byte for every pair with times.

    Its tiles are those that suit q, k and v of `dtype`; others go through them too, only not as fast.
    """
    plan = make_plan(offsets, targets, dtype)
    if query_times is None or key_times is None:
        return plan
    return with_buckets(plan, Times(query_times.double(), key_times.double(), buckets, time_log_base))


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    alpha: float = 1.0,
    position: Tensor | None = None,
    time: Tensor | None = None,
    query_times: Tensor | None = None,
    key_times: Tensor | None = None,
    time_log_base: float = TIME_LOG_BASE,
    targets: Tensor | None = None,
    plan: AttentionPlan | None = None,
    normalise: Normalise = "silu",
) -> Tensor:
    """q, k [T, H, K], v [T, H, V], offsets [S + 1], position [2N - 1], time [buckets], times [T] -> [T, H, V].

    The last targets[s] tokens of sequence s are candidates: each sees the tokens before them all and itself, and takes
    the position of the first. A `plan` of the same offsets and targets is made once for all layers, and its buckets
    take the place of the times. `softmax` weights add up to one and ignore `scale`; it takes the slow way, as do other
    devices than the CPU, and needs the times themselves.
    """
    check(q, k, v, offsets, position, time, query_times, key_times, plan, targets)
    biases = {"position": position, "time": time}
    if normalise == "softmax" or q.device.type != "cpu":
        times = {"query_times": query_times, "key_times": key_times, "time_log_base": time_log_base}
        given = {"scale": scale, "alpha": alpha, "targets": targets, "normalise": normalise}
        return hstu_attention_reference(q, k, v, offsets, **given, **biases, **times)
    times = None
    if time is not None and query_times is not None and key_times is not None:
        times = Times(query_times.double(), key_times.double(), time.numel(), time_log_base)
    plan = plan or make_plan(offsets, targets, q.dtype)
    out = HSTUAttention.apply(q, k, v, position, time, plan, times, scale, alpha)
    return out if plan.targets is None else _add_own(out, q, k, v, offsets, plan, position, time, times, scale, alpha)


def _add_own(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    plan: AttentionPlan,
    position: Tensor | None,
    time: Tensor | None,
    times: Times | None,
    scale: float,
    alpha: float,
) -> Tensor:
    """The weight of each candidate on itself, added to its row."""
    assert plan.targets is not None
    after = offsets[1:].repeat_interleave(plan.targets)
    ends = plan.targets.cumsum(0).repeat_interleave(plan.targets)
    rows = after - ends + torch.arange(len(ends))  # numbers of the candidates' tokens
    x = alpha * (q[rows] * k[rows]).sum(2).to(torch.promote_types(q.dtype, torch.float32))
    if position is not None:
        x = x + position[position.numel() // 2]
    if time is not None:
        own = plan.own_buckets
        if own is None:
            assert times is not None
            own = bucket(times.query - times.key, times.count, times.log_base)
        x = x + time[own[rows]][:, None]
    return out.index_add(0, rows, ((scale * F.silu(x))[:, :, None] * v[rows]).to(out.dtype))


def hstu_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    alpha: float = 1.0,
    position: Tensor | None = None,
    time: Tensor | None = None,
    query_times: Tensor | None = None,
    key_times: Tensor | None = None,
    time_log_base: float = TIME_LOG_BASE,
    targets: Tensor | None = None,
    normalise: Normalise = "silu",
) -> Tensor:
    """The definition, padded to the longest sequence, with every [n, n] matrix in full and ordinary autograd."""
    check(q, k, v, offsets, position, time, query_times, key_times, None, targets)
    lengths = offsets.diff()
    n = int(lengths.max()) if len(lengths) else 0
    valid = torch.arange(n, device=q.device) < lengths[:, None]  # [S, n]
    last = torch.zeros_like(lengths) if targets is None else targets
    seen = None
    if time is not None and query_times is not None and key_times is not None:
        delta = _pad(query_times.double(), valid)[:, :, None] - _pad(key_times.double(), valid)[:, None, :]
        seen = bucket(delta, time.numel(), time_log_base)
    bias = relative_bias(n, lengths - last, position, time, seen)
    padded = (_pad(q, valid), _pad(k, valid), _pad(v, valid))
    return _dense(*padded, bias, lengths, last, scale, alpha, normalise)[valid]


def relative_bias(
    n: int, history: Tensor, position: Tensor | None, time: Tensor | None, seen: Tensor | None
) -> Tensor | None:
    """History lengths [S] and buckets [S, n, n] -> what is added to the scores, [S, n, n]; None without a bias."""
    bias = None
    if position is not None:
        i = torch.arange(n, device=position.device)
        place = torch.minimum(i, history[:, None])  # candidates all stand where the first one does
        gap = (i[None, None, :] - place[:, :, None]).clamp(max=0)
        gap = gap.masked_fill(i[:, None] == i, 0)
        bias = position[gap + (position.numel() + 1) // 2 - 1]
    if time is not None and seen is not None:
        bias = time[seen] if bias is None else bias + time[seen]
    return bias


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lengths: Tensor,
    targets: Tensor,
    scale: float,
    alpha: float,
    normalise: Normalise,
) -> Tensor:
    """q, k [S, n, H, K], v [S, n, H, V], bias [S, n, n] -> [S, n, H, V]."""
    i = torch.arange(q.shape[1], device=q.device)
    causal, itself = i[None, :] <= i[:, None], i[None, :] == i[:, None]
    visible = causal & ((i < (lengths - targets)[:, None, None]) | itself)  # [S, n, n]
    scores = alpha * torch.einsum("snhd,smhd->shnm", q, k)
    if bias is not None:
        scores = scores + bias[:, None].to(scores.dtype)
    if normalise == "softmax":
        weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    else:
        weights = F.silu(scores) * scale * visible[:, None]
    return torch.einsum("shnm,smhd->snhd", weights, v)


def _pad(x: Tensor, valid: Tensor) -> Tensor:
    """[T, ...] -> [S, n, ...] with zeros where no token is."""
    return x.new_zeros(*valid.shape, *x.shape[1:]).index_put((valid,), x)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    position: Tensor | None,
    time: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    plan: AttentionPlan | None,
    targets: Tensor | None,
) -> None:
    """Raise `InputError` where shapes do not fit each other."""
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if q.dim() != 3 or v.dim() != 3 or k.shape != q.shape or v.shape[:2] != q.shape[:2]:
        raise InputError(f"q, k, v must be [T, H, K], [T, H, K], [T, H, V], not {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.device.type == "cpu" and q.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise InputError(f"on a CPU q, k and v must be float32, float64 or bfloat16, not {q.dtype}")
    total = len(q)
    lengths = offsets.diff()
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or not len(offsets):
        raise InputError(f"offsets must be int64 [S + 1], not {offsets.dtype} {tuple(offsets.shape)}")
    if offsets[0] != 0 or offsets[-1] != total or (lengths < 0).any():
        raise InputError(f"offsets must rise from 0 to {total}, the number of tokens")
    if targets is not None:
        if targets.shape != lengths.shape or targets.is_floating_point():
            raise InputError(f"targets must be integers [{len(lengths)}], one per sequence, not {tuple(targets.shape)}")
        if ((targets < 0) | (targets > lengths)).any():
            raise InputError("targets must lie between 0 and the length of their sequence")
    if position is not None:
        places = lengths if targets is None else lengths - targets + (targets > 0)
        need = int(places.max()) if len(places) else 0
        if position.dim() != 1 or position.numel() % 2 == 0 or position.numel() < 2 * need - 1:
            raise InputError(f"position must be [2N - 1] with N >= {need}, not {tuple(position.shape)}")
    if plan is not None:
        given = torch.zeros_like(lengths) if targets is None else targets
        planned = torch.zeros_like(lengths) if plan.targets is None else plan.targets
        if not torch.equal(plan.offsets, offsets) or not torch.equal(planned, given):
            raise InputError("the plan is of other offsets or targets than these; make one for every batch")
    if time is None:
        return
    if time.dim() != 1 or not 0 < time.numel() <= 2**15:
        raise InputError(f"time must be [buckets], at most 32,768, not {tuple(time.shape)}")
    if plan is not None and plan.own_buckets is not None:
        if plan.bucket_count != time.numel():
            raise InputError(f"the plan has {plan.bucket_count} buckets and time {time.numel()}")
        return
    if query_times is None or key_times is None:
        raise InputError("a time bias needs query_times and key_times, or a plan made with them")
    if query_times.shape != (total,) or key_times.shape != (total,):
        raise InputError(
            f"query_times and key_times must be [{total}], not {tuple(query_times.shape)}, {tuple(key_times.shape)}"
        )
