"""RankMixer (Zhu et al., 2025, sections 3.1-3.4): semantic tokens, parameter-free mixing, per-token FFNs.

U users   B rows   T tokens   D width   H heads   F hidden width of a token's FFN   c chunk width of the tokeniser
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from scalerec.batch import Batch, Outputs
from scalerec.errors import InputError
from scalerec.features.layout import Layout
from scalerec.layers.embedding import Embedded, EmbeddedSequence
from scalerec.layers.heads import HeadKind, Heads
from scalerec.layers.tokenizer import Tokenizer, TokenizerKind
from scalerec.models.base import FeatureJoin, Joined, Model, ModelConfig, count
from scalerec.ops.per_token import per_token_linear
from scalerec.ops.token_mixing import revert_mixing, token_mixing


class RankMixerConfig(ModelConfig):
    kind: str = "rankmixer"
    dim: PositiveInt = 768
    num_tokens: PositiveInt = 16
    num_layers: PositiveInt = 2
    ffn_dim: PositiveInt = 2160  # F; the paper gives no expansion ratio (spec A.9)
    num_heads: NonNegativeInt = 0  # 0: H = T; otherwise mix, transform, revert
    tokenizer: TokenizerKind = "equal"
    position: bool = False  # a learned vector per token, absorbed by the tokeniser's bias (spec A.4)
    shared_ffn: bool = False  # one FFN for all tokens: the ablation of Table 2
    dropout: float = Field(default=0.0, ge=0, lt=1)  # on the output of the FFN
    head: HeadKind = "mlp"
    head_hidden: PositiveInt = 128
    sequence: Literal["din", "mean"] = "din"

    def build(self, layout: Layout) -> RankMixer:
        heads = self.num_heads or self.num_tokens
        if self.dim % heads:
            what = "num_heads" if self.num_heads else "num_tokens"
            raise InputError(
                f"--model.dim {self.dim} is not divisible by --model.{what} {heads}: use a multiple, such as "
                f"{-(-self.dim // heads) * heads}"
            )
        return RankMixer(self, layout)

    def stack_parameters(self) -> int:
        """L [ T (2 D F + F + D) + 4 D ] (spec A.9), 1 FFN instead of T when shared; H = T only."""
        ffns = 1 if self.shared_ffn else self.num_tokens
        return self.num_layers * (ffns * (2 * self.dim * self.ffn_dim + self.ffn_dim + self.dim) + 4 * self.dim)

    def stack_macs(self) -> int:
        """2 L T D F multiply-accumulates per row."""
        return 2 * self.num_layers * self.num_tokens * self.dim * self.ffn_dim


class PerTokenFFN(nn.Module):
    """Eq. 6-9: GELU(x W1_t + b1_t) W2_t + b2_t with weights of its own for each token, [B, T, D] -> [B, T, D]."""

    def __init__(self, tokens: int, dim: int, hidden: int, shared: bool = False):
        super().__init__()
        self.tokens, self.shared = tokens, shared
        own = 1 if shared else tokens
        self.up = nn.Parameter(torch.empty(own, dim, hidden))
        self.up_bias = nn.Parameter(torch.zeros(own, hidden))
        self.down = nn.Parameter(torch.empty(own, hidden, dim))
        self.down_bias = nn.Parameter(torch.zeros(own, dim))
        for weight in (self.up, self.down):
            for matrix in weight:  # per slice: the fans of a 3-D tensor would be wrong
                nn.init.xavier_uniform_(matrix)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.shared:
            hidden = nn.functional.gelu(x_BTD @ self.up[0] + self.up_bias[0])
            return hidden @ self.down[0] + self.down_bias[0]
        h_TBF = nn.functional.gelu(per_token_linear(x_BTD.transpose(0, 1), self.up, self.up_bias))
        return per_token_linear(h_TBF, self.down, self.down_bias).transpose(0, 1)


class RankMixerBlock(nn.Module):
    """S = LN(Mix(X) + X), X' = LN(PFFN(S) + S) (eq. 1), post-norm.

    With H != T the FFN works on the H mixed tokens and mixing is reverted before the residual (spec A.6).
    """

    def __init__(self, config: RankMixerConfig):
        super().__init__()
        tokens, dim = config.num_tokens, config.dim
        self.tokens, self.heads = tokens, config.num_heads or tokens
        self.mixed_norm = nn.LayerNorm(dim)
        self.norm = nn.LayerNorm(dim)
        self.ffn = PerTokenFFN(tokens, dim, config.ffn_dim, config.shared_ffn)
        self.dropout = nn.Dropout(config.dropout)
        self.mixed_ffn = None
        if self.heads != tokens:
            self.mixed_ffn = PerTokenFFN(self.heads, tokens * dim // self.heads, config.ffn_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        mixed = token_mixing(x_BTD, self.heads)
        if self.mixed_ffn is not None:
            mixed = revert_mixing(self.mixed_ffn(mixed), self.tokens)
        s = self.mixed_norm(mixed + x_BTD)
        return self.norm(self.dropout(self.ffn(s)) + s)


class RankMixer(Model):
    """Tokens of the user side once per user, of the item side per row; L blocks; mean over tokens; heads."""

    def __init__(self, config: RankMixerConfig, layout: Layout):
        super().__init__(layout)
        self.config = config
        self.join = FeatureJoin(layout, config.sequence)
        self.tokenizer = Tokenizer(self.join.columns(), config.num_tokens, config.dim, config.tokenizer)
        self.position = nn.Parameter(torch.zeros(config.num_tokens, config.dim)) if config.position else None
        self.blocks = nn.ModuleList(RankMixerBlock(config) for _ in range(config.num_layers))
        self.heads = Heads(config.dim, len(layout.tasks), config.head, config.head_hidden)

    def encode_user(self, user: Embedded) -> tuple[Tensor, Tensor, dict[str, EmbeddedSequence]]:
        """User tokens [U, T_user, D], the user's features (a global token wants them) and the pasts for DIN."""
        joined = self.join.user_side(user)
        return self.tokenizer.user_tokens(joined.user), joined.user, joined.pasts

    def score(self, state: tuple, items: Embedded, user_of_row: Tensor) -> Outputs:
        user_tokens, user, pasts = state
        rows = self.join.item_side(Joined(user, pasts), items, user_of_row)
        x = self.tokenizer(user_tokens, user, rows, user_of_row)
        if self.position is not None:
            x = x + self.position
        for block in self.blocks:
            x = block(x)
        return Outputs(self.heads(x.mean(1)))

    def flops(self, batch: Batch) -> int:
        """Per row 2 T D F a block for the FFN (mixing costs none), the tokeniser on each side, DIN, heads."""
        config, rows = self.config, len(batch)
        macs = rows * (config.stack_macs() + self.heads.macs)
        if config.num_heads and config.num_heads != config.num_tokens:
            # H tokens of width T D / H through F: again T D F each way.
            macs += rows * config.stack_macs()
        return 2 * (macs + self.tokenizer.macs(rows, len(batch.user)) + self.join.macs(batch))

    def parts(self) -> dict[str, int]:
        position = 0 if self.position is None else self.position.numel()
        return {
            "stack": count(self.blocks),
            "tokeniser": count(self.tokenizer) + position,
            "sequence": count(self.join),
            "heads": count(self.heads),
        }


def tiny() -> RankMixerConfig:
    return RankMixerConfig(dim=64, num_tokens=8, ffn_dim=128)


def small() -> RankMixerConfig:
    return RankMixerConfig(dim=128, num_tokens=16, ffn_dim=256)


def base() -> RankMixerConfig:
    return RankMixerConfig(dim=256, num_tokens=16, ffn_dim=720)


def rankmixer_100m() -> RankMixerConfig:
    return RankMixerConfig(dim=768, num_tokens=16, ffn_dim=2160)


def rankmixer_1b() -> RankMixerConfig:
    return RankMixerConfig(dim=1536, num_tokens=32, ffn_dim=5592)
