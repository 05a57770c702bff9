"""Predicted against measured seconds and memory of steps on this machine, of models in layouts on 1, 2, 4 processes.

    python benchmarks/local_plan.py [--entry FILE] [--steps 10] [--size usual] [--format json]

`shoal calibrate` comes first, on the machine at rest. Each pair is built anew as `shoal train` builds it and takes
steps on random tokens; the median of all but the first two counts, of the slowest rank. Memory: most that a process
has had, of the fullest rank. Pairs of 4 processes are reported apart: on fewer cores they wait for each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from shoal.job import Job, Layout, parse, write
from shoal.job.data import DataOptions
from shoal.job.fits import check_layout
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.train import TrainOptions
from shoal.launch.cores import threads_per_rank
from shoal.launch.pool import Pool
from shoal.planning import entry, kept, local

# Name -> hidden size, width of the feed-forward, blocks, heads, words, sequence length, sequences of a step.
MODELS = {
    "small": (128, 352, 4, 4, 2048, 128, 8),
    "usual": (256, 688, 8, 8, 4096, 256, 8),
    "wide": (512, 1376, 4, 8, 8192, 256, 4),
    "deep": (192, 512, 16, 6, 1024, 256, 4),
    "odd": (250, 667, 4, 5, 4999, 200, 4),
}
TINY = {"tiny": (32, 88, 3, 4, 64, 16, 8)}
LAYOUTS = ("replicas=1", "replicas=2", "fsdp=2,zero=1", "fsdp=2,zero=3", "pipeline=2", "tensor=2")
MORE = ("replicas=1,micro_batch=2", "replicas=1,recompute=block")
FOUR = ("replicas=4", "replicas=2,tensor=2", "fsdp=4,zero=3", "pipeline=4")


def job_of(model: str, layout: str, precision: str = "fp32") -> Job:
    hidden, feed, blocks, heads, words, length, batch = (MODELS | TINY)[model]
    options = ModelOptions(
        vocab_size=words, hidden_size=hidden, intermediate_size=feed, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    job = Job(
        layout=Layout.parse(layout), model=options, data=DataOptions(sequence_length=length),
        optim=OptimOptions(schedule="constant", warmup=0),
        train=TrainOptions(steps=10_000, global_batch=batch, precision=precision, compile="off"),
    )  # fmt: skip
    return replace(job, layout=check_layout(job))


def pairs(size: str) -> list[tuple[str, str, str]]:
    """(model, layout, precision) of each; a model whose sizes a layout does not divide is left out of it."""
    if size == "tiny":
        return [("tiny", layout, "fp32") for layout in ("replicas=1", "replicas=2", "tensor=2", "pipeline=2")]
    found = [
        (model, layout, "fp32") for model in MODELS for layout in LAYOUTS if (model, layout) != ("odd", "tensor=2")
    ]
    found += [("usual", layout, "fp32") for layout in (*MORE, *FOUR)]
    return [*found, ("usual", "replicas=1", "bf16"), ("usual", "replicas=2", "bf16")]


def steps(seat: Any, job: str, number: int) -> dict[str, Any]:
    """seconds: of each step, of the slowest rank. resident, memory: bytes, of the fullest rank, before anything is
    built, and at most."""
    import torch

    from shoal import device, mesh
    from shoal.data.batch import Batch
    from shoal.training.feed import micro_batches
    from shoal.training.parts import assemble

    what = parse(job)
    assert what.layout is not None
    with mesh.build(what.layout, seat, timeout=120) as ranks:
        device.keep_memory(ranks.device, gathering=what.layout.sharers > 1)
        resident = device.resident(ranks.device)
        parts = assemble(what, ranks)
        sequences, length = what.train.global_batch // what.layout.readers, what.data.sequence_length
        tokens_BL, labels_BL = (torch.randint(what.model.vocab_size, (sequences, length)) for _ in range(2))
        place_BL = torch.arange(length).expand(sequences, length).contiguous()
        batch = Batch(
            tokens_BL, labels_BL, torch.zeros_like(tokens_BL), place_BL,
            torch.arange(sequences), torch.ones(sequences, length),
        )  # fmt: skip
        taken = []
        for step in range(number + 2):
            ranks.largest(0.0)
            start = time.perf_counter()
            parts.sync.begin(step)
            parts.sync.end(parts.replica.gradients(micro_batches(batch, what.layout.micro_batch), parts.objective))
            device.synchronize(ranks.device)
            taken.append(ranks.largest(time.perf_counter() - start))
        memory = ranks.largest(device.memory_peak(ranks.device))
        return {"seconds": taken[2:], "resident": ranks.largest(resident), "memory": memory}


def measure(path: Path, size: str, number: int) -> dict[str, Any]:
    known = entry.read(path)
    rows: list[dict[str, Any]] = []
    for model, layout, precision in pairs(size):
        job = job_of(model, layout, precision)
        assert job.layout is not None
        world, predicted = job.layout.world, local.predict(job, known)
        # Processes that have done nothing yet: the most that one has had is of all that it has done.
        with Pool(world) as pool:
            how = {"threads": threads_per_rank(0, world), "job": write(job), "number": number}
            taken = pool.run("benchmarks.local_plan:steps", world, **how)[0]
        measured = median(taken["seconds"])
        row: dict[str, Any] = {"model": model, "layout": layout, "precision": precision, "processes": world}
        row |= {"predicted": predicted.seconds, "measured": measured, "error": predicted.seconds / measured - 1}
        of_memory = kept.predict(job, taken["resident"])
        row |= {"memory_predicted": sum(of_memory.values()), "memory_measured": taken["memory"]}
        row["memory_error"] = row["memory_predicted"] / row["memory_measured"] - 1
        rows.append(row | {"parts": dict(predicted.parts), "parts_bytes": of_memory})
        print(table(rows[-1]), file=sys.stderr, flush=True)
    few = [abs(row["error"]) for row in rows if row["processes"] <= 2]
    many = [abs(row["error"]) for row in rows if row["processes"] > 2]
    return {
        "entry": str(path), "date": known.date, "pairs": len(few), "median": median(few),
        "median_of_4": median(many) if many else None,
        "memory_median": median(abs(row["memory_error"]) for row in rows), "rows": rows,
    }  # fmt: skip


def table(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:<6} {row['layout']:<28} {row['precision']} predicted {1e3 * row['predicted']:8.1f} ms   "
        f"measured {1e3 * row['measured']:8.1f} ms   {row['error']:+.0%}   "
        f"memory {row['memory_predicted'] / 2**20:6.0f} MiB   {row['memory_measured'] / 2**20:6.0f} MiB   "
        f"{row['memory_error']:+.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", type=Path, default=entry.home(), help="what `shoal calibrate` wrote")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", choices=("usual", "tiny"), default="usual")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    asked = parser.parse_args()
    found = measure(asked.entry, asked.size, asked.steps)
    if asked.format == "json":
        print(json.dumps(found))
    else:
        print(
            f"{found['pairs']} pairs on 1 and 2 processes: median error {found['median']:.1%}; "
            f"memory of all {len(found['rows'])}: {found['memory_median']:.1%}"
        )


if __name__ == "__main__":
    main()
