"""Fixtures of all tests: ranks that are started once and used by every test that needs several."""

from __future__ import annotations

import hypothesis
import pytest

from shoal.launch.pool import Pool

# No test asserts on speed, on whatever machine: hypothesis would, 200 ms an example.
hypothesis.settings.register_profile("shoal", deadline=None)
hypothesis.settings.load_profile("shoal")


# What the ranks of most tests import: once, before they are forked.
_PRELOAD = (
    "shoal.training.equality",
    "shoal.training.server.coordinate",
    "shoal.training.server.work",
    "shoal.training.server.hold",
    "shoal.launch.parallelize",
    "shoal.serving.staged",
    "tests.equivalence.cases",
)


@pytest.fixture(scope="session")
def ranks():
    """A pool of 4 ranks that grows; `ranks.run("tests.room.cases:function", world, **args)` gives a list."""
    with Pool(4, _PRELOAD) as pool:
        yield pool


def pytest_addoption(parser):
    parser.addoption("--golden", action="append", metavar="FILE", help="trajectories for tests/sync/test_golden.py")
