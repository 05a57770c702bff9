"""What a model, its sequences and its batch cannot be laid out as is refused in a sentence; what it proposes works."""

from __future__ import annotations

import re
from dataclasses import replace
from math import lcm
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import JobError, LayoutError, ShoalError
from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.every import layouts
from shoal.job.fits import EXCLUDED
from shoal.job.layout import SCHEDULES
from shoal.job.model import ModelOptions
from shoal.job.train import TrainOptions
from tests.equivalence import test_layouts


def job(layout: str, heads: int = 4, keys: int = 2, blocks: int = 4, length: int = 64, batch: int = 8, **train) -> Job:
    model = ModelOptions(
        num_attention_heads=heads, num_key_value_heads=keys, num_hidden_layers=blocks, vocab_size=64, head_dim=8
    )
    return Job(
        layout=Layout.parse(layout),
        model=model,
        data=DataOptions(sequence_length=length),
        train=TrainOptions(steps=1, global_batch=batch, **train),
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
        ("pipeline=3,schedule=zbv", {"batch": 9}, "has 6 stages, the model only 4 blocks", "pipeline=2"),
        ("pipeline=2,stages=1+2", {}, "stages=1+2 has 3 blocks, the model 4", "together"),
        ("replicas=3", {}, "global_batch=8 is not divisible by the 3 workers", "6 or 9"),
        ("fsdp=3,tensor=2", {}, "not divisible by the 3 ranks along replicas and fsdp", "6 or 9"),
        ("pipeline=2,micro_batch=8", {}, "cannot run 1 micro-batches", "micro_batch=1, 2 or 4"),
        ("pipeline=4", {"batch": 2}, "cannot run 2 micro-batches", "global_batch=4"),
        ("pipeline=2,micro_batch=4,schedule=dualpipev", {}, "cannot run 2 micro-batches", "micro_batch=1 or 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(layout: str, options: dict, what: str, fix: str):
    with pytest.raises(ShoalError) as caught:
        job(layout, **options).validate()
    assert what in caught.value.what
    assert fix in caught.value.fix


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 12))
def test_the_tensor_degrees_that_are_proposed_would_do(ranks: int, keys: int, sharers: int):
    wanted = job(f"tensor={ranks}", heads=keys * sharers, keys=keys, length=lcm(*range(1, 49)))
    wanted = replace(wanted, model=replace(wanted.model, max_position_embeddings=10**30))
    try:
        wanted.validate()
    except LayoutError as error:
        proposed = [int(n) for n in re.findall(r"\d+", error.fix)]
        assert 1 in proposed
        for degree in proposed:
            replace(wanted, layout=Layout(tensor=degree)).validate()


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 4), st.integers(1, 40), st.integers(0, 5), st.integers(1, 2))
def test_a_pipeline_gets_enough_micro_batches_or_is_told_what_to_take(schedule, ranks, batch, micro, fsdp):
    wanted = job(f"pipeline={ranks},fsdp={fsdp},schedule={schedule},micro_batch={micro}", blocks=8, batch=batch)
    try:
        layout = wanted.validate().layout
        assert layout is not None
        assert layout.micro_batch
        assert batch % (layout.micro_batch * layout.fsdp) == 0
        if micro:
            assert layout.micro_batch == micro
    except JobError as error:
        if not isinstance(error, LayoutError):
            assert batch % fsdp or (micro and batch // fsdp % micro)
            return
        numbers = [int(n) for n in re.findall(r"\d+", error.fix.split("=")[-1])]
        for n in numbers:
            changes = {"train": replace(wanted.train, global_batch=n)} if "global_batch" in error.fix else {}
            assert wanted.layout is not None
            replace(wanted, layout=replace(wanted.layout, micro_batch=micro if changes else n), **changes).validate()


@pytest.mark.parametrize(
    ("layout", "experts", "what", "fix"),
    [
        ("fsdp=2,expert=2", 0, "expert=2 shares experts, and the model has none", "leave it out"),
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
    assert caught.value.fix == fix
    if experts:
        replace(wanted, layout=replace(wanted.layout, expert=2)).validate()


def test_every_layout_of_a_model_with_experts_shares_them_where_it_can():
    found = layouts(4, 6)
    assert [layout for layout in found if layout.expert == 1] == layouts(4)
    shared = {str(layout) for layout in found if layout.expert > 1}
    assert {"fsdp=4,expert=2,zero=3", "fsdp=2,tensor=2,expert=2,zero=3", "tensor=2,expert=2"} <= shared
    assert not any(layout.expert == 4 for layout in found)
    assert all(layout.rest * layout.expert == layout.fsdp * layout.context * layout.tensor for layout in found)


@pytest.mark.parametrize("pair", EXCLUDED, ids=lambda pair: f"{pair.one} x {pair.other}")
def test_excluded_pairs_are_refused_and_named(pair):
    layout = "pipeline=2,schedule=zbv" + (",recompute=block" if "recompute" in pair.other else "")
    with pytest.raises(LayoutError) as caught:
        job(layout, compile="on" if "compile" in pair.other else "off").validate()
    assert pair.reason in caught.value.what
    assert pair.fix == caught.value.fix


def test_the_documentation_lists_every_excluded_pair():
    text = Path("docs/layouts.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \|", text.partition("## Refused")[2], re.M)
    assert [(pair.one, pair.other) for pair in EXCLUDED] == rows
    # A pair that is not refused is a row of the equivalence suite; taking one away needs an entry in the decisions.
    assert len(EXCLUDED) == 2


def test_no_row_leaves_the_equivalence_suite_unseen():
    """Fewer rows, or another number of refused pairs, need an entry in docs/decisions.md, and these numbers changed."""
    assert set(test_layouts.SCHEDULES) == set(SCHEDULES)
    assert all(f"schedule={name}" in " ".join(test_layouts.SINGLES) for name in SCHEDULES)
    assert len(test_layouts.SINGLES) == 19
    assert len(test_layouts.PAIRS) == 19
    assert len(test_layouts.TRIPLES) == 16
    assert set(test_layouts.AXES) == {"replicas", "pipeline", "fsdp", "context", "tensor"}
