"""`sync.name = local` as a whole run: checkpoints, resume on as many replicas or others, other syncs, metrics."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import manifest
from shoal.job import Layout, read, write
from shoal.job.idle import without_idle
from shoal.observe import metrics

NONFINITE = "tests.training.cases:nonfinite"
SYNC = {"name": "local", "every": 4, "fragments": 2, "delay": 2, "mix": 0.25}


@pytest.fixture(scope="module")
def whole(train, tiny, tmp_path_factory) -> Path:
    """16 steps of three replicas. After step 7 one fragment is on its way, and the round is not over."""
    run = tmp_path_factory.mktemp("local") / "whole"
    train(tiny(run, "replicas=3", train={"steps": 16}, sync=SYNC, checkpoint={"every": 7, "keep": 9}))
    return run


def broken_off(whole: Path, run: Path, step: int = 7) -> Path:
    """A copy of the run as it was when it had saved that step."""
    shutil.copytree(whole, run)
    for folder in checkpoint.complete(run / "checkpoints"):
        if folder.name > f"step-{step:08}":
            shutil.rmtree(folder)
    job = read(run / "job.toml")
    (run / "job.toml").write_text(write(replace(job, run=replace(job.run, dir=str(run)))))
    return run


def changed(run: Path, layout: str = "", **sync: object) -> Path:
    job = read(run / "job.toml")
    job = replace(job, layout=Layout.parse(layout) if layout else job.layout, sync=replace(job.sync, **sync))
    (run / "job.toml").write_text(write(without_idle(job).validate()))
    return run


def go_on(train, tiny, run: Path) -> list[dict[str, object]]:
    return train(tiny(run), resume=True)


def test_resumed_in_the_middle_of_a_round_equals_never_stopped_bitwise(train, tiny, whole, tmp_path):
    run = broken_off(whole, tmp_path / "run")
    values = manifest.read(run / "checkpoints/step-00000007").values["sync"]
    assert values["travelling"] == [1], "nothing is on its way that could be lost"
    assert go_on(train, tiny, run)[0]["step"] == 16
    rows, expected = metrics.read(run), metrics.read(whole)
    for key in ("loss", "grad_norm", "outer_tokens", "outer_common", "val_loss"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in expected], key
    for key in ("outer_loss", "outer_drift"):  # sums over ranks, in another order
        one, two = ([row[key] for row in some if key in row] for some in (rows, expected))
        assert one == pytest.approx(two, rel=1e-12)
    one, two = (sorted((folder / "checkpoints/step-00000016").glob("*.safetensors")) for folder in (run, whole))
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):
        assert mine.read_bytes() == theirs.read_bytes()


def test_a_checkpoint_has_one_model_and_what_each_replica_has_of_its_own(whole):
    folder = whole / "checkpoints/step-00000007"
    what = manifest.read(folder)
    model = [name for name, _ in checkpoint.tensors(folder)]
    assert all(name.startswith(("model.", "lm_head.")) for name in model)
    for slot in ("outer", *(f"{slot}@{r}" for r in range(3) for slot in ("weight", "exp_avg", "exp_avg_sq"))):
        assert {f"{slot}.{name}" for name in model} <= what.tensors.keys(), slot
    own = [dict(checkpoint.tensors(folder, [f"weight@{r}.{name}" for name in model])) for r in range(3)]
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(own[0][f"weight@0.{name}"], own[1][f"weight@1.{name}"])


def test_at_the_end_all_have_the_mean(whole):
    """What was learned after the last exchange is in the model."""
    folder = whole / "checkpoints/step-00000016"
    for name, common in checkpoint.tensors(folder):
        for _, own in checkpoint.tensors(folder, [f"weight@{r}.{name}" for r in range(3)]):
            assert torch.equal(own, common), name


@pytest.mark.parametrize("codec", [pytest.param("bf16", marks=pytest.mark.nightly), "randomk:0.25+int8"])
def test_what_a_codec_has_lost_is_in_checkpoints(ranks, train, tiny, tmp_path, codec):
    """Bitwise resume with one fragment on its way; on other numbers of replicas the sum stays what it was."""
    job = tiny(tmp_path / "run", "replicas=3", train={"steps": 16}, sync=SYNC | {"codec": codec},
               checkpoint={"every": 7, "keep": 9})  # fmt: skip
    train(job)
    run = broken_off(tmp_path / "run", tmp_path / "again")
    go_on(train, tiny, run)
    assert [row["loss"] for row in metrics.read(run)] == [row["loss"] for row in metrics.read(tmp_path / "run")]
    one, two = (
        sorted((folder / "checkpoints/step-00000016").glob("*.safetensors")) for folder in (run, tmp_path / "run")
    )
    for mine, theirs in zip(one, two, strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    folder, name = tmp_path / "run/checkpoints/step-00000007", "model.layers.0.mlp.down_proj.weight"
    before = sum(t for _, t in checkpoint.tensors(folder, [f"unsent@{r}.{name}" for r in range(3)]))
    assert before.count_nonzero()
    job = read(run / "job.toml")
    (_, of_sums), *_ = checkpoint.tensors(folder, [f"unsent.{name}"])
    assert of_sums.count_nonzero()
    for replicas in (2, 4):
        told = ranks.run(
            "tests.training.cases:loaded", replicas, job=write(job), layout=f"replicas={replicas}", folder=str(folder)
        )
        now = sum(torch.tensor(of_rank["unsent"][f"unsent@{r}.{name}"]) for r, of_rank in enumerate(told))
        # A sum of so many is divided by so many.
        assert torch.allclose(now / replicas, before / 3, atol=1e-9)
        for of_rank in told:
            assert torch.allclose(torch.tensor(of_rank["unsent"][f"unsent.{name}"]) / replicas, of_sums / 3, atol=1e-9)


@pytest.mark.parametrize("layout", ["replicas=2", "replicas=4", "replicas=2,fsdp=2"])
def test_another_number_of_replicas_goes_on(train, tiny, whole, tmp_path, layout):
    """Old ones from their own weights, new ones from the common weights and an old one's moments."""
    run = changed(broken_off(whole, tmp_path / "run"), layout)
    assert go_on(train, tiny, run)[0]["step"] == 16
    rows, expected = metrics.read(run), metrics.read(whole)
    assert [row["loss"] for row in rows[:7]] == [row["loss"] for row in expected[:7]]
    assert abs(rows[-1]["val_loss"] - expected[-1]["val_loss"]) < 0.02 * expected[-1]["val_loss"]


