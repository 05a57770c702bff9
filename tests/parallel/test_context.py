"""Rows spread over ranks: out and gradients equal to one process's in float64 (bound 1e-12, relative), by ring and by
Ulysses, in 2, 3 and 4 ranks; what travels is what is seen; planted bugs are at least 100 bounds away."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.parallel import ring
from shoal.parallel.context import METHODS

CASES = "tests.parallel.context_cases"
BOUND = 1e-12

# Three rows: documents that straddle every cut, one document, documents of one and two tokens.
CUTS = [[5, 17, 18, 40], [], [*range(1, 30), 31, 33]]
CASE = {"length": 48, "rows": 3, "heads": 12, "key_heads": 4, "cuts": CUTS}
KEY_HEADS = {2: (1, 2, 6), 3: (1, 3, 12), 4: (1, 2, 4)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_equals_one_process(ranks, method, world) -> None:
    cases = [CASE | {"key_heads": n} for n in KEY_HEADS[world]]
    found = ranks.run(f"{CASES}:agree", world, method=method, cases=cases)
    assert max(max(of_rank) for of_rank in found) < BOUND


def test_one_rank_is_a_group_too(ranks) -> None:
    for method in METHODS:
        assert ranks.run(f"{CASES}:agree", 1, method=method, cases=[CASE])[0][0] < BOUND


@st.composite
def odd_rows(draw, world: int) -> dict:
    length = 2 * world * draw(st.integers(1, 6))
    rows = draw(st.integers(1, 3))
    cuts = [draw(st.lists(st.integers(1, length), max_size=6)) for _ in range(rows)]
    heads = draw(st.sampled_from([(12, 12), (12, 4), (12, 1)] if world != 3 else [(12, 12), (12, 3), (12, 1)]))
    seed = draw(st.integers(0, 9))
    return {"length": length, "rows": rows, "heads": heads[0], "key_heads": heads[1], "cuts": cuts, "seed": seed}


@pytest.mark.parametrize("world", [3, 4])
def test_documents_cut_anywhere(ranks, world) -> None:
    @settings(max_examples=8, deadline=None)
    @given(st.lists(odd_rows(world), min_size=4, max_size=6), st.sampled_from(METHODS))
    def agree(cases: list[dict], method: str) -> None:
        found = ranks.run(f"{CASES}:agree", world, method=method, cases=cases)
        assert max(max(of_rank) for of_rank in found) < BOUND

    agree()


@pytest.mark.parametrize("method", METHODS)
def test_passes_repeat_to_the_last_bit(ranks, method) -> None:
    assert ranks.run(f"{CASES}:repeats", 4, method=method, case=CASE) == [True] * 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_no_further_from_the_truth_than_one_process(ranks, method, autocast) -> None:
    """By norm over a rank's part, at most 1.5 times (of one process in bf16)."""
    case = CASE | {"length": 192, "cuts": [[50, 90], [], [130]], "width": 32}
    found = ranks.run(f"{CASES}:narrow", 3, method=method, dtype="bfloat16", case=case | {"key_heads": 3},
                      autocast=autocast)  # fmt: skip
    for ours, plain in found:
        assert all(a < 1.5 * b for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_float32_is_as_near_as_one_process(ranks, method) -> None:
    for ours, plain in ranks.run(f"{CASES}:narrow", 2, method=method, dtype="float32", case=CASE):
        assert all(a < max(2 * b, 1e-6) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_inside_a_compiled_function(ranks, method) -> None:
    """Two graphs, before and after the attention, whatever the documents."""
    case = CASE | {"rows": 1}
    for *distances, graphs in ranks.run(f"{CASES}:compiled", 2, method=method, case=case):
        assert max(distances) < BOUND
        assert graphs == 2


@pytest.mark.parametrize(
    ("method", "bug"),
    [
        ("ring", "off by one block"),
        ("ring", "no merge"),
        ("ring", "local positions"),
        ("ring", "wrong home"),
        ("ring", "own lse"),
        ("ulysses", "no merge"),
        ("ulysses", "rows in the order of heads"),
        ("ulysses", "first copy"),
    ],
)
def test_sees_planted_bug(ranks, method, bug) -> None:
    case = {"length": 48, "rows": 2, "heads": 6, "key_heads": 1, "cuts": [[5, 17, 18, 40], []]}
    found = ranks.run(f"{CASES}:bug", 3, name=bug, method=method, case=case)
    assert max(found) > 100 * BOUND
    assert max(ranks.run(f"{CASES}:bug", 3, name="", method=method, case=case)) < BOUND


@given(data=st.data(), world=st.integers(1, 6))
def test_a_chunk_visits_whoever_sees_it_and_its_gradient_comes_home(data, world) -> None:
    """In the order of the ring, each rank once, and nobody sends what it does not hold."""
    others = [[r for r in range(world) if r != ring.owner(c, world)] for c in range(2 * world)]
    seers = []
    for c, o in enumerate(others):
        # Heads may be computed with in two steps, tails in one.
        steps = st.integers(1, 2 if c < world else 1)
        seers.append(data.draw(st.dictionaries(st.sampled_from(o), steps)) if o else {})
    outward, homeward = ring.routes(seers)
    assert len(outward) == len(homeward) == 2 * world + 1
    first = [{c: 2 * d + half for d in range(world) for half, c in enumerate(ring.chunks((r - d) % world, world))}
             for r in range(world)]  # fmt: skip
    arrived: list[dict[int, int]] = [{} for _ in range(world)]
    sums: list[dict[int, set[int]]] = [{} for _ in range(world)]
    home: list[set[int]] = [set() for _ in seers]
    for step in range(2 * world + 1):
        for m in outward[step]:
            # From its owner, or from who began to compute with it in the step before.
            assert m.source == ring.owner(m.chunk, world) or arrived[m.source][m.chunk] == step - 2
        coming = [(m, sums[m.source].pop(m.chunk)) for m in homeward[step]]
        for r in range(world):
            for c, at in arrived[r].items():
                if at < step <= at + seers[c][r]:
                    sums[r].setdefault(c, set()).add(r)
        for m in outward[step]:
            assert m.chunk not in arrived[m.target]
            assert first[m.target][m.chunk] == step + 1
            arrived[m.target][m.chunk] = step
        for m, of in coming:
            assert m.home == (m.target == ring.owner(m.chunk, world))
            if m.home:
                assert not home[m.chunk] & of
                home[m.chunk] |= of
            else:
                sums[m.target].setdefault(m.chunk, set()).update(of)
    assert not any(sums)
    assert [{r for r in range(world) if c in arrived[r]} for c in range(2 * world)] == home == [set(s) for s in seers]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_ring_sends_what_the_documentation_says(ranks, world) -> None:
    """docs/context-parallel.md: heads of the row visit all n − 1 others, tails only those before them: (n − 1)(3/2)
    chunks a rank on average; gradients in fp32 beside them on the way back. All ranks compute the same."""
    case = {"length": 48, "rows": 2, "heads": 4, "key_heads": 2, "cuts": [[], []]}
    chunk = 2 * 2 * (48 // (2 * world)) * 2 * 6  # K and V of both rows, two heads of width 6: elements
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        found = ranks.run(f"{CASES}:sent", world, case=case, dtype=dtype)
        visits = 1.5 * (world - 1) * world
        assert sum(f["forward"] for f in found) == visits * chunk * size
        assert sum(f["backward"] for f in found) == visits * chunk * (size + 4)
        assert [f["pairs"] for f in found] == [2 * world + 1] * world


@pytest.mark.parametrize("world", [3, 4])
def test_a_ring_computes_while_messages_travel(ranks, world) -> None:
    """In each step they begin, something is computed, and only then are they waited for."""
    case = {"length": 48, "rows": 1, "heads": 2, "key_heads": 1, "cuts": [[]]}
    for forward, backward in ranks.run(f"{CASES}:events", world, case=case):
        assert re.fullmatch(rf"(mc+w){{{2 * world}}}", forward)
        # The last gradients go home when all is computed.
        assert re.fullmatch(rf"(mmc+ww){{{2 * world}}}mmww", backward)


@pytest.mark.parametrize("key_heads", [1, 4])
def test_ulysses_sends_what_the_documentation_says(ranks, key_heads) -> None:
    """A rank's part of q, k, v and out, all but its own n-th; key heads that are fewer than ranks once for each."""
    case = {"length": 48, "rows": 2, "heads": 8, "key_heads": key_heads, "cuts": [[], []]}
    pieces = 2 * (48 // 4) * (8 + 8 + 2 * max(key_heads, 4)) * 6
    assert ranks.run(f"{CASES}:exchanged", 4, case=case) == [[pieces * 4 * 3 // 4] * 2] * 4


def test_what_nobody_sees_is_not_sent(ranks) -> None:
    """Documents that end with the chunks need no message; one that straddles two ranks, one each way."""
    case = {"length": 48, "rows": 1, "heads": 2, "key_heads": 1}
    within = ranks.run(f"{CASES}:sent", 3, case=case | {"cuts": [[8, 16, 24, 32, 40]]})
    assert [(f["forward"], f["backward"], f["pairs"]) for f in within] == [(0, 0, 2)] * 3
    straddles = ranks.run(f"{CASES}:sent", 3, case=case | {"cuts": [[8, 24, 32, 40]]})
    chunk = 2 * 8 * 6 * 4
    # Rank 1's head goes to rank 2, whose head sees it, and the gradient comes back.
    assert [f["forward"] for f in straddles] == [0, chunk, 0]
    assert [f["backward"] for f in straddles] == [0, chunk, chunk]
    assert [f["pairs"] for f in straddles] == [2, 2, 3]
