"""All-reduce through a codec: three ranks against numpy, layouts against one process, bytes against the sockets."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tests.equivalence import cases
from tests.sync import encoded_cases

STEPS = 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sum_is_that_of_rounded_numbers_in_the_order_of_ranks_rounded_again(ranks, dtype):
    """Three ranks: two would add up alike in either order. Sizes that three divide and that three do not."""
    told = ranks.run("tests.sync.encoded_cases:sums", 3, codec="bf16", dtype=dtype)
    assert told[0] == told[1] == told[2]
    given = [encoded_cases.values(rank, getattr(torch, dtype)) for rank in range(3)]
    for index, got in enumerate(told[0]):
        total = np.zeros(encoded_cases.SIZES[index], dtype)
        for rank in range(3):
            total = total + given[rank][index].to(torch.bfloat16).to(getattr(torch, dtype)).numpy()
        expected = torch.from_numpy(total).to(torch.bfloat16).tolist()
        assert got == expected


def test_fp16_ends_alike_on_all_ranks_and_near_the_sum(ranks):
    told = ranks.run("tests.sync.encoded_cases:sums", 3, codec="fp16", dtype="float32")
    assert told[0] == told[1] == told[2]
    given = [encoded_cases.values(rank, torch.float32) for rank in range(3)]
    for index, got in enumerate(told[0]):
        each = torch.stack([tensors[index].double() for tensors in given])
        # Each number is off by 2**-11 at most, and so is the sum of what was rounded.
        bound = 2.0**-11 * (each.abs().sum(0) * (1 + 2.0**-11) + each.sum(0).abs()) + 1e-9
        assert ((torch.tensor(got).double() - each.sum(0)).abs() <= bound).all()


# Where each number of the gradient is made whole within a replica before it goes to the others. Output layers apart:
# with tied ones the two ends of a pipeline each round their own half.
WHOLE = [
    "replicas=3,micro_batch=2", "replicas=2,fsdp=2,micro_batch=1", "replicas=2,context=2,micro_batch=2",
    "replicas=2,pipeline=2,micro_batch=2",
]  # fmt: skip


@pytest.mark.parametrize("layout", WHOLE)
def test_training_is_that_of_one_process_which_rounds_each_replicas_gradient(ranks, layout):
    replicas = int(layout.split(",")[0].partition("=")[2])
    world = 3 if replicas == 3 else 4
    options = {"steps": STEPS, "optimizer": "sgd", "tied": False, "model": "even"}
    how = {"layout": layout, "codec": "bf16", "feedback": False}
    results = ranks.run("tests.sync.encoded_cases:train", world, **how, **options)
    cases.assert_one_answer(results, cases.reference(replicas=replicas, codec="bfloat16", **options))


def test_a_sum_that_is_not_rounded_would_be_seen():
    """What the test above allows is a thousandth of what rounding does, at one of its ends or at both."""
    options = {"steps": STEPS, "optimizer": "sgd", "tied": False, "model": "even"}
    rounded = cases.reference(replicas=2, codec="bfloat16", **options)
    for other in (cases.reference(**options), cases.reference(replicas=3, codec="bfloat16", **options)):
        apart = max(cases.apart(w, other["weights"][n], w) for n, w in rounded["weights"].items())
        assert 1e-5 < apart < 1e-2


def test_what_ranks_of_a_replica_sum_afterwards_is_near(ranks):
    """Each tensor rank rounds its own part of a norm's gradient."""
    options = {"steps": 1, "optimizer": "sgd", "tied": False, "model": "even"}
    layout = "replicas=2,tensor=2,micro_batch=2"
    how = {"layout": layout, "codec": "bf16", "feedback": False}
    results = ranks.run("tests.sync.encoded_cases:train", 4, **how, **options)
    expected = cases.reference(**options)
    for name, error in cases.gradient_errors(results, expected["gradients"]).items():
        assert error < 2.0**-7, name


@pytest.mark.skipif(sys.platform != "linux", reason="only there sockets are counted")
def test_half_as_many_bytes_go_through_the_sockets(ranks):
    """Of n numbers in float32, an all-reduce of three ranks sends 4/3 n times 4 bytes a rank; encoded, times 2."""
    size = 300_000
    for sent, received in ranks.run("tests.sync.encoded_cases:bytes_of_a_sum", 3, codec="bf16", size=size):
        least = 2 * 4 / 3 * size
        assert least <= received <= 1.02 * least
        assert least <= sent <= 1.02 * least
