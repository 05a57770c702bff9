"""Validation: the mean over every held-out token once, whatever the ranks; in float64 against one plain process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.job import read
from shoal.launch.train import ready
from shoal.models import build
from shoal.models.spec import parameters
from shoal.models.storage import canonical
from shoal.ops.initialise import initialise_

# All rows, or some; neither is a multiple of what the ranks read in a round.
ALL = 10**9


def prepared(job) -> dict[str, str]:
    arguments = ready(job, None, time.time())[1]
    return {name: arguments[name] for name in ("folder", "prepared")}


def plain(folder: str, prepared: str) -> tuple[float, int]:
    """Piece by piece of each document, without packing, batches or masks."""
    job, corpus = read(Path(folder) / "job.toml"), Prepared.load(prepared)
    model = build(job.model).double()
    fills = parameters(job.model)
    for name, p in canonical(model):
        initialise_(p, name, tuple(p.shape), (0,) * p.ndim, fills[name].fill, job.train.seed)
    store, length = corpus.store("validation"), job.data.sequence_length
    total, count = 0.0, 0
    with torch.no_grad():
        for start, tokens in zip(store.start_D.tolist(), store.length_D.tolist(), strict=True):
            document = torch.from_numpy(store.tokens[start : start + tokens].astype("int64"))
            for first in range(0, tokens - 1, length):
                piece = document[first : first + length + 1]
                total += F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum").item()
                count += len(piece) - 1
    return total / count, count


LAYOUTS = [
    "replicas=1",
    "replicas=2,micro_batch=2",
    "replicas=3",
    "fsdp=2,zero=3",
    "pipeline=2,micro_batch=4",
    "pipeline=2,schedule=zbv,micro_batch=4",
    "tensor=2",
    "context=2",
    "pipeline=2,tensor=2,micro_batch=4",
    "replicas=2,replica_share=1+3",
    "replicas=2,fsdp=2,replica_share=2+1,micro_batch=2",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_plain_process(ranks, tiny, tmp_path, layout):
    # As many blocks as a V of two ranks has stages.
    job = tiny(tmp_path / "run", layout, train={"precision": "fp64"}, model={"num_hidden_layers": 4})
    where = prepared(job)
    expected, tokens = plain(**where)
    loader = Loader(Prepared.load(where["prepared"]), job.data, "validation")
    assert loader.samples % job.train.global_batch, "the last round must not be full"
    for nats, counted in ranks.run("tests.training.cases:validated", job.layout.world, **where, rows=ALL):
        assert counted == tokens
        assert nats == pytest.approx(expected, rel=1e-10)


def test_first_rows_only(ranks, tiny, tmp_path):
    """During training: the same rows for any number of ranks."""
    found = []
    for layout in ("replicas=1", "replicas=3"):
        job = tiny(tmp_path / layout, layout, train={"precision": "fp64"})
        found.append(
            ranks.run("tests.training.cases:validated", job.layout.world, **prepared(job), rows=5)[0],
        )
    assert found[0][1] == found[1][1] <= 5 * job.data.sequence_length
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-10)


def test_rows_that_count_twice_would_be_seen(ranks, tiny, tmp_path):
    where = prepared(tiny(tmp_path / "run", "replicas=2", train={"precision": "fp64"}))
    expected, tokens = plain(**where)
    nats, counted = ranks.run("tests.training.cases:validated", 2, **where, rows=ALL, bug=True)[0]
    assert counted > tokens
    assert abs(nats / expected - 1) > 100 * 1e-10
