"""`shoal calibrate`: measures this machine, with 1, 2, … ranks computing at once, and writes what it found."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import JobError
from shoal.job.check import at_least, require
from shoal.launch.cores import cores, threads_per_rank
from shoal.launch.pool import Pool
from shoal.observe import files, machine
from shoal.planning import entry
from shoal.planning.entry import Entry, Side

MOST_RANKS = 64
_ENTRY = "shoal.launch.measure:side"
# Seconds that are kept for starting ranks and for what overruns, a part of all; ranks that hang are given up after so
# many times what they were given.
_KEPT, _HANGS = 0.15, 4.0
_LEAST = 5.0
_MOST = 3600


def worlds(ranks: int) -> list[int]:
    """How many compute at once: 1, 2, 4, … and `ranks`."""
    return sorted({2**i for i in range(ranks.bit_length()) if 2**i <= ranks} | {ranks})


def calibrate(
    ranks: int = 4, seconds: float = 60.0, out: str = "", say: Callable[[str], None] = lambda line: None
) -> tuple[Entry, Path]:
    """Measures and writes the entry to `out`, or where `entry.home` says; returns it and where it is.

    ranks: most that compute at once. On GPUs, as many as there are at most. seconds: that all of it may take. say: gets
    a sentence now and then. Raises JobError for the user's mistakes, RankError where a rank fails.
    """
    at_least("--ranks", ranks, 1)
    require(ranks <= MOST_RANKS, f"--ranks {ranks} is more than {MOST_RANKS}", "calibrate as many as will run here")
    at_least("--seconds", seconds, _LEAST)
    require(
        seconds <= _MOST, f"--seconds {seconds:g} is more than an hour", f"--seconds {_MOST} or less; 60 are enough"
    )
    begin = time.monotonic()
    path = Path(out).expanduser() if out else entry.home()
    # Before a minute is spent for nothing.
    _keep(path, None)
    with Pool(1, ["shoal.launch.measure"]) as pool:
        found = _sides(pool, ranks, begin, seconds, say)
    facts = found[0]
    made = Entry(
        machine=machine.host(), system=machine.system(), device=str(facts["device"]), kind=str(facts["kind"]),
        cores=cores(), memory=float(facts["memory"]), date=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - begin, 1), versions=machine.versions(),
        sides=tuple(msgspec.convert(one["side"], Side) for one in found),
    )  # fmt: skip
    _keep(path, entry.write(made))
    return made, path


def _sides(pool: Pool, ranks: int, begin: float, seconds: float, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What rank 0 of each number of ranks found."""
    found: list[dict[str, Any]] = []
    wanted = worlds(ranks)
    for index, world in enumerate(wanted):
        if found and found[0]["kind"] != "cpu" and world > int(found[0]["devices"]):
            say(f"not with {world} ranks: there are {found[0]['devices']} devices")
            break
        left = begin + (1 - _KEPT) * seconds - time.monotonic()
        share = max(0.5, left / (len(wanted) - index))
        say(f"measuring with {world} rank{'s' * (world > 1)}, about {share:.0f} s")
        threads = threads_per_rank(0, world)
        # Ranks that are forked use up what they were given.
        until = time.time() + share
        values = pool.run(_ENTRY, world, threads=threads, timeout=60 + _HANGS * share, until=until, spread=share)
        found.append(values[0])
    return found


def _keep(path: Path, text: str | None) -> None:
    """Writes the entry, or finds out whether it could be. JobError where not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            probe = path.with_name(f".{path.name}.try")
            probe.write_bytes(b"")
            probe.unlink()
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
        else:
            files.replace(path, text.encode())
    except OSError as error:
        what = f"the entry cannot be written: {error.strerror or error}"
        raise JobError(what, where=str(path), fix="name another file: --out FILE") from None


def summary(made: Entry) -> str:
    """For people, with each number of ranks one line: what all of them do together."""
    lines = [f"{made.machine}: {made.device}, {made.cores} cores; measured in {made.seconds:.0f} s, {made.date}"]
    names = ("ranks", "threads", "products fp32", "bf16", "adding", "launch", "all-reduce")
    lines.append("{:>5} {:>8} {:>15} {:>15} {:>11} {:>9} {:>11}".format(*names))
    for side in made.sides:
        rates = {}
        for name, known in side.precisions.items():
            best = max(
                2 * m * n * k / t for (m, n, k), t in zip(known.products.shapes, known.products.seconds, strict=True)
            )
            rates[name] = f"{side.ranks * best / 1e9:.1f} GFLOP/s"
        adding = side.precisions["fp32"].operators["add"]
        added = 12 * adding.sizes[-1] / adding.seconds[-1] * side.ranks / 1e9
        reduced = side.exchanges.get("all_reduce")
        across = f"{reduced.sizes[-1] / reduced.seconds[-1] / 1e9:.2f} GB/s" if reduced else "–"
        lines.append(
            f"{side.ranks:>5} {side.threads:>8} {rates.get('fp32', '–'):>15} {rates.get('bf16', '–'):>15} "
            f"{f'{added:.1f} GB/s':>11} {f'{1e6 * side.launch:.1f} µs':>9} {across:>11}"
        )
    return "\n".join(lines)
