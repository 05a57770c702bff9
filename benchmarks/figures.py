"""The figures of docs/why-a-layout-wins.md, drawn by the planner.

    python benchmarks/figures.py [--out docs/figures] [--table]

Everything in them is computed when they are drawn, by the functions that `shoal plan` uses; nothing is measured.
--table: the numbers that the page tells instead, one line each. Drawing needs matplotlib (`pip install 'shoal[docs]'`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shoal.job.layout import Layout
from shoal.planning import asked, cluster, constants, products, timeline, work
from shoal.planning.constants import Rates
from shoal.planning.plan import Plan
from shoal.planning.schedules import FORWARD
from shoal.planning.search import SPARE, Space, Split
from shoal.planning.timeline import Seconds, Timeline

# The pages' example, and a small one whose bars can be compared with a device's memory.
MODEL, WHERE = "llama3-70b", "h100x512"
SMALL, NODE = "llama3-8b", "h100x8"
TENSOR = (1, 2, 4, 8, 16)
# A sequence of the example; rows of a product that are shown beside it.
ROWS = (64, 256, 1024, 8192)
STAGES, SCHEDULES = 8, (("gpipe", 1), ("1f1b", 1), ("interleaved", 4), ("zbv", 2))
MICRO_BATCHES = (8, 16, 32, 64, 128)
WAYS = {
    "replicas=8": "every device has all",
    "fsdp=8,zero=1": "the optimizer's state shared",
    "fsdp=8,zero=2": "gradients too",
    "fsdp=8,zero=3": "weights too",
    "fsdp=8,zero=3,recompute=block": "and activations computed again",
    "tensor=8": "every matrix cut in eight",
}
KEPT = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "beside")
PARTS = ("compute", "tensor", "context", "fsdp", "data", "messages", "bubble", "optimizer")
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")


def space(model: str, where: str) -> Space:
    return Space(asked.of_model(model, cluster.named(where), asked.Wanted()))


def planned(of: Space, text: str, chunks: int = 1) -> Plan:
    found = of.find(Layout.parse(f"{text},micro_batch=1"), chunks)
    assert found is not None, text
    return of.plan(found)


def roofline() -> dict[str, Any]:
    """Of the feed-forward's first matrix of the example's block: rate, FLOP/s, by FLOP of each byte that is moved.

    roof: the device's peak and bandwidth. tensor: a whole sequence, the matrix cut by so many ranks; rows: the whole
    matrix, so many tokens."""
    of = space(MODEL, WHERE)
    shape, device = of.question.shape, of.pool.device
    alone = {name: 1.0 for name in work.LAYOUT} | {name: 0.0 for name in ("zero", "shards", "recompute", "low")}
    known, stack = constants.load(), of.stack
    row = {**alone, **{name: float(getattr(stack, name)) for name in work.STACK}, **shape.columns, **of.pool.columns}
    one = work.of_rows([row | {"sequence": of.question.sequence}], [device.name], [stack.constants])
    rates = Rates.of(known, one)

    def point(m: int, n: float) -> tuple[float, float]:
        k = float(shape.columns["hidden"])
        low, sides = np.zeros(1), [np.array([float(side)]) for side in (m, n, k)]
        even = products.aligned(*sides[1:], known.shared("odd"), known.shared("align"))
        took = products.seconds(one, rates, even, *sides, low)
        return 2 * m * n * k / (2 * (m * k + k * n + m * n)), float(2 * m * n * k / took[0])

    feed = shape.columns["feed"]
    return {
        "peak": device.peak_16, "bandwidth": device.bandwidth,
        "tensor": {n: point(of.question.sequence, feed / n) for n in (*TENSOR, 64)},
        "rows": {m: point(m, feed) for m in ROWS[:-1]},
    }  # fmt: skip


def memory() -> tuple[float, dict[str, dict[str, float]]]:
    """(what a device has, bytes by part and way), of the small model on one node."""
    of = space(SMALL, NODE)
    plans = {way: planned(of, way) for way in WAYS}
    return of.pool.device.memory, {way: {name: plan.memory[name] for name in KEPT} for way, plan in plans.items()}


def bubbles() -> dict[str, list[float]]:
    """Share of the ranks' time in which they wait, by schedule and MICRO_BATCHES: simulated, stages alike, backward
    twice as long as forward, messages that take no time."""
    return {
        f"{name}{f' ×{chunks}' if chunks > 1 and name == 'interleaved' else ''}": [
            float(_run(name, STAGES, chunks, batches).bubble[0]) for batches in MICRO_BATCHES
        ]
        for name, chunks in SCHEDULES
    }


def _run(name: str, ranks: int, chunks: int, micro_batches: int) -> Timeline:
    """Forward of a rank takes 1, backward 2, half of it for the weights."""
    each = np.full((1, ranks * chunks), 1.0 / chunks)
    return timeline.simulate(name, ranks, chunks, micro_batches, Seconds(each, each, each))


def exchanges() -> dict[int, Plan]:
    """The example by degree of tensor, without a pipeline, weights shared by all that are left."""
    of = space(MODEL, WHERE)
    count = of.pool.count
    return {n: planned(of, f"tensor={n},fsdp={count // n},zero=3,recompute=block") for n in TENSOR}


def contest() -> list[Plan]:
    """The example's best layout for each tensor × pipeline, fastest first: those that fit."""
    of = space(MODEL, WHERE)
    found, _ = of.fastest(len(of.bases))
    best: dict[tuple[int, int], Split] = {}
    for one in of.ranked(of.simulated(found)):
        cut = int(of.bases.tensor[one.base]), int(of.bases.pipeline[one.base])
        best.setdefault(cut, one)
    # Of cuts that were not among the fastest too.
    return [of.plan(one) for one in of.ranked(of.simulated(list(best.values())))[:8]]


