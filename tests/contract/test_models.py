"""Every model of the package keeps the contract."""

from __future__ import annotations

import pytest

from scalerec.models.base import ModelConfig
from tests.contract import contract
from tests.contract.contract import CHECKS, SLOW, Check, Maker
from tests.contract.world import World

MODELS = contract.model_configs()


def test_models_are_found():
    assert {"rankmixer", "dcnv2", "dlrm_mlp"} <= MODELS.keys()
    assert all(config.kind == name for name, config in MODELS.items())


@pytest.mark.parametrize("name", MODELS)
def test_options_are_varied(name: str, world: World):
    assert len(list(contract.variations(Maker(MODELS[name], world.encoder.layout)))) >= 3


@pytest.mark.parametrize("check", [*CHECKS, *(pytest.param(check, marks=pytest.mark.slow) for check in SLOW)])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_contract(check: Check, config: ModelConfig, world: World):
    check(Maker(config, world.encoder.layout), world)
