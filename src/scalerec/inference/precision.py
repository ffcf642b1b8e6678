"""A trained model in fewer bits: bf16 products, or weights and tables in int8 (docs/bundles.md).

A matrix that only ever enters products gives its place in the module to a `Weight`, which answers torch's product
functions in its stead (the `__torch_function__` protocol), so that no model has a second form for serving. What is not
a product stays as it is: layer norms, softmax and SiLU, gates and residuals, the attention of DIN (a gate), the task
heads' last map, and with it the logits, are fp32.

I input width   O output width   T tokens   n rows   D width of a table
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalerec.layers.embedding import EmbeddingCollection
from scalerec.layers.experts import ExpertFFN
from scalerec.layers.heads import Heads, ProductHeads
from scalerec.layers.hstu import HSTULayer
from scalerec.layers.mlp import MLP
from scalerec.layers.sequence import DIN
from scalerec.layers.tokenizer import Tokenizer
from scalerec.models.base import Model
from scalerec.models.rankmixer import PerTokenFFN
from scalerec.models.sasrec import SASRecBlock

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
BLOCK = 2**21  # weights that are back in a floating format at one time


def convert(model: Model, precision: Precision) -> Model:
    """`model` itself, in evaluation mode, its weights replaced by those of the precision; fp32 leaves it as it is."""
    model.eval()
    if precision == "fp32":
        return model
    make = Weight16 if precision == "bf16" else Weight8
    for place in list(_products(model)):
        weight = place.module.get_parameter(place.name)
        delattr(place.module, place.name)
        kind = Weight32 if place.last else make
        setattr(place.module, place.name, kind(weight.detach(), by_columns=place.by_columns, narrow=place.narrow))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ExpertFFN):
                setattr(module, name, Experts(child, make))
    if precision == "int8":
        model.embeddings = TableCollection8(model.embeddings)
    return model


def nbytes(model: nn.Module) -> int:
    """Bytes of all weights, tables included; what shares memory counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class _Place(NamedTuple):
    """A parameter that only enters products."""

    module: nn.Module
    name: str
    by_columns: bool  # [..., I, O]; else [O, I], as of nn.Linear
    narrow: bool = False  # an activation follows, or a sum in fp32: the product may stay in bf16
    last: bool = False  # gives logits


def _products(model: Model) -> Iterator[_Place]:
    """What `convert` replaces, the kinds of layers one by one; an nn.Linear of any other module too."""
    narrow: set[nn.Module] = set()
    last: set[nn.Module] = set()
    left: set[nn.Module] = set(model.embeddings.modules())
    for module in model.modules():
        if isinstance(module, DIN):
            left.update(module.modules())
        elif isinstance(module, MLP):
            narrow.update(module.layers)
        elif isinstance(module, SASRecBlock):
            narrow.add(module.up)
        elif isinstance(module, Heads):
            (last if module.kind == "linear" else narrow).add(module.out if module.kind == "linear" else module.inner)
        elif isinstance(module, ProductHeads):
            last.add(module.out)
    for module in model.modules():
        if module in left:
            continue
        if isinstance(module, PerTokenFFN):
            yield _Place(module, "up", True, narrow=True)
            yield _Place(module, "down", True, narrow=True)
        elif isinstance(module, Tokenizer) and module.kind == "equal":
            sides = (side for side in module.sides.values() if side.get_parameter("weight").numel())
            yield from (_Place(side, "weight", True) for side in sides)
        elif isinstance(module, HSTULayer):
            yield _Place(module, "weight", True)
        elif type(module) is nn.Linear:
            yield _Place(module, "weight", False, narrow=module in narrow, last=module in last)


