"""Time to a loss with a parameter server and one worker that is four times slower than the others.

    python benchmarks/slow_worker.py [--methods bsp asp:compensation=look-ahead ...] [--steps 400] [--seeds 3]
                                     [--lr 1e-3,2e-3,4e-3] [--pads 0.5,0.5,0.5,2.0] [--out FOLDER] [--format json]

Whole runs as `shoal train --sync server` makes them, in which every gradient is stretched by sleep to --pads seconds
of its worker (one that computes longer is counted in `overran`). A method is a mode, with options of [server] behind
it. Model, text, optimizer and grid of rates are those of benchmarks/network.py: 10 M parameters, a row of 256 tokens
for each worker and step, fp32, one thread each, AdamW with a constant rate after 40 steps of warm-up.

The rate of every method, bsp's too, is chosen by one rule: that with the lowest loss on held-out rows, with the first
seed, when as many samples have been used up as bsp has after --steps. The other seeds take it. The target is bsp's loss
then, of each seed; the others train for at most --longest times as many samples. seconds_to_loss: from the end of the
first step until the target, on a straight line between two checkpoints. Checkpoints are written on the way as a run
does it, and their loss is measured when the run has ended, so that looking takes no time from anybody. speedup: bsp's
seconds over the method's, median of seeds.

bsp computes the same whatever the pads are (each update waits for all), so its losses are those of runs without pads,
and its seconds are steps × the median of --timed steps with them, as in benchmarks/network.py. What has been measured
lies in --out and is not measured again, so this can be done in pieces, or go on after it was stopped. Delete the folder
when the code has changed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.network import Bench, base_job, first, near, say

from shoal import checkpoint
from shoal.data.prepare import prepare
from shoal.job import Job, parse, write
from shoal.job.data import DataOptions
from shoal.job.optim import OptimOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions
from shoal.launch import local, roles, server
from shoal.launch.ranks import Ranks
from shoal.launch.roles import Role
from shoal.launch.train import absolute_paths, ready
from shoal.observe import metrics

RANKS = "benchmarks.slow_worker_ranks"
BASELINE = "bsp"
METHODS = [BASELINE, "asp:compensation=look-ahead", "quorum:quorum=3", "ssp:staleness=4"]
# Steps of warm-up, as in benchmarks/network.py.
_WARM_UP = 40


def job_of(base: Job, method: str, lr: float, seed: int, asked: argparse.Namespace) -> Job:
    """JobError for a mode or an option that shoal does not know."""
    mode, _, options = method.partition(":")
    pairs = [pair.partition("=") for pair in options.split(",") if pair]
    lines = [f"{key} = {value if value[:1].isdigit() else json.dumps(value)}" for key, _, value in pairs]
    steps = asked.steps if method == BASELINE else round(asked.longest * asked.steps)
    optim: OptimOptions = replace(base.optim, lr=lr, warmup=min(0.5, _WARM_UP / steps))
    train: TrainOptions = replace(
        # Nobody looks at the loss on the way, and the run itself hardly in the end.
        base.train, steps=steps, seed=seed, validate_every=steps + 1, validate_tokens=base.data.sequence_length,
    )  # fmt: skip
    job = replace(
        base, optim=optim, train=train, sync=SyncOptions(name="server"),
        checkpoint=replace(base.checkpoint, every=asked.every, keep=steps),
    )  # fmt: skip
    shards = f"shards = {asked.servers}\ncopies = {asked.copies}"
    return parse("\n".join(["[server]", f"mode = {json.dumps(mode)}", shards, *lines]), method, job).validate()


def run(job: Job, asked: argparse.Namespace, pads: list[float]) -> dict[str, Any]:
    """One run from its start to its last sample. pads: seconds of a gradient, each worker's.

    losses: [step, loss] of each checkpoint. seconds: until each, from the end of the first step on. step: median.
    """
    with tempfile.TemporaryDirectory(dir=asked.out) as name, ExitStack() as ending:
        job, arguments = ready(replace(job, run=replace(job.run, dir=str(Path(name, "run")))), None, time.time())
        folder, prepared = Path(arguments["folder"]), arguments["prepared"]
        ranks = Ranks([*server.ENTRIES, RANKS])
        ending.callback(ranks.close)
        with Thinned(folder / "checkpoints", asked.every), stretched(pads, folder):
            stopped = server.run(job, arguments, ranks, say, lambda name: None)["stopped_by"]
        if stopped:
            raise SystemExit(f"{stopped}: what was measured until then is not kept")
        told = {"folder": str(folder), "job": write(job), "prepared": prepared, "rows": asked.rows}
        looks = local.run(f"{RANKS}:losses", told, 1, ranks=ranks)
        rows = metrics.read(folder)
        gradients = [json.loads(path.read_text()) for path in sorted(folder.glob("padded-*.json"))]
        return figures(looks, rows, gradients)


def figures(looks: list[dict[str, Any]], rows: list[dict[str, Any]], gradients: list[dict[str, int]]) -> dict[str, Any]:
    """What a run came to. looks: step, version and loss of each checkpoint. gradients: of each worker, how many it
    computed and how many of them took too long."""
    times, spent = {rows[0]["version"]: 0.0}, 0.0
    for row in rows[1:]:
        spent += row["seconds"]
        times[row["version"]] = spent
    looks = sorted((look for look in looks if look["version"] >= rows[0]["version"]), key=lambda look: look["version"])
    counts = [(int(late), count) for row in rows for late, count in row["staleness"].items()]
    used = sum(count for _, count in counts)
    return {
        "losses": [[look["step"], look["loss"]] for look in looks],
        "seconds": [between(times, look["version"]) for look in looks],
        "staleness": sum(late * count for late, count in counts) / used,
        "rejected": sum(row["rejected"] for row in rows) / (used + sum(row["rejected"] for row in rows)),
        "step": statistics.median(row["seconds"] for row in rows[1:]),
        "overran": [one["overran"] / max(1, one["answered"]) for one in gradients],
    }


def between(times: dict[int, float], version: int) -> float:
    """When a version was there, on a straight line between the two nearest that are known."""
    low = max((known for known in times if known <= version), default=min(times))
    high = min((known for known in times if known >= version), default=max(times))
    part = (version - low) / (high - low) if high > low else 0.0
    return times[low] + part * (times[high] - times[low])


def stretched(pads: list[float], folder: Path) -> Any:
    """Within, workers of a run are those of RANKS, and wait for the ends of their pads."""
    plain = roles.run

    def with_pads(ranks: Ranks, parts: list[Role], **how: Any) -> Any:
        def padded(part: Role) -> Role:
            if "number" not in part.args or not part.name.startswith("worker"):
                return part
            number = part.args["number"]
            told = {"pad": pads[number], "told": str(folder / f"padded-{number}.json")}
            return replace(part, entry=f"{RANKS}:main", args={**part.args, **told})

        return plain(ranks, [padded(part) for part in parts], **how)

    return mock.patch.object(server.roles, "run", with_pads)


class Thinned:
    """Within, of a run's checkpoints only the first of every so many steps stays, and the newest two."""

    def __init__(self, root: Path, every: int):
        self.root, self.every, self._over = root, every, threading.Event()

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._over.wait(1.0):
            kept: set[int] = set()
            for path in checkpoint.complete(self.root)[:1:-1]:
                turn = int(path.name.split("-")[1]) // self.every
                if turn in kept:
                    shutil.rmtree(path, ignore_errors=True)
                kept.add(turn)


