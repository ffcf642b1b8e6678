"""Sparse experts in place of a per-token FFN (RankMixer section 3.4, eq. 10-11; L1 of ReMoE, arXiv 2412.14711).

T tokens   B rows   D width   E experts of a token   F hidden width of an expert

Two routers (DTSI): the train-router lets every expert learn, the infer-router alone is penalised and alone is served.
What the papers leave open is in docs/models.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor, nn
from torch.nn import functional as F

from scalerec.config import Config
from scalerec.errors import InputError
from scalerec.ops.expert_ffn import BREAK_EVEN, masked_experts, sparse_experts, sparse_experts_in_graphs
from scalerec.ops.per_token import per_token_linear

WEAKEST, STRONGEST = 1e-6, 1e2  # bounds of lambda, which starts at the first; below it nothing is felt
DAMPING = 4.0  # by how many e-folds the penalty is raised at once where twice as many gates are open as wanted


class ExpertsConfig(Config):
    """How an FFN is made of experts; 0 of them leave it as it is."""

    count: NonNegativeInt = 0  # E of each token and layer
    width: Literal["split", "full"] = "full"  # F = ffn_dim / E: as many parameters as the FFN; ffn_dim: E times as many
    routing: Literal["relu", "top_k"] = "relu"
    active: float = 0.125  # share of experts wanted open: what lambda is moved for, and K = active E
    dtsi: Literal["dual", "sample", "mix", "off"] = "dual"  # how the train-router enters (docs/models.md); off: no such
    train_gate: Literal["relu", "softmax"] = "relu"
    penalty: Literal["l1", "balanced_l1"] = "l1"  # the second weighs an expert by how often it is open
    control: Literal["damped", "remoe"] = "damped"  # how lambda moves; remoe: by one factor up or down
    growth: float = Field(default=1.1, gt=1)  # that factor; damped: at most
    top: NonNegativeInt = 0  # K; 0: as `active` says
    renormalise: bool = True  # the kept gates of top_k add up to one; a single one is left, or it would not learn
    balance: NonNegativeFloat = 0.0  # coefficient of the load-balance loss of top_k; 0.01 is usual
    balance_form: Literal["switch", "squares"] = "switch"  # squares: of mean probabilities minus 1/E
    threshold: float = Field(default=0.0, ge=0, lt=1)  # of a gate of top_k below which its expert is dropped
    router_shared: bool = False  # one router for all tokens
    pools: tuple[tuple[NonNegativeInt, ...], ...] = ()  # for each token the experts it may use; none: all

    @property
    def kept(self) -> int:
        """K of top_k."""
        return self.top or round(self.active * self.count)

    @property
    def target(self) -> float:
        """Share of experts wanted open."""
        return self.kept / self.count if self.routing == "top_k" else self.active

    def hidden(self, ffn_dim: int) -> int:
        """Hidden width of all experts of a token side by side."""
        return ffn_dim * (self.count if self.width == "full" else 1)

    def check(self, tokens: int, ffn_dim: int) -> None:
        """InputError where the options do not fit each other or the model."""
        option, count = "--model.experts", self.count
        if count < 2:
            raise InputError(f"{option}.count {count}: give each token at least 2 experts, or 0 for a dense FFN")
        if not 0 < self.active <= 1:
            raise InputError(f"{option}.active {self.active}: the share of open experts is above 0 and at most 1")
        if self.width == "split" and ffn_dim % count:
            raise InputError(
                f"--model.ffn_dim {ffn_dim} cannot be split into {option}.count {count} experts: use a multiple, such "
                f"as {-(-ffn_dim // count) * count}, or {option}.width full"
            )
        if self.routing == "top_k":
            self._check_top_k(option)
        elif self.top or self.balance or self.threshold:
            raise InputError(f"{option}.top, .balance and .threshold are of {option}.routing top_k: leave them at 0")
        self._check_pools(option, tokens)

    def _check_top_k(self, option: str) -> None:
        if self.dtsi != "off":
            raise InputError(f"{option}.routing top_k has one router: set {option}.dtsi off")
        if self.top > self.count:
            raise InputError(f"{option}.top {self.top} is more than {option}.count {self.count}: keep at most all")
        if not self.top and (self.kept < 1 or abs(self.kept / self.active / self.count - 1) > 0.01):
            raise InputError(
                f"{option}.active {self.active} of {self.count} experts is not a whole number: set {option}.top instead"
            )

    def _check_pools(self, option: str, tokens: int) -> None:
        if not self.pools:
            return
        if len(self.pools) != tokens:
            raise InputError(f"{option}.pools names {len(self.pools)} tokens of {tokens}: give each token its experts")
        needed = self.kept if self.routing == "top_k" else 1
        for token, pool in enumerate(self.pools):
            if max(pool, default=0) >= self.count:
                raise InputError(f"{option}.pools: token {token} has expert {max(pool)} of 0 to {self.count - 1}")
            if len(set(pool)) < needed:
                raise InputError(
                    f"{option}.pools leaves token {token} with {len(set(pool))} experts: give it {needed} or more"
                )


@dataclass
class RouterStep:
    """One training step: whose gates each row takes, and what the infer-router did, layer by layer."""

    train_share: Tensor | None = None  # [B, 1] weight of the train-router's gates; the rest is the infer-router's
    penalties: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # sum and weight, before lambda
    opened: list[Tensor] = field(default_factory=list)  # [T, E] rows with an open gate, of those served
    served: float = 0.0  # rows in which the infer-router has a say

    @staticmethod
    def begin(mode: str, rows: int, device: torch.device) -> RouterStep:
        """`dual` expects the rows twice, for the train-router first."""
        if mode == "off":
            return RouterStep()
        if mode == "mix":
            return RouterStep(torch.full((rows, 1), 0.5, device=device))
        if mode == "sample":
            return RouterStep((torch.rand(rows, 1, device=device) < 0.5).float())
        return RouterStep((torch.arange(2 * rows, device=device) < rows).float()[:, None])

    def note(self, gates_TBE: Tensor) -> Tensor:
        """Keep which of the infer-router's gates were open; [T, 1, E] how often, over the rows it serves."""
        served = self._served(gates_TBE)
        self.opened.append(((gates_TBE.detach() != 0) * served[:, None]).sum(1))
        self.served = float(served.sum())
        return self.opened[-1][:, None] / max(self.served, 1)

    def penalise(self, cost_TBE: Tensor) -> None:
        """A cost of each gate of the infer-router, of which the mean over rows, tokens and experts counts."""
        served = self._served(cost_TBE)
        self.penalties.append((served @ cost_TBE.float().mean((0, 2)), served.sum()))

    def _served(self, of: Tensor) -> Tensor:
        """[B] whether the infer-router has a say in a row; float32, which can count rows where bfloat16 cannot."""
        if self.train_share is None:
            return torch.ones(of.shape[1], device=of.device)
        return (self.train_share[:, 0] < 1).float()

    def penalty(self) -> tuple[Tensor, Tensor]:
        """Sum and weight whose quotient is the mean over rows, layers, tokens and experts."""
        sums, weights = zip(*self.penalties)
        return torch.stack(sums).sum(), torch.stack(weights).sum()

    def frequency(self) -> Tensor:
        """[L, T, E] share of the served rows with an open gate."""
        return torch.stack(self.opened) / max(self.served, 1)


