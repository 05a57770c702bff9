"""How long a run with a parameter server stands still when one of its processes is killed.

    python benchmarks/faults.py [--kills 50] [--mode bsp] [--workers 3] [--servers 2] [--format json]

Two runs of `shoal train --sync server` with a tiny model, whose processes get SIGKILL at random times: one with a
single copy of each shard, of which workers, shards and the coordinator are killed in turn; one with two copies, of
which shards are. Nobody is killed before the last one's successor takes part again, and no role more often than a run
allows (five times a minute), so 50 kills of each take about twenty minutes.

Watched is the coordinator's journal, every few milliseconds. resumed: seconds from the kill to the next commit, of a
worker's kill to the next with another worker's gradient. pause: the longest time without such a commit between the
kill and a second after the successor took part; before each kill as long a time without one gives the row `nobody`,
what a pause is by itself. Bars are of the pause's 95th percentile: 1 s for a worker, 5 s for the others.

In the end the run is stopped by SIGTERM and its journal audited, all that was ever in it: versions without a gap, no
push in two commits, no sample used twice or left out, and the last checkpoint is of the last version. The exit code
is 1 where a bar is missed or the audit finds something.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.watch import Watch, processes

from shoal import checkpoint
from shoal.checkpoint import manifest
from shoal.job import Job, Layout, write
from shoal.job.checkpoint import CheckpointOptions
from shoal.job.data import DataOptions
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions

BARS = {"worker": 1.0, "server": 5.0, "coordinator": 5.0, "server, 2 copies": 5.0}
# Seconds between two kills of processes of one name: a sixth loss within 60 s would end the run.
_APART = 12.5
# Seconds after which a run that does not go on has failed, and those that are watched when a successor takes part.
_LONGEST, _AFTER = 120.0, 1.0
_ENDLESS = 10_000_000
Kill = tuple[str, float, float]
"""Role, seconds to the next commit, longest pause."""


class Asked(NamedTuple):
    kills: int
    mode: str
    workers: int
    servers: int
    data: str
    seed: int
    apart: float = _APART


def job_of(asked: Asked, copies: int) -> Job:
    """A gradient takes milliseconds; there is no end, and nothing else than training."""
    return Job(
        layout=Layout(replicas=asked.workers),
        model=ModelOptions(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        ),
        data=DataOptions(source=(asked.data,), tokenizer="bytes", sequence_length=64),
        optim=OptimOptions(lr=1e-3, schedule="constant"),
        train=TrainOptions(
            steps=_ENDLESS, global_batch=4 * asked.workers, precision="fp32", compile="off", validate_every=_ENDLESS
        ),
        checkpoint=CheckpointOptions(every=_ENDLESS),
        sync=SyncOptions(name="server"),
        server=ServerOptions(mode=asked.mode, shards=asked.servers, copies=copies),
    ).validate()


@contextlib.contextmanager
def training(job: Job, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`shoal train` in a process; nothing of it is left afterwards."""
    (folder / "given.toml").write_text(write(job))
    words = [sys.executable, "-m", "shoal.cli.main", "train", str(folder / "given.toml"), "--run-dir"]
    with (folder / "out.txt").open("wb") as out:
        process = subprocess.Popen([*words, str(folder / "run")], stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        # Its fork server ends with it, and with that all ranks.
        process.kill()
        process.wait()


class Faults:
    """One run, and who was killed in it."""

    def __init__(self, asked: Asked, copies: int, folder: Path, process: subprocess.Popen[bytes]):
        self.asked, self.copies, self.folder, self.process = asked, copies, folder, process
        self.watch = Watch(folder / "run" / "server" / "journal")
        self.random = random.Random(asked.seed + copies)
        self.last: dict[str, float] = {}
        self.found: list[Kill] = []

    def begin(self) -> None:
        """Until all take part."""
        self._until(lambda: len(self.watch.commits) >= 5 * self.asked.workers, "did not begin")

    def kill(self, role: str) -> None:
        """One process of this role, at a random time; and then, for as long, nobody."""
        self._until(lambda: bool(self._due(role)), "cannot be waited for")
        name = self.random.choice(self._due(role))
        self.watch.follow(self.random.random())
        before, copies = self._of_name(name), self.watch.copies.get(_number(name), ())
        since = self.last[name] = time.monotonic()
        os.kill(self.random.choice(before), signal.SIGKILL)
        self._until(lambda: self._whole(name, before, copies, since), f"stands still after {name} was killed")
        self.watch.follow(_AFTER)
        worker = _number(name) if role == "worker" else None
        self._tell(role if self.copies == 1 else f"{role}, {self.copies} copies", since, worker)
        length, since = time.monotonic() - since, time.monotonic()
        self.watch.follow(length)
        self._tell("nobody", since)

    def _due(self, role: str) -> list[str]:
        """Names of this role's processes that may be killed now."""
        count = {"worker": self.asked.workers, "server": self.asked.servers}.get(role)
        names = ["shoal-coordinat"] if count is None else [f"shoal-{role}{number}" for number in range(count)]
        return [name for name in names if time.monotonic() - self.last.get(name, -math.inf) > self.asked.apart]

    def _of_name(self, name: str) -> list[int]:
        """The kernel keeps 15 bytes of a name, so that all copies of a shard are alike."""
        return [pid for pid, comm in processes(self.process.pid) if comm.startswith(name)]

    def _whole(self, name: str, before: list[int], copies: tuple[int, ...], since: float) -> bool:
        """Whether somebody else has taken the place, and takes part. copies: of its shard, as they were."""
        now, commits = self._of_name(name), self.watch.since(since)
        if len(now) < len(before) or set(now) == set(before) or not commits:
            return False
        if name.startswith("shoal-worker"):
            worker = _number(name)
            mine = worker, self.watch.incarnations[worker]
            return self.watch.entered[worker] > since and any(key[:2] == mine for _, one in commits for key in one.keys)
        if name.startswith("shoal-server") and self.copies > 1:
            with_new = self.watch.copies.get(_number(name), ())
            return len(with_new) == self.copies and with_new != copies
        return True

    def _tell(self, role: str, since: float, but: int | None = None) -> None:
        """but: the worker whose gradients are not meant."""
        times = [at for at, one in self.watch.since(since) if any(key.worker != but for key in one.keys)]
        edges = [since, *times, time.monotonic()]
        self.found.append((role, edges[1] - since, max(b - a for a, b in pairwise(edges))))
        if role != "nobody":
            say(f"{role}: next commit after {edges[1] - since:.2f} s, longest pause {self.found[-1][2]:.2f} s")

    def _until(self, done: Callable[[], bool], failed: str) -> None:
        deadline = time.monotonic() + _LONGEST
        while not done():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the run {failed}:\n{self.words()}")
            self.watch.follow(0.02)

    def words(self) -> str:
        return "\n".join((self.folder / "out.txt").read_text(errors="replace").splitlines()[-12:])

    def end(self) -> list[str]:
        """Stops the run; what its audit finds."""
        self.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _LONGEST
        while self.process.poll() is None and time.monotonic() < deadline:
            self.watch.follow(0.02)
        newest = next(iter(checkpoint.complete(self.folder / "run" / "checkpoints")), None)
        found = audit(self.watch, manifest.read(newest).values if newest else {})
        if self.process.returncode != 128 + signal.SIGTERM:
            found.append(f"the run ended with code {self.process.returncode}:\n{self.words()}")
        return found


def _number(name: str) -> int:
    """`shoal-server1` -> 1; -1 where there is none."""
    return int("".join(filter(str.isdigit, name)) or -1)


def audit(watch: Watch, last: dict[str, Any]) -> list[str]:
    """One sentence for each thing that is wrong; none: all is well. last: values of the last checkpoint's manifest."""
    commits = [record for _, record in watch.commits]
    found = list(watch.wrong)
    if [record.version for record in commits] != list(range(1, len(commits) + 1)):
        found.append("the journal's versions are not 1, 2, 3, …")
    keys = [key for record in commits for key in record.keys]
    if len(set(keys)) < len(keys):
        found.append(f"{len(keys) - len(set(keys))} pushes are in two commits")
    skipped = [record.skipped for record in watch.rejected if record.skipped.stop > record.skipped.start]
    used = merged([tuple(samples) for record in commits for samples in record.samples] + [*map(tuple, skipped)], found)
    if not last:
        return [*found, "nothing was saved"]
    if (saved := int(last["update"]["updates"])) != len(commits):
        found.append(f"the last checkpoint is of version {saved}, the last commit is {len(commits)}")
    told = merged([(0, int(last["position"])), *map(tuple, last["sync"]["exceptions"])], found)
    if told != used:
        found.append(f"samples {used} were used, the last checkpoint says {told}")
    return found


def merged(ranges: list[tuple[int, ...]], found: list[str]) -> list[tuple[int, int]]:
    """Neighbours as one range; samples that are in two of them are added to `found`."""
    whole: list[tuple[int, int]] = []
    for start, stop in sorted((a, b) for a, b in ranges if b > a):
        if whole and start < whole[-1][1]:
            found.append(f"samples {start} to {min(stop, whole[-1][1]) - 1} were used twice")
        if whole and start <= whole[-1][1]:
            whole[-1] = whole[-1][0], max(stop, whole[-1][1])
        else:
            whole.append((start, stop))
    return whole


def one_run(asked: Asked, copies: int, roles: list[str]) -> tuple[list[Kill], list[str], int]:
    """(each kill, what the audit finds, how often roles were started again)."""
    with tempfile.TemporaryDirectory() as name, training(job_of(asked, copies), Path(name)) as process:
        faults = Faults(asked, copies, Path(name), process)
        faults.begin()
        for _ in range(asked.kills):
            for role in roles:
                faults.kill(role)
        wrong = faults.end()
        again = (Path(name) / "out.txt").read_text(errors="replace").count(": started again")
        return faults.found, wrong, again


def measure(asked: Asked) -> dict[str, Any]:
    """rows: of each role, and of nobody. started_again: in both runs; as often as somebody was killed, if nobody else
    was drawn into it. audit: what is wrong."""
    kills, wrong, again = [], [], 0
    for copies, roles in ((1, ["worker", "server", "coordinator"]), (2, ["server"])):
        found, audited, started = one_run(asked, copies, roles)
        kills += found
        wrong += [f"{copies} copies: {sentence}" for sentence in audited]
        again += started
    rows = [row(role, [kill for kill in kills if kill[0] == role]) for role in [*BARS, "nobody"]]
    return {**asked._asdict(), "rows": rows, "started_again": again, "audit": wrong}


def row(role: str, kills: list[Kill]) -> dict[str, Any]:
    pauses, bar = [pause for _, _, pause in kills], BARS.get(role)
    return {
        "role": role, "times": len(kills), "resumed_median": statistics.median(kill[1] for kill in kills),
        "median": statistics.median(pauses), "p95": quantile(pauses, 0.95), "max": max(pauses), "bar": bar,
        "within": bar is None or quantile(pauses, 0.95) <= bar,
    }  # fmt: skip


def quantile(values: list[float], part: float) -> float:
    """The smallest value that so large a part of all is not above."""
    return sorted(values)[math.ceil(part * len(values)) - 1]


def table(found: dict[str, Any]) -> str:
    lines = ["killed              times   resumed     pause: median      p95      max   bar of p95"]
    for one in found["rows"]:
        bar = "" if one["bar"] is None else f"{one['bar']:.0f} s {'met' if one['within'] else 'MISSED'}"
        lines.append(
            f"{one['role']:<18} {one['times']:>6} {one['resumed_median']:>7.2f} s {one['median']:>15.2f} s "
            f"{one['p95']:>6.2f} s {one['max']:>6.2f} s   {bar}"
        )
    lines.append(f"roles started again {found['started_again']} times")
    return "\n".join([*lines, *(found["audit"] or ["audit: nothing lost, nothing twice"])])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each role")
    parser.add_argument("--mode", default="bsp", help="in bsp and quorum the others wait for who is lost")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--data", default="python", help="text, as for shoal train --data")
    parser.add_argument("--seed", type=int, default=0, help="of when and whom")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    given = vars(parser.parse_args())
    form = given.pop("format")
    found = measure(Asked(**given))
    print(json.dumps(found) if form == "json" else table(found))
    sys.exit(bool(found["audit"]) or not all(one["within"] for one in found["rows"]))


if __name__ == "__main__":
    main()
