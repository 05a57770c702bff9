"""Streaming DiLoCo against trajectories that another library publishes of a mock model (golden/README.md).

`pytest tests/sync/test_golden.py --golden FILE` takes others of the same form.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent / "golden/streaming_diloco.json"


def pytest_generate_tests(metafunc):
    files = [Path(name) for name in metafunc.config.getoption("--golden") or [HERE]]
    cases = [(file.name, case) for file in files for case in json.loads(file.read_text())]
    metafunc.parametrize("case", [case for _, case in cases], ids=[f"{name}-{case['case']}" for name, case in cases])


def test_trajectory(ranks, case):
    """To the last digit, of both replicas, at every step."""
    told = ranks.run("tests.sync.golden_cases:trajectory", case["replicas"], case=case)
    assert case["history"]
    for own, common in told:
        for step, weights in case["history"].items():
            assert own[step] == weights, f"local weights after step {step}"
        for step, weights in case["global_history"].items():
            assert common[step] == weights, f"common weights after step {step}"
