"""Every row of the equivalence suite, and every pair that is refused, is written down in docs/decisions.md: none can
leave, or become weaker, unseen. `python -m tests.equivalence.test_rows` prints the list as it is now."""

from __future__ import annotations

from itertools import combinations, groupby
from pathlib import Path
from textwrap import fill
from types import ModuleType

from shoal.job.fits import EXCLUDED
from shoal.job.layout import SCHEDULES
from shoal.launch import excluded
from tests.equivalence import (
    cases,
    test_attention_dropout,
    test_data_parallel,
    test_experts,
    test_layouts,
    test_muon,
    test_overlap,
)  # fmt: skip

MODULES = (test_data_parallel, test_layouts, test_attention_dropout, test_overlap, test_experts, test_muon)


def rows(module: ModuleType) -> set[str]:
    """Of all parametrised tests: the test and one of its cases."""
    found = set()
    for name, test in vars(module).items():
        marks = getattr(test, "pytestmark", [])
        nightly = any(mark.name == "nightly" for mark in marks)
        test_name = f"{module.__name__.rpartition('test_')[2]}.{name.removeprefix('test_')}{' (nightly)' * nightly}"
        for mark in marks:
            if mark.name == "parametrize":
                found |= {f"{test_name}: {_case(value)}" for value in mark.args[1]}
    return found


def _case(value: object) -> str:
    """`Row` is a tuple too."""
    return " | ".join(value) if type(value) is tuple else str(value)


def written_down() -> set[str]:
    """A line says what its rows have in common, up to its last colon, and what each has besides, apart by `; `. It goes
    on where the next one is indented."""
    block = Path("docs/decisions.md").read_text().partition("```rows\n")[2].partition("\n```")[0]
    found = set()
    for line in block.replace("\n  ", " ").splitlines():
        common, _, cases_of_it = line.rpartition(": ")
        found |= {f"{common}: {case}" for case in cases_of_it.split("; ")}
    return found


def all_rows() -> set[str]:
    refused = {f"refused: {pair.one} x {pair.other}" for pair in EXCLUDED}
    refused |= {f"refused by parallelize: {one.what}" for one in excluded.EXCLUDED}
    return refused.union(*(rows(module) for module in MODULES))


def test_no_row_leaves_or_comes_without_an_entry():
    assert all_rows() == written_down()


def test_all_that_is_promised_has_a_row():
    singles, pairs = " ".join(test_layouts.SINGLES), [cases.Layout.parse(layout) for layout in test_layouts.PAIRS]
    assert all(f"schedule={name}" in singles for name in SCHEDULES)
    assert "context=2,micro_batch=6" in test_layouts.SINGLES  # ring
    assert "context_by=ulysses" in singles
    for one, other in combinations(("replicas", "pipeline", "fsdp", "context", "tensor"), 2):
        assert any(getattr(layout, one) > 1 < getattr(layout, other) for layout in pairs)
    assert set(test_layouts.SINGLES) <= set(test_experts.SINGLES)
    assert set(test_layouts.PAIRS) <= set(test_experts.PAIRS)
    axes = ("replicas", "pipeline", "fsdp", "context", "tensor")
    triples = [cases.Layout.parse(layout) for layout in test_layouts.TRIPLES]
    for three in combinations(axes, 3):
        assert any(all(getattr(layout, axis) > 1 for axis in three) for layout in triples)
    assert set(test_layouts.TRIPLES) <= {layout for _, layout in test_experts.EVERY}


if __name__ == "__main__":
    for common, group in groupby(sorted(all_rows()), lambda row: row.rpartition(": ")[0]):
        line = f"{common}: {'; '.join(row.rpartition(': ')[2] for row in group)}"
        print(fill(line, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
