"""PowerSGD where a replica is spread over ranks, in checkpoints, and after the loss of a replica."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import contents, manifest
from shoal.job import Layout
from shoal.models.spec import parameters
from tests.equivalence import cases
from tests.sync import residual_cases
from tests.sync.test_residuals import of_checkpoint, options

CASES = "tests.sync.residual_cases"
# With pieces that two ranks of a replica have a part of each, and with rows cut by fsdp and columns by tensor.
LAYOUTS = [
    "replicas=3,micro_batch=2", "replicas=2,fsdp=2,zero=3,micro_batch=1", "replicas=2,tensor=2,micro_batch=2",
    "replicas=2,pipeline=2,schedule=zbv,micro_batch=2",
]  # fmt: skip
# Key heads on two ranks each, and so experts.
EIGHT = pytest.param("replicas=2,tensor=4,expert=2,micro_batch=3", marks=pytest.mark.nightly)


def run(ranks, what: str, layout: str, **args):
    world = Layout.parse(layout).world
    return ranks.run(f"{CASES}:{what}", world, layout=layout, codec="lowrank", **args, **options(layout))


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """saved(layout): what the ranks told that trained in it, and the folder of their checkpoint."""
    done = {}

    def once(layout: str):
        if layout not in done:
            root = tmp_path_factory.mktemp("lowrank")
            told = run(ranks, "train", layout, root=str(root))
            done[layout] = told, root / f"step-{residual_cases.SAVED:08}"
        return done[layout]

    return once


@pytest.mark.parametrize("layout", [*LAYOUTS, EIGHT])
def test_resumed_in_the_same_layout_is_bitwise_the_same(ranks, saved, layout):
    """And the model learns, and replicas stay equal (`whole` looks)."""
    told, folder = saved(layout)
    assert told[0]["losses"][-1] < told[0]["losses"][0]
    like = {name: tensor for name, tensor in checkpoint.tensors(folder)}
    cases.whole(told, "weights", like)
    for one, two in zip(told, run(ranks, "go_on", layout, folder=str(folder)), strict=True):
        assert one["saved"] == two["loaded"] != []
        assert one["known"] == two["known"] != []
        for what in ("losses", "norms", "weights"):
            assert one[what] == two[what]


@pytest.mark.parametrize("layout", [*LAYOUTS[1:], EIGHT])
def test_all_gradients_were_applied_or_are_kept(ranks, layout):
    """Of each matrix what ranks have of it, of a pipeline's tied embedding both ends."""
    given, there = zip(*run(ranks, "keep_books", layout), strict=True)
    shapes = parameters(cases.job("replicas=1", 1, **options(layout)).model)
    like = {name: torch.empty(spec.shape, dtype=torch.float64) for name, spec in shapes.items()}
    there = residual_cases.totals([*there], like)
    for name, total in residual_cases.totals([*given], like).items():
        torch.testing.assert_close(there[name], total, rtol=0, atol=1e-11 * float(total.abs().max()), msg=name)


def known(folder: Path) -> dict[str, torch.Tensor]:
    names = [name for name in manifest.read(folder).tensors if name.startswith("lowrank-q")]
    return dict(checkpoint.tensors(folder, names))


@pytest.mark.parametrize("layout", ["replicas=2,micro_batch=2", LAYOUTS[1], LAYOUTS[2]])
def test_in_another_layout_directions_are_those_of_the_first_rows_and_residuals_are_kept_in_sum(ranks, saved, layout):
    for other in [one for one in LAYOUTS[:3] if one != layout]:
        folder = saved(other)[1]
        before, expected, results = (
            known(folder),
            of_checkpoint(folder),
            run(ranks, "go_on", layout, folder=str(folder)),
        )
        for name, total in residual_cases.totals([r["loaded"] for r in results], expected).items():
            assert total.shape[-1] == total.numel() or total.count_nonzero() > 0.5 * total.numel(), name
            torch.testing.assert_close(total, expected[name], rtol=0, atol=1e-12 * float(total.abs().max()), msg=name)
        for name, offsets, numbers in (one for result in results for one in result["known"]):
            piece, parameter = torch.tensor(numbers, dtype=torch.float64), name.partition(".")[2]
            row = int(name.partition(".")[0].partition("@")[2].partition("-")[0] or 0)
            rows = [int(n.partition("@")[2].partition(".")[0] or 0) for n in before if n.endswith(f".{parameter}")]
            last = max(first for first in rows if first <= row)
            there = before[f"lowrank-q{f'@{last}' if last else ''}.{parameter}"]
            assert torch.equal(piece, there[cases.place(offsets, piece)]), (name, other)


def test_directions_are_the_state_of_tensors_and_no_tensors_of_the_model(saved):
    told = contents.contents(saved(LAYOUTS[0])[1])
    assert {*told["kinds"]} == {"model", "momentum", "lowrank-q", "residual@0", "residual@1", "residual@2"}
    assert told["kinds"]["lowrank-q"]["bytes"] < 0.2 * told["kinds"]["model"]["bytes"]


def test_what_a_codec_of_numbers_had_lost_is_kept_in_sum(ranks, tmp_path):
    """Also what its owners of sums had, whom nobody follows."""
    layout = LAYOUTS[0]
    ranks.run(f"{CASES}:train", 3, layout=layout, root=str(tmp_path), codec="signs", **options(layout))
    folder = tmp_path / f"step-{residual_cases.SAVED:08}"
    expected, results = of_checkpoint(folder), run(ranks, "only_load", layout, folders=[str(folder)])
    for name, total in residual_cases.totals([of_rank[0] for of_rank in results], expected).items():
        torch.testing.assert_close(total, expected[name], rtol=0, atol=1e-12 * float(total.abs().max()), msg=name)
