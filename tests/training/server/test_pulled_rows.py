"""Runs whose workers pull the rows of their tokens by themselves: the same, bit for bit, in fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.observe import metrics
from tests.training.server import runs

# Larger than all other parameters together, and most of it never read.
VOCABULARY, HIDDEN = 4096, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 4,
        "tie_word_embeddings": False,
    },
    "checkpoint": {"every": 1000},
    "train": {"steps": 6, "validate_every": 2},
}  # fmt: skip


def trained(folder: Path) -> list[tuple[float, ...]]:
    """What each step computed; held-out text, too, which has other tokens."""
    rows = [(row["step"], row["loss"], row["grad_norm"], row.get("val_loss")) for row in metrics.read(folder)]
    assert sum(row[3] is not None for row in rows) == 2
    return rows


@pytest.mark.parametrize(
    ("layout", "server"),
    [
        ("replicas=2", {}),
        *(
            pytest.param(layout, server, marks=pytest.mark.nightly)
            for layout, server in (
                ("replicas=2,fsdp=2", {}), ("replicas=2,tensor=2", {}), ("replicas=2,pipeline=2", {}),
                ("replicas=2,pipeline=2,schedule=zbv", {}), ("replicas=1,fsdp=2,tensor=2", {"level": "shard"}),
                ("replicas=2,context=2", {}),
                ("replicas=1", {"mode": "asp", "compensation": "look-ahead"}),
                ("replicas=1", {"mode": "asp", "level": "hogwild"}),
            )
        ),
    ],
)  # fmt: skip
def test_a_run_that_pulls_rows_is_one_that_pulls_everything(ranks, tiny, tmp_path, layout, server):
    """AdamW decays and moves rows whose tokens do not occur."""
    for name, rows in (("rows", True), ("all", False)):
        job = tiny(tmp_path / name, layout, sync={"name": "server"}, server={"shards": 2} | server, **OPTIONS)
        runs.run(ranks, job, rows=rows)
    assert trained(tmp_path / "rows") == trained(tmp_path / "all")
    some, every = runs.weights(tmp_path / "rows"), runs.weights(tmp_path / "all")
    assert all(torch.equal(some[name], every[name]) for name in some.keys() | every.keys())
    received = [[row["received_bytes"] for row in metrics.read(tmp_path / name)] for name in ("rows", "all")]
    saved = [whole - less for less, whole in zip(*received, strict=True)]
    # All is pulled at first, and by worker 0 before it looks at held-out text (steps 2 and 4 of 0 … 5).
    for step, expected in {0: 0.0, 1: 1.0, 3: 1.0, 5: 1.0}.items():
        # Of the workers' 4096 rows, text in ASCII has fewer than 128.
        most = job.layout.replicas * VOCABULARY * HIDDEN * 4 * expected
        assert 0.9 * most - 1e4 < saved[step] < most + 1e4, (step, saved)


@pytest.mark.nightly
def test_questions_that_are_asked_again_bring_the_same_rows(ranks, tiny, tmp_path):
    """A tenth of all messages is lost, late or doubled, and a worker of several ranks asks on each of them."""
    for name, network in (("good", None), ("bad", {"odds": 1 / 30, "seed": 3})):
        job = tiny(
            tmp_path / name,
            "replicas=2,fsdp=2",
            sync={"name": "server"},
            server={"shards": 2, "lease": 60.0},
            **OPTIONS,
        )
        runs.run(ranks, job, rows=name == "bad", network=network)
    good, bad = runs.weights(tmp_path / "good"), runs.weights(tmp_path / "bad")
    assert all(torch.equal(good[name], bad[name]) for name in good.keys() | bad.keys())
    received = [sum(row["received_bytes"] for row in metrics.read(tmp_path / name)) for name in ("good", "bad")]
    assert received[1] < received[0]
