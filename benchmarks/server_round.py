"""A whole round of a parameter server: push, commit, update, pull, in runs of `shoal train --sync server`.

    python benchmarks/server_round.py [--mib 64] [--shards 1 2 4] [--copies 1 2] [--workers 1] [--steps 24] [--starts 3]

`benchmarks/push_pull.py` is of the transfer alone. Here every round has all that a run's has: a gradient of --mib to
the shards, where it is logged (one copy of each shard: on disk when it is acknowledged) or goes on to the second copy,
the coordinator's commit in its journal, AdamW, and the weights of the new version back. All are processes of their own
on loopback, with one thread each. The model is made so that its weights in float32 are --mib, its rows of 8 tokens so
that computing takes little of a step, which is not counted: a round is the time from the end of one gradient to the
weights for the next, as the run's metrics tell it (`waited_s`), mean over workers; the first four are left out.

Runs of all numbers of shards and copies take turns, --starts of each. MiB a second: pushed and pulled, of all workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from shoal.job import Job, Layout, write
from shoal.job.checkpoint import CheckpointOptions
from shoal.job.data import DataOptions
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.run import RunOptions
from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions
from shoal.models.spec import count
from shoal.observe import metrics

_WARM_UP = 4


def model_of(mib: int) -> ModelOptions:
    """Two blocks whose float32 weights are so many MiB, to a hundredth."""

    def sized(intermediate: int) -> ModelOptions:
        return ModelOptions(
            vocab_size=257, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4,
        )  # fmt: skip

    hidden = 128 if mib < 16 else 512
    without, with_one = count(sized(1)), count(sized(2))
    return sized(round(((mib << 20) / 4 - without) / (with_one - without)) + 1)


def job_of(asked: argparse.Namespace, shards: int, copies: int, data: str) -> Job:
    never = 10 * asked.steps
    return Job(
        layout=Layout(replicas=asked.workers),
        model=model_of(asked.mib),
        data=DataOptions(source=(data,), tokenizer="bytes", sequence_length=8),
        optim=OptimOptions(lr=1e-4, schedule="constant"),
        train=TrainOptions(
            steps=asked.steps, global_batch=asked.workers, precision="fp32", compile="off", validate_every=never,
            validate_tokens=8,
        ),
        checkpoint=CheckpointOptions(every=never),
        sync=SyncOptions(name="server"),
        server=ServerOptions(mode="bsp", shards=shards, copies=copies),
        run=RunOptions(threads=1),
    ).validate()  # fmt: skip


def rounds(job: Job) -> list[float]:
    """Seconds of each, of a whole run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.toml").write_text(write(job))
        words = [sys.executable, "-m", "shoal.cli.main", "train", str(folder / "job.toml"), "--run-dir"]
        done = subprocess.run([*words, str(folder / "run")], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"shoal train ended with code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
        rows = metrics.read(folder / "run")
    return [statistics.fmean(row["waited_s"].values()) for row in rows[_WARM_UP:]]


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    cases = [(shards, copies) for copies in asked.copies for shards in asked.shards]
    seconds: dict[tuple[int, int], list[list[float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as name:
        text = Path(name, "text.txt")
        text.write_text("".join(f"line {i} of a text that nobody learns anything of\n" for i in range(2000)))
        for start in range(asked.starts):
            shift = start % len(cases)
            for case in cases[shift:] + cases[:shift]:
                seconds[case].append(rounds(job_of(asked, *case, str(text))))
                print(f"shards, copies {case}: {statistics.median(seconds[case][-1]):.3f} s", file=sys.stderr)
    return [row(asked, shards, copies, seconds[shards, copies]) for shards, copies in cases]


def row(asked: argparse.Namespace, shards: int, copies: int, seconds: list[list[float]]) -> dict[str, Any]:
    """seconds: of each round of each run."""
    middles = [statistics.median(of_run) for of_run in seconds]
    middle = statistics.median([each for of_run in seconds for each in of_run])
    weights = 4 * count(model_of(asked.mib)) / 2**20
    return {
        "shards": shards, "copies": copies, "workers": asked.workers, "mib": weights, "seconds": middle,
        "least": min(middles), "most": max(middles), "mib_per_second": 2 * weights * asked.workers / middle,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    lines = [f"push and pull of {first['mib']:.1f} MiB with all that belongs to it, {first['workers']} worker(s):"]
    for found in rows:
        kept = "log on disk" if found["copies"] == 1 else f"{found['copies']} copies"
        lines.append(
            f"  {found['shards']} shards, {kept:<12} {found['seconds']:.3f} s (medians of runs {found['least']:.3f} to "
            f"{found['most']:.3f})   {found['mib_per_second']:,.0f} MiB/s"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="of all weights in float32 (default 64)")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2], help="of each shard")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24, help="of a run (default 24)")
    parser.add_argument("--starts", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    asked = parser.parse_args()
    if asked.steps <= _WARM_UP:
        parser.error(f"--steps must be more than {_WARM_UP}")
    found = measure(asked)
    print(json.dumps({"rows": found}) if asked.format == "json" else table(found))


if __name__ == "__main__":
    main()
