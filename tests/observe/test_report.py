"""The report holds the run's own numbers, needs no network, and is there for any run, short or broken."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import DivergedError, ShoalError
from shoal.job import Job, Layout, write
from shoal.job.model import ModelOptions
from shoal.job.train import TrainOptions
from shoal.models.spec import count
from shoal.observe import charts, environment, report, result
from shoal.observe import page as page_module
from shoal.observe.hold import hold
from shoal.observe.log import Log
from shoal.observe.metrics import FILE, Metrics
from shoal.observe.result import Result
from tests.observe.rows import row

MODEL = ModelOptions(vocab_size=300)
RESULT = Result(
    run="runs/x", steps=3, tokens=3000, loss_first=8.0, loss_last=7.97, val_loss=2.247, bits_per_byte=0.973,
    tokens_per_second=2000.0, mfu=0.453, seconds=231.4, prompt="def <main>(", sample="</script><b>x</b>",
    gzip_bits_per_byte=1.9, xz_bits_per_byte=1.6, mfu_note="MFU = formula",
)  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: visible text, the contents of scripts, and everything that it would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.scripts, self.fetched, self.open = "", {}, [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.open.append((tag, dict(attributes)))
        self.fetched += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action", "poster")]

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "script":
            self.scripts[attributes.get("id", len(self.scripts))] = data
        elif tag == "style":
            self.fetched += re.findall(r"url\(|@import", data)
        else:
            self.text += f" {data}"

    @property
    def charts(self) -> dict[str, dict]:
        return {chart["title"]: chart for chart in json.loads(self.scripts["charts"])}


def run_folder(folder: Path, rows, done: Result | None = RESULT, steps: int = 3) -> Path:
    job = Job(layout=Layout(replicas=2), model=MODEL, train=TrainOptions(steps=steps))
    (folder / "job.toml").write_text(write(job))
    metrics = Metrics(folder)
    for one in rows:
        metrics.write(one)
    metrics.close()
    if done:
        result.write(folder, done)
    return folder


def page(folder: Path) -> Page:
    path = report.write(folder)
    assert path == folder / "report.html"
    assert path.stat().st_size < 6e6
    return Page(path.read_text(encoding="utf-8"))


def test_charts_hold_the_rows(tmp_path):
    rows = [row(1), row(2, val_loss=3.5), row(3, val_loss=3.25)]
    shown = page(run_folder(tmp_path, rows))
    loss = shown.charts["Loss"]["data"]
    assert [t["name"] for t in loss] == ["training", "validation"]
    assert (loss[0]["x"], loss[0]["y"]) == ([1, 2, 3], [7.99, 7.98, 7.97])
    assert (loss[1]["x"], loss[1]["y"]) == ([2, 3], [3.5, 3.25])
    assert shown.charts["Throughput"]["data"][0]["y"] == [2000.0] * 3
    assert shown.charts["Gradient norm"]["data"][0]["y"] == pytest.approx([2, 1.5, 1.33333])
    assert shown.charts["Learning rate"]["data"][0]["y"] == [1e-3] * 3
    assert shown.charts["Memory"]["data"][0]["y"] == [1.25] * 3
    parts = {t["name"]: t["y"] for t in shown.charts["Step breakdown"]["data"]}
    assert parts == {
        "data": [10.0] * 3,
        "forward": [150.0] * 3,
        "backward": [300.0] * 3,
        "communication after backward": [20.0] * 3,
        "optimizer": [20.0] * 3,
    }


def test_text_has_the_figures_and_is_escaped(tmp_path):
    environment.write(tmp_path, {"host": "node7", "command": ["shoal", "train"], "device": "a CPU"})
    shown = page(run_folder(tmp_path, [row(1), row(2), row(3)]))
    for text in (
        "2.247", "0.973", "45.3 %", "3:51 to the end of its last step", "duration of all steps", "0:02", "2,000",
        "1.900", "1.600", "gzip -9", "node7", "shoal train",
        "MFU = formula", f"{count(MODEL):,} parameters", "replicas=2", "</script><b>x</b>", "def <main>(",
        "shoal generate", "--resume",
        "500 ms in the median: data 2 %, forward 30 %, backward 60 %, communication after backward 4 %, optimizer 4 %",
    ):  # fmt: skip
        assert text in shown.text, text


def test_predicted_beside_measured_and_memory(tmp_path):
    before = page(run_folder(tmp_path, [row(1)])).text
    assert "step, predicted" not in before
    assert "GiB at most" not in before
    result.write(tmp_path, replace(RESULT, step_seconds=0.25, predicted_step_seconds=0.2, memory_gib=1.25))
    after = page(tmp_path).text
    assert "200 ms, 20 % less than measured, by what shoal calibrate had found" in after
    assert "1.25 GiB at most, of the fullest rank" in after


def test_a_run_that_goes_on_is_not_finished(tmp_path):
    """It was resumed a moment ago and has no step of its own yet."""
    run_folder(tmp_path, [row(1), row(2), row(3)])
    with hold(tmp_path):
        assert "3 of 3 steps, running ·" in page(tmp_path).text


def test_a_result_older_than_the_rows_is_dropped(tmp_path):
    """The run had finished with 3 steps, was resumed for 6, and has done 4."""
    run_folder(tmp_path, [row(s, val_loss=3.25) for s in (1, 2, 3, 4)], steps=6)
    with hold(tmp_path):
        shown = page(tmp_path)
    assert "4 of 6 steps, running ·" in shown.text
    for text in ("finished", "stopped", "failed", "2.247", "0.973", "45.3 %", "<x>", "tokens trained on"):
        assert text not in shown.text, text
    assert "3.250" in shown.text
    assert "4 of 6 steps, failed ·" in page(tmp_path).text


@pytest.mark.parametrize(
    ("done", "steps", "under"),
    [
        (RESULT, 3, "3 of 3 steps, finished ·"),
        (RESULT, 6, "3 of 6 steps, stopped ·"),
        (replace(RESULT, stopped_by="SIGTERM"), 6, "3 of 6 steps, stopped by SIGTERM ·"),
        (replace(RESULT, stopped_by="SIGTERM"), 3, "3 of 3 steps, finished ·"),
        (RESULT, 0, "3 steps, finished ·"),
    ],
)
def test_how_it_ended(tmp_path, done, steps, under):
    run_folder(tmp_path, [row(s) for s in (1, 2, 3)], done, steps)
    assert under in page(tmp_path).text
    with hold(tmp_path):  # as whoever closes a run does, while it writes the page
        report.write(tmp_path, over=True)
    assert under in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_that_diverged_tells_it(tmp_path):
    run_folder(tmp_path, [row(1), row(2, loss=math.nan)], done=None)
    with contextlib.closing(Log(tmp_path)) as log:
        for line in range(20):
            log.write(f"line {line}")
    error = DivergedError("loss is <nan>", where="step 2", fix="lower optim.lr")
    with hold(tmp_path):  # a rank that is being killed still does
        report.failed(tmp_path, error)
    shown = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "2 of 3 steps, failed ·" in shown.text
    assert shown.charts["Loss"]["data"][0]["y"][0] == 7.99
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert log[-2].endswith(" step 2: loss is <nan>")
    assert "\n".join(log[-8:]) in shown.text
    # The page that `shoal report` writes later tells it too; once it runs again, no longer.
    assert "lower optim.lr" in page(tmp_path).text
    with hold(tmp_path):
        assert "lower optim.lr" not in page(tmp_path).text


def test_a_failure_without_words_is_named(tmp_path):
    run_folder(tmp_path, [row(1)], done=None)
    report.failed(tmp_path, KeyboardInterrupt())
    assert "KeyboardInterrupt" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_telling_a_failure_never_fails(tmp_path, monkeypatch):
    report.failed(tmp_path / "deleted", ZeroDivisionError())
    (tmp_path / "empty").mkdir()
    report.failed(tmp_path / "empty", ZeroDivisionError())
    run_folder(tmp_path, [row(1)])
    before = page(tmp_path)

    def full(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("os.fsync", full)
    report.failed(tmp_path, ZeroDivisionError())
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).text == before.text


def test_nothing_is_fetched(tmp_path):
    shown = page(run_folder(tmp_path, [row(1)]))
    assert shown.fetched == []
    scripts = list(shown.scripts.values())
    assert len(scripts) == 3
    assert "Plotly.newPlot" in scripts[2]
    assert "plotly.js v" in scripts[1][:200]
    assert "http" not in scripts[0] + scripts[2]


def test_no_text_of_a_chart_ends_its_script():
    shown = Page(page_module.page("a", "", [], [{"title": "</script><img src=x>"}]))
    assert "</script><img src=x>" in shown.charts
    assert shown.fetched == []


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(1)],
        [{"step": 1}],
        [{"step": s, "loss": 1.0} for s in (1, 2)],
        [row(1, loss=math.nan, grad_norm=math.inf, val_loss=math.nan), row(2)],
        [row(s, loss=math.nan, tokens_per_second=None) for s in (1, 2, 3)],
    ],
    ids=["none", "one", "only step", "only loss", "nan", "all nan"],
)
@pytest.mark.parametrize("done", [RESULT, None], ids=["ended", "running"])
def test_any_run_has_a_page(tmp_path, rows, done):
    shown = page(run_folder(tmp_path, rows, done))
    assert tmp_path.name in shown.text
    for chart in shown.charts.values():
        for trace in chart["data"]:
            assert len(trace["x"]) == len(trace["y"]) > 0


def test_a_damaged_job_or_result_leaves_the_rest(tmp_path):
    run_folder(tmp_path, [row(1), row(2)])
    (tmp_path / "job.toml").write_text("steps = [")
    (tmp_path / "result.json").write_text('{"run": 3')
    (tmp_path / "environment.json").write_text("[]")
    assert page(tmp_path).charts["Loss"]["data"][0]["y"] == [7.99, 7.98]


def test_no_run_is_said(tmp_path):
    with pytest.raises(ShoalError, match="no run here"):
        report.write(tmp_path / "missing")


def test_a_long_run_stays_small_and_keeps_its_peaks(tmp_path):
    run_folder(tmp_path, [])
    spikes = {17: 55.0, 30_001: 77.0}
    lines = (json.dumps(row(s, grad_norm=spikes.get(s, 1.0))) for s in range(1, 60_001))
    (tmp_path / FILE).write_text("\n".join(lines))
    shown = page(tmp_path)
    drawn = shown.charts["Gradient norm"]["data"][0]
    assert len(drawn["x"]) < 2500
    assert {x: y for x, y in zip(drawn["x"], drawn["y"], strict=True) if y > 1} == spikes
    areas = shown.charts["Step breakdown"]["data"]
    assert sum(area["y"][0] for area in areas) == pytest.approx(500)


values = st.lists(st.none() | st.floats(-1e6, 1e6), max_size=60)


@settings(deadline=None)
@given(values, st.integers(0, 9))
def test_around_is_the_mean_of_what_is_near(xs, half):
    for i, mean in enumerate(charts.around(xs, half)):
        near = [x for x in xs[max(0, i - half) : i + half + 1] if x is not None]
        # The bound: differences of running sums of 60 values up to 1e6 round at 1e-8.
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-7) if near else mean is None


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(-10, 10), min_size=1, max_size=400), st.integers(6, 90))
def test_outline_keeps_ends_and_extremes(xs, limit):
    kept = charts.outline(xs, limit)
    present = [x for x in xs if x is not None]
    assert kept == sorted(set(kept))
    assert {0, len(xs) - 1} <= set(kept)
    assert len(kept) <= limit + 2
    if present:
        assert {min(present), max(present)} <= {xs[i] for i in kept}


def test_outline_of_noise_has_the_highest_of_every_tenth():
    random.seed(0)
    xs = [random.random() for _ in range(10_000)]
    kept = set(charts.outline(xs))
    for start in range(0, 10_000, 1000):
        tenth = range(start, start + 1000)
        assert max(tenth, key=lambda i: xs[i]) in kept


def test_experts_have_charts_where_there_are_any(tmp_path):
    for name, dropped in (("all", [0.0, 0.0]), ("some", [0.0, 0.125])):
        (tmp_path / name).mkdir()
        loads = zip((1, 2), dropped, strict=True)
        rows = [row(s, balance_loss=1.5 / s, busiest_load=2.5 / s, dropped_share=share) for s, share in loads]
        run_folder(tmp_path / name, rows)
    shown = page(tmp_path / "some").charts
    busiest, balance = shown["Balance of experts"]["data"]
    assert (busiest["y"], balance["y"]) == ([2.5, 1.25], [1.5, 0.75])
    assert shown["Dropped choices of experts"]["data"][0]["y"] == [0.0, 12.5]
    assert "Balance of experts" in page(tmp_path / "all").charts
    assert "Dropped choices of experts" not in page(tmp_path / "all").charts


def test_replicas_that_train_apart_have_a_chart_of_how_far(tmp_path):
    outer = {"outer_drift": 0.5, "outer_common": 0.25}
    run_folder(tmp_path, [row(1), row(2, **outer), row(3), row(4, **outer)])
    own, common = page(tmp_path).charts["Replicas apart"]["data"]
    assert (own["x"], own["y"], common["y"]) == ([2, 4], [0.5, 0.5], [0.25, 0.25])
    (tmp_path / "together").mkdir()
    assert "Replicas apart" not in page(run_folder(tmp_path / "together", [row(1), row(2)])).charts


def test_models_without_experts_have_no_charts_of_them(tmp_path):
    assert not any("expert" in title for title in page(run_folder(tmp_path, [row(1), row(2)])).charts)