class Weight(nn.Module):
    """Matrices [..., I, O], or [O, I], that only enter products: answers F.linear, matmul and baddbmm.

    Outside of those it has what reading code asks of a tensor: `shape`, `numel()` and an index of the first dimension.
    """

    def __init__(self, weight: Tensor, *, by_columns: bool, narrow: bool = False):
        super().__init__()
        self.by_columns, self.narrow, self.shape = by_columns, narrow, weight.shape

    def numel(self) -> int:
        return self.shape.numel()

    def __getitem__(self, index: int) -> Weight:
        """One of several matrices, sharing its memory."""
        found = type(self).__new__(type(self))
        Weight.__init__(
            found, torch.empty(self.shape[1:], device="meta"), by_columns=self.by_columns, narrow=self.narrow
        )
        for name, values in self.named_buffers():
            found.register_buffer(name, values[index])
        return found

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.product(x, None)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        if kwargs or not isinstance(args[-1 if func is torch.baddbmm else 1], Weight):
            raise TypeError(f"{func}: a converted weight enters products from the right only")
        if func is F.linear:
            return args[1].product(args[0], args[2] if len(args) > 2 else None)
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            return args[1].product(args[0], None)
        if func is torch.baddbmm:
            return args[2].product(args[1], args[0])
        raise TypeError(f"{func}: not a product, and a converted weight enters nothing else")

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] (or [T, n, I] with weights [T, I, O]) times the weight, plus the bias."""
        raise TypeError(f"{type(self).__name__} does not say how it is multiplied")


class Weight32(Weight):
    """As it was, for a layer whose input may be narrower."""

    def __init__(self, weight: Tensor, *, by_columns: bool, narrow: bool = False):
        super().__init__(weight, by_columns=by_columns)
        self.register_buffer("values", weight)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x.float(), self.get_buffer("values"), bias, self.by_columns)


class Weight16(Weight):
    """In bf16; products of bf16 with sums in fp32, as AMX and AVX512-BF16 compute them."""

    def __init__(self, weight: Tensor, *, by_columns: bool, narrow: bool = False):
        super().__init__(weight, by_columns=by_columns, narrow=narrow)
        self.register_buffer("values", weight.bfloat16())

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        values = self.get_buffer("values")
        if self.narrow:
            return _product(x.bfloat16(), values, None if bias is None else bias.bfloat16(), self.by_columns)
        found = _product(x.bfloat16(), values, None, self.by_columns).float()
        return found if bias is None else found + bias


class Weight8(Weight):
    """In int8, w = q scale with a scale for each output; brought back block by block, so that memory stays int8's.

    Whole numbers up to 256 are exact in bf16: where the processor multiplies bf16 the block is bf16 and only the
    activations are rounded (W8A16); elsewhere everything is fp32.
    """

    def __init__(self, weight: Tensor, *, by_columns: bool, narrow: bool = False):
        super().__init__(weight, by_columns=by_columns, narrow=narrow)
        scale = weight.abs().amax(-2 if by_columns else -1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self.register_buffer("values", (weight / scale).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale.squeeze(-2 if by_columns else -1))  # [..., O]

    def dequantised(self) -> Tensor:
        """The weight that is meant, fp32."""
        return self.get_buffer("values").float() * self.get_buffer("scale").unsqueeze(-2 if self.by_columns else -1)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        values, scale = self.get_buffer("values"), self.get_buffer("scale")
        x = x.to(torch.bfloat16 if multiplies_bf16() else torch.float32)
        if values.ndim == 3:
            found = torch.stack([self._blocks(*each) for each in zip(x, values, scale)])
        else:
            found = self._blocks(x, values, scale)
        return found if bias is None else found + bias

    def _blocks(self, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """x [..., I] times one matrix, some outputs at a time, fp32."""
        outputs = -1 if self.by_columns else 0
        size = max(BLOCK // max(x.shape[-1], 1), 1)
        parts = zip(values.split(size, outputs), scale.split(size))
        found = [_product(x, part.to(x.dtype), None, self.by_columns).float() * own for part, own in parts]
        return found[0] if len(found) == 1 else torch.cat(found, -1)


def _product(x: Tensor, values: Tensor, bias: Tensor | None, by_columns: bool) -> Tensor:
    if not by_columns:
        return F.linear(x, values, bias)
    if bias is None:
        return x @ values
    return torch.baddbmm(bias, x, values)


class Experts(ExpertFFN):
    """Experts in few bits, each with scales of its own: of every expert only the rows whose gate is open."""

    def __init__(self, whole: ExpertFFN, make: type[Weight]):
        nn.Module.__init__(self)
        self.tokens, self.config = whole.tokens, whole.config
        self.router, self.train_router = whole.router, None  # training's router serves nobody
        self.up_bias, self.down_bias = whole.up_bias, whole.down_bias
        self.register_buffer("allowed", whole.allowed, persistent=False)
        for name, weight in (("up", whole.up), ("down", whole.down)):  # [T, E, I, O] -> [T E, I, O]
            self.add_module(name, make(weight.detach().flatten(0, 1), by_columns=True, narrow=True))

    def forward(self, x_BTD: Tensor, step: Any = None) -> Tensor:
        x_TBD = x_BTD.transpose(0, 1)
        gates = self.gates(x_TBD)
        up, down = self.get_submodule("up"), self.get_submodule("down")
        assert isinstance(up, Weight) and isinstance(down, Weight)
        own = torch.arange(self.tokens) % len(self.up_bias)  # 0 for all where they share one set
        out = torch.bmm(gates, self.down_bias[own])
        for t, j in (gates != 0).any(1).nonzero().tolist():
            rows, at = gates[t, :, j].nonzero()[:, 0], int(own[t]) * self.config.count + j
            hidden = F.gelu(x_TBD[t, rows] @ up[at] + self.up_bias[own[t], j])
            out[t].index_add_(0, rows, (hidden @ down[at]).float() * gates[t, rows, j, None])
        return out.transpose(0, 1)


def multiplies_bf16() -> bool:
    """Whether the processor itself multiplies bf16."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


