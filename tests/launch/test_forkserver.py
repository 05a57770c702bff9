"""The fork server forks only while it has one thread."""

from __future__ import annotations

import pytest

from shoal.errors import RankError
from shoal.launch.pool import Pool


def test_a_module_that_starts_a_thread_when_imported_is_refused():
    with Pool(1, preload=["tests.launch.starts_thread"]) as pool, pytest.raises(RankError) as caught:
        pool.run("tests.launch.cases:count_up", 1, timeout=30)
    assert "after importing tests.launch.starts_thread the fork server has 2 threads" in str(caught.value)


def test_a_module_that_cannot_be_imported_fails_in_the_rank():
    with Pool(1, preload=["tests.launch.nowhere"]) as pool:
        with pytest.raises(RankError) as caught:
            pool.run("tests.launch.nowhere:main", 1, timeout=30)
        assert str(caught.value).endswith("ModuleNotFoundError: No module named 'tests.launch.nowhere'")
