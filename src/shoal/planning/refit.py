"""`python -m shoal.planning.refit`: fits the constants again on the published rows, and writes constants.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from shoal.planning import constants, fit, published
from shoal.planning.constants import Constants

_HEAD = """# Constants of the cost model, fitted on published_fit.csv; written by `python -m shoal.planning.refit`.
# prior, spread: what each was believed to be before any row, and the standard deviation of its logarithm.
# rows: whose prediction moves by more than 0.2 % where it changes by a tenth. With none it is its prior.
"""


def refitted() -> Constants:
    """From the priors on."""
    rows, known = published.read(published.FIT), constants.load()
    found = fit.fit(rows.work, rows.seconds, rows.table, known.at(known.priors))
    felt = fit.felt(rows.work, found)
    return Constants(tuple(c._replace(rows=int(n)) for c, n in zip(found.all, felt, strict=True)))


def text(found: Constants) -> str:
    """As TOML."""
    lines = [_HEAD.rstrip("\n")]
    for one in found.all:
        place = ".".join(part for part in (one.kind, one.group, one.name) if part)
        lines += ["", f"[{place}]", f"value = {one.value:.6g}", f"prior = {one.prior:.6g}"]
        lines += [f"spread = {one.spread:g}", f"rows = {one.rows}"]
        if one.what:
            lines.append(f'what = "{one.what}"')
    return "\n".join(lines) + "\n"


def main() -> None:
    path = Path(__file__).parent / constants.FILE
    path.write_text(text(refitted()), encoding="utf-8")
    print(f"{path}: {len(constants.load().all)} constants", file=sys.stderr)


if __name__ == "__main__":
    main()
