"""Proof of the joints: one of three replicas is killed, the two others go on in process with the same samples."""

from __future__ import annotations

import pytest
import torch

from tests.equivalence import cases

STEPS = 8


@pytest.mark.parametrize(("victim", "share"), [(0, ""), pytest.param(1, "", marks=pytest.mark.nightly), (2, "2+1+3")])
def test_survivors_take_over_the_share_of_a_killed_replica(ranks, victim, share):
    """Those of uneven replicas in their own proportion, here 8 and 4 of the 12 samples."""
    results = ranks.run("tests.sync.cases:survive", 3, lost={victim}, victim=victim, at=3, steps=STEPS, share=share)
    expected = cases.reference(STEPS)
    survivors = [result for result in results if result is not None]
    assert len(survivors) == 2
    for result in survivors:
        # Loss and weights are those of one process that never failed: nothing was lost, nothing counted twice.
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-8)
        assert result["worlds"] == [3] * 3 + [2] * 5
        assert result["view"] == 1
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                torch.tensor(result["weights"][name], dtype=weight.dtype), weight, rtol=1e-8, atol=1e-10
            )
    for step in range(3, STEPS):
        seen = sorted(sample for result in survivors for sample in result["ledger"][step])
        assert seen == list(range(step * cases.GLOBAL_BATCH, (step + 1) * cases.GLOBAL_BATCH))
        assert [len(result["ledger"][step]) for result in survivors] == ([8, 4] if share else [6, 6])


def test_a_survivor_that_had_finished_the_broken_step_brings_the_others_along(ranks):
    results = ranks.run("tests.sync.cases:survive", 3, lost={1}, victim=1, behind=2, at=3, steps=STEPS)
    expected = cases.reference(STEPS)
    survivors = [result for result in results if result is not None]
    assert [result["view"] for result in survivors] == [1, 1]
    for result in survivors:
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                torch.tensor(result["weights"][name], dtype=weight.dtype), weight, rtol=1e-8, atol=1e-10
            )


def test_survivors_agree_on_what_their_optimizers_have_seen(ranks):
    """As that of whoever is furthest has: the state is that one's."""
    results = ranks.run("tests.sync.cases:survive", 3, lost={0}, victim=0, at=3, steps=5, since=True)
    survivors = [result for result in results if result is not None]
    assert [(result["since"], result["counts"]) for result in survivors] == [(1, 4.0)] * 2
    assert survivors[0]["weights"] == survivors[1]["weights"]


@pytest.mark.parametrize(
    ("codec", "behind"),
    [
        ("coarse", -1),
        ("lowrank", 2),
        pytest.param("coarse", 2, marks=pytest.mark.nightly),
        pytest.param("lowrank", -1, marks=pytest.mark.nightly),
    ],
)
def test_survivors_keep_what_a_codec_has_lost_of_theirs(ranks, codec, behind):
    """Once in each step that was applied, whoever applied it first; and they go on with the same weights, and with the
    same directions."""
    killed = {"victim": 1, "at": 3, "behind": behind, "steps": STEPS, "codec": codec}
    results = ranks.run("tests.sync.cases:survive", 3, lost={1}, **killed)
    stop = 3 if behind < 0 else 4
    expected = ranks.run("tests.sync.cases:undisturbed", 3, steps=STEPS, stop=stop, codec=codec)
    assert results[0]["kept"] == expected[0] != []
    assert results[2]["kept"] == expected[2]
    assert results[0]["weights"] == results[2]["weights"]
    assert results[0]["known"] == results[2]["known"]
    assert bool(results[0]["known"]) == (codec == "lowrank")
    assert results[0]["losses"][-1] < 0.9 * results[0]["losses"][0]
