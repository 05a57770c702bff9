"""What can be asked for as a codec, and what is said of what cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.job import Job
from shoal.job.codec import KEEPING, ROUNDING, Part, parse
from shoal.job.sync import SyncOptions


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("int8", [Part("int8")]),
        ("int4:unbiased", [Part("int4", unbiased=True)]),
        ("topk:0.01", [Part("topk", 0.01)]),
        ("topk:0.05+int2", [Part("topk", 0.05), Part("int2")]),
        ("randomk:0.1:unbiased", [Part("randomk", 0.1, unbiased=True)]),
        ("randomk:.5:unbiased + int8:unbiased", [Part("randomk", 0.5, unbiased=True), Part("int8", unbiased=True)]),
        ("dct:5e-2+bf16", [Part("dct", 0.05), Part("bf16")]),
        ("powersgd:4", [Part("powersgd", rank=4)]),
    ],
)
def test_what_is_asked_for(text: str, parts: list[Part]):
    assert parse(text) == tuple(parts)
    replace(Job(), sync=SyncOptions(codec=text, feedback=False)).validate()


def test_error_feedback_of_what_is_no_contraction_is_refused():
    for text, instead in (("randomk:0.1:unbiased", "randomk:0.1"), ("randomk:0.1:unbiased+sign", "randomk:0.1+sign")):
        with pytest.raises(JobError, match="more in every step") as caught:
            SyncOptions(codec=text).validate()
        assert caught.value.fix.startswith(f"{instead}, or")
        SyncOptions(codec=instead).validate()
    SyncOptions(codec="randomk:0.1+int8:unbiased").validate()


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("int9", "'int9' is unknown", "did you mean 'int8'?"),
        ("nome", "'nome' is unknown", "did you mean 'none'?"),
        ("none+int8", "'none' goes with nothing else", "none alone, or leave it out"),
        ("auto+int8", "'auto' goes with nothing else", "auto alone"),
        ("INT8", "'INT8' is unknown", "did you mean 'int8'?"),
        ("int8+int8", "int8 and int8 both round", "int8 alone"),
        ("", "'' is unknown", "known: none, auto, bf16"),
        ("topk:0.05+topq", "'topq' is unknown", "known: bf16, fp16, int8, int4, int2, sign"),
        ("top_k:0.1", "'top_k' is unknown", "did you mean 'topk'?"),
        ("topk", "topk needs the share that it keeps", "e.g. topk:0.05 keeps one number in 20"),
        ("topk:many", "'many' is not a share", "topk:0.05"),
        ("topk:nan", "'nan' is not a share", "topk:0.05"),
        ("topk:0", "topk cannot keep a share of 0", "give 1/4096 = 0.000244141 to 0.5"),
        ("dct:0.6", "dct cannot keep a share of 0.6", "to 0.5"),
        ("randomk:0.001", "randomk cannot keep a share of 0.001", "give 1/256 = 0.00390625 to 0.5"),
        ("topk:inf", "topk cannot keep a share of inf", ""),
        ("sign:0.1", "'0.1' says nothing to sign", "give sign alone"),
        ("int8:stochastic", "'stochastic' says nothing to int8", "int8 or int8:unbiased"),
        ("int8:unbiased:unbiased", "'unbiased' says nothing to int8", "give int8 alone"),
        ("topk:0.1:unbiased", "'unbiased' says nothing to topk", "give topk:0.1 alone"),
        ("int8+topk:0.1", "topk cannot come after int8", "e.g. topk:0.1+int8"),
        ("topk:0.1+dct:0.1", "dct cannot come after topk", "leave one of them out"),
        ("int8+int4", "int8 and int4 both round", "int8 or int4 alone"),
        ("topk:0.1+int8+sign", "what is kept is rounded twice", "e.g. topk:0.1+int8"),
        ("topk:0.1+", "'' is unknown", "known: bf16"),
        ("powersdg:4", "'powersdg' is unknown", "did you mean 'powersgd'?"),
        ("powersgd", "powersgd needs the rank of what it sends", "a whole number from 1 to 999999, e.g. powersgd:4"),
        ("powersgd:0", "'0' is not a rank", "from 1 to 999999"),
        ("powersgd:-1", "'-1' is not a rank", "from 1 to 999999"),
        ("powersgd:1.5", "'1.5' is not a rank", "from 1 to 999999"),
        ("powersgd:1_0", "'1_0' is not a rank", "from 1 to 999999"),
        ("powersgd:9999999", "'9999999' is not a rank", "from 1 to 999999"),
        ("powersgd:4:unbiased", "'unbiased' says nothing to powersgd", "give powersgd:4 alone"),
        ("powersgd:4+int8", "int8 cannot come after powersgd", "powersgd:4 alone"),
        ("topk:0.1+powersgd:2", "powersgd cannot come after topk", "powersgd:2 alone, or leave it out"),
        ("powersgd:2+powersgd:4", "powersgd cannot come after powersgd", "powersgd:2 alone"),
    ],
)
def test_what_cannot_be_is_refused(text: str, what: str, fix: str):
    with pytest.raises(JobError) as caught:
        replace(Job(), sync=SyncOptions(codec=text)).validate()
    assert caught.value.what.startswith(f"sync.codec={text!r}: ")
    assert what in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize("name", ["local", "gossip", "server"])
def test_powersgd_is_for_gradients_only(name: str):
    with pytest.raises(JobError, match="powersgd:4' excludes sync") as caught:
        replace(Job(), sync=SyncOptions(name=name, codec="powersgd:4")).validate()
    assert f"sync.name={name}" in caught.value.what
    assert "sync.name=allreduce" in caught.value.fix


WORDS = st.sampled_from(
    [*KEEPING, *ROUNDING, "powersgd", "none", "+", ":", "0.1", "unbiased", " ", "1e-3", "-1", "4", "ä"]
)


@given(st.text() | st.lists(WORDS).map("".join))
def test_any_text_is_a_codec_or_a_mistake_of_the_user(text: str):
    try:
        first, *second = parse(text)
    except JobError:
        return
    assert (first.name in KEEPING) == (first.share > 0)
    assert (first.name == "powersgd") == (first.rank > 0)
    assert [part.name in ROUNDING for part in second] in ([], [True])
    assert not second or first.name in KEEPING
