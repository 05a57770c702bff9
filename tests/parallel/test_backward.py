"""A backward that the graph of a pipeline does not record is refused; what has none is left alone by the look at it."""

from __future__ import annotations

import pytest

from tests.parallel import backward_cases

ENTRY = "tests.parallel.backward_cases:start"


@pytest.mark.parametrize("name", backward_cases.UNRECORDED)
def test_a_backward_that_is_not_recorded_is_refused_by_a_pipeline(ranks, name: str) -> None:
    for said in ranks.run(ENTRY, 2, name=name, layout="pipeline=2"):
        assert "the gradient of 'up.weight' is another in the stages of the graph" in said["refused"]
        assert "fsdp=2 or replicas=2, which need no graph" in said["refused"]


def test_without_the_look_the_gradient_is_wrong_and_fsdp_has_the_right_one(ranks) -> None:
    expected = backward_cases.reference("reversal")
    other = backward_cases.reference("hook on a tensor")
    unseen = ranks.run(ENTRY, 2, name="hook on a tensor", layout="pipeline=2", checked=False)
    assert abs(unseen[0]["norm"] / other - 1) > 1e-2
    for name, right in (("reversal", expected), ("hook on a tensor", other)):
        for said in ranks.run(ENTRY, 2, name=name, layout="fsdp=2"):
            assert said["norm"] == pytest.approx(right, rel=1e-10)


@pytest.mark.parametrize("name", backward_cases.RECORDED)
def test_the_look_changes_nothing(ranks, name: str) -> None:
    """Neither buffers nor random state nor gradients that were there."""
    told = ranks.run(ENTRY, 2, name=name, layout="pipeline=2")
    # The first stage's rank has it as a parameter of the module's own.
    assert [[*said["gradients"]] for said in told] == [["up.bias"], []]
    for said in told:
        assert said.get("refused") is None
        assert said["kept"]
        assert said["chance"]
        assert all(value == [1.0] * 8 for value in said["gradients"].values())
