"""Features -> tokens (RankMixer eq. 2; the group tokenisers of TokenMixer-Large).

U users   B rows   T tokens   D width   c chunk width
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from scalerec.errors import InputError
from scalerec.features.layout import FeatureLayout
from scalerec.ops.per_token import per_token_linear

TokenizerKind = Literal["equal", "group", "group+global"]
Column = tuple[str, str, FeatureLayout, int]  # side, group, feature, first column of its side


class Tokenizer(nn.Module):
    """Cuts each side's features into chunks, one affine map per chunk.

    `equal` cuts chunks of one width c, the smallest for which user and item side together need at most T (each side
    padded with zeros at its end); `group` makes one token per semantic group; `group+global` adds one of everything.
    """

    def __init__(self, columns: list[Column], tokens: int, dim: int, kind: TokenizerKind = "equal"):
        super().__init__()
        self.kind, self.tokens, self.dim, self.columns = kind, tokens, dim, columns
        widths = {side: sum(c[2].width for c in columns if c[0] == side) for side in ("user", "item")}
        self.total = sum(widths.values())
        chunks = equal_chunks(widths, tokens) if kind == "equal" else self._group_chunks(columns, tokens)
        self.chunks: dict[str, list[list[tuple[int, int]]]] = chunks  # per side and token: spans of columns
        maps = _EqualChunks if kind == "equal" else _GroupChunks
        self.sides = nn.ModuleDict({side: maps(chunks[side], dim) for side in chunks})
        self.everything = nn.Linear(self.total, dim) if kind == "group+global" else None

    def _group_chunks(self, columns: list[Column], tokens: int) -> dict[str, list[list[tuple[int, int]]]]:
        chunks: dict[str, dict[str, list[tuple[int, int]]]] = {"user": {}, "item": {}}
        for side, group, feature, first in columns:
            chunks[side].setdefault(group, []).append((first, first + feature.width))
        found = sum(len(groups) for groups in chunks.values()) + (self.kind == "group+global")
        if found != tokens:
            raise InputError(
                f"--model.tokenizer {self.kind} gives {found} tokens for this schema (a past read by DIN counts on the "
                f"item side), not --model.num_tokens {tokens}: set it to {found}, or use the equal tokenizer"
            )
        return {side: list(groups.values()) for side, groups in chunks.items()}

    def user_tokens(self, user: Tensor) -> Tensor:
        """[U, W_user] -> [U, T_user, D]."""
        return self.sides["user"](user)

    def forward(self, user_tokens: Tensor, user: Tensor, items: Tensor, user_of_row: Tensor) -> Tensor:
        """User tokens [U, T_user, D], user features [U, W_user], row features [B, W_item] -> [B, T, D]."""
        tokens = [user_tokens[user_of_row], self.sides["item"](items)]
        if self.everything is not None:
            tokens.append(self.everything(torch.cat([user[user_of_row], items], 1))[:, None])
        return torch.cat(tokens, 1)

    def macs(self, rows: int, users: int) -> int:
        """Multiply-accumulates: user chunks once per user, item chunks and the global token once per row."""
        user, item = (self.sides[side].macs for side in ("user", "item"))
        return users * user + rows * (item + (self.total * self.dim if self.everything is not None else 0))  # type: ignore

    def describe(self) -> list[tuple[str, list[str]]]:
        """For each token its side and the features in it, "name[a:b]" where only some of its columns are."""
        found = []
        for side in ("user", "item"):
            for spans in self.chunks[side]:
                names = []
                for column_side, _, feature, first in self.columns:
                    for start, stop in spans if column_side == side else ():
                        a, b = max(start, first), min(stop, first + feature.width)
                        if a < b:
                            whole = b - a == feature.width
                            names.append(feature.name if whole else f"{feature.name}[{a - first}:{b - first}]")
                found.append((side, names or ["(padding)"]))
        if self.everything is not None:
            found.append(("item", ["everything"]))
        return found


def equal_chunks(widths: dict[str, int], tokens: int) -> dict[str, list[list[tuple[int, int]]]]:
    """Spans of T equal chunks; leftover tokens go to the item side as pure padding."""
    needed = sum(width > 0 for width in widths.values())
    if tokens < needed:
        raise InputError(f"--model.num_tokens {tokens} is too few: user and item side need one token each")
    width = max(-(-sum(widths.values()) // tokens), 1)
    while sum(-(-w // width) for w in widths.values()) > tokens:
        width += 1
    counts = {side: -(-w // width) for side, w in widths.items()}
    counts["item"] = tokens - counts["user"]
    return {side: [[(i * width, (i + 1) * width)] for i in range(counts[side])] for side in ("user", "item")}


class _EqualChunks(nn.Module):
    """One affine map per chunk of equal width as one batched product: [n, W] -> [n, tokens, D]."""

    def __init__(self, chunks: list[list[tuple[int, int]]], dim: int):
        super().__init__()
        self.dim, self.count = dim, len(chunks)
        self.width = chunks[0][0][1] if chunks else 0
        self.weight = nn.Parameter(torch.empty(self.count, self.width, dim))
        self.bias = nn.Parameter(torch.zeros(self.count, dim))
        for matrix in self.weight:  # per slice: the fans of a 3-D tensor would be wrong
            nn.init.xavier_uniform_(matrix)
        self.macs = self.count * self.width * dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.count:
            return x.new_zeros(x.shape[0], 0, self.dim)
        x = nn.functional.pad(x, (0, self.count * self.width - x.shape[1]))
        x = x.view(x.shape[0], self.count, self.width).transpose(0, 1)
        return per_token_linear(x, self.weight, self.bias).transpose(0, 1)


class _GroupChunks(nn.Module):
    """One affine map per group, each as wide as its features: [n, W] -> [n, tokens, D]."""

    def __init__(self, chunks: list[list[tuple[int, int]]], dim: int):
        super().__init__()
        self.dim, self.count, self.chunks = dim, len(chunks), chunks
        widths = [sum(b - a for a, b in spans) for spans in chunks]
        self.maps = nn.ModuleList(nn.Linear(width, dim) for width in widths)
        for layer in self.maps:
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.macs = sum(widths) * dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.count:
            return x.new_zeros(x.shape[0], 0, self.dim)
        parts = [torch.cat([x[:, a:b] for a, b in spans], 1) if len(spans) > 1 else x[:, slice(*spans[0])]
                 for spans in self.chunks]  # fmt: skip
        return torch.stack([layer(part) for layer, part in zip(self.maps, parts)], 1)
