"""The memory model: by hand, against orders of torch's schedules, and what must hold of every layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules

from shoal.errors import JobError
from shoal.job.layout import SCHEDULES
from shoal.planning import constants, memory, published, refit, stacks, work
from shoal.planning import schedules as orders

ONE = {
    "layers": 12, "hidden": 1024, "feed": 4096, "heads": 16, "key_heads": 16, "head_size": 64, "vocab": 51200,
    "gated": 0, "sequence": 2048, "devices": 1, "per_node": 8, "tensor": 1, "pipeline": 1, "chunks": 1, "context": 1,
    "data": 1, "fsdp": 1, "zero": 0, "shards": 0, "recompute": 0, "selective": 0, "micro_batch": 2, "global_batch": 64,
    "low": 0, "peak": 312e12, "measured": 0.8, "measured_low": 0.8, "memory": 80 * 2**30, "bandwidth": 2e12,
    "link": 300e9, "nic": 25e9, "units": 108,
    **{name: float(getattr(stacks.STACKS["megatron-2021"], name)) for name in work.STACK},
}  # fmt: skip


def of(**changed):
    return work.of_rows([{**ONE, **changed}], ["a100-80"], ["megatron"])


@st.composite
def layouts(draw):
    few = st.sampled_from([1, 2, 4])
    zero = draw(st.integers(0, 3))
    tensor, pipeline, context, fsdp, replicas = (draw(few) for _ in range(5))
    chunks = draw(st.sampled_from([1, 2, 3])) if pipeline > 1 else 1
    fsdp = fsdp if zero else 1
    micro = draw(st.sampled_from([1, 2]))
    return {
        "layers": draw(st.integers(1, 13)), "gated": draw(st.integers(0, 1)),
        "key_heads": draw(st.sampled_from([4, 16])),
        "tensor": tensor, "pipeline": pipeline, "chunks": chunks, "context": context, "fsdp": fsdp, "zero": zero,
        "data": fsdp * replicas, "shards": draw(st.integers(0, 1)), "micro_batch": micro,
        "flash": draw(st.sampled_from([0, 2])), "kept_bytes": draw(st.sampled_from([2, 4, 6])),
        "global_batch": fsdp * replicas * micro * draw(st.integers(1, 20)),
    }  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(layouts(), st.sampled_from(list(SCHEDULES)))
def test_ranks_together_have_the_models_bytes(layout, schedule):
    """A replica's ranks, whatever axis they share by; and a table more where input and output are apart."""
    if schedule in orders.V_SHAPED:
        layout["chunks"] = 1
    one = of(**layout)
    summed = Counter()
    for rank in range(layout["pipeline"]):
        found = memory.stage(one, np.array([float(rank)]), schedule)
        for name in ("weights", "gradients", "optimizer"):
            stage = {"weights": 3, "gradients": 2, "optimizer": 1}[name]
            ranks = layout["tensor"] * (layout["fsdp"] if layout["zero"] >= stage else 1)
            summed[name] += float(getattr(found, name)[0]) * ranks
    block = 2 * 1024 * 1024 + 2 * 1024 * layout["key_heads"] * 64 + (3 if layout["gated"] else 2) * 1024 * 4096
    apart = layout["gated"] or (layout["pipeline"] > 1 and schedule not in orders.V_SHAPED)
    parameters = layout["layers"] * block + (2 if apart else 1) * 51200 * 1024
    assert summed["weights"] == pytest.approx(2 * parameters)
    assert summed["gradients"] == pytest.approx(layout["kept_bytes"] * parameters)
    assert summed["optimizer"] == pytest.approx(12 * parameters)


@settings(deadline=None, max_examples=200)
@given(layouts(), st.sampled_from(list(SCHEDULES)), st.sampled_from(["", "recompute", "selective"]))
def test_the_fullest_stage_is_found_among_all(layout, schedule, again):
    if schedule in orders.V_SHAPED:
        layout["chunks"] = 1
    one = of(**layout, **({again: 1} if again else {}))
    stages = [memory.stage(one, np.array([float(rank)]), schedule) for rank in range(layout["pipeline"])]
    assert memory.cost(one, schedule).allocated == pytest.approx(max(stage.allocated[0] for stage in stages))


