"""The doctor looks at this machine within its time, and a broken one never breaks it."""

from __future__ import annotations

import json
import socket
import time

import msgspec
import pytest

from shoal import device
from shoal.errors import RankError
from shoal.launch import doctor
from shoal.launch.pool import Pool
from shoal.observe import machine, peak


def test_this_machine():
    # A busy machine needs longer than users are made to wait; what is measured is not less true for it.
    found = doctor.diagnose(budget=90)
    assert found.cores >= 1
    assert found.computes_on in ("cpu", device.kind())
    for one in found.devices:
        assert set(one.peaks) == {"fp32", "bf16"}
        assert all(flops > 1e6 for flops in one.peaks.values())
    if found.computes_on == "cpu":
        assert 0 < found.link.latency < 5
        assert found.link.bandwidth > 1e6
        assert found.link.listening == []
    assert "matmul peak fp32" in str(found)
    assert json.loads(msgspec.json.encode(found))["seconds"] > 0


@pytest.mark.nightly
def test_a_link_that_hangs_keeps_nobody(monkeypatch):
    monkeypatch.setattr(doctor, "_ENTRY", "tests.launch.cases:hang")
    start = time.monotonic()
    found = doctor.diagnose()
    assert time.monotonic() - start < 30  # in 15, where nothing else keeps the machine busy
    assert found.link is None
    assert any("link" in finding.what and "no answer within" in finding.what for finding in found.findings)
    assert all(one.peaks for one in found.devices)


def test_ranks_on_loopback_only(ranks):
    (first, second) = ranks.run("shoal.launch.doctor:measure_link", 2)
    assert first["listening"] == second["listening"] == []


def test_everything_broken_is_found_and_nothing_raised(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("planted\n trouble")

    for name in ("versions", "system", "core_limit", "memory", "compiler", "shared_memory"):
        monkeypatch.setattr(machine, name, broken)
    for module, name in (("os", "getloadavg"), ("shutil", "disk_usage"), ("resource", "getrlimit")):
        monkeypatch.setattr(getattr(doctor, module), name, broken)
    for where, name in ((doctor, "cores"), (peak, "matmul_peak"), (Pool, "run")):
        monkeypatch.setattr(where, name, broken)
    found = doctor.diagnose()
    texts = [finding.what for finding in found.findings]
    for what in (
        "versions",
        "system",
        "cores",
        "limit",
        "memory",
        "compiler",
        "load",
        "disk",
        "devices",
        "link",
    ):
        assert any(what in text and "planted trouble" in text for text in texts), what
    assert "→" in str(found)


def test_a_late_link_is_a_finding(monkeypatch):
    def late(self, *_, timeout, **__):
        assert timeout <= 15
        raise RankError(f"no answer within {timeout:g} s", where="ranks 0, 1")

    monkeypatch.setattr(Pool, "start", lambda self: None)
    monkeypatch.setattr(Pool, "run", late)
    monkeypatch.setattr(doctor, "_devices", lambda *_: [])
    found = doctor.diagnose()
    assert found.link is None
    assert any("no answer within" in finding.what for finding in found.findings)


def test_a_silent_name_server_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(1))
    monkeypatch.setattr(doctor, "_RESOLVE", 0.01)
    assert doctor._host_resolves() is False


def test_a_torch_that_does_not_fit_the_machine_is_a_finding(monkeypatch):
    monkeypatch.setattr(device, "misfit", lambda: ("torch is built for another machine", "install this one"))
    monkeypatch.setattr(peak, "matmul_peak", lambda *_: 1e12)
    monkeypatch.setattr(Pool, "start", lambda self: None)
    monkeypatch.setattr(doctor, "_link", lambda *_: None)
    assert ("torch is built for another machine", "install this one") in [
        (finding.what, finding.fix) for finding in doctor.diagnose().findings
    ]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_one_gpu_has_no_link(kind, monkeypatch):
    monkeypatch.setattr(Pool, "run", lambda *_, **__: [{"latency": 1e-4, "bandwidth": 1e9, "listening": []}] * 2)
    facts = doctor.Diagnosis(computes_on=kind, devices=[doctor.Device("one")])
    assert (doctor._link(facts, Pool(2), 5) is None) == (kind == "gpu")
