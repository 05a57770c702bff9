"""Blocks are dealt out to pipeline stages so that the dearest stage is as cheap as any split allows."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.job import Layout
from shoal.job.model import ModelOptions
from shoal.parallel.stages import balance, kind, layer_costs, layers_of_stages, measured_costs


@settings(max_examples=500)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 30), st.data())
def test_no_other_split_is_better(costs: list[int], head: int, data):
    stages = data.draw(st.integers(1, len(costs)))
    sizes = balance(costs, head, stages)
    assert sum(sizes) == len(costs)
    assert all(size >= 1 for size in sizes)

    def dearest(ends: tuple[int, ...]) -> tuple[int, int]:
        sums = [sum(costs[a:b]) for a, b in pairwise((0, *ends, len(costs)))]
        sums[-1] += head
        return max(sums), sum(s * s for s in sums)

    mine = tuple(sum(sizes[: i + 1]) for i in range(stages - 1))
    assert dearest(mine) == min(dearest(ends) for ends in combinations(range(1, len(costs)), stages - 1))


def test_a_large_vocabulary_takes_blocks_from_the_last_stage():
    options = ModelOptions(num_hidden_layers=8, hidden_size=64, intermediate_size=172, vocab_size=64)
    even = layers_of_stages(options, Layout(pipeline=2), 64)
    assert [len(r) for r in even] == [4, 4]
    large = ModelOptions(num_hidden_layers=8, hidden_size=64, intermediate_size=172, vocab_size=2048)
    first, last = layers_of_stages(large, Layout(pipeline=2), 64)
    assert len(first) > len(last)
    assert [*first, *last] == list(range(8))
    given = layers_of_stages(large, Layout(pipeline=2, stages="2+6"), 64)
    assert given == [range(0, 2), range(2, 8)]


def test_costs_are_counted_by_hand():
    options = ModelOptions(
        num_hidden_layers=2, hidden_size=8, intermediate_size=16, vocab_size=32, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    assert layer_costs(options, 10) == ([2 * weights + 2 * 8 * 10] * 2, 2 * 32 * 8)


def test_an_expert_costs_what_the_tokens_that_choose_it_cost():
    options = ModelOptions(
        family="qwen3_moe", num_hidden_layers=2, hidden_size=8, intermediate_size=16, vocab_size=32, num_experts=4,
        num_attention_heads=2, num_key_value_heads=1, moe_intermediate_size=6, first_k_dense_replace=1,
    )  # fmt: skip
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    dense, routed = attention + 3 * 8 * 16, attention + 4 * 8 + 2 * 3 * 8 * 6  # two of four experts, and the router
    assert layer_costs(options, 10)[0] == [2 * dense + 2 * 8 * 10, 2 * routed + 2 * 8 * 10]


def test_measured_costs_stand_where_their_pieces_are():
    options = ModelOptions(family="qwen3_moe", num_hidden_layers=4, num_experts=4, first_k_dense_replace=2)
    assert [kind(options, layer) for layer in range(4)] == ["dense block"] * 2 + ["routed block"] * 2
    seconds = {"embedding": 1.0, "dense block": 2.0, "routed block": 4.0, "head": 8.0}
    assert measured_costs(options, seconds) == ([3.0, 2.0, 4.0, 4.0], 8.0)
    one = ModelOptions(num_hidden_layers=2)
    assert measured_costs(one, {"embedding": 1.0, "block": 2.0, "head": 8.0}) == ([3.0, 2.0], 8.0)


def test_stages_to_be_measured_are_estimated_where_nothing_is_trained():
    options = ModelOptions(num_hidden_layers=8, hidden_size=64, intermediate_size=172, vocab_size=2048)
    measured = Layout.parse("pipeline=2,stages=measured")
    assert layers_of_stages(options, measured, 64) == layers_of_stages(options, Layout(pipeline=2), 64)


def test_stages_are_dealt_out_in_turns_or_down_and_up_a_v():
    assert [Layout(pipeline=2, schedule="interleaved").stages_of(r) for r in range(2)] == [(0, 2), (1, 3)]
    assert [Layout(pipeline=3, schedule="zbv").stages_of(r) for r in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert [Layout(pipeline=3).stages_of(r) for r in range(3)] == [(0,), (1,), (2,)]
    assert Layout().stages_of(0) == (0,)