class Rows8(nn.Module):
    """A table in 8 bits, w = (q - zero) scale with a scale and a zero for each row; answers F.embedding.

    The zero is a whole number, so that the vector of padding, and any 0, is exact; the scale is a bf16, rounded up
    before it is used, so that nothing is cut off. D + 3 bytes a row.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        scale = (high - low) / 255
        rounded = scale.bfloat16()
        up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
        rounded = torch.where(rounded.float() < scale, up, rounded)
        rounded = torch.where(rounded > 0, rounded, torch.ones_like(rounded))
        zero = (-low / rounded.float()).round().clamp(0, 255)
        values = torch.empty(weight.shape, dtype=torch.uint8)
        for rows in torch.arange(len(weight)).split(2**16):  # a table may fill the memory: no second one beside it
            step, start = rounded[rows, None].float(), zero[rows, None]
            values[rows] = ((weight[rows] / step).round() + start).clamp(0, 255).to(torch.uint8)
        self.register_buffer("values", values)
        self.register_buffer("zero", zero.to(torch.uint8))
        self.register_buffer("scale", rounded)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [n] -> vectors [n, D] fp32."""
        values, zero, scale = (self.get_buffer(name)[ids] for name in ("values", "zero", "scale"))
        return (values.float() - zero.float()[..., None]) * scale.float()[..., None]

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        if func is not F.embedding:
            raise TypeError(f"{func}: a table in 8 bits is only looked up")
        return args[1](args[0])


class TableCollection8(EmbeddingCollection):
    """The same tables, 8 bits a number."""

    def __init__(self, whole: EmbeddingCollection):
        nn.Module.__init__(self)
        self.layout, self.std, self.place, self.widths = whole.layout, whole.std, whole.place, whole.widths
        self.linear, self.first_rows = whole.linear, {}
        for dim in self.widths:
            self.add_module(f"width_{dim}", Rows8(whole.weight(dim).detach()))

    def weight(self, dim: int) -> Any:
        return self.get_submodule(f"width_{dim}")

    def sparse_parameters(self) -> list[nn.Parameter]:
        return []

    _save_to_state_dict = nn.Module._save_to_state_dict
