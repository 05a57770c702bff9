"""`python -m shoal.planning.refit`: fits the constants again on the published rows, and writes constants.toml."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from shoal.planning import constants, fit, memory, published
from shoal.planning.constants import MEMORY, Constants, OfMemory

_HEAD = """# Constants of the cost model, fitted on published_fit.csv; written by `python -m shoal.planning.refit`.
# prior, spread: what each was believed to be before any row, and the standard deviation of its logarithm.
# rows: whose prediction moves by more than 0.2 % where it changes by a tenth. With none it is its prior.
# Those of memory have no priors, and were fitted apart from those of time.
"""


# Steps of half a GiB: more than 8 GiB of a device are not beside the allocator.
_MOST = 17


def refitted() -> Constants:
    """From the priors on."""
    rows, known = published.read(published.FIT), constants.load()
    found = fit.fit(rows.work, rows.seconds, rows.table, known.at(known.priors))
    felt = fit.felt(rows.work, found)
    return Constants(tuple(c._replace(rows=int(n)) for c, n in zip(found.all, felt, strict=True)))


def refitted_memory() -> dict[str, OfMemory]:
    """The two of memory, apart from those of time: of a grid, those with the least median error on published rows of
    what devices had in use."""
    rows = published.read(published.FIT).filled
    whole = (rows.kind == "device") & ~rows.out
    measured, found = rows.measured[whole], memory.cost(rows.work.take(whole)).allocated / 2**30

    def error(pair: tuple[float, float]) -> float:
        return float(np.median(np.abs((found * pair[0] + pair[1]) / measured - 1)))

    grid = [(round(0.9 + 0.02 * i, 2), 0.5 * j) for i in range(26) for j in range(_MOST)]
    fragments, beside = grid[int(np.argmin([error(pair) for pair in grid]))]
    best = {"fragments": fragments, "beside": beside}
    known = constants.memory()
    return {name: known[name]._replace(value=value, rows=len(measured)) for name, value in best.items()}


def text(found: Constants, of_memory: dict[str, OfMemory]) -> str:
    """As TOML."""
    lines = [_HEAD.rstrip("\n")]
    for one in found.all:
        place = ".".join(part for part in (one.kind, one.group, one.name) if part)
        lines += ["", f"[{place}]", f"value = {one.value:.6g}", f"prior = {one.prior:.6g}"]
        lines += [f"spread = {one.spread:g}", f"rows = {one.rows}"]
        if one.what:
            lines.append(f'what = "{one.what}"')
    for name, its in of_memory.items():
        lines += ["", f"[{MEMORY}.{name}]", f"value = {its.value:.6g}", f"rows = {its.rows}", f'what = "{its.what}"']
    return "\n".join(lines) + "\n"


def main() -> None:
    path = Path(__file__).parent / constants.FILE
    path.write_text(text(refitted(), refitted_memory()), encoding="utf-8")
    print(f"{path}: {len(constants.load().all)} constants", file=sys.stderr)


if __name__ == "__main__":
    main()
