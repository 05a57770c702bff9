"""Which rank failed and in which operation the others waited for it: killed, raising, hanging, doing something else."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shoal import operations
from shoal.errors import RankError
from shoal.launch import waits
from shoal.launch.call import call
from shoal.operations import Doing, Operation

# Liveness, on a machine however busy; without what is tested here, ranks wait for 60 s.
SOON = 30.0


def stuck(ranks: Any, world: int, **args: Any) -> RankError:
    ranks.run("tests.launch.cases:all_reduce", world)  # all are there
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        call(ranks.start(), "tests.launch.cases:stuck", args, world, threads=1, timeout=50)
    assert time.monotonic() - start < SOON
    return caught.value


@pytest.mark.parametrize(
    ("layout", "axis", "told"),
    [
        ("replicas=3", "replicas", ["ranks 0 and 2 waited for it in all_reduce along replicas"]),
        (
            "replicas=2,tensor=2",
            "tensor",
            [
                "rank 0 waited for it in all_reduce along tensor",
                "ranks 2 and 3 waited for it in all_reduce among all ranks",
            ],
        ),
        (
            "pipeline=2,tensor=2",
            "pipeline",
            [
                "ranks 0 and 2 waited for it in all_reduce among all ranks",
                "rank 3 waited for it in all_reduce along pipeline",
            ],
        ),
    ],
)
def test_who_waited_for_a_killed_rank_and_in_what(ranks, layout, axis, told):
    error = stuck(ranks, 3 if "3" in layout else 4, how="kill", layout=layout, axis=axis)
    assert error.where == "rank 1"
    assert error.what.splitlines() == ["killed by SIGKILL at step 3", *("  " + line for line in told)]
    assert error.fix


def test_an_exception_of_a_ranks_own_stays_the_last_word(ranks):
    error = stuck(ranks, 2, how="raise", layout="fsdp=2", axis="fsdp")
    lines = str(error).splitlines()
    assert lines[:2] == ["rank 1: failed at step 3", "  rank 0 waited for it in all_reduce along fsdp"]
    assert lines[-1] == "ValueError: boom"


def test_a_rank_that_hangs_is_named_with_what_it_never_entered(ranks):
    error = stuck(ranks, 3, how="hang", layout="tensor=3", axis="tensor", timeout=3)
    assert error.where == "rank 1"
    first, second = error.what.splitlines()
    assert first.startswith("never entered all_reduce #")
    assert " along tensor at step 3; it was last in broadcast #" in first
    assert "launch/cases.py:" in first
    assert second == "  ranks 0 and 2 waited for it in all_reduce along tensor"


def test_a_call_that_is_late_says_in_what(ranks):
    ranks.run("tests.launch.cases:all_reduce", 2)
    with pytest.raises(RankError) as caught:
        call(
            ranks.start(), "tests.launch.cases:stuck", {"how": "hang", "layout": "tensor=2", "axis": "tensor"}, 2,
            threads=1, timeout=6,
        )  # fmt: skip
    assert str(caught.value).startswith("ranks 0, 1: no answer within 6 s\n  rank 1 never entered all_reduce #")


@pytest.mark.parametrize("how", ["differ", "shape"])
def test_ranks_that_do_different_things_are_named_with_both(ranks, how):
    error = stuck(ranks, 3, how=how, layout="tensor=3", axis="tensor", timeout=3)
    if how == "differ":
        assert error.where == "rank 1"
        assert error.what.startswith("entered barrier at step 3 as operation #")
        assert error.what.endswith(" along tensor, where ranks 0 and 2 entered all_reduce of 5 elements")
    else:  # gloo aborts the process that finds it
        assert "all_reduce along tensor" in error.what or "along tensor, where" in error.what
        assert "at step 3" in error.what


def collective(number: int, ranks: list[int], kind: str = "all_reduce", along: str = "tensor") -> Operation:
    return Operation(kind, along, ranks, number, 5, number, True)


def direct(kind: str, peer: int, number: int) -> Operation:
    return Operation(kind, "pipeline", [peer], number, 5, number, True)


def waiting(*operations: Operation) -> Doing:
    return Doing(7, True, operations[-1].direct, "", [*operations])


def test_a_chain_of_waits_leads_to_its_first_rank():
    """Rank 2 waits for 1, which waits for 0, which computes."""
    doings = {
        0: Doing(7, False, False, "data/loader.py:9, batch", [direct("send", 1, 3)]),
        1: waiting(direct("send", 2, 2), direct("recv", 0, 4)),
        2: waiting(direct("recv", 1, 3)),
    }
    error = waits.absent(doings)
    assert error is not None
    assert error.where == "rank 0"
    assert error.what.splitlines() == [
        "never entered send #4 to rank 1 along pipeline at step 7; it was last in send #3 to rank 1 along pipeline, "
        "now at data/loader.py:9, batch",
        "  rank 1 waited for it in recv along pipeline",
        "  rank 2 waited for rank 1 in recv along pipeline",
    ]


def test_ranks_that_wait_for_each_other_are_all_named():
    doings = {
        0: waiting(collective(3, [0, 1])),
        1: waiting(collective(2, [0, 1]), collective(9, [0, 1], along="fsdp")),
    }
    error = waits.absent(doings)
    assert error is not None
    assert error.what.splitlines() == [
        "waited for each other",
        "  rank 0 waited for rank 1 in all_reduce #3 along tensor",
        "  rank 1 waited for rank 0 in all_reduce #9 along fsdp",
    ]


def test_equal_operations_are_not_blamed():
    doings = {rank: waiting(collective(3, [0, 1], "all_to_all"), collective(4, [0, 1])) for rank in (0, 1)}
    doings[1].operations[0].size = 9  # an exchange may be uneven
    assert waits.unequal(doings) is None
    doings[1].operations[1].size = 9
    error = waits.unequal(doings)
    assert error is not None
    assert error.where == "rank 1"


@pytest.mark.parametrize(
    ("begin", "peer", "direct"), [(dist.isend, [0], True), (dist.irecv, [0], True), (dist.all_reduce, [], False)]
)
def test_one_that_fails_as_it_begins_is_the_one_that_was_waited_for(begin, peer, direct):
    """As with a rank that is gone; here because there is no group at all."""
    with pytest.raises(ValueError, match="process group") as caught:
        begin(torch.ones(1), *peer)
    doing = operations.doing(caught.value)
    assert (doing.waits, doing.direct) == (True, direct)
