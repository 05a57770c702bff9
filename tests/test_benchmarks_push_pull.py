"""The transport's benchmark: all contenders move the same bytes, and its figures have names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import push_pull

from tests.sync.server.peers import in_thread


@pytest.mark.parametrize(
    ("begin", "tuned"),
    [
        (push_pull.by_connection, False),
        (push_pull.by_station, False),
        (push_pull.by_socket, False),
        (push_pull.by_socket, True),
    ],
)
def test_a_push_and_a_pull_move_all_pieces(begin, tuned: bool, tmp_path: Path):
    worker, server = ([torch.full((300_000,), float(rank + 1)) for _ in range(3)] for rank in range(2))
    pulled, pushed = ([torch.zeros(300_000) for _ in range(3)] for _ in range(2))

    def run(rank: int, out: list[torch.Tensor], back: list[torch.Tensor]) -> None:
        with begin(tmp_path / "port", rank, out, back, tuned) as exchange:
            for _ in range(2):
                exchange()

    with in_thread(lambda: run(1, server, pushed)) as served:
        run(0, worker, pulled)
    assert served.get() is None
    assert all(torch.equal(a, b) for a, b in zip(worker + server, pushed + pulled, strict=True))


def test_the_figures_have_names(monkeypatch):
    seconds = {"connection": 0.05, "station": 0.1, "raw": 0.04, "raw, tuned": 0.03, "connection again": 0.05}
    columns = {name: [value, value * 1.1, value] for name, value in seconds.items()}
    monkeypatch.setattr(push_pull, "over_starts", lambda *_: (columns, {}))
    found = push_pull.measure(64, 16, 8, 3, 1)
    assert found["seconds"] == pytest.approx(seconds)
    # Speeds, not seconds: 0.8 is slower than raw.
    assert (found["of_raw"], found["of_tuned"], found["aa"]) == pytest.approx((0.8, 0.6, 1))
    assert found["station_of_raw"] == pytest.approx(0.4)
    assert found["of_raw_low"] <= found["of_raw"] + 1e-9
    assert "2.50 GiB/s" in push_pull.table(found)