def _stacked(axes: Any, bars: dict[str, dict[str, float]], scale: float) -> None:
    """Bars on their side, each of its parts; the first on top."""
    names = KEPT if KEPT[0] in next(iter(bars.values())) else PARTS
    left = np.zeros(len(bars))
    for colour, part in zip(COLOURS, names, strict=False):
        widths = np.array([scale * bar.get(part, 0.0) for bar in bars.values()])
        if widths.max() > 0.005:
            axes.barh(list(bars), widths, left=left, color=colour, label=part, height=0.7)
        left += widths
    for place, width in enumerate(left):
        axes.text(width, place, f" {width:.3g}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * left.max())
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _roofline(figure: Any) -> None:
    found, axes = roofline(), figure.subplots()
    edge = found["peak"] / found["bandwidth"]
    at = np.geomspace(20, 8000, 200)
    axes.loglog(at, np.minimum(found["peak"], at * found["bandwidth"]) / 1e12, color="#555", label="the device's roof")
    axes.axvline(edge, color="#bbb", linestyle=":")
    axes.text(edge, 55, f" {edge:.0f}", color="#777", fontsize=8)
    kinds = (
        ("rows", 2, "the whole matrix, so many tokens"),
        ("tensor", 0, "8,192 tokens, the matrix cut by so many ranks"),
    )
    for name, colour, label in kinds:
        xs, ys = zip(*found[name].values(), strict=True)
        axes.plot(xs, [y / 1e12 for y in ys], "o", color=COLOURS[colour], label=label)
        for number, x, y in zip(found[name], xs, ys, strict=True):
            axes.annotate(f"{number:,}", (x, y / 1e12), (0, 5), textcoords="offset points", fontsize=8, ha="center")
    axes.set_xlabel("operations for each byte moved")
    axes.set_ylabel("TFLOP/s")
    axes.set_ylim(50, 1500)
    axes.legend(fontsize=8, loc="lower right")


def _memory(figure: Any) -> None:
    (capacity, found), axes = memory(), figure.subplots()
    _stacked(axes, {way.replace(",recompute=block", "\n+ recompute"): parts for way, parts in found.items()}, 2**-30)
    axes.axvline(capacity / 2**30, color="#555", linestyle="--")
    axes.axvline(capacity / SPARE / 2**30, color="#555", linestyle=":")
    axes.set_xlabel("GiB of a device; dashed: what it has, dotted: with a tenth to spare")


def _bubble(figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for event in _run("1f1b", 4, 1, 8).events():
        colour = COLOURS[0] if event.kind == FORWARD else COLOURS[4]
        left.barh(event.rank, event.end - event.start, left=event.start, color=colour, edgecolor="white")
        left.text(
            (event.start + event.end) / 2,
            event.rank,
            event.micro_batch + 1,
            ha="center",
            va="center",
            fontsize=7,
            color="white",
        )
    left.invert_yaxis()
    left.set_yticks(range(4), [f"rank {rank}" for rank in range(4)])
    left.set_xlabel("1f1b, 8 micro-batches: blue forward, green backward, white waiting")
    for (name, shares), style in zip(bubbles().items(), ("o-", "x--", "s-", "^-"), strict=True):
        right.plot(MICRO_BATCHES, [100 * share for share in shares], style, label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(MICRO_BATCHES, MICRO_BATCHES)
    right.set_xlabel("micro-batches of 8 ranks")
    right.set_ylabel("% of the time waited")
    right.legend(fontsize=8)


def _communication(figure: Any) -> None:
    axes = figure.subplots()
    _stacked(axes, {f"tensor={n},fsdp={plan.layout.fsdp}": dict(plan.parts) for n, plan in exchanges().items()}, 1.0)
    axes.set_xlabel("seconds of a step")


def _contest(figure: Any) -> None:
    axes = figure.subplots()
    _stacked(axes, {_short(plan): dict(plan.parts) for plan in contest()}, 1.0)
    axes.set_xlabel("seconds of a step")


def _short(plan: Plan) -> str:
    one = plan.layout
    axes = ("replicas", "pipeline", "fsdp", "context", "tensor")
    text = ",".join(f"{name}={getattr(one, name)}" for name in axes if getattr(one, name) > 1)
    return text + (",recompute" if one.recompute == "block" else "")


FIGURES: dict[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
    "roofline": (_roofline, (7, 4)), "memory": (_memory, (8, 3.4)), "bubble": (_bubble, (9, 3)),
    "communication": (_communication, (8, 2.8)), "contest": (_contest, (9, 3.6)),
}  # fmt: skip


def draw(folder: Path) -> Iterable[Path]:
    """Writes the figures as SVG, the same bytes each time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "shoal", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for name, (fill, size) in FIGURES.items():
        figure = Figure(figsize=size, layout="constrained")
        fill(figure)
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        yield path


def told() -> list[str]:
    """What the page says in numbers, which a test compares with it."""
    found, capacity_and_ways, shares = roofline(), memory(), bubbles()
    lines = [f"- roofline: {found['peak'] / 1e12:.0f} TFLOP/s, {found['bandwidth'] / 1e12:.2f} TB/s"]
    for name in ("rows", "tensor"):
        some = ", ".join(f"{n:,}: {rate / 1e12:.0f}" for n, (_, rate) in found[name].items())
        lines.append(f"- TFLOP/s by {name}: {some}")
    lines += [f"- `{way}`: {sum(parts.values()) / 2**30:.1f} GiB" for way, parts in capacity_and_ways[1].items()]
    lines += [f"- bubble of {name}: {', '.join(f'{100 * s:.1f} %' for s in some)}" for name, some in shares.items()]
    for n, plan in exchanges().items():
        parts = " and ".join(f"{plan.parts[part]:.2f} s of {part}" for part in ("tensor", "fsdp"))
        lines.append(f"- exchanges of tensor={n}: {plan.seconds:.2f} s, with {parts}")
    lines += [f"- `{_short(plan)}`: {plan.seconds:.2f} s" for plan in contest()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--table", action="store_true", help="the page's numbers, and draw nothing")
    given = parser.parse_args()
    for line in told() if given.table else draw(given.out):
        print(line)


if __name__ == "__main__":
    main()