class SparsityControl(nn.Module):
    """Moves lambda after each step towards the wanted share of open gates; both buffers are in the state dict.

    `remoe` multiplies lambda by `growth` or divides by it (ReMoE). The routers follow some twenty steps late, so
    that this swings by a factor of four about the target for hundreds of steps. `damped` takes steps in proportion to
    the error, and lets the error itself raise or lower the penalty: a PI controller of log lambda.
    """

    strength: Tensor  # [1] what the penalty is multiplied with
    settled: Tensor  # [1] the same without what the error of the moment adds

    def __init__(self, target: float, growth: float, damped: bool = True):
        super().__init__()
        self.target, self.growth, self.damped = target, growth, damped
        self.register_buffer("strength", torch.full((1,), WEAKEST))
        self.register_buffer("settled", torch.full((1,), WEAKEST))

    @torch.no_grad()
    def update(self, step: RouterStep) -> None:
        """After each optimiser step, on all processes together."""
        opened = torch.stack([value.sum() for value in step.opened]).sum().double()
        gates = sum(value.numel() for value in step.opened) * step.served
        both = torch.stack([opened, torch.full_like(opened, gates)])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(both)
        if not both[1]:
            return
        error = float(both[0] / both[1]) / self.target - 1
        move = min(max(error, -1.0), 1.0) if self.damped else float((error > 0) - (error < 0))
        self.settled.mul_(self.growth**move).clamp_(WEAKEST, STRONGEST)
        self.strength.copy_(self.settled * math.exp(DAMPING * move) if self.damped else self.settled)


