from __future__ import annotations

import pytest

from tests.contract.world import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    """The rows that all contract checks share; nothing changes them."""
    return make_world()
