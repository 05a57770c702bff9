"""Benchmarks of whole short runs: what they make of the runs' figures; they run themselves in the nightly suite."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
from benchmarks import auto, server_round

from shoal.models.spec import count


@pytest.mark.parametrize("mib", [1, 4, 64])
def test_a_model_has_the_weights_asked_for(mib):
    assert 4 * count(server_round.model_of(mib)) / 2**20 == pytest.approx(mib, rel=0.01)


def test_the_figures_of_rounds():
    """Push and pull of every worker, in the median round; runs differ."""
    asked = argparse.Namespace(mib=64, workers=2)
    found = server_round.row(asked, 4, 2, [[0.1, 0.2, 0.3], [0.3, 0.5, 0.4]])
    assert (found["seconds"], found["least"], found["most"]) == pytest.approx((0.3, 0.2, 0.4))
    assert found["mib_per_second"] == pytest.approx(2 * 2 * found["mib"] / 0.3)
    assert "4 shards, 2 copies" in server_round.table([found])


def test_rounds_are_what_workers_waited_after_the_first_few(monkeypatch):
    rows = [{"waited_s": {"0": 9.0, "1": 9.0}}] * 4 + [{"waited_s": {"0": 0.2, "1": 0.4}}, {"waited_s": {"0": 0.5}}]
    monkeypatch.setattr(server_round.subprocess, "run", lambda *_, **__: argparse.Namespace(returncode=0))
    monkeypatch.setattr(server_round.metrics, "read", lambda folder: rows)
    asked = argparse.Namespace(mib=1, workers=2, steps=6)
    assert server_round.rounds(server_round.job_of(asked, 1, 1, "text.txt")) == pytest.approx([0.3, 0.5])


def test_auto_is_compared_in_pairs():
    """Half a second more in every pair of two is a fifth less speed; drift from pair to pair does not count."""
    seconds = {"none": [2.0, 4.0], "auto": [2.5, 5.0], "none again": [2.0, 4.0]}
    found = auto.compared("whole", seconds)
    assert (found["whole_speed"], found["whole_low"], found["whole_aa"]) == pytest.approx((0.8, 0.8, 1.0))
    told = auto.table({**found, **auto.compared("step", seconds), "codecs": {"auto": "none"}, "pairs": 2})
    assert "speed of auto ÷ none 0.800" in told


@pytest.mark.nightly
def test_rounds_of_a_small_run(monkeypatch, capsys):
    words = "server_round.py --mib 1 --shards 1 2 --copies 1 2 --steps 6 --starts 1 --format json"
    monkeypatch.setattr(sys, "argv", words.split())
    server_round.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["shards"], row["copies"]) for row in rows] == [(1, 1), (2, 1), (1, 2), (2, 2)]
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.nightly
def test_auto_takes_no_codec_on_one_machine(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["auto.py", "--pairs", "2", "--steps", "8", "--size", "tiny", "--format", "json"])
    auto.main()
    found = json.loads(capsys.readouterr().out)
    assert found["codecs"] == {"none": "none", "auto": "none", "none again": "none"}
    assert found["whole_speed"] > 0
