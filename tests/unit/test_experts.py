"""Sparse experts: gates, penalties, both routers, lambda, the sparse execution, the warm start, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scalerec import checkpoint
from scalerec.batch import Batch
from scalerec.errors import InputError
from scalerec.layers.experts import DAMPING, WEAKEST, ExpertFFN, ExpertsConfig, RouterStep, SparsityControl, split
from scalerec.losses import total
from scalerec.models import rankmixer
from scalerec.models.base import Model
from scalerec.models.rankmixer import PerTokenFFN, RankMixer, RankMixerConfig
from scalerec.ops import expert_ffn
from scalerec.ops.expert_ffn import masked_experts, masked_experts_reference, sparse_experts, sparse_experts_reference
from scalerec.training.optim import OptimizerConfig
from scalerec.training.warm_start import transfer
from tests.contract import contract
from tests.contract.contract import Check, Maker
from tests.contract.world import World, make_world

TOP_K: dict[str, Any] = {"routing": "top_k", "dtsi": "off"}
CONFIG = RankMixerConfig(dim=32, num_tokens=8, ffn_dim=12, experts=ExpertsConfig(count=4, active=0.25))


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def config(**experts: Any) -> RankMixerConfig:
    return CONFIG.model_copy(update={"experts": CONFIG.experts.model_copy(update=experts)})


def model_of(world: World, seed: int = 0, **experts: Any) -> RankMixer:
    torch.manual_seed(seed)
    return config(**experts).build(world.encoder.layout)


def experts_of(model: Model) -> list[ExpertFFN]:
    return [module for module in model.modules() if isinstance(module, ExpertFFN)]


def ffn(tokens: int = 3, dim: int = 5, hidden: int = 8, **experts: Any) -> ExpertFFN:
    torch.manual_seed(1)
    made = ExpertFFN(tokens, dim, hidden, ExpertsConfig(**({"count": 4, "active": 0.25} | experts)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


# -- the networks


def weights(tokens: int, dim: int, experts: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(dim, width), (width,), (width, dim), (dim,)]
    return [torch.randn((tokens, experts, *shape), dtype=dtype) for shape in shapes]


shapes = st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(1, 4), st.integers(2, 5), st.integers(1, 3))


@given(shapes, st.floats(0, 1), st.floats(0.05, 1.5), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_masked_and_sparse_experts_are_their_definition(shape, closed, break_even, threads):
    tokens, rows, dim, experts, width = shape
    x, own = torch.randn(tokens, rows, dim).double(), weights(tokens, dim, experts, width)
    gates = torch.rand(tokens, rows, experts).double()
    gates *= torch.rand_like(gates) >= closed
    expected = masked_experts_reference(x, gates, *own)
    torch.testing.assert_close(masked_experts(x, gates, *own), expected)
    torch.testing.assert_close(sparse_experts_reference(x, gates, *own), expected)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(sparse_experts(x, gates, *own, break_even=break_even), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("open_share", [0.0, 1 / 16, 1 / 8, 0.5, 1.0])
def test_sparse_experts_are_the_masked_ones_in_float32(open_share):
    torch.manual_seed(0)
    own = [weight / 8 for weight in weights(4, 64, 8, 96, torch.float32)]
    x, gates = torch.randn(4, 200, 64), torch.rand(4, 200, 8) * (torch.rand(4, 200, 8) < open_share)
    gates[0], gates[1, :, 1:], gates[2] = 0, 0, 0.5  # no expert, one alone, all
    expected = masked_experts(x, gates, *own)
    assert not sparse_experts(x, gates, *own)[0].any()
    for break_even in (0.6, 2):  # 2: never as a whole
        found = sparse_experts(x, gates, *own, break_even=break_even)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_all_gates_at_one_are_the_dense_ffn():
    dense = PerTokenFFN(3, 5, 8).double()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter)
    made = ffn().double()
    assert made.train_router is not None
    made.load_state_dict(split({f"of.{name}": value for name, value in dense.state_dict().items()}, "of.", made))
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(made(x), dense(x))
    with torch.no_grad():
        torch.testing.assert_close(made(x), dense(x))


def test_without_gradients_experts_are_skipped(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # products on other threads are not counted
    monkeypatch.setattr(expert_ffn, "SMALLEST", 0)  # experts as tiny as these are else computed whole
    made, x = ffn(), torch.randn(9, 3, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        skipped = made(x)
    opened = float((made.gates(x.transpose(0, 1)) != 0).float().mean())
    assert 0 < opened < 1
    made.break_even = 2
    with FlopCounterMode(display=False) as sparse, torch.no_grad():
        assert torch.allclose(made(x), skipped, atol=1e-5)
    made.break_even = 0
    with FlopCounterMode(display=False) as masked, torch.no_grad():
        assert torch.allclose(made(x), skipped, atol=1e-5)
    routers = 2 * 9 * 3 * 5 * 4  # and as much again where the biases of experts are a product
    assert sparse.get_total_flops() - routers == round(opened * (masked.get_total_flops() - 2 * routers))
    assert counter.get_total_flops() == sparse.get_total_flops() < masked.get_total_flops()


# -- gates


def test_routers_begin_with_gates_that_add_up_to_one():
    torch.manual_seed(0)
    made = ExpertFFN(4, 256, 64, ExpertsConfig(count=8))
    gates = made.gates(torch.nn.functional.layer_norm(torch.randn(4, 4000, 256), (256,)))
    assert abs(float(gates.detach().sum(-1).mean()) - 1) < 0.1
    assert abs(float((gates > 0).float().mean()) - 0.5) < 0.02


def test_top_k_keeps_the_k_largest():
    x = torch.randn(3, 50, 5)
    for options, total_of in (({}, 1.0), ({"renormalise": False}, None)):
        made = ffn(active=0.5, **TOP_K, **options)
        p, gates = torch.softmax(made.router(x), -1), made.gates(x)
        assert ((gates > 0).sum(-1) == 2).all()
        largest = p.topk(2).values
        expected = largest / largest.sum(-1, keepdim=True) if total_of else largest
        torch.testing.assert_close(gates.topk(2).values, expected)
    thrifty = ffn(top=4, threshold=0.2, **TOP_K).gates(x)
    p = torch.softmax(ffn(top=4, **TOP_K).router(x), -1)
    assert torch.equal(thrifty > 0, p >= 0.2)
    torch.testing.assert_close(thrifty.sum(-1), torch.ones(3, 50))


def test_pools_are_the_experts_of_a_token():
    pools = ((0, 1), (2, 3), (0, 1, 2, 3))
    for options in ({}, TOP_K):
        made = ffn(pools=pools, **options)
        opened = (made.gates(torch.randn(3, 200, 5)) > 0).any(1)
        for t, pool in enumerate(pools):
            assert set(opened[t].nonzero()[:, 0].tolist()) == set(pool)


def test_shared_routers_and_shared_experts():
    assert ffn(router_shared=True).router.weight.shape == (1, 5, 4)
    made = ExpertFFN(3, 5, 8, ExpertsConfig(count=4, router_shared=True), shared=True)
    x = torch.randn(6, 1, 5).expand(6, 3, 5)
    out = made(x)
    torch.testing.assert_close(out[:, 0], out[:, 2])
    with torch.no_grad():
        torch.testing.assert_close(made(x), out)


# -- what training asks of both routers


def test_the_balance_loss_is_one_for_equal_loads_and_more_for_one_expert():
    made, step = ffn(**TOP_K), RouterStep()
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.bias.zero_()[:, 0] = 20
    made(torch.randn(6, 3, 5), step)
    cost, weight = step.penalty()
    assert abs(float(cost.detach() / weight) - 4) < 1e-3  # E * 1 * 1
    logits = 20 * torch.eye(4).repeat(3, 5, 1)  # every expert five times
    even = made._balance(torch.softmax(logits, -1), torch.full((3, 1, 4), 0.25)).mean()
    assert abs(float(even) - 1) < 1e-3
    squares = ffn(balance_form="squares", **TOP_K)._balance(torch.softmax(logits, -1), torch.zeros(3, 1, 4)).mean()
    assert abs(float(squares)) < 1e-6


def test_the_penalty_is_the_mean_gate_of_the_rows_that_are_served():
    x = torch.randn(10, 3, 5)
    made = ffn(dtsi="dual")
    step = RouterStep.begin("dual", 5, x.device)
    made(x, step)
    gates = made.gates(x.transpose(0, 1))[:, 5:]
    cost, weight = step.penalty()
    assert step.served == 5
    torch.testing.assert_close(cost / weight, gates.mean())
    torch.testing.assert_close(step.frequency()[0], (gates > 0).float().mean(1))
    balanced, again = ffn(dtsi="dual", penalty="balanced_l1"), RouterStep.begin("dual", 5, x.device)
    balanced(x, again)
    cost, weight = again.penalty()
    often = (gates > 0).float().mean(1, keepdim=True)
    torch.testing.assert_close(cost / weight, (gates * often / 0.25).mean())


def test_what_each_mode_gates_with():
    x = torch.randn(400, 3, 5)
    made = ffn()
    served, trained = made.gates(x.transpose(0, 1)), made.gates(x.transpose(0, 1), made.train_router)
    own = [made.up, made.up_bias, made.down, made.down_bias]
    given = {"infer": served, "train": trained, "mix": (served + trained) / 2}
    outputs = {name: masked_experts(x.transpose(0, 1), gates, *own).transpose(0, 1) for name, gates in given.items()}
    torch.testing.assert_close(made(x, RouterStep.begin("off", 400, x.device)), outputs["infer"])
    torch.testing.assert_close(made(x, RouterStep.begin("mix", 400, x.device)), outputs["mix"])
    twice = made(torch.cat([x, x]), RouterStep.begin("dual", 400, x.device))
    torch.testing.assert_close(twice, torch.cat([outputs["train"], outputs["infer"]]))
    step = RouterStep.begin("sample", 400, x.device)
    assert step.train_share is not None and 120 < step.train_share.sum() < 280
    by_train = step.train_share.bool()[:, :, None]
    torch.testing.assert_close(made(x, step), torch.where(by_train, outputs["train"], outputs["infer"]))
    soft = ffn(train_gate="softmax")
    assert torch.allclose(soft.gates(x.transpose(0, 1), soft.train_router).sum(-1), torch.ones(()))


def task_loss(model: Model, batch: Batch) -> Tensor:
    return total({name: term for name, term in model.objective(batch).items() if name != "gates"})


@pytest.mark.parametrize("mode", ["dual", "sample", "mix", "off"])
def test_the_infer_router_learns_the_task_in_every_mode(mode, world):
    model = model_of(world, dtsi=mode).train()
    task_loss(model, world.batch).backward()
    for layer in experts_of(model):
        for router in (layer.router, layer.train_router):
            if router is not None:
                assert router.weight.grad is not None and router.weight.grad.flatten(1).norm(dim=1).min() > 0
        assert layer.up.grad is not None and layer.up.grad.flatten(1).norm(dim=1).min() > 0


def test_the_router_of_a_single_expert_learns(world):
    model = model_of(world, **TOP_K).train()
    task_loss(model, world.batch).backward()
    assert all(layer.router.weight.grad.any() for layer in experts_of(model))


@pytest.mark.parametrize("mode", ["dual", "sample", "mix"])
@pytest.mark.parametrize("penalty", ["l1", "balanced_l1"])
def test_the_penalty_never_reaches_the_train_router(mode, penalty, world):
    model = model_of(world, dtsi=mode, penalty=penalty).train()
    term = model.objective(world.batch)["gates"]
    assert term.sum > 0
    term.sum.backward()
    for layer in experts_of(model):
        assert layer.train_router is not None and layer.router.weight.grad is not None
        assert all(p.grad is None or not p.grad.any() for p in layer.train_router.parameters())
        assert layer.router.weight.grad.any()
        assert layer.up.grad is None or not layer.up.grad.any()


def test_the_train_router_never_changes_what_is_served(world):
    model = model_of(world).eval()
    before = [model(world.batch).logits]
    with torch.no_grad():
        before.append(model(world.batch).logits)
        for layer in experts_of(model):
            assert layer.train_router is not None
            for parameter in layer.train_router.parameters():
                parameter.copy_(torch.randn_like(parameter))
        assert torch.equal(model(world.batch).logits, before[1])
    assert torch.equal(model(world.batch).logits, before[0])


@pytest.mark.parametrize("options", [{}, {"dtsi": "sample", "penalty": "balanced_l1"}, {"balance": 0.01, **TOP_K}])
def test_training_under_autocast_is_near_that_in_full_precision(options, world):
    found = []
    for enabled in (False, True):
        model = model_of(world, **options).train()
        torch.manual_seed(5)  # `sample` draws
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms = model.objective(world.batch)
        total(terms).backward()
        model.after_step()
        found.append(torch.stack([term.sum.detach() / term.weight for term in terms.values()]))
        assert all(p.grad is None or p.grad.to_dense().isfinite().all() for p in model.parameters())
    torch.testing.assert_close(found[1], found[0], atol=0.02, rtol=0.05)


@pytest.mark.parametrize("mode", ["dual", "sample", "mix", "off"])
def test_a_step_without_rows_changes_nothing(mode, world):
    model = model_of(world, dtsi=mode).train()
    loss = total(model.objective(world.batch.take(torch.arange(0))))
    assert loss == 0
    loss.backward()
    model.after_step()
    assert model.control is not None and model.control.settled == torch.tensor([WEAKEST])
    assert all(p.grad is None or not p.grad.to_dense().any() for p in model.parameters())
    assert deepcopy(model).diagnostics()["open"] == 0


def test_dual_is_the_mean_of_both_losses(world):
    model = model_of(world, dtsi="dual").train()
    terms = model.objective(world.batch)
    served = model.loss(model(world.batch), world.batch)
    with torch.no_grad():
        for layer in experts_of(model):
            assert layer.train_router is not None
            layer.router.load_state_dict(layer.train_router.state_dict())
    trained = model.loss(model(world.batch), world.batch)
    for task in world.encoder.layout.tasks:
        torch.testing.assert_close(terms[task].sum, (served[task].sum + trained[task].sum) / 2)
        assert terms[task].weight == served[task].weight


def test_top_k_without_balance_costs_nothing(world):
    assert model_of(world, **TOP_K).objective(world.batch)["gates"].sum == 0
    assert model_of(world, balance=0.01, **TOP_K).objective(world.batch)["gates"].sum > 0


# -- lambda


def opened(share: float) -> RouterStep:
    return RouterStep(opened=[torch.full((2, 5), 100 * share)], served=100)


def test_lambda_follows_the_share_of_open_gates():
    control = SparsityControl(0.25, 1.2, damped=False)
    control.update(opened(0.3))
    torch.testing.assert_close(control.strength, torch.tensor([1.2 * WEAKEST]))
    control.update(opened(0.2))
    control.update(opened(0.25))
    torch.testing.assert_close(control.strength, torch.tensor([WEAKEST]))
    for _ in range(200):
        control.update(opened(1.0))
    assert control.strength == 100
    damped = SparsityControl(0.25, 1.2)
    damped.update(opened(0.3))  # 20 % too many
    torch.testing.assert_close(damped.settled, torch.tensor([WEAKEST * 1.2**0.2]))
    torch.testing.assert_close(damped.strength, damped.settled * 2.718281828 ** (0.2 * DAMPING))
    damped.update(RouterStep(opened=[torch.zeros(2, 5)], served=0))  # no rows say nothing
    torch.testing.assert_close(damped.settled, torch.tensor([WEAKEST * 1.2**0.2]))


def test_lambda_is_kept_with_the_weights(world):
    model = model_of(world)
    list(steps(model, world.batch, 3))
    assert model.control is not None and model.control.settled > WEAKEST
    again = model_of(world, seed=1)
    again.load_state_dict(model.state_dict())
    assert again.control is not None and again.control.strength == model.control.strength


def steps(model: Model, batch: Batch, count: int) -> Iterator[float]:
    """Training on one batch over and over; the share of open gates after each step."""
    optimizers = OptimizerConfig(dense="adamw", lr=3e-3).build(model)
    model.train()
    for _ in range(count):
        loss = total(model.objective(batch))
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        model.after_step()
        yield model.diagnostics()["open"]


def test_diagnostics_are_of_the_last_step(world):
    model = model_of(world)
    assert model.diagnostics() == {}
    list(steps(model, world.batch, 1))
    found = model.diagnostics()
    often = torch.tensor(found["open_by_expert"])
    assert often.shape == (2, 8, 4) and abs(float(often.mean()) - found["open"]) < 1e-6
    assert found["never_open"] == float((often == 0).float().mean()) and found["lambda"] > 0
    dense = rankmixer.tiny().build(world.encoder.layout)
    dense.objective(world.batch)
    assert dense.diagnostics() == {}


@pytest.mark.parametrize("mode", ["dual", "sample", "off"])
def test_the_target_is_held_on_a_toy(mode, world):
    model = model_of(world, dtsi=mode, active=0.25)
    shares = torch.tensor(list(steps(model, world.batch, 500)))
    assert abs(float(shares[-100:].mean()) / 0.25 - 1) < 0.1, shares[::25]


# -- from a dense model


def kept(model: Model, world: World, folder: Path) -> checkpoint.Checkpoint:
    run = {"model": model.config.model_dump(mode="json")}  # type: ignore[union-attr]
    checkpoint.save(folder, run, world.encoder, world.encoder.layout, model.state_dict(), {}, {})
    return checkpoint.load(folder)


@pytest.mark.parametrize("mode", ["dual", "sample", "mix", "off"])
def test_a_dense_model_becomes_experts_with_the_same_outputs(mode, world, tmp_path):
    dense = Maker(CONFIG.model_copy(update={"experts": ExpertsConfig()}), world.encoder.layout).awake()
    before = dense(world.batch).logits
    old = kept(dense, world, tmp_path / "dense")
    model = model_of(world, width="split", dtsi=mode)
    assert "0 new ids" in transfer(old, model)
    torch.testing.assert_close(model(world.batch).logits, before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(world.batch).logits, before, atol=1e-5, rtol=1e-5)
    terms, expected = model.train().objective(world.batch), dense.loss(dense(world.batch), world.batch)
    for task in world.encoder.layout.tasks:
        torch.testing.assert_close(terms[task].sum, expected[task].sum)
    again = model_of(world, seed=3, width="split", dtsi=mode)
    transfer(kept(model, world, tmp_path / "experts"), again)
    torch.testing.assert_close(again(world.batch).logits, before, atol=1e-5, rtol=1e-5)


def test_what_does_not_become_what(world, tmp_path):
    dense = CONFIG.model_copy(update={"experts": ExpertsConfig()}).build(world.encoder.layout)
    old = kept(dense, world, tmp_path / "dense")
    with pytest.raises(InputError, match=r"--warm-start .*FFN is 12 wide for 8 tokens, the experts together 48"):
        transfer(old, model_of(world))
    with pytest.raises(InputError, match=r"--warm-start .*is dense, and only ReLU gates without pools can all be one"):
        transfer(old, model_of(world, width="split", **TOP_K))
    with pytest.raises(InputError, match=r"--warm-start .*holds experts and this model none: set --model.experts"):
        transfer(kept(model_of(world), world, tmp_path / "experts"), dense)


# -- what is refused


@pytest.mark.parametrize(("options", "words"), [
    ({"count": 1}, "experts.count 1: give each token at least 2 experts"),
    ({"active": 0.0}, "experts.active 0.0: the share of open experts is above 0 and at most 1"),
    ({"active": 1.5}, "experts.active 1.5: the share"),
    ({"width": "split", "count": 5}, "ffn_dim 12 cannot be split into --model.experts.count 5 .* 15"),
    ({"top": 5, **TOP_K}, "experts.top 5 is more than --model.experts.count 4"),
    ({"active": 0.3, **TOP_K}, "experts.active 0.3 of 4 experts is not a whole number"),
    ({"routing": "top_k"}, "top_k has one router: set --model.experts.dtsi off"),
    ({"balance": 0.01}, "top, .balance and .threshold are of --model.experts.routing top_k"),
    ({"pools": ((0,),) * 7}, "pools names 7 tokens of 8"),
    ({"pools": ((0, 4),) * 8}, "token 0 has expert 4 of 0 to 3"),
    ({"pools": ((0,),) * 7 + ((),)}, "leaves token 7 with 0 experts"),
    ({"pools": ((0,),) * 8, "active": 0.5, **TOP_K}, "leaves token 0 with 1 experts: give it 2 or more"),
])  # fmt: skip
def test_bad_options_are_refused_in_one_line(options, words, world):
    with pytest.raises(InputError, match=words) as error:
        config(**options).build(world.encoder.layout)
    assert "\n" not in str(error.value)


# -- the whole model

VARIANTS = {
    "dual": config(),
    "split": config(width="split"),
    "sample_balanced": config(dtsi="sample", penalty="balanced_l1"),
    "mix_softmax": config(dtsi="mix", train_gate="softmax"),
    "off_remoe": config(dtsi="off", control="remoe"),
    "top_k": config(**TOP_K),
    "top_k_balance": config(balance=0.01, threshold=0.1, top=2, renormalise=False, **TOP_K),
    "shared": config(router_shared=True).model_copy(update={"shared_ffn": True}),
    "pools": config(pools=((0, 1),) * 4 + ((2, 3),) * 3 + ((0, 1, 2, 3),)),
    "revert": config().model_copy(update={"num_heads": 4}),
}


def all_computed(model: Model) -> Model:
    for layer in experts_of(model):
        layer.break_even = 0
    return model


def always_skipping(model: Model) -> Model:
    for layer in experts_of(model):
        layer.break_even = 2
    return model


@pytest.mark.parametrize("check", [
    contract.check_row_alone,
    contract.check_users_shared,
    contract.check_state_ignores_items,
    contract.check_bfloat16,
    contract.check_no_rows,
    contract.check_checkpoint,
    contract.check_same_seed,
    contract.check_parts,
    contract.check_config_json,
])  # fmt: skip
@pytest.mark.parametrize("of", VARIANTS.values(), ids=VARIANTS)
def test_variants_keep_the_contract(check: Check, of: RankMixerConfig, world: World):
    check(Maker(of, world.encoder.layout), world)


@pytest.mark.parametrize("of", VARIANTS.values(), ids=VARIANTS)
def test_variants_have_gradients_and_count_their_flops(of: RankMixerConfig, world: World):
    contract.check_gradients(Maker(of, world.encoder.layout), world)
    contract.check_flops(Maker(of, world.encoder.layout, all_computed), world)
    if not of.num_heads:
        model = of.build(world.encoder.layout)
        assert of.stack_parameters() == model.parts()["stack"]


@pytest.mark.parametrize("of", VARIANTS.values(), ids=VARIANTS)
def test_variants_score_alike_whether_experts_are_skipped_or_not(of: RankMixerConfig, world: World):
    expected = Maker(of, world.encoder.layout).awake()(world.batch).logits
    for change in (always_skipping, all_computed):
        with torch.no_grad():
            found = Maker(of, world.encoder.layout, change).awake()(world.batch).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("check", [contract.check_exported, contract.check_compiled])
@pytest.mark.parametrize("name", ["dual", "top_k"])
def test_graphs_skip_experts_too(check: Check, name: str, world: World):
    check(Maker(VARIANTS[name], world.encoder.layout, always_skipping), world)


@pytest.mark.slow
def test_an_exported_graph_holds_the_skipping_as_one_operation(world):
    program = contract.export_dense(Maker(CONFIG, world.encoder.layout, always_skipping).awake())
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("scalerec.sparse_experts" in name for name in names) == CONFIG.num_layers
