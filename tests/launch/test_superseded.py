"""Roles of a job that is another one by now."""

from __future__ import annotations

import os
import signal

import pytest

from shoal.launch import roles
from shoal.launch.local import Interrupted
from tests.launch.test_roles import Start


@pytest.fixture
def start(ranks, tmp_path):
    return Start(ranks, tmp_path)


def test_all_are_killed_when_the_job_is_another_one_by_now(start):
    """It is asked while nobody says anything."""
    asked = []

    def superseded() -> bool:
        asked.append(len(asked))
        return (start.folder / "leader-0").exists() and (start.folder / "worker0.0-0").exists()

    with pytest.raises(roles.Superseded):
        start(start.role("coordinator", "lead", awaited=["nothing"]), start.worker(0), superseded=superseded)
    assert len(asked) > 1
    assert sorted(start.pids()) == ["leader-0", "worker0.0-0"]


def test_who_was_asked_to_end_does_so_when_the_job_is_another_one_by_now(start):
    """The signal comes while it is found out."""

    def superseded() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        start(start.role("coordinator", "lead", awaited=["nothing"]), superseded=superseded)
