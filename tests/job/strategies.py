"""Random jobs: every option takes any value of its type, sensible or not."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from shoal.job import Job, Layout
from shoal.job.layout import SCHEDULES


def values(kind: Any) -> st.SearchStrategy[Any]:
    if get_origin(kind) is tuple:
        items = get_args(kind)
        return st.lists(values(items[0]), max_size=4).map(tuple) if items[-1] is ... else st.tuples(*map(values, items))
    if kind is str:
        # Paths and separators that a TOML writer may trip over, besides any text.
        return st.text(max_size=12) | st.sampled_from(
            ['"', "\\", "a\nb", "\r\n", "'''", '"""', "\x00\x7f", "# no", "é", "鯨"]
        )
    return {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
    }[kind]


layouts = (
    st.builds(
        Layout,
        replicas=st.integers(1, 30),
        fsdp=st.integers(1, 30),
        context=st.integers(1, 30),
        tensor=st.integers(1, 30),
        context_by=st.sampled_from(["ring", "ulysses"]),
        zero=st.sampled_from([1, 2, 3]),
        micro_batch=st.integers(0, 64),
        recompute=st.sampled_from(["none", "block"]),
        schedule=st.sampled_from(sorted(SCHEDULES)),
    )
    | st.builds(
        Layout,
        pipeline=st.integers(2, 9),
        micro_batch=st.integers(0, 64),
        schedule=st.sampled_from(["gpipe", "1f1b"]),
    ).map(lambda layout: replace(layout, stages="+".join(str(n + 1) for n in range(layout.pipeline))))
    | st.builds(Layout, pipeline=st.integers(2, 9), stages=st.just("measured"))
    | st.builds(Layout, replicas=st.integers(2, 9)).map(
        lambda layout: replace(layout, replica_share="+".join(str(n + 1) for n in range(layout.replicas)))
    )
    | st.builds(Layout, replicas=st.integers(2, 9), fsdp=st.integers(1, 3), replica_share=st.just("auto"))
    | st.builds(Layout, tensor=st.integers(2, 9), tensor_by=st.just("ring"))
    | st.builds(
        Layout, fsdp=st.just(2), context=st.integers(1, 9), tensor=st.just(3), expert=st.sampled_from([1, 2, 3, 6])
    )
)


def parts(kind: type) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: values(hint) for name, hint in get_type_hints(kind).items()})


jobs = st.builds(
    Job,
    layout=st.none() | layouts,
    **{f.name: parts(type(getattr(Job(), f.name))) for f in fields(Job) if f.name != "layout"},
)