class Router(nn.Module):
    """An affine map of each token's own to one number per expert, [T, B, D] -> [T, B, E]."""

    def __init__(self, tokens: int, dim: int, experts: int, shared: bool):
        super().__init__()
        self.tokens, own = tokens, 1 if shared else tokens
        # So that gates add up to about one for a normalised input: E 0.399 sigma = 1, 0.399 sigma being the mean of
        # ReLU(N(0, sigma^2)).
        self.weight = nn.Parameter(torch.randn(own, dim, experts) / (0.399 * experts * dim**0.5))
        self.bias = nn.Parameter(torch.zeros(own, experts))

    def forward(self, x_TBD: Tensor) -> Tensor:
        return per_token_linear(x_TBD, self.weight.expand(self.tokens, -1, -1), self.bias.expand(self.tokens, -1))


class ExpertFFN(nn.Module):
    """v_t = sum_j G_tj e_tj(s_t) (eq. 10), [B, T, D] -> [B, T, D], e_tj(s) = GELU(s up_tj + b) down_tj + b'_tj.

    With `shared` all tokens have the same experts; routers stay their own. A token may have no open gate: zero.
    """

    allowed: Tensor | None

    def __init__(self, tokens: int, dim: int, hidden: int, config: ExpertsConfig, shared: bool = False):
        super().__init__()
        self.tokens, self.config, self.break_even = tokens, config, BREAK_EVEN
        own, experts = 1 if shared else tokens, config.count
        self.router = Router(tokens, dim, experts, config.router_shared)
        self.train_router = None if config.dtsi == "off" else Router(tokens, dim, experts, config.router_shared)
        width = hidden // experts
        self.up = nn.Parameter(torch.empty(own, experts, dim, width))  # an expert's matrix lies in one piece
        self.up_bias = nn.Parameter(torch.zeros(own, experts, width))
        self.down = nn.Parameter(torch.empty(own, experts, width, dim))
        self.down_bias = nn.Parameter(torch.zeros(own, experts, dim))
        for weight in (self.up, self.down):
            for matrix in weight.flatten(0, 1):  # per slice: the fans of a 4-D tensor would be wrong
                nn.init.xavier_uniform_(matrix)
        allowed = None
        if config.pools:
            allowed = torch.tensor([[[j in pool for j in range(experts)]] for pool in config.pools])
        self.register_buffer("allowed", allowed, persistent=False)

    def gates(self, x_TBD: Tensor, router: Router | None = None) -> Tensor:
        """[T, B, E]: those that are served, or those of the train-router."""
        if router is None:
            return self._opened(self._logits(self.router, x_TBD))
        logits = self._logits(router, x_TBD)
        return torch.softmax(logits, -1) if self.config.train_gate == "softmax" else F.relu(logits)

    def forward(self, x_BTD: Tensor, step: RouterStep | None = None) -> Tensor:
        """`step` belongs to training; without one the infer-router alone decides."""
        x_TBD = x_BTD.transpose(0, 1)
        gates = self.gates(x_TBD)
        if step is not None:
            gates = self._trained(x_TBD, gates, step)
        parts = (x_TBD, gates, *(weight.expand(self.tokens, *weight.shape[1:]) for weight in self._weights()))
        # In graphs skipping has no gradients; exported ones never need them, whatever is switched on meanwhile.
        wanted = torch.is_grad_enabled() and not torch.compiler.is_exporting()
        if self.break_even == 0 or (torch.compiler.is_compiling() and wanted):
            out = masked_experts(*parts)
        elif torch.compiler.is_compiling():
            out = sparse_experts_in_graphs(*parts, self.break_even)  # type: ignore[call-arg]
        else:
            out = sparse_experts(*parts, break_even=self.break_even)
        return out.transpose(0, 1)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.up, self.up_bias, self.down, self.down_bias

    def _logits(self, router: Router, x_TBD: Tensor) -> Tensor:
        logits = router(x_TBD)
        return logits if self.allowed is None else logits.masked_fill(~self.allowed, float("-inf"))

    def _opened(self, logits: Tensor) -> Tensor:
        """Gates of the infer-router from its logits: ReLU, or the K largest of a softmax."""
        if self.config.routing == "relu":
            return F.relu(logits)
        return self._kept(torch.softmax(logits, -1))

    def _kept(self, p_TBE: Tensor) -> Tensor:
        config = self.config
        gates = torch.zeros_like(p_TBE).scatter(-1, p_TBE.topk(config.kept, -1).indices, 1.0) * p_TBE
        if config.threshold:
            gates = gates * (gates >= config.threshold)
        if config.renormalise and config.kept > 1:
            gates = gates / gates.sum(-1, keepdim=True).clamp(min=1e-9)
        return gates

    def _trained(self, x_TBD: Tensor, gates: Tensor, step: RouterStep) -> Tensor:
        """Gates of both routers by row, with what the infer-router's cost."""
        config, often = self.config, step.note(gates)
        if config.routing == "top_k":
            step.penalise(self._balance(torch.softmax(self._logits(self.router, x_TBD), -1), often))
            return gates
        # Its input is detached: the penalty moves this router and nothing before it, so never a train-router.
        cost = self.gates(x_TBD.detach())
        step.penalise(cost * (often / config.target) if config.penalty == "balanced_l1" else cost)
        if self.train_router is None or step.train_share is None:
            return gates
        return torch.lerp(gates, self.gates(x_TBD, self.train_router), step.train_share.to(gates.dtype))

    def _balance(self, p_TBE: Tensor, often_T1E: Tensor) -> Tensor:
        """[T, B, E] whose mean over all is the load-balance loss averaged over tokens (Switch; docs/models.md)."""
        experts = self.config.count
        if self.config.balance_form == "squares":
            return (experts * (p_TBE.mean(1, keepdim=True) - 1 / experts).square()).expand_as(p_TBE)
        return experts**2 * (often_T1E / self.config.kept) * p_TBE


