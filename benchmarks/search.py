"""How long `shoal plan` searches: Llama-3 405B on 16,384 H100, and a model of 1 T parameters with experts on 65,536.

    python benchmarks/search.py [--runs 5] [--format json]

Each run is a process of its own with one thread, so nothing is remembered. search: seconds between question and answer;
cpu: of the processor meanwhile; command: of `shoal plan` as a user types it, from its start to its end. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

CASES = (("llama3-405b", "h100x16384"), ("1t-moe", "h100x65536"))
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def one(model: str, where: str) -> dict[str, Any]:
    """In a fresh process: this file's own, asked for one search."""
    command = [sys.executable, __file__, "--one", model, where]
    out = subprocess.run(command, env={**os.environ, **_ONE_THREAD}, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(out.stdout)
    began = time.perf_counter()
    plan = [sys.executable, "-m", "shoal.cli.main", "plan", "--model", model, "--cluster", where]
    subprocess.run(plan, env={**os.environ, **_ONE_THREAD}, check=True, capture_output=True)
    return found | {"command": time.perf_counter() - began}


def measured(model: str, where: str) -> dict[str, Any]:
    from shoal.planning import asked, cluster, search

    question = asked.of_model(model, cluster.named(where), asked.Wanted())
    cpu = time.process_time()
    answer = search.search(question)
    return {
        "cpu": time.process_time() - cpu, "search": answer.seconds, "candidates": answer.candidates,
        "compared": answer.compared, "best": str(answer.plans[0].layout),
    }  # fmt: skip


def rows(runs: int) -> list[dict[str, Any]]:
    found = []
    for model, where in CASES:
        each = [one(model, where) for _ in range(runs)]
        medians = {name: statistics.median(run[name] for run in each) for name in ("search", "cpu", "command")}
        found.append({**each[0], "model": model, "cluster": where, **medians})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--format", choices=["text", "json"], default="text")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "CLUSTER"), help="one search, in this process")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(*asked.one)))
        return
    found = rows(asked.runs)
    if asked.format == "json":
        print(json.dumps({"rows": found}))
        return
    for row in found:
        print(
            f"{row['model']} on {row['cluster']}: search {row['search']:.2f} s (processor {row['cpu']:.2f} s), whole "
            f"command {row['command']:.2f} s; {row['candidates']:,} layouts, {row['compared']:,} computed in full"
        )


if __name__ == "__main__":
    main()
