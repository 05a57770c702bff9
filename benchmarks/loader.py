"""How fast the loader makes batches: one core, the token store warm in memory.

    python benchmarks/loader.py [--tokens 8000000] [--batch 32] [--length 256] [--seconds 3]

Prints one JSON object; mtok_per_s is the median over blocks of 100 batches, of positions (32 × 256 a batch).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from shoal.data.loader import Loader
from shoal.data.prepared import Counts, Prepared
from shoal.data.store import Writer
from shoal.job.data import DataOptions


def corpus(folder: Path, tokens: int) -> Prepared:
    """Random tokens in documents of mixed length, log-normal with a median of 600 tokens."""
    rng = np.random.default_rng(0)
    counts = {}
    for split, share in (("train", 1.0), ("validation", 0.02)):
        writer = Writer(folder / split, 4096)
        while writer.tokens < share * tokens:
            length = int(np.clip(rng.lognormal(np.log(600), 1.2), 2, 100_000))
            writer.add(rng.integers(0, 4096, length), np.array([length]), True)
        writer.close()
        counts[split] = Counts(documents=writer.documents, tokens=writer.tokens)
    return Prepared(folder, "", 4096, 0, 0, counts["train"], counts["validation"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--format", choices=("json",), default="json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options = DataOptions(sequence_length=asked.length)
        loader = Loader(corpus(Path(folder), asked.tokens), options, "train", asked.batch)
        position, speeds = 0, []
        end = time.perf_counter() + asked.seconds
        while time.perf_counter() < end or len(speeds) < 3:
            start = time.perf_counter()
            for _ in range(100):
                loader.batch(position, 0, 1)
                position += asked.batch
            speeds.append(100 * asked.batch * asked.length / (time.perf_counter() - start) / 1e6)
    # The first block reads the store for the first time.
    figures = {"mtok_per_s": round(statistics.median(speeds[1:]), 1), "blocks": len(speeds) - 1}
    print(json.dumps({**figures, "batch": asked.batch, "length": asked.length, "samples": loader.samples}))


if __name__ == "__main__":
    main()
