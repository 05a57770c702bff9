"""The orders are PyTorch's, and what they keep is what the papers say."""

from __future__ import annotations

import pytest
from torch.distributed.pipelining import schedules as theirs

from shoal.errors import LayoutError
from shoal.job.layout import SCHEDULES, Layout
from shoal.planning import schedules
from shoal.planning.schedules import BACKWARD, FORWARD, INPUT, WEIGHT

_KINDS = {theirs.F: FORWARD, theirs.B: BACKWARD, theirs.I: INPUT, theirs.W: WEIGHT}
_NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}


class _Noting:
    """A stage that holds nothing, and notes what PyTorch has it do."""

    has_backward = is_first = True
    is_last = False
    submod = group = None
    device = "cpu"

    def __init__(self, ranks, chunks, index):
        self.group_size, self.num_stages, self.stage_index, self.group_rank = ranks, ranks * chunks, index, 0
        self.done = []

    def forward_one_chunk(self, micro_batch, *_, **__):
        self.done.append((FORWARD, self.stage_index, micro_batch))

    def backward_one_chunk(self, micro_batch, **_):
        self.done.append((BACKWARD, self.stage_index, micro_batch))

    def get_fwd_recv_ops(self, _):
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def perform_reduce_grad(self, _):
        pass


def _torchs(schedule, ranks, chunks, micro_batches):
    """Of each rank: by running it where there is one stage a rank (what it would print is not what it runs), else as it
    is planned."""
    kind = theirs.get_schedule_class(_NAMES[schedule])
    if chunks == 1:
        return tuple(_run(kind, ranks, micro_batches, rank) for rank in range(ranks))
    built = kind([_Noting(ranks, chunks, 0) for _ in range(chunks)], micro_batches)
    found = []
    for rank in range(ranks):
        actions = [part for one in built.pipeline_order[rank] if one is not None for part in one.sub_actions or (one,)]
        found.append(tuple((_KINDS[one.computation_type], one.stage_index, one.microbatch_index) for one in actions))
    return tuple(found)


def _run(kind, ranks, micro_batches, rank):
    stage = _Noting(ranks, 1, rank)
    built = kind(stage, micro_batches)
    built._initialize_stage = lambda *_: None
    nothing = [()] * micro_batches
    built._step_microbatches(nothing, [{}] * micro_batches)
    return tuple(stage.done)


def _either(call, *args):
    """What comes back, or that the case is refused."""
    try:
        return call(*args)
    except (LayoutError, ValueError):
        return "refused"


def _compared(schedule, all_ranks, all_micro_batches):
    """How many cases PyTorch runs; the others are refused by both."""
    compared = 0
    for ranks in all_ranks:
        for chunks in (2, 3) if schedule in schedules.LOOPS else (SCHEDULES[schedule],):
            for micro_batches in all_micro_batches:
                case = (schedule, ranks, chunks, micro_batches)
                expected = _either(_torchs, *case)
                assert _either(schedules.orders, *case) == expected, case
                compared += expected != "refused"
    return compared


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_orders_are_those_of_pytorch(schedule):
    assert _compared(schedule, (2, 3, 4), (1, 2, 3, 4, 5, 6, 8, 9, 12)) > 10


@pytest.mark.nightly
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_orders_are_those_of_pytorch_in_more_cases(schedule):
    assert _compared(schedule, (2, 5, 6, 7, 8), (*range(1, 18), 20, 21, 24, 31, 32, 33)) > 60


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_are_where_the_layout_puts_them(schedule):
    for ranks in (2, 3, 4):
        layout = Layout(pipeline=ranks, schedule=schedule)
        home = schedules.home(schedule, ranks, SCHEDULES[schedule])
        assert len(home) == layout.stage_count
        for rank in range(ranks):
            assert tuple(s for s, where in enumerate(home) if where == rank) == layout.stages_of(rank)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_what_is_kept(ranks):
    """1F1B: as many as ranks, less one for each rank further on (Narayanan et al. 2021, section 2.2). Interleaved: what
    goes ahead of the first backward, and one. ZBV: as rank 0 of 1F1B, on all ranks (Qi et al. 2024, section 6), whose
    stages are half as large; DualPipeV one more (DeepSeek-AI 2025, table 2: stages and one)."""
    later = [ranks - 1 - rank for rank in range(ranks)]
    for micro_batches in (2 * ranks, 5 * ranks):
        found = {
            name: list(schedules.live(name, ranks, SCHEDULES[name], micro_batches)) for name in SCHEDULES
        }  # fmt: skip
        assert found["gpipe"] == [micro_batches] * ranks
        assert found["1f1b"] == [1 + ahead for ahead in later]
        assert found["looped_bfs"] == [2 * micro_batches] * ranks
        assert found["interleaved"] == [ranks + 2 * ahead + 1 for ahead in later]
        assert found["interleaved_zero_bubble"] == [2 * ranks] * ranks
        assert max(found["zbv"]) == 2 * ranks
        assert max(found["dualpipev"]) == 2 * ranks + 1


@pytest.mark.parametrize(
    ("case", "fix"),
    [
        (("1f1b", 4, 1, 3), "4 micro-batches or more"),
        (("dualpipev", 4, 2, 7), "8 micro-batches or more"),
        (("interleaved", 4, 2, 9), "a multiple of 4"),
        (("zbv", 4, 3, 8), "2 on each rank"),
        (("looped_bfs", 4, 1, 8), "2 or more on each rank"),
        (("interleavd", 4, 2, 8), "interleaved"),
    ],
)
def test_what_cannot_run_is_refused(case, fix):
    with pytest.raises(LayoutError) as error:
        schedules.orders(*case)
    assert fix in error.value.fix
