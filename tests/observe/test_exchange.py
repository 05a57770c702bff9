"""What a report says of keeping replicas consistent: staleness, waiting, work in vain, bytes."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.job import Job, Layout, write
from shoal.job.model import ModelOptions
from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions
from shoal.models.spec import count
from shoal.observe import report
from shoal.observe.charts import charts
from shoal.observe.charts_server import server_charts
from shoal.observe.exchange import exchange, figures
from shoal.observe.metrics import Metrics
from shoal.observe.waiting import waiting_charts
from tests.observe.rows import row, server_row, waiting_row

JOB = Job(layout=Layout(replicas=2), model=ModelOptions(vocab_size=300))
SERVER = replace(JOB, sync=SyncOptions(name="server"), server=ServerOptions(mode="asp", shards=2))
WHOLE = 4 * count(JOB.model)
ASP = [
    server_row(1, {0: 2}, rejected=2),
    server_row(2, {0: 1, 2: 1}),
    server_row(3, {4: 2}, waited_s={"1": 0.15, "0": 0.2}),
]


def drawn(rows) -> dict[str, Any]:
    return {chart["title"]: chart["data"] for chart in [*charts(rows), *waiting_charts(rows), *server_charts(rows)]}


def told(job: Job | None, rows) -> dict[str, str]:
    return dict(exchange(job, rows))


def test_charts_of_a_server_by_hand():
    found = drawn(ASP)
    highest, mean = found["Staleness"]
    assert (highest["y"], mean["y"]) == ([0, 2, 4], [0, 1, 4])
    (times,) = found["Staleness of the whole run"]
    assert (times["x"], times["y"]) == ([0, 1, 2, 3, 4], [3, 0, 1, 0, 2])
    # Seconds of three rows of 0.5 s.
    (waits,) = found["Waiting"]
    assert (waits["x"], waits["y"]) == ([0, 1], pytest.approx([100 * 0.4 / 1.5, 100 * 0.55 / 1.5], rel=1e-5))
    assert found["Rejected gradients"][0]["y"] == [50, 0, 0]
    assert found["Updates"][0]["y"] == [2, 2, 2]
    parts = {part["name"]: part["y"] for part in found["Step breakdown"]}
    assert parts == {"forward and backward": [300.0] * 3, "push, pull and waiting": [100.0] * 3}


def test_what_would_only_say_zero_is_left_out():
    """bsp: an update a step, of gradients that are never late."""
    rows = [server_row(s, {0: 2}, commits=1) for s in (1, 2)]
    extra = {"Staleness", "Staleness of the whole run", "Rejected gradients", "Wasted work", "Updates"}
    assert not extra & set(drawn(rows))
    assert "Waiting" in drawn(rows)
    assert not server_charts([row(1), row(2)])
    assert set(told(SERVER, rows)) == {"network", "waiting", "gradients"}


def test_work_in_vain():
    """Rejected, and lost with workers that were given up; nothing is assumed of a run of before this was counted."""
    rows = [server_row(1, {0: 1}, rejected=1, lost=2, wasted_s=1.5), server_row(2, {0: 3}, lost=1, wasted_s=0.0)]
    found = drawn(rows)
    rejected, lost = found["Rejected gradients"]
    assert (rejected["y"], lost["y"]) == ([25, 0], [50, 25])
    assert found["Wasted work"][0]["y"] == [1.5, 0]
    assert told(SERVER, rows)["gradients"] == (
        "4 gradients; 1 more (20.0 %) rejected; 3 lost with their worker; 1.5 s computed in vain"
    )
    (only,) = drawn(ASP)["Rejected gradients"]
    assert only["y"] == [50, 0, 0]
    (lost,) = drawn([server_row(1, {0: 1}, lost=1)])["Rejected gradients"]
    assert (lost["name"], lost["y"]) == ("lost with their worker", [50])


def test_a_run_that_went_on_with_a_server_has_both_parts():
    found = drawn([row(1), server_row(2, {0: 1, 1: 1})])
    assert found["Staleness"][0]["x"] == [2]
    assert {"forward", "forward and backward"} <= {part["name"] for part in found["Step breakdown"]}


def test_who_waits_without_a_server():
    """Of four steps of 0.5 s; local steps and gossip tell in some, and before the first exchange nobody does."""
    rows = [row(1), waiting_row(2, 0.1, 0.0, 0.3), row(3), waiting_row(4, 0.2, 0.02, 0.0)]
    found = drawn(rows)
    (waits,) = found["Waiting for other replicas"]
    assert (waits["x"], waits["y"]) == ([0, 1, 2], pytest.approx([15, 1, 15]))
    assert told(JOB, [*rows, waiting_row(5, 0.1, 0, 0)])["waiting"] == (
        "replica 0 waited for others most, 16.0 % of the run; replica 1 least, 0.8 %"
    )
    assert "Waiting" not in found
    assert "waiting" not in told(JOB, [row(1)])
    assert "Waiting for other replicas" not in drawn([row(1)]) | drawn(ASP)


def test_the_sentences_of_a_server():
    assert told(SERVER, ASP) == {
        "network": "1.91 MiB sent and 2.86 MiB received a step, by all workers; both together 4.88 KiB a token",
        "waiting": "worker 1 waited for pushes, pulls and others most, 36.7 % of the run; worker 0 least, 26.7 %",
        "gradients": "6 gradients; 2 more (25.0 %) rejected",
        "staleness": "1.67 in the mean, 4 at most",
    }


def test_the_figures_of_a_server_for_scripts():
    coded = replace(SERVER, sync=SyncOptions(name="server", codec="int8"))
    rows = [
        server_row(1, {0: 3}, sent_bytes=WHOLE, received_bytes=WHOLE, rejected=1, wasted_s=0.5, waited_s={"1": 0.25}),
        server_row(2, {1: 2, 10: 1}, sent_bytes=WHOLE, received_bytes=WHOLE, lost=2, waited_s={"1": 0.25, "0": 1.0}),
        server_row(3, {1: 4}, sent_bytes=WHOLE, received_bytes=2 * WHOLE, outer_drift=0.125, waited_s={}),
    ]
    found = figures(coded, rows)
    assert found == {
        "sent_bytes": 3 * WHOLE, "received_bytes": 4 * WHOLE, "rejected": 1, "lost": 2, "wasted_s": 0.5,
        "times_fewer": {"pushed": 4.0, "pulled": 3.0}, "waited_s": {"0": 1.0, "1": 0.5},
        "staleness": {"0": 3, "1": 6, "10": 1}, "outer_drift": 0.125,
    }  # fmt: skip
    assert list(found["staleness"]) == ["0", "1", "10"]
    assert json.loads(json.dumps(found)) == found


def test_figures_without_a_server_and_none_of_one_process():
    local = replace(JOB, sync=SyncOptions(name="local", every=4))
    rows = [row(s, sent_bytes=WHOLE * (s % 4 == 0), received_bytes=WHOLE, plain_bytes=WHOLE) for s in range(1, 9)]
    assert figures(local, rows) == {
        "sent_bytes": 2 * WHOLE, "received_bytes": 8 * WHOLE, "times_fewer": {"sent": 4.0},
    }  # fmt: skip
    assert figures(JOB, [row(1, sent_bytes=0, received_bytes=0)]) == figures(None, rows) == {}


def test_what_a_codec_saves():
    """Of the server's, the median of steps; the first sends less: its push is counted with the next one."""
    coded = replace(SERVER, sync=SyncOptions(name="server", codec="int8"))
    rows = [server_row(s, {0: 3}, sent_bytes=3 * WHOLE // 4, received_bytes=3 * WHOLE // 2) for s in (1, 2, 3)]
    rows[0]["sent_bytes"] //= 3
    assert told(coded, rows)["compression"] == "pushed 4, pulled 2 times fewer bytes than in float32"
    # What was rejected was pushed as well.
    rows = [row | {"staleness": {"0": 2}, "rejected": 1} for row in rows]
    assert told(coded, rows)["compression"] == "pushed 4, pulled 2 times fewer bytes than in float32"
    bf16 = replace(JOB, sync=SyncOptions(codec="bf16"))
    rows = [row(s, sent_bytes=WHOLE // 2, plain_bytes=WHOLE) for s in (1, 2)]
    assert told(bf16, rows)["compression"] == "2 times fewer bytes than an all-reduce in float32 every step"
    # A whole exchange every fourth step.
    local = replace(JOB, sync=SyncOptions(name="local", every=4))
    rows = [row(s, sent_bytes=WHOLE * (s % 4 == 0), plain_bytes=WHOLE) for s in range(1, 9)]
    assert told(local, rows)["compression"] == "4 times fewer bytes than an all-reduce in float32 every step"
    assert (
        told(local, [row(1), row(2, sent_bytes=0)])["network"]
        == "977 KiB sent and 2.86 MiB received a step, by one rank"
    )
    # With several ranks a replica, what they send each other is told apart. Of older runs nothing is said.
    shared = replace(bf16, layout=Layout(replicas=2, fsdp=2))
    rows = [row(s, sent_bytes=9 * WHOLE, sent_across_bytes=2**18, plain_bytes=2.0**19) for s in (1, 2)]
    facts = told(shared, rows)
    assert facts["compression"] == "2 times fewer bytes than an all-reduce in float32 every step"
    assert facts["network"].endswith("received a step, by one rank; to other replicas 256 KiB sent")
    assert "compression" not in told(shared, [row(1)])
    # Nor of the first rows of a run that went on with a newer version.
    assert told(shared, [row(3, sent_bytes=9 * WHOLE), *rows])["compression"] == facts["compression"]


@pytest.mark.parametrize(
    ("job", "rows"),
    [
        (JOB, [row(1)]),
        (replace(JOB, sync=SyncOptions(codec="bf16")), [row(1, sent_bytes=0), {"step": 2}]),
        (None, [row(1)]),
    ],
    ids=["no codec", "nothing sent", "no job"],
)
def test_no_figure_where_it_would_mean_nothing(job, rows):
    assert "compression" not in told(job, rows)


def test_the_page_has_them(tmp_path: Path):
    (tmp_path / "job.toml").write_text(write(SERVER))
    metrics = Metrics(tmp_path)
    for one in ASP:
        metrics.write(one)
    metrics.close()
    text = report.render(tmp_path, running=False)
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, re.S)
    assert found is not None
    by_title = {chart["title"]: chart for chart in json.loads(found[1])}
    assert by_title["Staleness of the whole run"]["layout"]["xaxis"]["title"]["text"] == "staleness"
    assert by_title["Network"]["unit"].endswith("of all workers")
    words = html.unescape(text)
    for sentence in (
        "replicas=2, sync server (asp, 2 shards)",
        "6 gradients; 2 more (25.0 %) rejected",
        "500 ms in the median: forward and backward 60 %, push, pull and waiting 20 %",
    ):
        assert sentence in words, sentence
