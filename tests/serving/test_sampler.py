"""Sampling against a naive oracle that sorts Python lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.errors import JobError
from shoal.serving.sampler import Sampling, draw, probabilities


def naive(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The smallest set of likeliest tokens, renormalised after each rule."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[: top_k or None]
    weight = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in kept}
    total, gone, stay = sum(weight.values()), 0.0, []
    for i in kept:
        if gone < top_p:
            stay.append(i)
        gone += weight[i] / total
    total = sum(weight[i] for i in stay)
    return [weight[i] / total if i in stay else 0.0 for i in range(len(logits))]


# Integers make ties; sevenths keep sums of probabilities away from top_p.
rows = st.lists(st.integers(-20, 20), min_size=1, max_size=12).map(lambda row: [v / 7 for v in row])


@settings(max_examples=200, deadline=None)
@given(rows, st.sampled_from([0.3, 1.0, 1.7]), st.integers(0, 14), st.floats(0.01, 1.0))
def test_equals_naive(row: list[float], temperature: float, top_k: int, top_p: float) -> None:
    ours = probabilities(torch.tensor([row]), Sampling(temperature, top_k, top_p))[0]
    near_edge = any(
        abs(sum(sorted(naive(row, temperature, top_k, 1.0), reverse=True)[:n]) - top_p) < 1e-5 for n in range(len(row))
    )
    if not near_edge or top_p == 1.0:
        assert (ours - torch.tensor(naive(row, temperature, top_k, top_p))).abs().max() < 1e-5


def test_planted_bug_top_p_before_top_k_is_seen() -> None:
    row = [0.0, -0.1, -0.2, -5.0]
    top_p_first = probabilities(torch.tensor([row]), Sampling(top_p=0.51))[0]
    assert top_p_first[1] > 0
    assert naive(row, 1.0, 2, 0.51)[1] == 0


def test_temperature_0_is_greedy_and_rows_are_independent() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 3.0], [9.0, 1.0, 2.0]])
    assert probabilities(logits_BV, Sampling(0.0)).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert draw(logits_BV, Sampling(0.0), torch.Generator()).tolist() == [1, 0]


def test_seed_decides_and_frequencies_follow_probabilities() -> None:
    """20,000 draws: within 5 standard errors."""
    logits_BV = torch.tensor([[0.0, 1.0, -1.0, 0.5]])

    def drawn(seed: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return draw(logits_BV.expand(count, -1), Sampling(1.3), generator)

    assert torch.equal(drawn(3, 50), drawn(3, 50))
    assert not torch.equal(drawn(3, 50), drawn(4, 50))
    share = torch.bincount(drawn(0, 20_000), minlength=4) / 20_000
    assert (share - probabilities(logits_BV, Sampling(1.3))[0]).abs().max() < 5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize(
    "options",
    [{"temperature": -0.1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}],
    ids=str,
)
def test_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(JobError, match=next(iter(options))):
        Sampling(**options).validate()
