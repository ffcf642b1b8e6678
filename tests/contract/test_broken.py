"""Every check of the contract finds the model that breaks it, and says so in its own words."""

from __future__ import annotations

import pytest

from scalerec.config import allow
from tests.contract.broken import BROKEN, Broken
from tests.contract.contract import CHECKS, SLOW, Maker
from tests.contract.world import World

allow("tests")


def test_every_check_can_fail():
    assert {broken.check for broken in BROKEN} == {*CHECKS, *SLOW}


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(
            broken, id=f"{broken.check.__name__}-{number}", marks=[pytest.mark.slow] if broken.check in SLOW else []
        )
        for number, broken in enumerate(BROKEN)
    ],
)
def test_broken_model_is_found(broken: Broken, world: World):
    with pytest.raises(AssertionError, match=f"(?s){broken.words}"):
        broken.check(Maker(broken.config, world.encoder.layout, broken.change), world)
