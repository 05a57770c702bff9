"""A layout is printed and parsed as one text; what cannot be built is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given

from shoal.errors import LayoutError
from shoal.job import Layout
from tests.job.strategies import layouts


@given(layouts)
def test_parsing_what_was_printed_gives_the_same_layout(layout: Layout):
    assert Layout.parse(str(layout)) == layout


def test_ranks_are_the_product_of_the_axes():
    assert Layout.parse("replicas=3, fsdp=4").world == 12


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("replica=2", "unknown layout key 'replica'", "'replicas'"),
        (
            "fsdp=2,tensor=3,expert=4",
            "expert=4 does not divide the fsdp × context × tensor = 6 ranks",
            "1 or 2 or 3 or 6",
        ),
        ("replicas=1" + "0" * 400, "layout replicas is more than 1,048,576", "smaller"),
        ("tensor=1" + "0" * 5000, "layout tensor is more than 1,048,576", "smaller"),
        ("micro_batch=1048577", "layout micro_batch is more than 1,048,576", "smaller"),
        ("replicas=1048576,fsdp=2", "layout of replicas=1048576 × fsdp=2 is more than 1,048,576", "smaller"),
        ("pipeline=2,stages=1+" + "9" * 5000, "a number in layout stages is more than 1,048,576", "smaller"),
        ("expert=0", "expert=0 is less than 1", ""),
        ("tensor=0", "tensor=0 is less than 1", ""),
        ("pipeline=2,schedule=gpip", "schedule='gpip' is unknown", "gpipe"),
        ("context=2,context_by=star", "context_by='star' is unknown", "ring or ulysses"),
        ("tensor=2,tensor_by=star", "tensor_by='star' is unknown", "gather or ring"),
        ("fsdp=2,tensor_by=ring", "no ranks to go around", "tensor=2"),
        ("pipeline=2,stages=3-1", "stages='3-1' is not a list of numbers", "3+5"),
        ("pipeline=2,stages=1+1+1", "names 3 stages for pipeline=2", "give 2 numbers"),
        ("pipeline=2,schedule=zbv,stages=1+1", "names 2 stages for pipeline=2", "give 4 numbers"),
        ("pipeline=2,stages=1+1+1+1", "names 4 stages for pipeline=2", "give 2 numbers"),
        ("stages=4", "names 1 stages for pipeline=1", "give no stages"),
        ("stages=measured", "no pipeline to split", "pipeline=2"),
        ("pipeline=2,stages=auto", "is not a list of numbers", "measured"),
        ("replicas=two", "replicas='two' is not a whole number", "replicas=2"),
        ("replicas", "'replicas' has no value", "replicas=2"),
        ("replicas=", "replicas='' is not a whole number", "replicas=2"),
        ("tensor=2 context=2", "'tensor=2 context=2' is two options", "tensor=2,context=2"),
        ("tensor=２", "tensor='２' is not a whole number", "tensor=2"),
        ("tensor=1_0", "tensor='1_0' is not a whole number", "tensor=2"),
        ("", "the layout is empty", "replicas=1"),
        (" , ", "the layout is empty", "replicas=1"),
        ("replicas=0", "replicas=0 is less than 1", ""),
        ("fsdp=-1", "fsdp=-1 is less than 1", ""),
        ("replicas=2,replicas=3", "given twice", "once"),
        ("fsdp=2,zero=4", "zero=4 is not a ZeRO stage", "1, 2 or 3"),
        ("recompute=all", "recompute='all' is unknown", "none or block"),
        ("micro_batch=-1", "micro_batch=-1 is less than 0", ""),
    ],
)
def test_a_wrong_layout_is_refused(text: str, what: str, fix: str):
    with pytest.raises(LayoutError) as caught:
        Layout.parse(text)
    assert what in caught.value.what
    assert fix in caught.value.fix