def test_a_new_replica_begins_with_what_all_have_in_common(ranks, whole):
    folder = str(whole / "checkpoints/step-00000007")
    job = read(whole / "job.toml")
    for told in ranks.run("tests.training.cases:loaded", 4, job=write(job), layout="replicas=4", folder=folder):
        replica = told["replica"]
        saved = {0: "weight@0", 1: "weight@1", 2: "weight@2", 3: ""}[replica]
        for name, value in told["weights"].items():
            (_, wanted), *_ = checkpoint.tensors(Path(folder), [f"{saved}.{name}" if saved else name])
            assert torch.equal(torch.tensor(value), wanted), (replica, name)
        name = "model.norm.weight"
        (_, moment), *_ = checkpoint.tensors(Path(folder), [f"exp_avg@{replica % 3}.{name}"])
        assert torch.equal(torch.tensor(told["moments"][name]), moment)


def test_a_run_goes_on_with_all_reduce_and_back(train, tiny, whole, tmp_path):
    run = changed(broken_off(whole, tmp_path / "run"), name="allreduce")
    before = dict(checkpoint.tensors(run / "checkpoints/step-00000007"))
    assert go_on(train, tiny, run)[0]["step"] == 16
    what = manifest.read(run / "checkpoints/step-00000016")
    assert not [name for name in what.tensors if "@" in name]
    row = metrics.read(run)[7]
    assert "outer_loss" not in row
    assert set(before) <= what.tensors.keys()
    again = changed(broken_off(run, tmp_path / "again", 14), name="local", every=2, fragments=1, delay=0)
    assert go_on(train, tiny, again)[0]["step"] == 16
    assert metrics.read(again)[-1]["outer_tokens"] > 0


