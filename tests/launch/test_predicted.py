"""Before a run: what a step will take, by this machine's entry, or why nobody knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.launch import predicted
from shoal.planning import entry, kept, local
from tests.planning.test_local import JOB, in_layout, machine, precision


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> entry.Entry:
    """A machine that has been calibrated."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entry.home().parent.mkdir()
    made = machine(precision())
    entry.home().write_text(entry.write(made), encoding="utf-8")
    return made


def test_seconds_are_those_of_the_entry(known):
    job = in_layout("replicas=2")
    seconds, said = predicted.step(job, known.device)
    assert seconds == local.predict(job, known).seconds > 0
    assert said.endswith("predicted, by what `shoal calibrate` measured on 2026-11-23")


def test_memory_is_predicted_where_a_rank_computes_itself(known):
    job = in_layout("replicas=2")
    figures, said = predicted.of_run(job, known.device, 2.0**28)
    assert figures["predicted_step_seconds"] == predicted.step(job, known.device)[0]
    assert figures["predicted_memory_gib"] * 2**30 == sum(kept.predict(job, 2.0**28).values())
    assert said.endswith(f"memory of the fullest rank: {figures['predicted_memory_gib']:.2f} GiB predicted")
    assert predicted.of_run(job, known.device, 0)[0].keys() == {"predicted_step_seconds"}
    compiled = replace(job, train=replace(job.train, compile="on"))
    assert predicted.of_run(compiled, known.device, 2.0**28)[0] == {}


def test_why_there_are_none(known, monkeypatch):
    reasons = {
        "CPU é; `shoal calibrate` measures this one": (JOB, "another"),
        "not with 8": (in_layout("replicas=8"), known.device),
        "sync.name=local": (replace(JOB, sync=replace(JOB.sync, name="local")), known.device),
        "train.compile=on": (replace(JOB, train=replace(JOB.train, compile="on")), known.device),
    }
    for words, asked in reasons.items():
        seconds, said = predicted.step(*asked)
        assert seconds is None
        assert said.startswith("no prediction of a step: ")
        assert words in said
    entry.home().write_text("version = 1\n")
    assert "not the entry of a machine" in predicted.step(JOB, known.device)[1]
    entry.home().unlink()
    assert "`shoal calibrate` measures this machine" in predicted.step(JOB, known.device)[1]


def test_ranks_on_several_machines_are_not_predicted(known, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert predicted.step(in_layout("replicas=2"), known.device)[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "of one machine" in predicted.step(in_layout("replicas=2"), known.device)[1]
