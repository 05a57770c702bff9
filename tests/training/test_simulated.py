"""`shoal simulate` of a job: what its replicas learn is what a run learns, and how long it takes, told by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shoal.cli.main import main
from shoal.errors import DivergedError
from shoal.job import Job
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions
from shoal.launch.simulate import Simulation, _alone, simulate
from shoal.models.spec import count
from shoal.training.simulated import Machines

LOCAL = {"name": "local", "every": 4}
SHORT = {"validate_tokens": 64}


def simulation(job: Job, *seconds: float, **network: float) -> Simulation:
    return simulate(job, lambda replicas: Machines(seconds, **network), lambda line: None)


@pytest.mark.parametrize(
    ("layout", "sync"),
    [
        ("replicas=2", LOCAL),
        pytest.param("replicas=3", {"name": "gossip", "every": 3}, marks=pytest.mark.nightly),
        pytest.param("replicas=3,replica_share=2+1+1", {**LOCAL, "pace": "4+2+1"}, marks=pytest.mark.nightly),
    ],
)
def test_the_validation_loss_is_that_of_a_run(tiny, train, tmp_path, layout, sync):
    """In float32, to the last bit."""
    job = tiny(tmp_path / "run", layout, sync=sync)
    found = simulation(job, *[1.0] * job.layout.replicas)
    result, *_ = train(job)
    assert found.outcome.val_loss == result["validation"]["nats"]
    assert found.outcome.val_loss != found.allreduce.val_loss
    assert found.outcome.losses[-1] < found.outcome.losses[0]


def test_seconds_and_bytes_are_those_of_machines_and_lines(tiny, tmp_path):
    job = tiny(tmp_path / "run", train=SHORT, sync={**LOCAL, "bucket_mib": 25.0})
    rate = 1e6
    found = simulation(job, 0.1, 0.1, rate=rate)
    # 8 steps of 6 sequences each; with a rank of two, half of the model goes each way, there and back.
    size = 4 * count(replace(job.model, vocab_size=257))
    assert found.outcome.steps == 8
    assert found.outcome.sent_bytes == pytest.approx([2 * size] * 2, rel=0.01)
    assert found.outcome.seconds == pytest.approx(8 * 6 * 0.1 + 2 * size * 8 / rate, rel=0.01)
    assert found.allreduce.sent_bytes == pytest.approx([8 * size] * 2, rel=0.01)
    assert found.allreduce.seconds == pytest.approx(8 * 6 * 0.1 + 8 * size * 8 / rate, rel=0.01)
    assert found.speedup == found.allreduce.seconds / found.outcome.seconds


@pytest.mark.parametrize(
    ("steps", "sync", "said"),
    [
        (20, {**LOCAL, "every": 50}, "sync.every=50 and 20 steps: replicas exchange nothing on the way"),
        (20, {**LOCAL, "every": 50, "together": 5}, "sync.every=50 and 20 steps: after step 5, replicas"),
        (20, {"name": "gossip", "every": 20}, "sync.every=20 and 20 steps"),
        (20, {**LOCAL, "every": 10, "delay": 9}, ""),
        (6, {**LOCAL, "every": 5, "delay": 4, "together": 2}, "sync.every=5 and 6 steps: after step 2"),
        (20, {**LOCAL, "every": 50, "fragments": 3}, ""),
        (20, {**LOCAL, "every": 50, "together": 20}, ""),
        (20, {"name": "gossip", "every": 19}, ""),
    ],
)
def test_who_exchanges_nothing_on_the_way_is_told(steps, sync, said):
    job = Job(train=TrainOptions(steps=steps), sync=SyncOptions(**sync))
    assert _alone(job).startswith(said)
    assert bool(_alone(job)) == bool(said)


def test_the_progress_is_that_of_the_slowest(tiny, tmp_path):
    said: list[str] = []
    job = tiny(tmp_path / "run", train=SHORT, sync=LOCAL)
    simulate(job, lambda replicas: Machines((0.1, 0.4)), said.append)
    steps = [line for line in said if line.startswith("local every 4: step")]
    assert steps == [f"local every 4: step {n} of 8, {6 * 0.4 * n:.1f} s" for n in range(1, 9)]


def test_who_is_fast_waits_unless_it_takes_more_steps(tiny, tmp_path):
    job = tiny(tmp_path / "run", train=SHORT, sync=LOCAL)
    found = simulation(job, 0.1, 0.4)
    assert found.outcome.seconds == pytest.approx(8 * 6 * 0.4)
    assert found.outcome.wait == pytest.approx([0.75, 0.0])
    paced = simulation(tiny(tmp_path / "run", train=SHORT, sync={**LOCAL, "pace": "auto"}), 0.1, 0.4)
    assert paced.outcome.seconds == pytest.approx(8 * 6 * 0.1)
    assert paced.outcome.wait == pytest.approx([0.0, 0.0])
    assert paced.allreduce.wait == pytest.approx([0.75, 0.0])
    assert paced.outcome.tokens < found.outcome.tokens


def test_a_fragment_on_its_way_is_hidden_by_computing(tiny, tmp_path):
    slow = {"rate": 2e6, "delay": 0.01}
    at_once, later = (
        simulation(
            tiny(tmp_path / "run", train=SHORT, sync={**LOCAL, "fragments": 2, "delay": delay}), 0.5, 0.5, **slow
        ).outcome
        for delay in (0, 2)
    )
    # At once, both are waited for in each round, and the first one again at the end. With a delay only at the end.
    assert later.wait[0] < 0.6 * at_once.wait[0]
    assert later.seconds == pytest.approx(24 * (1 + later.wait[0] / (1 - later.wait[0])))


def test_what_would_arrive_after_the_last_step_is_not_sent(tiny, tmp_path):
    """Of two fragments, at steps 2, 6 and 4, 8; the first one's rest at the end. With a delay of two, not at step 2,
    and what would leave at step 8 stays."""
    sync = {**LOCAL, "fragments": 2, "delay": 2, "bucket_mib": 25.0}
    job = tiny(tmp_path / "run", train=SHORT, sync=sync)
    sent = simulation(job, 0.1, 0.1).outcome.sent_bytes
    assert sent == pytest.approx([2 * 4 * count(replace(job.model, vocab_size=257))] * 2, rel=0.01)


def test_the_table_and_the_answer(arguments, capsys: pytest.CaptureFixture):
    words = [
        "simulate", *arguments[1:], "--sync", "local", "--sync.every", "2", "--layout", "replicas=2", "--steps", "4",
        "--speeds", "0.1,0.2", "--rate", "100",
    ]  # fmt: skip
    assert main([*words, "--format", "json"]) == 0
    printed, told = capsys.readouterr()
    answer = json.loads(printed)
    assert set(answer) == {"outcome", "allreduce", "speedup"}
    assert len(answer["outcome"]["losses"]) == 4
    assert "local every 2" in told
    assert "allreduce: wait of each replica  0: " in told
    assert f"{answer['speedup']:.2f} times as fast as allreduce over the same steps" in told


def test_a_replica_that_diverges_is_named(tiny, tmp_path):
    job = tiny(tmp_path / "run", train=SHORT, sync=LOCAL, optim={"name": "sgd", "lr": 1e30, "clip": 0.0})
    with pytest.raises(DivergedError, match="not finite") as raised:
        simulation(job, 1.0, 1.0)
    assert raised.value.where.startswith("replica ")