def test_rows_have_the_outer_steps(whole):
    rows = metrics.read(whole)
    # Fragment 0 arrives after steps 2, 6, 10, 14 (what left two steps before), fragment 1 after 4, 8, 12, 16.
    assert [row["step"] for row in rows if "outer_loss" in row] == [4, 6, 8, 10, 12, 14, 16]
    for row in rows:
        assert row["tokens"] > 0
        if "outer_loss" in row:
            assert abs(row["outer_loss"] - row["loss"]) < 1.0
            # Three ways that agree in part: longer than their mean, and no more than √3 times.
            assert row["outer_common"] <= row["outer_drift"] <= math.sqrt(3) * 1.0001 * row["outer_common"]
    sums = [row["outer_tokens"] for row in rows if "outer_loss" in row]
    assert sum(sums) == pytest.approx(sum(row["tokens"] for row in rows), rel=0.01)


def test_validation_is_of_the_common_weights(train, tiny, tmp_path):
    """Replicas that never meet before the end: until then the common weights are the first ones."""
    sync = {"name": "local", "every": 100}
    job = tiny(tmp_path / "run", "replicas=2", train={"steps": 8, "validate_every": 3}, sync=sync)
    train(job)
    glances = [row["val_loss"] for row in metrics.read(tmp_path / "run") if "val_loss" in row]
    assert len(glances) == 3
    assert glances[0] == glances[1]
    assert glances[2] < glances[0] - 0.1


def test_a_replica_whose_gradient_is_not_finite_leaves_it_out(train, tiny, tmp_path):
    """The others take their step, and all meet at the next exchange."""
    sync = {"name": "local", "every": 3}
    job = tiny(tmp_path / "run", "replicas=3", train={"steps": 6, "on_nonfinite": "skip"}, sync=sync)
    told = train(job, entry=NONFINITE, what="gradient", at=[2], victim=1)
    digests = [of_rank["digests"] for of_rank in told]
    assert digests[1][2] == digests[1][1]
    for other in (0, 2):
        assert digests[other][2] != digests[other][1]
    values = manifest.read(tmp_path / "run/checkpoints/step-00000006").values["sync"]
    assert values["updates"] == [6, 5, 6]


def test_ruined_weights_of_a_replica_do_not_reach_the_others(train, tiny, tmp_path):
    """All go back to the weights that they had in common; the run goes on where it may skip."""
    sync = {"name": "local", "every": 3}
    job = tiny(tmp_path / "run", "replicas=3", train={"steps": 6, "on_nonfinite": "skip"}, sync=sync)
    for told in train(job, entry=NONFINITE, what="weights", at=[2], victim=1):
        assert told["error"] is None
    rows = metrics.read(tmp_path / "run")
    assert "step 3: loss or gradient is not finite" in (tmp_path / "run/log.txt").read_text()
    assert "the mean over replicas of how far they had moved" in (tmp_path / "run/log.txt").read_text()
    assert rows[2]["outer_drift"] is None
    assert rows[-1]["outer_drift"] > 0
    assert rows[-1]["val_loss"] < rows[0]["loss"]


def test_where_it_stops_every_rank_ends(train, tiny, tmp_path):
    job = tiny(tmp_path / "run", "replicas=3", train={"steps": 6}, sync={"name": "local", "every": 3})
    for told in train(job, entry=NONFINITE, what="weights", at=[3], victim=1):
        assert told["error"]["where"] == "step 3"
        assert "the mean over replicas of how far they had moved" in told["error"]["what"]


def test_a_fault_of_memory_in_the_common_weights_is_found(train, tiny, tmp_path):
    sync = {"name": "local", "every": 3}
    job = tiny(tmp_path / "run", "replicas=3", train={"steps": 6}, checkpoint={"every": 2}, sync=sync)
    for error in train(job, entry="tests.training.cases:flips_a_bit", at=3, victim=1):
        assert "rank 1 differs along replicas in 'model." in error["what"]
        assert error["where"] == "step 4"
