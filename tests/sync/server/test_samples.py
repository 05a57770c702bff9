"""Samples are leased lowest first, each to one at a time, and those of a job that grows never come to an end."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.sync.server.messages import Range
from shoal.sync.server.samples import Samples


def numbers(ranges) -> list[int]:
    return [number for start, stop in ranges for number in range(start, stop)]


def growing(end: int) -> Samples:
    samples = Samples(end)
    samples.growing = True
    return samples


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 5), st.lists(st.integers(0, 12), max_size=6))
def test_whatever_is_leased_given_back_and_appended_every_sample_is_used_once(seed, most, more):
    """In any order of leases, results and appends; a job that grows is finished only when nothing more can come."""
    chance, used, held = random.Random(seed), list[Range](), list[Range]()
    samples, ends = growing(0), [sum(more[: i + 1]) for i in range(len(more))]
    while ends or samples.available or held:
        assert not (samples.finished and (ends or held)), "it ended while there was something to do"
        deed = chance.choice(["lease", "use", "return", "append"])
        if deed == "lease" and (found := samples.lease(most)) is not None:
            assert found.stop <= (samples.end or 0), "what is not there was leased"
            held.append(found)
        elif deed == "use" and held:
            used.append(held.pop(chance.randrange(len(held))))
            samples.consume(used[-1])
        elif deed == "return" and held and chance.random() < 0.3:
            samples.give_back(held.pop(chance.randrange(len(held))))
        elif deed == "append" and ends:
            samples.extend(ends.pop(0), growing=bool(ends))
        assert samples.dry == (samples.growing and not samples.available)
        assert samples.leased <= (samples.end or 0)
    assert sorted(numbers(used)) == list(range(sum(more)))
    assert samples.finished == bool(more), "with nothing appended, it waits"
    assert samples.state() == (sum(more), ())


def test_a_dry_spell_is_no_end():
    samples = growing(4)
    first = samples.lease(4)
    assert first == Range(0, 4)
    assert samples.lease(4) is None
    assert samples.dry
    samples.consume(first)
    assert samples.dry
    assert not samples.finished
    samples.extend(6, growing=True)
    assert not samples.dry
    assert samples.lease(4) == Range(4, 6)


def test_samples_never_become_fewer():
    samples = growing(8)
    samples.extend(4, growing=True)
    assert samples.end == 8


@pytest.mark.parametrize("growing", [False, True])
def test_it_is_over_with_the_last_one_that_can_come(growing: bool):
    samples = Samples(4)
    samples.growing = True
    samples.consume(samples.lease(4) or Range(0, 0))
    samples.extend(4, growing=growing)
    assert samples.finished == (not growing)


def test_a_lease_that_was_forgotten_is_claimed_within_what_there_is():
    samples = growing(8)
    assert not samples.claim(Range(8, 12))
    samples.extend(12, growing=True)
    assert samples.claim(Range(8, 12))
    assert samples.lease(20) == Range(0, 8)
