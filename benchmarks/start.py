"""Seconds from nothing to N ranks that have all answered, through the fork server.

python benchmarks/start.py [--ranks 8] [--times 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from shoal.launch.pool import Pool


def present(seat: Any) -> int:
    return seat.member


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    seconds = []
    for _ in range(options.times):
        start = time.perf_counter()
        with Pool(options.ranks) as pool:
            assert pool.run("benchmarks.start:present", options.ranks) == list(range(options.ranks))
            seconds.append(time.perf_counter() - start)
    print(json.dumps({"ranks": options.ranks, "median_s": statistics.median(seconds), "worst_s": max(seconds)}))


if __name__ == "__main__":
    main()
