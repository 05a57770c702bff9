"""What docs/why-a-layout-wins.md shows is what the planner says now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from benchmarks import figures

PAGE = Path(__file__).parents[2] / "docs" / "why-a-layout-wins.md"
# Of a line of `--table`, the words of the page that have its numbers.
SENTENCES = {
    "roofline": "{0:g} TFLOP/s ÷ {1:g} TB/s",
    "TFLOP/s by rows": "With 64 tokens it reaches {1:g} TFLOP/s, with 256 {3:g}",
    "TFLOP/s by tensor": "with a sequence of 8,192 {1:g}",
    "replicas=8": "would need {0:.3g} GiB of its 80",
    "fsdp=8,zero=1": "{0:.3g} are left",
    "fsdp=8,zero=2": "gradients too, {0:.2g}",
    "fsdp=8,zero=3": "weights too, {0:g}",
    "fsdp=8,zero=3,recompute=block": "brings it to {0:.2g} GiB",
    "tensor=8": "activations too: {0:g}",
    "exchanges of tensor=8": "is hidden ({2:g} s)",
    "bubble of 1f1b": "8 ranks and 8 micro-batches {0:g} %, with 128 {4:g} %",
    "bubble of interleaved ×4": "{0:g} % and {4:g} %",
    "bubble of zbv": "waits {1:g} % with 16 micro-batches",
    "exchanges of tensor=1": "shows {2:g} s of it",
    "exchanges of tensor=16": "takes {1:.3g} s",
    "replicas=2,pipeline=32,context=8": "The winner ({0:g} s)",
    "pipeline=4,fsdp=16,context=2,tensor=4": "four stages ({0:g} s)",
}


def test_waiting_is_that_of_the_closed_form():
    """(p − 1) / (m + p − 1) of GPipe and 1F1B (Narayanan et al. 2021, section 2.2)."""
    found, ranks = figures.bubbles(), figures.STAGES
    for number, micro_batches in enumerate(figures.MICRO_BATCHES):
        share = (ranks - 1) / (micro_batches + ranks - 1)
        assert found["gpipe"][number] == pytest.approx(share, rel=1e-9)
        assert found["1f1b"][number] == pytest.approx(share, rel=1e-9)
        of_loops = (ranks - 1) / (4 * micro_batches + ranks - 1)
        assert found["interleaved ×4"][number] == pytest.approx(of_loops, rel=1e-9)


def test_no_product_is_over_the_roof():
    found = figures.roofline()
    for intensity, rate in [*found["tensor"].values(), *found["rows"].values()]:
        assert 0 < rate < min(found["peak"], intensity * found["bandwidth"])


@pytest.mark.nightly
def test_the_page_tells_the_planners_numbers():
    """Each number of `--table` that the page uses is in the sentence about it."""
    page = " ".join(PAGE.read_text().split())
    told = {line.split(":")[0].strip("- `"): line for line in figures.told()}

    def numbers(name: str) -> list[str]:
        return re.findall(r"\d+(?:\.\d+)?", told[name].partition(":")[2].replace(",", ""))

    for name, form in SENTENCES.items():
        assert form.format(*map(float, numbers(name))) in page, (form, told[name])
