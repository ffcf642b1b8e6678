"""Candidates that each see the history of their user and themselves, over keys and values computed once (M-FALCON).

B candidate rows   U users   T history tokens of all users   H heads   K width of q and k   V width of v
P pieces of users' rows   R most rows of a piece   L longest history
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
    user_of_piece, piece, place, most = _pieces(user_of_row, users)
    history, mask = Jagged(torch.cat([keys, values], -1), offsets).padded()  # [U, L, H, K + V]
    towards = None if bias is None else Jagged(bias, offsets).padded()[0]
    if len(user_of_piece) > users:
        history, mask = history.index_select(0, user_of_piece), mask.index_select(0, user_of_piece)
        towards = None if towards is None else towards.index_select(0, user_of_piece)
    keys_PLHK, values_PLHV = history.split([keys.shape[-1], values.shape[-1]], -1)
    q_PRHK = q.new_zeros(len(user_of_piece), most, *q.shape[1:]).index_put((piece, place), q)
    past = alpha * torch.einsum("prhd,plhd->prhl", q_PRHK, keys_PLHK)
    if towards is not None:
        past = past + towards[:, None, None]
    past = past.masked_fill(~mask[:, None, None], float("-inf") if normalise == "softmax" else 0.0)
    own_PRH = own.new_zeros(len(user_of_piece), most, own.shape[1]).index_put((piece, place), own)
    weights, own_PRH = _weights(past, own_PRH, scale, normalise)
    out = torch.einsum("prhl,plhd->prhd", weights.to(values.dtype), values_PLHV)
    return out[piece, place] + own_PRH[piece, place][..., None] * v


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
    user_of_piece, _, _, most = _pieces(user_of_row, users)
    return len(user_of_piece) * most * max(int(offsets.diff().max()), 1)


def _weights(past: Tensor, own: Tensor, scale: float, normalise: Normalise) -> tuple[Tensor, Tensor]:
    """Scores towards the history [..., H, L] and itself [..., H] -> weights of the same shapes."""
    if normalise == "softmax":
        both = torch.cat([past, own[..., None]], -1).softmax(-1)
        return both[..., :-1], both[..., -1]
    return F.silu(past) * scale, F.silu(own) * scale


def _pieces(user_of_row: Tensor, users: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Users' rows in pieces: the user of each [P], the piece and the place in it of each row [B], the most rows of one.

    All are filled up to the largest. So that one user with very many rows does not set that for all others, none has
    more than twice what users have on average, and P R <= 3 B + U.
    """
    order = torch.argsort(user_of_row, stable=True)
    count = torch.bincount(user_of_row, minlength=users)
    number = torch.empty_like(user_of_row)  # of each row among its user's
    first = torch.repeat_interleave(count.cumsum(0) - count, count)
    number[order] = torch.arange(user_of_row.numel(), device=user_of_row.device) - first
    most = min(int(count.max()), -(-2 * user_of_row.numel() // users)) if user_of_row.numel() else 0
    pieces = (-(-count // max(most, 1))).clamp(min=1)  # users without rows keep theirs: nothing is copied then
    user_of_piece = torch.repeat_interleave(torch.arange(users, device=user_of_row.device), pieces)
    before = pieces.cumsum(0) - pieces
    return user_of_piece, before[user_of_row] + number // max(most, 1), number % max(most, 1), most