class Slow:
    """All runs of one command, each from its file where there is one."""

    def __init__(self, asked: argparse.Namespace):
        data = DataOptions(
            source=(asked.data,), tokenizer=asked.tokenizer, sequence_length=asked.length, cache=asked.cache
        )
        corpus = prepare(data, say=say)
        self.asked, self.base = asked, absolute_paths(base_job(asked, corpus, data))
        self.bench = Bench(asked, corpus, self.base, ExitStack())

    def train(self, method: str, lr: float, seed: int) -> dict[str, Any]:
        asked = self.asked
        job = job_of(self.base, method, lr, seed, asked)
        key = {"method": method, "job": write(job), "rows": asked.rows}
        if method != BASELINE:
            return self._run(job, asked.pads, key)
        found = self._run(job, [0.0] * asked.workers, key)
        timed = replace(job, train=replace(job.train, steps=asked.timed))
        paced = self._run(timed, asked.pads, {**key, "job": write(timed)})
        seconds = [paced["step"] * (step - 1) for step, _ in found["losses"]]
        return {**found, "seconds": seconds, "overran": paced["overran"]}

    def _run(self, job: Job, pads: list[float], key: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.bench.measured("slow", {**key, "pads": pads}, lambda: run(job, self.asked, pads))
        return found

    def targets(self) -> tuple[float, list[float]]:
        """bsp's best rate, and its loss with each seed."""
        best = self.best_rate(BASELINE)
        return best, [near(self.train(BASELINE, best, seed), self.asked.steps) for seed in range(self.asked.seeds)]

    def best_rate(self, method: str) -> float:
        """Of the grid, by the loss after --steps steps' samples with the first seed: the same rule for all."""
        return min(self.asked.lr, key=lambda lr: near(self.train(method, lr, 0), self.asked.steps))

    def row(self, method: str, lr: float | None, targets: list[float]) -> dict[str, Any]:
        """lr: None = the best one. speedup comes later."""

        def seconds(lr: float, seed: int) -> float:
            found = first(self.train(method, lr, seed), targets[seed])
            return found["seconds"] if found else float("inf")

        lr = lr if lr is not None else self.best_rate(method)
        runs = [self.train(method, lr, seed) for seed in range(len(targets))]
        return {
            "method": method, "lr": lr, "seconds_to_loss": [seconds(lr, seed) for seed in range(len(targets))],
            "final_losses": [near(one, self.asked.steps) for one in runs],
            "staleness": statistics.fmean(one["staleness"] for one in runs),
            "rejected": statistics.fmean(one["rejected"] for one in runs),
            "overran": [max(shares) for shares in zip(*(one["overran"] for one in runs), strict=True)],
        }  # fmt: skip


def rows_of(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """bsp's and the methods', in the order asked for. Never reached: null."""
    slow = Slow(asked)
    best, targets = slow.targets()
    say(f"target: {', '.join(f'{target:.4f}' for target in targets)} nats per token")
    rows = []
    for method in dict.fromkeys([BASELINE, *asked.methods]):
        row = slow.row(method, best if method == BASELINE else None, targets)
        pairs = zip((rows or [row])[0]["seconds_to_loss"], row["seconds_to_loss"], strict=True)
        row["speedup"] = statistics.median(bsps / own for bsps, own in pairs)
        rows.append(row)
        say(table(row))
    for row in rows:
        row["seconds_to_loss"] = [None if own == float("inf") else own for own in row["seconds_to_loss"]]
    return rows


def table(row: dict[str, Any]) -> str:
    times = ", ".join("-" if own in (None, float("inf")) else f"{own:,.0f}" for own in row["seconds_to_loss"])
    overran = ", ".join(f"{100 * share:.0f}" for share in row["overran"])
    return (
        f"{row['method']:<28} {times:>16} s to the loss   ×{row['speedup']:.2f}   staleness {row['staleness']:.2f}   "
        f"rejected {100 * row['rejected']:.0f} %   lr {row['lr']:g}   overran {overran} %"
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    floats = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="MODE[:KEY=VALUE,...]")
    parser.add_argument("--steps", type=int, default=400, help="after which bsp's loss is the target")
    parser.add_argument("--timed", type=int, default=20, help="steps of bsp that are timed with pads")
    parser.add_argument("--longest", type=float, default=1.5, help="times as many samples the others may use")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=floats, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument(
        "--pads", type=floats, default=[0.5, 0.5, 0.5, 2.0], help="seconds of a gradient, each worker's"
    )
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--every", type=int, default=10, help="steps between two looks at the loss")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows that the loss is of")
    parser.add_argument("--data", default="python", help="text, as for shoal train --data")
    parser.add_argument("--tokenizer", default="bpe")
    parser.add_argument("--cache", default="", help="as data.cache")
    parser.add_argument("--length", type=int, default=256, help="tokens for each worker and step")
    parser.add_argument("--size", choices=["usual", "tiny"], default="usual", help="of the model")
    parser.add_argument("--out", type=Path, default=Path("runs/slow_worker"), help="folder of what has been measured")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    asked = parser.parse_args()
    asked.workers = len(asked.pads)
    asked.out.mkdir(parents=True, exist_ok=True)
    return asked


def main() -> None:
    from shoal.cli.answer import channel

    asked = options()
    with channel("json"):  # runs say much, which is not the answer
        rows = rows_of(asked)
    print(json.dumps({"rows": rows}) if asked.format == "json" else "\n".join(map(table, rows)))


if __name__ == "__main__":
    main()
