"""Fixtures of all tests: ranks that are started once and used by every test that needs several."""

from __future__ import annotations

import pytest

from shoal.launch.pool import Pool


@pytest.fixture(scope="session")
def ranks():
    """A pool of 4 ranks that grows; `ranks.run("tests.room.cases:function", world, **args)` gives a list."""
    with Pool(4) as pool:
        yield pool