@pytest.mark.parametrize(
    ("changed", "per_token"),
    [
        ({}, 34 * 1024 + 5 * 16 * 2048),
        ({"tensor": 4}, (10 + 24 / 4) * 1024 + 5 * 16 * 2048 / 4),
        ({"tensor": 4, "shards": 1}, (34 * 1024 + 5 * 16 * 2048) / 4),
    ],
)
def test_activations_are_those_of_the_paper(changed, per_token):
    """Korthikanti et al. 2022, table 2: a layer's, sbh (34 + 5as/h) and so on, here of 12 layers and 4096 tokens; with
    its attention computed again, without 5as/h, but for one layer's at a time; all again, 2 sbh."""
    tokens, scores = 2 * 2048, 5 * 16 * 2048 / changed.get("tensor", 1)
    found = memory.cost(of(**changed)).activations
    assert found == pytest.approx(12 * tokens * per_token)
    found = memory.cost(of(**changed, selective=1)).activations
    assert found == pytest.approx(12 * tokens * (per_token - scores) + tokens * scores)
    given = 2 * 1024 / (changed["tensor"] if changed.get("shards") else 1)
    found = memory.cost(of(**changed, recompute=1)).activations
    assert found == pytest.approx(11 * tokens * given + tokens * per_token)


def test_every_second_product_is_kept():
    """torchtitan's policy: of each token the block's input, queries, values, what attention gives with its statistics,
    the first product of the feed-forward and its output; but of one block all, while it is computed again. The gated
    block's up-projection is computed again, and so are keys and the output of attention."""
    tokens = 2 * 2048
    kept = 2 * 1024 + 2 * (16 + 4 + 16) * 64 + 4 * 16 + 2 * 4096 + 2 * 1024
    one = {"gated": 1, "key_heads": 4, "flash": 2, "operators": 1}
    found = float(memory.cost(of(**one)).activations[0])
    whole = float(memory.cost(of(**{**one, "operators": 0, "layers": 1})).activations[0])
    assert found == pytest.approx(11 * tokens * kept + whole)
    assert whole == pytest.approx(tokens * (10 * 1024 + 2 * (16 + 8) * 64 + 2 * 16 * 64 + 6 * 4096 + 4 * 16))
    # Cut by tensor: what a group shares by sequences, too.
    cut = float(memory.cost(of(**one, tensor=4, shards=1)).activations[0])
    assert cut == pytest.approx(found / 4)


def test_every_second_block_is_computed_again():
    none, half, whole = (float(memory.cost(of(recompute=share)).activations[0]) for share in (0, 0.5, 1))
    assert half == pytest.approx((none + whole) / 2)


def test_a_pipeline_that_adds_up_whole_gradients():
    """torchtitan's: a stage's weights and gradients stay whole for the step, only the optimizer is shared."""
    shared = {"pipeline": 4, "fsdp": 8, "data": 8, "zero": 3, "layers": 12, "gated": 1, "context": 2}
    plain = memory.cost(of(**shared, shares_context=1))
    adds = memory.cost(of(**shared, shares_context=1, adds_whole=1))
    assert adds.weights == pytest.approx(16 * plain.weights)
    assert adds.gradients == pytest.approx(16 * plain.gradients)
    assert adds.optimizer == pytest.approx(plain.optimizer)
    alone = {**shared, "pipeline": 1}
    assert memory.cost(of(**alone, adds_whole=1)).weights == memory.cost(of(**alone)).weights


@settings(deadline=None, max_examples=100)
@given(layouts(), st.sampled_from(list(SCHEDULES)))
def test_what_saves_memory_never_costs_any(layout, schedule):
    def total(**changed):
        return float(memory.stage(of(**{**layout, **changed}), np.zeros(1), schedule).activations[0])

    assert total(recompute=1) <= total(selective=1) * (1 + 1e-12)
    assert total(selective=1) <= total() * (1 + 1e-12)
    assert total(flash=2) <= total(flash=0)
    assert total(shards=1) <= total(shards=0)
    assert total(context=2 * layout["context"]) < total()
    sizes = [
        memory.cost(of(**{**layout, "fsdp": 4, "data": 4, "zero": zero, "global_batch": 64})) for zero in (0, 1, 2)
    ]
    assert sizes[0].allocated > sizes[1].allocated > sizes[2].allocated


