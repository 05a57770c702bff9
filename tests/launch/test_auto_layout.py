"""`layout = "auto"`: the fastest that is predicted, or one replica for each device, and why."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from shoal import device
from shoal.errors import LayoutError
from shoal.job import Job, Layout
from shoal.launch import auto_layout
from shoal.observe import machine as this
from shoal.observe.units import short
from shoal.planning import entry, here, local
from tests.planning.test_local import JOB, line, machine, precision

OPEN = replace(JOB, layout=None, train=replace(JOB.train, precision="auto", compile="auto"))


def chosen(job: Job = OPEN) -> tuple[Layout, str]:
    said: list[str] = []
    found = auto_layout.choose(job, said.append)
    assert len(said) == 1
    assert said[0].startswith(f"layout {found}: ")
    return found, said[0]


@pytest.fixture(autouse=True)
def four_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(auto_layout, "cores", lambda: 4)
    monkeypatch.setattr(auto_layout, "has_driver", lambda: False)
    entry.home().parent.mkdir()


def calibrated(**changes) -> entry.Entry:
    made = replace(machine(precision(), **changes.pop("exchanges", {})), machine=this.host(), **changes)
    entry.home().write_text(entry.write(made), encoding="utf-8")
    return made


@pytest.mark.parametrize("latency", [0.0, 1.0])
def test_the_fastest_of_all_that_are_known(latency):
    """Where exchanges are free, four ranks; where each takes a second, one."""
    exchanges = {name: line(latency) for name in entry.EXCHANGES}
    known = calibrated(exchanges=exchanges)
    found, said = chosen()
    assert found.world == (1 if latency else 4)
    best = local.predict(replace(JOB, layout=found), known).seconds
    for text in ("replicas=1", "replicas=2", "replicas=4", "fsdp=4", "tensor=2", "replicas=2,fsdp=2", "pipeline=4"):
        other = local.predict(replace(JOB, layout=Layout.parse(text)), known).seconds
        assert best <= other * 1.0051
    assert "a step predicted; next " in said


def test_the_next_one_and_why_it_lost():
    """Exchanges of a second each: whoever has fewest comes next, and has nothing but them against it."""
    known = calibrated(exchanges={name: line(1.0) for name in entry.EXCHANGES})
    steps = {}
    for layout in here.layouts([1, 2, 4], JOB.train.global_batch):
        with contextlib.suppress(LayoutError):  # a pipeline with fsdp is not predicted
            steps[layout] = local.predict(replace(JOB, layout=layout), known)
    best = steps[Layout()]
    steps = {layout: step for layout, step in steps.items() if layout.world > 1}
    second = min(steps, key=lambda layout: steps[layout].seconds)
    lost = steps[second].parts["exchange"] - best.parts["exchange"]
    assert chosen()[1].endswith(f", which spends {short(lost)} more on exchanges")
    calibrated()
    assert chosen()[1].endswith(", about the same")


def test_without_an_entry_one_replica_for_each_core():
    found, said = chosen()
    assert found == Layout(replicas=4)
    assert "one replica for each core; not predicted: `shoal calibrate` has not measured this machine" in said
    assert chosen(replace(OPEN, train=replace(OPEN.train, global_batch=6)))[0] == Layout(replicas=3)


def test_a_model_of_fewer_blocks_than_ranks():
    """No pipeline of four ranks has three blocks; the others are compared all the same."""
    calibrated(exchanges={name: line(1.0) for name in entry.EXCHANGES})
    found, said = chosen(replace(OPEN, model=replace(OPEN.model, num_hidden_layers=3)))
    assert found == Layout()
    assert "a step predicted" in said


def test_what_is_not_predicted_has_its_reason():
    calibrated()
    found, said = chosen(replace(OPEN, sync=replace(OPEN.sync, name="local")))
    assert found == Layout(replicas=4)
    assert "sync.name=local" in said
    made = calibrated()
    entry.home().write_text(entry.write(replace(made, machine="elsewhere")), encoding="utf-8")
    assert "is of another machine" in chosen()[1]
    entry.home().write_text("nonsense")
    assert chosen()[0] == Layout(replicas=4)


def test_gpus_are_asked_of_the_planner(monkeypatch):
    """Eight H100s, by the name that CUDA gives them: no real one is asked."""
    monkeypatch.setattr(auto_layout, "has_driver", lambda: True)
    monkeypatch.setattr(device, "kind", lambda: "cuda")
    monkeypatch.setattr(device, "count", lambda: 8)
    monkeypatch.setattr(device, "name", lambda where: "NVIDIA H100 80GB HBM3")
    found, said = chosen()
    assert found.world == 8
    assert "predicted of H100-SXM5-80GB; " in said
    monkeypatch.setattr(device, "name", lambda where: "Voodoo 2")
    found, said = chosen()
    assert found == Layout(replicas=8)
    assert "Voodoo 2 is not in the planner's catalogue" in said