def split(weights: dict[str, Tensor], prefix: str, ffn: ExpertFFN) -> dict[str, Tensor]:
    """The weights of a dense per-token FFN under `prefix` as experts that are all open: the same outputs.

    Raises:
        InputError: gates cannot all be one, or the experts together are not as wide as the FFN.
    """
    config = ffn.config
    soft = ffn.train_router is not None and config.train_gate == "softmax"
    if config.routing != "relu" or soft or config.pools:
        raise InputError(
            "it is dense, and only ReLU gates without pools can all be one: set --model.experts.routing and "
            ".train_gate to relu"
        )
    up, up_bias, down, down_bias = (weights[prefix + name] for name in ("up", "up_bias", "down", "down_bias"))
    own, experts, _, width = ffn.up.shape
    if (len(up), up.shape[2]) != (own, experts * width):
        raise InputError(
            f"its FFN is {up.shape[2]} wide for {len(up)} tokens, the experts together {experts * width} for {own}: "
            "set --model.ffn_dim and --model.experts.width so that both agree"
        )
    found = {
        "up": up.unflatten(2, (experts, width)).transpose(1, 2),
        "up_bias": up_bias.unflatten(1, (experts, width)),
        "down": down.unflatten(1, (experts, width)),
        "down_bias": torch.zeros_like(ffn.down_bias),
    }
    found["down_bias"][:, 0] = down_bias  # gates are one, so that any expert can carry it
    for name in ("router", "train_router") if ffn.train_router is not None else ("router",):
        found[f"{name}.weight"] = torch.zeros_like(ffn.router.weight)
        found[f"{name}.bias"] = torch.ones_like(ffn.router.bias)
    return found
