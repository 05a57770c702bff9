"""Methods of `benchmarks/network.py` with a parameter server: whole runs of `shoal train`, since staleness depends on
the network. Server shards share hosts with workers, or have hosts behind theirs.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.hosts import Hosts

from shoal.job import Job, write
from shoal.job.run import RunOptions
from shoal.observe import metrics

# Seconds that a run may take until its first step, and that it has to end when it is asked to.
_BEGIN, _END = 300.0, 120.0


def train(job: Job, hosts: Hosts | None, steps: int, least: int, target: float | None) -> dict[str, Any]:
    """Trains until the loss on held-out text is `target` or less, but at least `least` and at most `steps` steps.

    hosts: one for each worker, those behind them for servers; None = all on this machine's loopback. losses: [step,
    loss] of each look, by the first worker with the weights that it pulled. seconds: since the first step, looks
    included. moved: bytes that workers sent and received; tokens: that they trained on.
    """
    assert job.layout is not None
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        run, token = Path(folder) / "run", Path(folder) / "token"
        token.write_text(secrets.token_hex(16))
        parts = placed(job, len(hosts.names) if hosts else job.layout.replicas)
        job = replace(
            job, run=RunOptions(dir=str(run), threads=1), train=replace(job.train, steps=steps),
            server=replace(
                job.server, host=hosts.addresses[0] if hosts else "127.0.0.1", token=str(token),
                elsewhere=tuple(parts) if hosts else (),
            ),
        )  # fmt: skip
        recipe = Path(folder) / "job.toml"
        recipe.write_text(write(job))
        logs = [Path(folder) / "train.log"]
        started = [ending.enter_context(_process(hosts, 0, ["train", str(recipe)], logs[0]))]
        for name, host in parts.items() if hosts else ():
            words = ["join", str(run), name, "--wait", f"{_BEGIN:g}"]
            # Workers listen to nobody.
            words += ["--host", hosts.addresses[host]] if hosts and name.startswith("server") else []
            logs.append(Path(folder) / f"{name.replace(' ', '-')}.log")
            started.append(ending.enter_context(_process(hosts, host, words, logs[-1])))
        return _followed(started, run, logs, least, target)


def placed(job: Job, hosts: int) -> dict[str, int]:
    """On which host each part of the job is that is not on the first one, where the coordinator and worker 0 are.

    hosts: as many as workers, and then shards take turns on all of them; where there are more, on those.
    """
    assert job.layout is not None
    workers = job.layout.replicas
    apart = hosts - workers
    servers = {n: workers + n % apart if apart else n % workers for n in range(job.server.shards)}
    found = {f"worker {number}": number for number in range(1, workers)}
    return found | {f"server {number}": host for number, host in servers.items() if host}


@contextlib.contextmanager
def _process(hosts: Hosts | None, host: int, words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "shoal.cli.main", *words]
    with log.open("wb") as file:
        process = subprocess.Popen(
            hosts.command(host, command) if hosts else command, stdout=file, stderr=file, stdin=subprocess.DEVNULL
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _followed(
    started: Sequence[subprocess.Popen[bytes]], run: Path, logs: Sequence[Path], least: int, target: float | None
) -> dict[str, Any]:
    """What the run's metrics say, when it has come far enough. started: `shoal train`, and parts that join it."""
    deadline = time.monotonic() + _BEGIN
    while True:
        rows = metrics.read(run)
        looks = [row for row in rows if row.get("val_loss") is not None]
        reached = target is not None and any(row["val_loss"] <= target for row in looks)
        if reached and rows[-1]["step"] >= least:
            break
        for process, log in zip(started, logs, strict=True):
            if process.poll():
                raise RuntimeError(f"{log.stem} ended with code {process.returncode}:\n{log.read_text()[-4000:]}")
        if started[0].poll() is not None:
            break
        if not rows and time.monotonic() > deadline:
            raise RuntimeError(f"no step within {_BEGIN:g} s:\n{logs[0].read_text()[-4000:]}")
        time.sleep(0.5)
    rows = metrics.read(run)
    since, elapsed = 0.0, {}
    for row in rows:
        since += row["seconds"]
        elapsed[row["step"]] = since
    looks = [row for row in rows if row.get("val_loss") is not None]
    return {
        "losses": [[row["step"], row["val_loss"]] for row in looks],
        "seconds": [elapsed[row["step"]] for row in looks],
        "moved": sum(row["sent_bytes"] + row["received_bytes"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "total_seconds": since,
        "steps": rows[-1]["step"],
        "staleness": _counted(rows),
        "rejected": sum(row["rejected"] for row in rows),
    }


def _counted(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows:
        for late, count in row["staleness"].items():
            found[late] = found.get(late, 0) + count
    return json.loads(json.dumps(dict(sorted(found.items(), key=lambda pair: int(pair[0])))))
