"""What a step sends: the table of docs/data-parallel.md, counted. 3 micro-batches; fsdp pads, by a few rows."""

from __future__ import annotations

import shutil

import pytest

MICRO_BATCHES = 3


@pytest.mark.parametrize(
    ("layout", "all_gather", "reduce_scatter", "all_reduce"),
    [
        # multiples of the parameters (for all_reduce: of this rank's share of them)
        ("replicas=2,micro_batch=2", 0, 0, 1),
        ("fsdp=2,zero=1,micro_batch=2", 1, 1, 0),
        ("fsdp=2,zero=2,micro_batch=2", 1, MICRO_BATCHES, 0),
        ("fsdp=2,zero=3,micro_batch=2", 2 * MICRO_BATCHES, MICRO_BATCHES, 0),
        ("replicas=2,fsdp=2,zero=1,micro_batch=1", 1, 1, 0.5),
        ("replicas=2,fsdp=2,zero=2,micro_batch=1", 1, MICRO_BATCHES, 0.5),
        ("replicas=2,fsdp=2,zero=3,micro_batch=1", 2 * MICRO_BATCHES, MICRO_BATCHES, 0.5),
    ],
)
def test_a_step_sends_what_the_documentation_says(ranks, layout, all_gather, reduce_scatter, all_reduce):
    world = 4 if "replicas=2,fsdp" in layout else 2
    for result in ranks.run("tests.parallel.cases:count_bytes", world, layout=layout):
        size, sent = result["parameters"], result["elements"]
        # Below: blocks are gathered again in backward with ZeRO 3, embedding and output layer are not.
        least = all_gather if all_gather < 2 else all_gather * 0.7
        assert least * size <= sent["all_gather"] <= all_gather * size * 1.1
        assert reduce_scatter * size <= sent["reduce_scatter"] <= reduce_scatter * size * 1.1
        assert all_reduce * size <= sent["all_reduce"] <= all_reduce * size * 1.1


def test_in_bf16_weights_travel_in_it_and_sums_in_fp32(ranks):
    """Blocks are gathered in bf16, embedding and output layer as they are stored; a few numbers of each rank are summed
    up in float64."""
    for result in ranks.run("tests.parallel.cases:count_bytes", 4, layout="replicas=2,fsdp=2", precision="bf16"):
        assert result["dtypes"] == {
            "all_gather": ["torch.bfloat16", "torch.float32"],
            "reduce_scatter": ["torch.float32"],
            "all_reduce": ["torch.float32", "torch.float64"],
        }


@pytest.mark.parametrize("context_by", ["ring", "ulysses"])
def test_ulysses_exchanges_heads_and_the_ring_does_not(ranks, context_by):
    for calls in ranks.run("tests.parallel.cases:exchanges", 2, layout=f"context=2,context_by={context_by}"):
        assert (calls > 0) == (context_by == "ulysses")


def test_recomputed_blocks_keep_less(ranks):
    plain, again = (
        ranks.run("tests.parallel.cases:held", 2, layout=f"fsdp=2,{how}micro_batch=2")[0]["kept"]
        for how in ("", "recompute=block,")
    )
    assert 0 < again < 0.7 * plain


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.parametrize("compile", ["on", "off"])
def test_compiled_blocks_are_compiled(ranks, compile):
    (held,) = ranks.run("tests.parallel.cases:held", 1, layout="replicas=1", compile=compile, precision="fp32")
    assert (held["graphs"] > 0) == (compile == "on")
