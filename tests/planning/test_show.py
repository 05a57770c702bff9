"""Plans as text and for scripts: which columns, sentences and keys there are."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions
from shoal.planning import asked, cluster, failures, show
from shoal.planning.asked import Wanted
from shoal.planning.plan import CALLED, Answer, why
from tests.planning.plans import plan

QUESTION = asked.of_model("llama3-8b", cluster.named("h100x8"), Wanted())
ONE = plan("replicas=2,fsdp=4,zero=1,micro_batch=2", 2.0)
PIPE = plan("pipeline=8,micro_batch=1,schedule=interleaved,recompute=block", 3.0, chunks=4)


def answer(*plans) -> Answer:
    return Answer(plans, 0.25, 100, 40, None)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_columns_of_which_nothing_is_known_are_left_out():
    head, row = cells(show.table(QUESTION, answer(ONE)))
    assert head == [
        "#", "layout", "micro-batch", "recompute", "step", "80 %", "tok/s/device", "MFU %", "GiB", "free %", "bubble %",
        "exposed %",
    ]  # fmt: skip
    assert row == [
        "1", "replicas=2,fsdp=4,zero=1", "2", "none", "2 s", "1.6 s to 2.5 s", "50,000", "40.0", "40", "50", "25.0",
        "12.5",
    ]  # fmt: skip
    head, one, two = cells(show.table(QUESTION, answer(replace(ONE, cost=12.5, days=1234.0), replace(PIPE, cost=1.0))))
    assert "days" not in head, "not known of all"
    assert (head[-1], one[-1], two[-1]) == ("cost/1e9", "12.5", "1")
    assert (head[3], one[3], two[3]) == ("schedule", "–", "interleaved ×4")


def test_lines_of_a_table_are_aligned():
    lines = show.table(QUESTION, answer(ONE, PIPE)).splitlines()
    assert {line.rindex(" %") for line in lines[:1]} == {len(lines[0]) - 2}
    assert len(set(map(len, lines))) == 1


def test_a_table_that_is_too_wide_is_two():
    found = answer(ONE, PIPE)
    whole = show.table(QUESTION, found)
    width = len(whole.splitlines()[0])
    assert show.table(QUESTION, found, width) == whole
    figures, layouts = (cells(half) for half in show.table(QUESTION, found, width - 1).split("\n\n"))

    together = [[*layout, *figure[1:]] for layout, figure in zip(layouts, figures, strict=True)]
    assert together == cells(whole)


def test_small_numbers_are_written_out():
    small = replace(QUESTION, sequence=64, global_batch=64)
    assert "= 4,096 tokens, bf16" in show.title(small)
    assert "8.03 B parameters" in show.title(small)
    assert "12.9 B a token" in show.title(asked.of_model("mixtral-8x7b", cluster.named("h100x8"), Wanted()))


def test_the_sentences():
    priced = replace(QUESTION, cluster=asked.cluster_of("h100x8", 2.0), tokens=1e12)
    text = show.remarks(priced, answer(replace(ONE, cost=10.0), replace(PIPE, cost=20.0)))
    assert "wins over" in text
    assert "What limits it: compute." in text
    assert "for 1 T tokens: 10,000." in text
    assert "The fastest of 100 layouts" in text
    assert "No cost" not in text
    alone = show.remarks(QUESTION, answer(ONE))
    assert "No other layout fits." in alone
    assert "No other layout fits." not in show.remarks(QUESTION, replace(answer(ONE), more=True))
    assert "No cost: the cluster has no price" in alone


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"tensor": 2.0, "compute": -1.0}, "2 s less of a step on {tensor}, though 1 s more on {compute}"),
        (
            {"tensor": 1.0, "data": 0.5, "compute": -1.0},
            "1 s less of a step on {tensor} and 0.5 s less on {data}, though 1 s more on {compute}",
        ),
        ({"data": 0.5, "tensor": 0.25}, "0.5 s less of a step on {data}"),
        (
            {"data": 0.5, "tensor": 0.4, "bubble": 0.3, "compute": -0.8},
            "0.5 s less of a step on {data} and 0.4 s less on {tensor} and 0.3 s less on {bubble}, though 0.8 s more "
            "on {compute}",
        ),
    ],
)
def test_what_is_said_to_be_saved_is_more_than_what_is_said_to_be_lost(saved: dict[str, float], said: str):
    first = replace(ONE, parts=dict.fromkeys(saved, 3.0), seconds=10.0)
    parts = {name: 3.0 + more for name, more in saved.items()}
    second = replace(PIPE, parts=parts, seconds=10.0 + sum(saved.values()))
    found = why(first, second)
    assert (
        f"because it spends {said.format(**CALLED | {'tensor': 'exchanges of the tensor group'})}; the step takes"
        in found
    )
    routed = replace(first, layout=replace(first.layout, fsdp=2, expert=2))
    if next(iter(saved)) == "tensor":
        assert "exchanges of the expert group" in why(routed, second)


def test_a_simpler_layout_that_is_hardly_slower_is_pointed_out():
    deep = plan("pipeline=2,context=4,zero=1,micro_batch=2,schedule=zbv", 10.0, chunks=2)
    flat = plan("fsdp=4,tensor=2,zero=1,micro_batch=1", 10.14)
    text = show.remarks(QUESTION, answer(deep, replace(deep, seconds=10.05), flat))
    assert "\n3, fsdp=4,tensor=2,zero=1, has no pipeline and is predicted 1.4 % slower, less than what" in text
    few = plan("fsdp=8,zero=2,micro_batch=1", 10.2)
    assert "\n2, fsdp=8,zero=2, has fewer axes and is predicted 0.6 % slower" in show.remarks(
        QUESTION, answer(flat, few)
    )
    # As simple, much slower, or the first itself the simplest.
    for others in ((deep, deep), (deep, replace(flat, seconds=10.4)), (few, flat)):
        assert "predictions tell apart" not in show.remarks(QUESTION, answer(*others))


def test_a_nearly_full_device_is_warned_of():
    assert "nearly full (90 % predicted)" in show.remarks(QUESTION, answer(plan("fsdp=8", 1.0, gib=72.0)))
    assert "nearly full" not in show.remarks(QUESTION, answer(plan("fsdp=8", 1.0, gib=60.0)))


def test_the_peak_of_mfu_is_the_devices():
    """tokens/s of all devices at 40 % of 8 × 989 TFLOP/s."""
    each = QUESTION.shape.flops_per_token(QUESTION.sequence)
    rate = 0.4 * 8 * 989e12 / each
    text = show.remarks(QUESTION, answer(replace(ONE, tokens_per_second=rate)))
    assert "(8 devices × 989 TFLOP/s, the bf16 peak in the catalogue or the cluster's file)" in text


def test_where_time_and_memory_go():
    rows = cells(show.explained(ONE, 1))
    assert ["compute", "1.5 s", "75.0 %"] in rows
    assert rows.index(["compute", "1.5 s", "75.0 %"]) < rows.index(["bubble", "500 ms", "25.0 %"])
    assert ["together", "2 s", "100 %"] in rows
    assert ["weights", "30 GiB", "37.5 %"] in rows
    assert ["together", "40 GiB", "50.0 %"] in rows
    assert not any("expert" in row[0] for row in rows if row), "what takes no time"


def test_for_scripts():
    found = show.result(QUESTION, answer(PIPE, ONE))
    first, _ = found["plans"]
    wanted = {
        "layout", "micro_batch", "schedule", "recompute", "step_seconds", "tokens_per_second_per_device", "mfu",
        "memory_gib", "limit",
    }  # fmt: skip
    assert wanted <= set(first)
    assert (first["layout"], first["step_seconds"], first["memory_gib"]) == (str(PIPE.layout), 3.0, 40.0)
    assert (first["schedule"], first["recompute"], first["cost_per_1e9_tokens"]) == ("interleaved", "block", None)
    assert found["seconds"] == 0.25


def test_failures_beside_days_and_cost():
    known = dataclasses.asdict(failures.expected(QUESTION).shares)
    assert "days in all" not in show.remarks(QUESTION, answer(ONE))
    full = answer(replace(ONE, days=10.0, cost=5.0))
    text = show.remarks(QUESTION, full)
    assert f"With failures: {100 * known['training']:.1f} % of the time is training that counts, 10 days in all" in text
    assert "a device fails every 264 days, a restart takes 10 min, and a checkpoint of 96.4 GB" in text
    found = show.result(QUESTION, full)
    assert found["failures"]["goodput"] == known["training"]
    assert found["failures"]["interval_seconds"] == known["interval"]
    (first,) = found["plans"]
    assert (first["days"], first["cost_per_1e9_tokens"]) == (10.0, 5.0)
    assert first["days_with_failures"] == pytest.approx(10 / known["training"])
    assert first["cost_per_1e9_tokens_with_failures"] == pytest.approx(5 / known["training"])
    lost = replace(QUESTION, restart=1e12)
    assert "no run would get on" in show.remarks(lost, full)
    assert show.result(lost, full)["failures"]["goodput"] == 0
    assert show.result(lost, full)["plans"][0]["days_with_failures"] is None
    quiet = replace(QUESTION, cluster=cluster.named("l4x8"))
    assert "the cluster does not say how often" in show.remarks(quiet, full)
    assert show.result(quiet, full)["failures"] is None


def test_how_replicas_agree():
    every = replace(QUESTION, sync=SyncOptions("local", "int8", every=500, fragments=4, delay=2))
    assert show.title(every).endswith("; sync local, every 500 steps, in 4 fragments, 2 steps on their way, codec int8")
    assert "sync" not in show.title(QUESTION)
    assert "not predicted" not in show.remarks(QUESTION, answer(ONE))
    text = show.remarks(every, answer(ONE))
    assert "learns otherwise from the same tokens: how much that costs is not predicted" in text
    assert "exchanges nothing" not in text
    assert "has one replica, which exchanges nothing" in show.remarks(every, answer(PIPE))
    served = replace(QUESTION, sync=SyncOptions("server"), server=ServerOptions(shards=1, mode="asp", max_staleness=4))
    assert show.title(served).endswith("; sync server, 1 shard, asp")
    text = show.remarks(served, answer(replace(ONE, staleness=7.0)))
    assert "A gradient is 7 updates old" in text
    assert "server.max_staleness=4 would reject most of them" in text
    assert show.result(served, answer(replace(ONE, staleness=7.0)))["plans"][0]["staleness"] == 7


def test_two_clusters_are_compared():
    after = replace(PIPE, tokens_per_second=2 * ONE.tokens_per_second, per_device=ONE.per_device, cost=5.0)
    text = show.compared(answer(replace(ONE, cost=10.0)), answer(after))
    assert "2.00 times the tokens/s, 1.00 times a device's, 0.50 times the cost" in text
    assert "the same layout" in show.compared(answer(ONE), answer(replace(ONE, seconds=1.0)))
