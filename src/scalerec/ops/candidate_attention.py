"""Candidates that each see the history of their user and themselves, over keys and values computed once (M-FALCON).

B candidate rows   U users   T history tokens of all users   H heads   K width of q and k   V width of v
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scalerec.batch import Jagged
from scalerec.ops.hstu_attention import Normalise

TOGETHER = 128  # candidates of one user: their weights on a thousand tokens stay in the cache between operations


def candidate_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, user_of_row: Tensor, *,
    bias: Tensor | None = None, own_bias: Tensor | None = None, scale: float = 1.0, alpha: float = 1.0,
    normalise: Normalise = "silu",
) -> Tensor:  # fmt: skip
    """What `hstu_attention` gives each candidate as the last token of its user's history (M-FALCON, HSTU section 3.4).

    q, k [B, H, K] and v [B, H, V] of the candidates; keys [T, H, K] and values [T, H, V] of the histories of users
    with `offsets` [U + 1]; `bias` [T] towards the history, alike for all candidates of a user, and `own_bias` []
    towards itself -> [B, H, V].
    """
    own = alpha * (q * k).sum(-1)  # [B, H]
    if own_bias is not None:
        own = own + own_bias
    users = offsets.numel() - 1
    if users == 1:
        parts = zip((alpha * q).split(TOGETHER), own.split(TOGETHER), v.split(TOGETHER))
        return torch.cat([_over_one(*part, keys, values, bias, scale, normalise) for part in parts] or [v])
    history, mask = Jagged(torch.cat([keys, values], -1), offsets).padded()  # [U, L, H, K + V]
    keys_ULHK, values_ULHV = history.split([keys.shape[-1], values.shape[-1]], -1)
    place, most = _place(user_of_row, users)
    q_URHK = q.new_zeros(users, most, *q.shape[1:]).index_put((user_of_row, place), q)
    past = alpha * torch.einsum("urhd,ulhd->urhl", q_URHK, keys_ULHK)
    if bias is not None:
        past = past + Jagged(bias, offsets).padded()[0][:, None, None]
    past = past.masked_fill(~mask[:, None, None], float("-inf") if normalise == "softmax" else 0.0)
    own_URH = own.new_zeros(users, most, own.shape[1]).index_put((user_of_row, place), own)
    weights, own_URH = _weights(past, own_URH, scale, normalise)
    out = torch.einsum("urhl,ulhd->urhd", weights.to(values.dtype), values_ULHV)
    return out[user_of_row, place] + own_URH[user_of_row, place][..., None] * v


def _over_one(
    q: Tensor, own: Tensor, v: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float,
    normalise: Normalise,
) -> Tensor:  # fmt: skip
    """Some candidates of one user, q scaled and `own` [B, H] biased already -> [B, H, V]."""
    q_HBK, keys_HKT, values_HTV = q.transpose(0, 1), keys.permute(1, 2, 0), values.transpose(0, 1)
    if bias is not None and bias.dtype == q.dtype:
        past = torch.baddbmm(bias.expand(len(q_HBK), len(q), -1), q_HBK, keys_HKT)
    else:
        past = q_HBK @ keys_HKT
        past = past if bias is None else past + bias
    if normalise == "softmax":
        weights, own = _weights(past.transpose(0, 1), own, scale, normalise)
        return (weights.transpose(0, 1).to(values.dtype) @ values_HTV).transpose(0, 1) + own[..., None] * v
    # Scaled behind the products: [B, H, V] numbers instead of [B, H, T].
    seen = (F.silu(past).to(values.dtype) @ values_HTV).transpose(0, 1)
    return scale * (seen + F.silu(own).to(v.dtype)[..., None] * v)


def candidate_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, user_of_row: Tensor, *,
    bias: Tensor | None = None, own_bias: Tensor | None = None, scale: float = 1.0, alpha: float = 1.0,
    normalise: Normalise = "silu",
) -> Tensor:  # fmt: skip
    """The same, one candidate after the other."""
    rows = []
    for b, user in enumerate(user_of_row.tolist()):
        past = slice(int(offsets[user]), int(offsets[user + 1]))
        k_HTK = torch.cat([keys[past], k[b : b + 1]]).transpose(0, 1)
        v_HTV = torch.cat([values[past], v[b : b + 1]]).transpose(0, 1)
        scores = alpha * (k_HTK @ q[b][:, :, None])[..., 0]  # [H, n + 1]
        if bias is not None and own_bias is not None:
            scores = scores + torch.cat([bias[past], own_bias.reshape(1)])
        weights = scores.softmax(-1) if normalise == "softmax" else F.silu(scores) * scale
        rows.append((weights[:, None] @ v_HTV)[:, 0])
    return torch.stack(rows) if rows else v


def candidate_pairs(offsets: Tensor, user_of_row: Tensor) -> int:
    """Pairs of a candidate and a history token for which `candidate_attention` does multiply."""
    users, rows = offsets.numel() - 1, user_of_row.numel()
    if not rows:
        return 0
    if users == 1:
        return rows * int(offsets[-1])
    return users * _place(user_of_row, users)[1] * max(int(offsets.diff().max()), 1)


def _weights(past: Tensor, own: Tensor, scale: float, normalise: Normalise) -> tuple[Tensor, Tensor]:
    """Scores towards the history [..., H, L] and itself [..., H] -> weights of the same shapes."""
    if normalise == "softmax":
        both = torch.cat([past, own[..., None]], -1).softmax(-1)
        return both[..., :-1], both[..., -1]
    return F.silu(past) * scale, F.silu(own) * scale


def _place(user_of_row: Tensor, users: int) -> tuple[Tensor, int]:
    """The number [B] of each row among its user's rows, and the most rows that a user has."""
    order = torch.argsort(user_of_row, stable=True)
    count = torch.bincount(user_of_row, minlength=users)
    place = torch.empty_like(user_of_row)
    first = torch.repeat_interleave(count.cumsum(0) - count, count)
    place[order] = torch.arange(user_of_row.numel(), device=user_of_row.device) - first
    return place, int(count.max()) if user_of_row.numel() else 0
