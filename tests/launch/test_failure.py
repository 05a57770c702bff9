"""Which of many failures is the cause, and how it is told."""

from __future__ import annotations

import signal

from shoal.errors import CheckpointError
from shoal.launch import failure
from shoal.launch.messages import Failed


def told(follows: bool, at: float, kind: str = "") -> Failed:
    return Failed(kind, "what", "where", "fix", at, follows)


def test_the_first_failure_that_does_not_follow_is_the_cause():
    first = failure.raised(0, told(follows=True, at=1.0))
    cause = failure.raised(1, told(follows=False, at=2.0))
    later = failure.raised(2, told(follows=False, at=3.0))
    assert failure.root_cause([later, first, cause]) is cause
    assert failure.root_cause([first, failure.raised(2, told(follows=True, at=0.5))]).rank == 2


def test_a_death_goes_before_the_broken_connections_that_follow_from_it():
    death = failure.ended(2, -signal.SIGKILL, at=9.0, out_of_memory=False)
    assert failure.root_cause([failure.raised(0, told(follows=True, at=1.0)), death]) is death


def test_a_backend_that_aborts_when_a_peer_is_gone_is_not_the_cause():
    abort = failure.ended(0, -signal.SIGABRT, at=1.0, out_of_memory=False)
    death = failure.ended(1, -signal.SIGSEGV, at=2.0, out_of_memory=False)
    assert failure.root_cause([abort, death]) is death
    assert str(death.error).splitlines()[0] == "rank 1: killed by SIGSEGV"


def test_a_death_goes_before_those_who_only_waited_for_it():
    abort = failure.ended(1, -signal.SIGABRT, at=2.0, out_of_memory=False)
    assert failure.root_cause([failure.raised(0, told(follows=True, at=1.0, kind="RankError")), abort]) is abort


def test_memory_is_named_only_if_the_kernel_ran_out_of_it():
    assert failure.ended(1, -signal.SIGKILL, 0.0, False).error.what == "killed by SIGKILL"
    assert "memory" not in str(failure.ended(1, -signal.SIGKILL, 0.0, False).error)
    assert "out of memory" in str(failure.ended(1, -signal.SIGKILL, 0.0, True).error)
    assert "out of memory" not in str(failure.ended(1, -signal.SIGSEGV, 0.0, True).error)


def test_a_shoal_error_keeps_its_class():
    error = failure.raised(1, told(follows=False, at=1.0, kind="CheckpointError")).error
    assert isinstance(error, CheckpointError)
    assert str(error) == "rank 1, where: what\n  → fix"


def test_several_late_ranks_are_named():
    assert str(failure.late([0, 2], 5.0, 0.0).error) == "ranks 0, 2: no answer within 5 s"