def most_kept(order):
    """Of an order of one rank's operations: forward passes whose activations it still has, at most."""
    kept = most = 0
    for operation in order:
        if operation is None:
            continue
        kind = operation.computation_type.name
        # Where a backward pass is split, its first half frees nothing: the gradients of weights need what was kept.
        kept += (kind == "FORWARD") - (kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"))
        most = max(most, kept)
    return most


@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_interleaved_keeps_what_its_order_does(ranks, chunks, rounds):
    """Orders by torch.distributed.pipelining."""
    batches = ranks * rounds
    there = SimpleNamespace(
        pp_group_size=ranks, n_local_stages=chunks, _n_microbatches=batches, number_of_rounds=rounds,
        microbatches_per_round=ranks,
    )  # fmt: skip
    for rank in range(ranks):
        order = schedules.ScheduleInterleaved1F1B._calculate_single_rank_operations(there, rank)
        found = memory.in_flight("1f1b", *(np.array([float(n)]) for n in (rank, ranks, chunks, batches)))
        assert found == pytest.approx([most_kept(order) / chunks])


@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("batches", [12, 24])
def test_a_v_keeps_no_more_than_its_papers_bound(ranks, batches):
    there = SimpleNamespace(pp_group_size=ranks, n_local_stages=2, _n_microbatches=batches, num_stages=2 * ranks)
    found = memory.in_flight("zbv", *(np.array([float(n)]) for n in (0, ranks, 2, batches)))
    kept = [
        most_kept(schedules.ScheduleZBVZeroBubble._calculate_single_rank_operations(there, r)) for r in range(ranks)
    ]
    assert found == pytest.approx([max(kept) / 2])


def test_a_v_goes_there_and_back():
    """5 layers on 4 places are 2, 2, 1, 0: the first rank has the first place and the last, and both tables."""
    one = of(layers=5, pipeline=2)
    own = [float(memory.owned(one, np.array([rank]), "zbv")[0]) for rank in (0.0, 1.0)]
    block = float(one.block_parameters[0])
    assert own == [2 * block + 51200 * 1024, 3 * block]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("batches", [5, 7])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_plain_pipelines_keep_what_their_orders_do(ranks, batches, schedule):
    """Orders by torch.distributed.pipelining, which has them for no fewer micro-batches than ranks."""
    kind = {"1f1b": schedules.Schedule1F1B, "gpipe": schedules.ScheduleGPipe}[schedule]
    every = kind._get_pipeline_order(SimpleNamespace(_num_stages=ranks, _n_microbatches=batches))
    for rank in range(ranks):
        found = memory.in_flight(schedule, *(np.array([float(n)]) for n in (rank, ranks, 1, batches)))
        assert found == [most_kept(every[rank])]


@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("chunks", [2, 3])
def test_an_interleaved_zero_bubble_keeps_what_its_order_does(ranks, chunks):
    kept = orders.live("interleaved_zero_bubble", ranks, chunks, 4 * ranks)
    found = memory.in_flight("interleaved_zero_bubble", *(np.array([float(n)]) for n in (0, ranks, chunks, 4 * ranks)))
    assert found == pytest.approx([max(kept) / chunks])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_each_schedule_keeps_what_its_order_does(schedule, ranks):
    for chunks in (2, 3) if schedule in orders.LOOPS else (SCHEDULES[schedule],):
        for batches in (2 * ranks, 4 * ranks):
            kept = orders.live(schedule, ranks, chunks, batches)
            for rank in range(ranks):
                sizes = (np.array([float(n)]) for n in (rank, ranks, chunks, batches))
                assert memory.in_flight(schedule, *sizes) == pytest.approx([kept[rank] / chunks])


def test_no_more_micro_batches_are_kept_than_there_are():
    for schedule in SCHEDULES:
        assert memory.in_flight(schedule, *(np.array([float(n)]) for n in (0, 8, 1, 3))) == [3]


def test_totals_by_kind():
    found = memory.cost(of(pipeline=2, zero=3, fsdp=2, data=2, layers=2, vocab=512_000))
    known = constants.memory()
    assert sum(found) == pytest.approx(found.total("allocated"))
    assert all((part > 0).all() for name, part in found._asdict().items() if name != "sync")
    assert found.total() == pytest.approx(found.allocated * known["fragments"].value)
    assert found.total("device") == pytest.approx(found.total() + known["beside"].value * 2**30)
    with pytest.raises(JobError, match="no memory is called 'all'"):
        found.total("all")
    with pytest.raises(JobError, match="no schedule is called 'zb'"):
        memory.cost(of(), "zb")


def test_what_is_beside_the_allocator_is_a_tenth_of_a_small_device_at_most():
    found = memory.Memory(*(np.array([2.0**30]) for _ in memory.Memory._fields))
    reserved = found.total("reserved")[0]
    beside = [found.total("device", gib * 2**30)[0] - reserved for gib in (16, 24, 80, 192)]
    assert beside == pytest.approx([1.6 * 2**30, 2.4 * 2**30, 8 * 2**30, 8 * 2**30])
    assert found.total("device")[0] - reserved == pytest.approx(8 * 2**30)


def test_published_rows_are_met_and_the_constants_are_those_of_a_fit():
    rows = published.read(published.FIT).filled
    assert len(rows.rows) == 70
    assert refit.refitted_memory() == constants.memory()
    assert len(constants.memory()) <= 2
    error = memory.cost(rows.work).total("device") / 2**30 / rows.measured - 1
    assert np.median(np.abs(error)) < 0.05
    assert abs(error.mean()) < 0.03


def test_no_candidates_have_no_memory():
    one = of()
    none = replace(one, columns={name: column[:0] for name, column in one.columns.items()}, device=one.device[:0])
    assert len(memory.cost(none).allocated) == 0
