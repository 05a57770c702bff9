"""`--sync.codec auto` on one machine against no codec: whole runs of `shoal train`, their start included.

    python benchmarks/auto.py [--pairs 10] [--steps 60] [--workers 2] [--format json]

`auto` has to find out at the start that the link is fast, and must cost nothing then. Runs take turns, each with the
same text, model (10 M parameters, those of benchmarks/network.py) and number of steps. whole: a run's seconds from the
command to its end. step: the median of its steps. Beside the ratios of pairs, and the lower 95 % bound, that of `none`
against itself in as many more runs (A/A).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.network import base_job
from benchmarks.paired import interleave, ratio

from shoal.data.prepare import prepare
from shoal.job import Job, write
from shoal.job.data import DataOptions
from shoal.job.run import RunOptions
from shoal.launch.train import absolute_paths
from shoal.observe import metrics

CONTENDERS = {"none": "none", "auto": "auto", "none again": "none"}


def whole(job: Job) -> tuple[float, float, str]:
    """(seconds of the run, median of its steps, the codec that it took)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.toml").write_text(write(job))
        words = [sys.executable, "-m", "shoal.cli.main", "train", str(folder / "job.toml"), "--run-dir"]
        start = time.monotonic()
        done = subprocess.run([*words, str(folder / "run")], capture_output=True, text=True)
        seconds = time.monotonic() - start
        if done.returncode:
            raise RuntimeError(f"shoal train ended with code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
        rows = metrics.read(folder / "run")
        codec = next(line for line in (folder / "run" / "job.toml").read_text().splitlines() if "codec =" in line)
    return seconds, statistics.median(row["seconds"] for row in rows[5:]), codec.partition("=")[2].strip(' "')


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    data = DataOptions(source=(asked.data,), sequence_length=asked.length, cache=asked.cache)
    corpus = prepare(data, say=lambda text: None)
    base = absolute_paths(base_job(asked, corpus, data))
    train = replace(base.train, steps=asked.steps, validate_every=10 * asked.steps, validate_tokens=asked.length)
    base = replace(base, train=train, run=RunOptions(threads=1))
    steps: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    took: dict[str, str] = {}

    def contender(name: str) -> Callable[[], float]:
        job = replace(base, sync=replace(base.sync, codec=CONTENDERS[name]))

        def run() -> float:
            seconds, step, took[name] = whole(job)
            steps[name].append(step)
            return seconds

        return run

    seconds = interleave({name: contender(name) for name in CONTENDERS}, asked.pairs)
    return {"pairs": asked.pairs, "codecs": took, **compared("whole", seconds), **compared("step", steps)}


def compared(what: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Speed of `auto` as a part of that without a codec."""
    speed, low = ratio(seconds["none"], seconds["auto"])
    return {
        f"{what}_seconds": {name: statistics.median(column) for name, column in seconds.items()},
        f"{what}_speed": speed, f"{what}_low": low, f"{what}_aa": ratio(seconds["none"], seconds["none again"])[0],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    lines = [f"auto took {found['codecs']['auto']}; {found['pairs']} pairs, medians:"]
    for what in ("whole", "step"):
        of = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in found[f"{what}_seconds"].items())
        speed, low, same = (found[f"{what}_{part}"] for part in ("speed", "low", "aa"))
        lines.append(f"  {what:<6} {of}   speed of auto ÷ none {speed:.3f} (≥ {low:.3f})   A/A {same:.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60, help="of a run (default 60)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", default="python", help="text, as for shoal train --data")
    parser.add_argument("--cache", default="", help="as data.cache")
    parser.add_argument("--length", type=int, default=256, help="tokens for each worker and step")
    parser.add_argument("--size", choices=["usual", "tiny"], default="usual", help="of the model")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    asked = parser.parse_args()
    found = measure(asked)
    print(json.dumps(found) if asked.format == "json" else table(found))


if __name__ == "__main__":
    main()
