"""What a model, its sequences and its batch cannot be laid out as is refused in a sentence; what it proposes works."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import JobError, LayoutError, ShoalError
from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.every import layouts
from shoal.job.fits import EXCLUDED, _divisors, enough, fewest
from shoal.job.layout import AXES, SCHEDULES
from shoal.job.model import ModelOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions


def job(layout: str, heads: int = 4, keys: int = 2, blocks: int = 4, length: int = 64, batch: int = 8, **train) -> Job:
    model = ModelOptions(
        num_attention_heads=heads, num_key_value_heads=keys, num_hidden_layers=blocks, vocab_size=64, head_dim=8
    )
    sync = SyncOptions(**train.pop("sync", {}))
    return Job(
        layout=Layout.parse(layout),
        model=model,
        data=DataOptions(sequence_length=length),
        train=TrainOptions(steps=1, global_batch=batch, **train),
        sync=sync,
    )


@pytest.mark.parametrize(
    ("layout", "options", "what", "fix"),
    [
        ("tensor=3", {}, "tensor=3 does not divide 4 query heads with 2 key and value heads", "tensor=1, 2 or 4"),
        ("tensor=4", {"heads": 12, "keys": 6}, "tensor=4 does not divide 12 query heads", "1, 2, 3, 6 or 12"),
        ("tensor=2", {"length": 63}, "sequence_length=63 cannot be shared", "sequence_length=62 or 64"),
        ("context=4", {"length": 60}, "sequence_length=60 cannot be shared by context=4", "56 or 64"),
        ("context=3,context_by=ulysses", {"length": 63}, "ulysses gives each of context=3", "context_by=ring"),
        ("pipeline=8", {}, "has 8 stages, the model only 4 blocks", "pipeline=4"),
        ("pipeline=3,schedule=zbv", {"batch": 9}, "has 6 stages, the model only 4 blocks", "schedule=1f1b"),
        ("pipeline=2,stages=1+2", {}, "stages=1+2 has 3 blocks, the model 4", "together"),
        ("replicas=3", {}, "global_batch=8 is not divisible by the 3 workers", "6 or 9"),
        ("fsdp=3,tensor=2", {}, "not divisible by the 3 ranks along replicas and fsdp", "6 or 9"),
        ("pipeline=2,micro_batch=8", {}, "cannot run 1 micro-batch (8 sequences a pipeline)", "micro_batch=1, 2 or 4"),
        ("pipeline=4", {"batch": 2}, "cannot run 2 micro-batches", "global_batch=4"),
        ("pipeline=2,micro_batch=4,schedule=dualpipev", {}, "cannot run 2 micro-batches", "micro_batch=1 or 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(layout: str, options: dict, what: str, fix: str):
    with pytest.raises(ShoalError) as caught:
        job(layout, **options).validate()
    assert what in caught.value.what
    assert fix in caught.value.fix


LAYOUTS = st.fixed_dictionaries(
    {},
    optional={
        **{axis: st.integers(2, 6) for axis in AXES},
        "expert": st.integers(1, 4), "schedule": st.sampled_from(sorted(SCHEDULES)), "micro_batch": st.integers(0, 5),
        "context_by": st.sampled_from(["ring", "ulysses"]), "recompute": st.sampled_from(["none", "block"]),
    },
)  # fmt: skip


@settings(max_examples=60)
@given(
    LAYOUTS,
    st.fixed_dictionaries(
        {
            "heads": st.integers(1, 12), "keys": st.integers(1, 4), "blocks": st.integers(1, 8),
            "length": st.integers(1, 200), "batch": st.integers(1, 40),
        }
    ),
    st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_the_layout_that_is_proposed_would_do(axes, sizes, dropped):
    """On no more ranks than were asked for. Options that are proposed besides need not be enough."""
    try:
        text = str(Layout(**axes))
        wanted = job(text, **{**sizes, "heads": sizes["heads"] * sizes["keys"]}, attention_dropout=dropped)
    except LayoutError:
        return  # of itself, as in test_layout
    try:
        layout = wanted.validate().layout
        assert layout is not None
        assert layout.pipeline == 1 or layout.micro_batch
    except JobError as error:
        (proposed,) = re.findall(r"^layout (\S+) would do", error.fix)
        nearest = Layout.parse(proposed)
        assert nearest.world <= Layout.parse(text).world
        replace(wanted, layout=nearest).validate()


@pytest.mark.parametrize(
    ("layout", "options", "nearest"),
    [
        ("tensor=3", {}, "tensor=2"),
        ("pipeline=6", {"blocks": 5, "batch": 4}, "pipeline=4,schedule=1f1b"),
        ("pipeline=3,schedule=zbv", {"batch": 9}, "pipeline=3,schedule=1f1b"),
        ("pipeline=2,micro_batch=8", {}, "pipeline=2,schedule=1f1b"),
        ("pipeline=4", {"batch": 2}, "pipeline=4,schedule=gpipe"),
        ("tensor=3", {"length": 63}, "replicas=1"),
        ("fsdp=1000001", {}, "fsdp=8,zero=3"),
        ("context=2,context_by=ulysses,tensor=2", {"heads": 2}, "context=2,tensor=2,zero=3,context_by=ring"),
        ("fsdp=2,expert=2", {}, "fsdp=2,zero=3"),
        ("pipeline=2,schedule=zbv,recompute=block", {}, "pipeline=2,schedule=1f1b,recompute=block"),
    ],
)
def test_the_nearest_layout_keeps_the_ranks_at_work(layout, options, nearest):
    with pytest.raises(JobError) as caught:
        job(layout, **options).validate()
    assert caught.value.fix.startswith(f"layout {nearest} would do")


def test_shares_are_left_out_and_all_replicas_kept():
    """Where their number does not divide the batch, with another one."""
    gossip = {"name": "gossip"}
    for batch, fix in (
        (24, "layout replicas=3 would do; or another"),
        (16, "; or layout replicas=3 with train.global_batch=15 or 18; or"),
    ):
        with pytest.raises(LayoutError, match="gossip excludes replica_share") as caught:
            job("replicas=3,replica_share=6+1+1", batch=batch, sync=gossip).validate()
        assert fix in caught.value.fix
    job("replicas=3", batch=18, sync=gossip).validate()


@pytest.mark.parametrize(
    ("layout", "experts", "what", "fix"),
    [
        ("fsdp=2,expert=2", 0, "expert=2 shares experts, and the model has none", ""),
        ("fsdp=2,tensor=2,expert=4", 6, "expert=4 does not divide model.num_experts=6", "expert=1 or 2"),
        ("fsdp=3,tensor=2,expert=6", 4, "expert=6 does not divide model.num_experts=4", "expert=1 or 2"),
    ],
)
def test_experts_that_cannot_be_shared_are_refused(layout: str, experts: int, what: str, fix: str):
    wanted = job(layout, batch=12)
    family = {"family": "mixtral", "num_experts": experts} if experts else {}
    wanted = replace(wanted, model=replace(wanted.model, **family))
    with pytest.raises(LayoutError) as caught:
        wanted.validate()
    assert what in caught.value.what
    assert caught.value.fix.endswith(fix)
    if experts:
        replace(wanted, layout=replace(wanted.layout, expert=2)).validate()


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("pipeline", [2, 3, 6])
def test_fewest_micro_batches_are_the_first_that_are_enough(schedule, pipeline):
    layout = Layout(pipeline=pipeline, schedule=schedule)
    assert fewest(layout) == next(n for n in range(1, 64 * layout.stage_count) if enough(n, layout))


def test_divisors_are_all_of_them_in_order():
    assert all(_divisors(n) == [d for d in range(1, n + 1) if n % d == 0] for n in range(1, 200))


@pytest.mark.parametrize("axis", AXES)
def test_the_largest_degrees_are_refused_in_a_sentence(axis):
    with pytest.raises(JobError) as caught:
        job(f"{axis}=1048576").validate()
    assert caught.value.fix.startswith("layout ")


def test_every_layout_of_a_model_with_experts_shares_them_where_it_can():
    found = layouts(4, 6)
    assert [layout for layout in found if layout.expert == 1] == layouts(4)
    shared = {str(layout) for layout in found if layout.expert > 1}
    assert {"fsdp=4,expert=2,zero=3", "fsdp=2,tensor=2,expert=2,zero=3", "tensor=2,expert=2"} <= shared
    assert not any(layout.expert == 4 for layout in found)
    assert all(layout.rest * layout.expert == layout.fsdp * layout.context * layout.tensor for layout in found)


REFUSED = {
    "train.compile=on": ("pipeline=2,schedule=zbv", {"compile": "on"}),
    "recompute=block": ("pipeline=2,schedule=zbv,recompute=block", {}),
    "train.attention_dropout": ("context=2", {"attention_dropout": 0.1}),
    "tensor, pipeline or experts on several ranks": (
        "replicas=2,tensor=2",
        {"sync": {"name": "local", "codec": "int8"}},
    ),
    "replica_share": ("replicas=2,replica_share=3+1", {"sync": {"name": "gossip"}}),
}


@pytest.mark.parametrize("pair", EXCLUDED, ids=lambda pair: f"{pair.one} x {pair.other}")
def test_excluded_pairs_are_refused_and_named(pair):
    layout, train = REFUSED[pair.other]
    with pytest.raises(LayoutError) as caught:
        job(layout, **train).validate()
    assert pair.reason in caught.value.what
    assert caught.value.fix.endswith(pair.fix)


@pytest.mark.parametrize("layout", ["context=2,context_by=ulysses", "fsdp=2,context=2"])
def test_dropout_of_probabilities_has_other_layouts(layout):
    with pytest.raises(LayoutError, match=r"context excludes train\.attention_dropout"):
        job(layout, attention_dropout=0.1).validate()
    job(layout, dropout=0.1).validate()
    for other in ("tensor=2", "fsdp=2", "pipeline=2,schedule=zbv"):
        job(other, attention_dropout=0.1).validate()


def test_the_documentation_lists_every_excluded_pair_its_reason_and_what_to_take():
    """tests/equivalence/test_rows.py holds them to docs/decisions.md."""
    text = Path("docs/layouts.md").read_text().partition("## Refused")[2].replace("`", "")
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.M)[1:]
    assert [(pair.one, pair.other, pair.reason, pair.fix) for pair in EXCLUDED] == rows
