"""RankMixer (Zhu et al., 2025, sections 3.1-3.4): semantic tokens, parameter-free mixing, per-token FFNs or experts.

U users   B rows   T tokens   D width   H heads   F hidden width of a token's FFN   c chunk width of the tokeniser
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from scalerec.batch import Batch, Outputs
from scalerec.errors import InputError
from scalerec.features.layout import Layout
from scalerec.layers.embedding import Embedded, EmbeddedSequence
from scalerec.layers.experts import ExpertFFN, ExpertsConfig, RouterStep, SparsityControl, split
from scalerec.layers.heads import HeadKind, Heads
from scalerec.layers.tokenizer import Tokenizer, TokenizerKind
from scalerec.losses import Term
from scalerec.models.base import FeatureJoin, Joined, Model, ModelConfig, count
from scalerec.ops.mix_norm import add_norm, mix_add_norm
from scalerec.ops.per_token_ffn import per_token_ffn
from scalerec.ops.token_mixing import revert_mixing, token_mixing


class RankMixerConfig(ModelConfig):
    kind: str = "rankmixer"
    dim: PositiveInt = 768
    num_tokens: PositiveInt = 16
    num_layers: PositiveInt = 2
    ffn_dim: PositiveInt = 2160  # F; the paper gives no expansion ratio (docs/models.md)
    num_heads: NonNegativeInt = 0  # 0: H = T; otherwise mix, transform, revert
    tokenizer: TokenizerKind = "equal"
    position: bool = False  # a learned vector per token, absorbed by the tokeniser's bias
    shared_ffn: bool = False  # one FFN, or one set of experts, for all tokens: the ablation of Table 2
    experts: ExpertsConfig = ExpertsConfig()  # in place of each token's FFN (section 3.4)
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
        if self.experts.count:
            self.experts.check(self.num_tokens, self.ffn_dim)
        return RankMixer(self, layout)

    @property
    def hidden(self) -> int:
        """Hidden width of a token: F, or that of all its experts side by side."""
        return self.experts.hidden(self.ffn_dim) if self.experts.count else self.ffn_dim

    def stack_parameters(self) -> int:
        """L [ T (2 D F + F + D) + 4 D ] (docs/models.md), 1 FFN instead of T when shared; H = T only.

        Experts have E output biases instead of one, and routers of D E + E.
        """
        own, dim, hidden = 1 if self.shared_ffn else self.num_tokens, self.dim, self.hidden
        experts = self.experts.count
        routers = (1 if self.experts.router_shared else self.num_tokens) * (1 + (self.experts.dtsi != "off"))
        ffn = own * (2 * dim * hidden + hidden + max(experts, 1) * dim) + routers * (dim + 1) * experts
        return self.num_layers * (ffn + 4 * dim)

    def stack_macs(self, active: float = 1.0) -> int:
        """2 L T D F multiply-accumulates per row, of the share of experts that is active; 2 L T D E more to gate."""
        gating = 2 * self.dim * self.experts.count
        return round(self.num_layers * self.num_tokens * (2 * self.dim * self.hidden * active + gating))


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
        return per_token_ffn(x_BTD, self.up, self.up_bias, self.down, self.down_bias)


class MixedNorm(nn.LayerNorm):
    """LN(Mix(x) + x)."""

    def forward(self, x_BTD: Tensor) -> Tensor:  # type: ignore[override]
        return mix_add_norm(x_BTD, self.weight, self.bias, self.eps)


class ResidualNorm(nn.LayerNorm):
    """LN(y + x)."""

    def forward(self, y_BTD: Tensor, x_BTD: Tensor) -> Tensor:  # type: ignore[override]
        return add_norm(y_BTD, x_BTD, self.weight, self.bias, self.eps)


class RankMixerBlock(nn.Module):
    """S = LN(Mix(X) + X), X' = LN(PFFN(S) + S) (eq. 1), post-norm.

    With H != T the FFN works on the H mixed tokens and mixing is reverted before the residual (arXiv 2602.06563).
    """

    def __init__(self, config: RankMixerConfig):
        super().__init__()
        tokens, dim = config.num_tokens, config.dim
        self.tokens, self.heads = tokens, config.num_heads or tokens
        self.mixed_norm = MixedNorm(dim) if self.heads == tokens else ResidualNorm(dim)
        self.norm = ResidualNorm(dim)
        self.ffn: PerTokenFFN | ExpertFFN
        if config.experts.count:
            self.ffn = ExpertFFN(tokens, dim, config.hidden, config.experts, config.shared_ffn)
        else:
            self.ffn = PerTokenFFN(tokens, dim, config.ffn_dim, config.shared_ffn)
        self.dropout = nn.Dropout(config.dropout)
        self.mixed_ffn = None
        if self.heads != tokens:
            self.mixed_ffn = PerTokenFFN(self.heads, tokens * dim // self.heads, config.ffn_dim)

    def forward(self, x_BTD: Tensor, step: RouterStep | None = None) -> Tensor:
        if self.mixed_ffn is None:
            s = self.mixed_norm(x_BTD)
        else:
            s = self.mixed_norm(revert_mixing(self.mixed_ffn(token_mixing(x_BTD, self.heads)), self.tokens), x_BTD)
        out = self.ffn(s, step) if isinstance(self.ffn, ExpertFFN) else self.ffn(s)
        return self.norm(self.dropout(out), s)


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
        experts = config.experts
        self.control = None
        if experts.count and experts.routing == "relu":
            self.control = SparsityControl(experts.target, experts.growth, experts.control == "damped")
        self.last: RouterStep | None = None  # what the routers did in the last training step

    def encode_user(self, user: Embedded) -> tuple[Tensor, Tensor, dict[str, EmbeddedSequence]]:
        """User tokens [U, T_user, D], the user's features (a global token wants them) and the pasts for DIN."""
        joined = self.join.user_side(user)
        return self.tokenizer.user_tokens(joined.user), joined.user, joined.pasts

    def score(self, state: tuple, items: Embedded, user_of_row: Tensor) -> Outputs:
        return self._from_tokens(self._tokens(state, items, user_of_row))

    def objective(self, batch: Batch) -> dict[str, Term]:
        """With experts, the loss under both routers by `dtsi`, and what the infer-router's open gates cost."""
        experts = self.config.experts
        if not experts.count:
            return super().objective(batch)
        user, items = self.embeddings(batch.user, batch.items)
        x_BTD = self._tokens(self.encode_user(user), items, batch.user_of_row)
        self.last = RouterStep.begin(experts.dtsi, len(batch), x_BTD.device)
        twice = experts.dtsi == "dual"
        logits = self._from_tokens(torch.cat([x_BTD, x_BTD]) if twice else x_BTD, self.last).logits
        found = [self.loss(Outputs(part), batch) for part in logits.chunk(2 if twice else 1)]
        terms = {
            task: Term(torch.stack([terms[task].sum for terms in found]).mean(), term.weight)
            for task, term in found[0].items()
        }
        strength = experts.balance if self.control is None else self.control.strength[0]
        cost, weight = self.last.penalty()
        return {**terms, "gates": Term(strength * cost, weight)}

    def begin_bf16(self) -> None:
        """Gradients of the FFNs' weights are products in bf16: they stay so, half as much to write and to read."""
        for module in self.modules():
            if isinstance(module, PerTokenFFN) and hasattr(module.up, "grad_dtype"):  # since torch 2.10
                module.up.grad_dtype = module.down.grad_dtype = torch.bfloat16

    def after_step(self) -> None:
        if self.last is not None:
            self.last.penalties.clear()  # they hold on to the step's graph
            if self.control is not None:
                self.control.update(self.last)

    def diagnostics(self) -> dict[str, Any]:
        """Lambda and how often each gate was open [L, T, E] in the last training step."""
        if self.last is None:
            return {}
        often = self.last.frequency()
        found: dict[str, Any] = {"open": float(often.mean()), "never_open": float((often == 0).float().mean())}
        if self.control is not None:
            found["lambda"] = float(self.control.strength)
        return found | {"open_by_expert": often.tolist()}

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of a dense RankMixer as experts that are all open, whose outputs are the same."""
        had, has = (any(".ffn.router." in name for name in some) for some in (weights, self.state_dict()))
        if had == has:
            return weights
        if had:
            raise InputError("it holds experts and this model none: set --model.experts as they were there")
        found = dict(weights)
        for number, block in enumerate(self.blocks):
            assert isinstance(block, RankMixerBlock) and isinstance(block.ffn, ExpertFFN)
            prefix = f"blocks.{number}.ffn."
            found |= {prefix + name: value for name, value in split(weights, prefix, block.ffn).items()}
        assert self.control is not None  # of ReLU gates, which `split` demands
        return found | {f"control.{name}": value for name, value in self.control.state_dict().items()}

    def _tokens(self, state: tuple, items: Embedded, user_of_row: Tensor) -> Tensor:
        """[B, T, D] before the first block."""
        user_tokens, user, pasts = state
        rows = self.join.item_side(Joined(user, pasts), items, user_of_row)
        x_BTD = self.tokenizer(user_tokens, user, rows, user_of_row)
        return x_BTD if self.position is None else x_BTD + self.position

    def _from_tokens(self, x_BTD: Tensor, step: RouterStep | None = None) -> Outputs:
        for block in self.blocks:
            x_BTD = block(x_BTD, step)
        return Outputs(self.heads(x_BTD.mean(1)))

    def flops(self, batch: Batch) -> int:
        """Per row 2 T D F a block for the FFN (mixing costs none), the tokeniser on each side, DIN, heads.

        Of experts all are counted; what is left of them where some are skipped follows from `stack_macs(active)`.
        """
        config, rows = self.config, len(batch)
        macs = rows * (config.stack_macs() + self.heads.macs)
        if config.num_heads and config.num_heads != config.num_tokens:
            # H tokens of width T D / H through F: T D F each way.
            macs += rows * 2 * config.num_layers * config.num_tokens * config.dim * config.ffn_dim
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
