"""Every fact that is bad has its finding with something to do; a good machine has none."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.observe.diagnosis import TESTED_TORCH, Device, Diagnosis, Link, judge

GIB = 2**30
GOOD = Diagnosis(
    versions={"torch": ".".join(map(str, TESTED_TORCH)) + ".0+cpu"},
    system="Linux", cores=8, load=0.5, memory=32 * GIB, memory_available=16 * GIB, disk_free=50 * GIB,
    shared_memory_free=8 * GIB, open_files=4096, compiler="/usr/bin/g++", host_resolves=True,
    computes_on="cpu", devices=[Device("a CPU", {"fp32": 1e11, "bf16": 2e11})], link=Link(60e-6, 2 * GIB, []),
)  # fmt: skip

BAD = {
    "too old": {"versions": {"torch": "2.10.1"}},
    "not the release": {"versions": {"torch": "2.99.0a0+git123"}},
    "C++ compiler": {"compiler": None},
    "does not resolve": {"host_resolves": False},
    "from other machines at 0.0.0.0:5": {"link": Link(60e-6, 2 * GIB, ["0.0.0.0:5"])},
    "only 1 GiB of memory": {"memory_available": GIB},
    "only 512 MiB are free": {"disk_free": GIB // 2},
    "/dev/shm has 64 MiB": {
        "shared_memory_free": 64 * 2**20,
        "computes_on": "gpu",
        "devices": [Device("a GPU", {"fp32": 1e13})] * 2,
    },
    "256 open files": {"open_files": 256},
    "one core": {"cores": 1},
    "load 7.5 on 8 cores": {"load": 7.5},
    "bf16 is slower": {"devices": [Device("a CPU", {"fp32": 2e11, "bf16": 1e11})]},
    "5 ms to answer": {"link": Link(5e-3, 2 * GIB, [])},
}


def test_nothing_is_wrong_with_a_good_machine():
    assert judge(GOOD) == []
    assert str(GOOD).endswith("Nothing is wrong.")


@pytest.mark.parametrize("words", BAD)
def test_each_bad_fact_has_one_finding_with_something_to_do(words):
    facts = replace(GOOD, **BAD[words])
    facts.findings = judge(facts)
    (finding,) = facts.findings
    assert words in finding.what
    assert finding.fix
    assert finding.what in str(facts)


def test_no_compiler_is_fine_on_a_gpu():
    assert judge(replace(GOOD, compiler=None, computes_on="gpu")) == []


def test_nothing_known_is_shown_and_accuses_nobody():
    shown = str(Diagnosis())
    assert "–" in shown
    assert [f.what for f in judge(Diagnosis())] == []


def test_tested_torch_is_the_pinned_one():
    constraints = Path(__file__).parents[2] / "constraints.txt"
    pinned = re.search(r"^torch==(\d+)\.(\d+)", constraints.read_text(), re.M)
    assert tuple(map(int, pinned.groups())) == TESTED_TORCH
