"""The part of a step in which a pipeline's ranks have nothing to do, against what its schedule allows.

    python benchmarks/bubble.py [--schedules gpipe,1f1b,...] [--micro-batches 8] [--milliseconds 100] [--kib 0]
                                [--repetitions 3] [--format json]

Four ranks run shoal's Pipeline over stages that sleep: f for a forward, f for the gradient of the inputs, f for that of
the weights. Two cores are enough if sleeps are long beside what an action costs (1 ms of Python and gloo, more on a
busy machine): all time that is not slept is either the schedule's bubble or that.
bubble: 1 - slept / wall, the wall from the first rank's beginning to the end of the last one to end.
formula: (p - 1) / (v m + p - 1) for v stages on each of p ranks and m micro-batches (Narayanan et al. 2021, section
2.2, arXiv:2104.04473), where there is one.
simulated: of the schedule's own list of actions, each begun as soon as its rank is free and its input is there; once
with sleeps as asked for (what the schedule promises; a bubble that is not within 10 % of it ends this program with 1),
once as they were (on a busy machine whoever sleeps is woken late, and others wait for him).
--kib: what a stage hands to the next; the simulated input then comes later by the time that such a message
needs, measured between two of the ranks. ZBV, zero-bubble and DualPipeV compute the two gradients apart, except that of
the first stage, whose inputs have none: torch does all of it with the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from shoal import mesh as meshes
from shoal.job.layout import SCHEDULES, Layout
from shoal.launch.pool import Pool
from shoal.parallel.pipeline import Pipeline

RANKS = 4

Action = tuple[int, str, int]
"""(stage, what, micro-batch); what: F forward, B both gradients, I the one of the inputs, W that of the weights."""
Order = list[list[Action]]
"""What a rank computes, in turns of one action. DualPipeV has turns of two, which torch computes one after the other;
it sends what came of them at the end of both."""


class Clock:
    """Sleeps, and remembers what for."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.reset()

    def reset(self) -> None:
        self.log: list[tuple[Action, float]] = []

    def sleep(self, stage: int, what: str, micro_batch: int) -> None:
        start = time.perf_counter()
        if self.seconds:
            time.sleep(self.seconds)
        self.log.append(((stage, what, micro_batch), time.perf_counter() - start))


class _Sleep(torch.autograd.Function):
    """The identity; sleeps in backward, and in forward too if that is said."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, forward: bool, backward: Action) -> Tensor:
        ctx.clock, ctx.backward_action = clock, backward
        stage, _, micro_batch = backward
        if forward:
            clock.sleep(stage, "F", micro_batch)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clock.sleep(*ctx.backward_action)
        return gradient, None, None, None


class Stub(nn.Module):
    """A stage. The gradients of inputs and weights hang on nodes of their own, so that either can be asked for."""

    def __init__(self, stage: int, count: int, like: Tensor):
        super().__init__()
        self.stage, self.last = stage, stage == count - 1
        self.weight = nn.Parameter(torch.zeros(1))
        # Stands for the embedding, whose gradient needs that of all blocks of the first stage.
        self.input = nn.Parameter(torch.zeros(like.shape)) if stage == 0 else None

    def forward(self, clock: Clock, micro_batch: int, x: Tensor | None) -> Tensor:
        x = self.input if x is None else x
        assert x is not None
        x = _Sleep.apply(x, clock, True, (self.stage, "I", micro_batch))
        x = x + _Sleep.apply(self.weight, clock, False, (self.stage, "W", micro_batch))
        # Not plainly the sum: its gradient is one number expanded, which gloo does not send.
        return x.square().sum() if self.last else x


def rank_main(
    seat: Any, schedule: str, micro_batches: int, seconds: float, kib: int, repetitions: int
) -> dict[str, Any]:
    """One rank. spans: when each repetition began and ended, by the machine's clock. logs: what it slept for then.
    orders: of all ranks. message: seconds of one."""
    torch.set_num_threads(1)
    layout = Layout(pipeline=seat.world, schedule=schedule)
    mesh = meshes.build(layout, seat)
    like = torch.empty(1, 1, max(1, kib * 256), device="meta")
    clock = Clock(seconds)
    modules = {stage: Stub(stage, layout.stage_count, like) for stage in layout.stages_of(mesh.stage)}
    pipeline: Pipeline[int] = Pipeline(dict(modules), layout, mesh.group("pipeline"), mesh.device)

    def compute(module: nn.Module, micro_batch: int, x: Tensor | None) -> Tensor:
        return module(clock, micro_batch, x)

    spans, logs = [], []
    for repetition in range(repetitions + 1):  # the first one opens connections
        clock.reset()
        dist.barrier()
        start = time.perf_counter()
        pipeline.run(range(micro_batches), compute, like)
        if repetition:
            spans.append((start, time.perf_counter()))
            logs.append(clock.log)
    message = message_seconds(like) if kib else 0.0
    built, _ = pipeline._schedule(micro_batches, like)
    one = layout.stages_per_rank == 1
    orders = orders_of_one_stage(schedule, micro_batches, seat.world) if one else orders_of(built)
    mesh.close()
    return {"spans": spans, "logs": logs, "orders": orders, "message": message}


def message_seconds(like: Tensor, times: int = 20) -> float:
    """Of one message between the first two ranks, as half of its way there and back. All ranks call it."""
    x, rank = torch.zeros(like.shape), dist.get_rank()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times if rank < 2 else 0):
        for sender in (0, 1):
            dist.send(x, 1 - rank) if rank == sender else dist.recv(x, 1 - rank)
    found = torch.tensor([(time.perf_counter() - start) / (2 * times) if rank < 2 else 0.0])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def orders_of(schedule: Any) -> list[Order]:
    """What torch's schedule of several stages a rank says that each rank computes."""
    return [
        [
            [
                (int(part.stage_index), part.computation_type.value, int(part.microbatch_index))
                for part in action.sub_actions or (action,)
            ]
            for action in schedule.pipeline_order[rank]
            if action is not None
        ]
        for rank in sorted(schedule.pipeline_order)
    ]


def orders_of_one_stage(schedule: str, micro_batches: int, ranks: int = RANKS) -> list[Order]:
    """The same of gpipe and 1f1b, by their definition. (In torch they are loops without a list, and what 2.13 draws of
    1F1B leaves out the last rank's first forward.)"""
    orders = []
    for rank in range(ranks):
        ahead = micro_batches if schedule == "gpipe" else ranks - rank
        first = [(rank, "F", m) for m in range(ahead)]
        pairs = [((rank, "B", m), (rank, "F", m + ahead)) for m in range(micro_batches)]
        orders.append([[a] for a in (*first, *(a for pair in pairs for a in pair)) if a[2] < micro_batches])
    return orders


def simulate(orders: list[Order], cost: Callable[[Action], float], message: float = 0.0) -> float:
    """Seconds until all ranks are done, if each action begins as soon as its rank is free and its input there.

    message: seconds between the end of one stage's turn and the beginning of another's on another rank.
    """
    home = {stage: rank for rank, order in enumerate(orders) for turn in order for stage, _, _ in turn}
    ended: dict[Action, float] = {}
    free, at = [0.0] * len(orders), [0] * len(orders)
    while any(at[rank] < len(order) for rank, order in enumerate(orders)):
        before = list(at)
        for rank, order in enumerate(orders):
            while at[rank] < len(order) and all(needs(a, len(home)) <= ended.keys() for a in order[at[rank]]):
                turn = order[at[rank]]
                for action in turn:
                    arrivals = [ended[n] + (message if home[n[0]] != rank else 0.0) for n in needs(action, len(home))]
                    free[rank] = max([free[rank], *arrivals]) + sum(map(cost, parts(action)))
                # Whoever waits for the gradient of the inputs does not care with what it came.
                ended |= {(stage, "I" if what == "B" else what, m): free[rank] for stage, what, m in turn}
                at[rank] += 1
        assert at != before, f"ranks wait for each other at {[o[i] for o, i in zip(orders, at, strict=True) if o[i:]]}"
    return max(free)


def parts(action: Action) -> list[Action]:
    """What is slept for: F, I and W. torch computes both gradients of the first stage, whose inputs have none, in W."""
    stage, what, micro_batch = action
    if what == "B" or (what == "W" and stage == 0):
        return [(stage, "I", micro_batch), (stage, "W", micro_batch)]
    return [] if what == "I" and stage == 0 else [action]


def needs(action: Action, stages: int) -> set[Action]:
    """The actions that must have ended."""
    stage, what, micro_batch = action
    if what == "F":
        return {(stage - 1, "F", micro_batch)} if stage else set()
    if what == "W":
        return {(stage, "I", micro_batch)}
    return {(stage, "F", micro_batch), *([(stage + 1, "I", micro_batch)] if stage < stages - 1 else [])}


def formula(schedule: str, micro_batches: int, ranks: int = RANKS) -> float | None:
    """The bubble of a schedule that keeps both gradients together and has its stages in turns."""
    if schedule not in ("gpipe", "1f1b", "interleaved", "looped_bfs"):
        return None
    return (ranks - 1) / (SCHEDULES[schedule] * micro_batches + ranks - 1)


def measure(
    pool: Pool, schedule: str, micro_batches: int, seconds: float, kib: int, repetitions: int
) -> dict[str, Any]:
    found = pool.run(
        "benchmarks.bubble:rank_main", RANKS, schedule=schedule, micro_batches=micro_batches, seconds=seconds, kib=kib,
        repetitions=repetitions, timeout=3600.0,
    )  # fmt: skip
    # From the beginning of the first rank, for whose first stage all others wait, to the end of the last to end.
    walls = [max(end for _, end in spans) - spans[0][0] for spans in zip(*(f["spans"] for f in found), strict=True)]
    message = found[0]["message"]
    orders = [[[(s, what, m) for s, what, m in turn] for turn in order] for order in found[0]["orders"]]
    bubbles, replayed = [], []
    for repetition, wall in enumerate(walls):
        slept = {tuple(action): took for f in found for action, took in f["logs"][repetition]}
        bubbles.append(1 - sum(slept.values()) / (RANKS * wall))
        replayed.append(1 - sum(slept.values()) / (RANKS * simulate(orders, slept.__getitem__, message)))
    total = 3 * seconds * micro_batches * SCHEDULES[schedule]
    simulated = 1 - total / simulate(orders, lambda _: seconds, message)
    return {
        "schedule": schedule, "micro_batches": micro_batches, "milliseconds": 1e3 * seconds, "kib": kib,
        "formula": formula(schedule, micro_batches), "simulated": simulated, "replayed": replayed, "bubble": bubbles,
        "within": all(abs(b - simulated) <= 0.1 * simulated for b in bubbles), "wall": walls, "message": message,
    }  # fmt: skip


def table(row: dict[str, Any]) -> str:
    said = f"{100 * row['formula']:5.1f} %" if row["formula"] is not None else "      –"
    replayed, measured = (" ".join(f"{100 * b:5.1f} %" for b in row[key]) for key in ("replayed", "bubble"))
    return (
        f"{row['schedule']:<24} formula {said}   simulated {100 * row['simulated']:5.1f} %   measured {measured}   "
        f"simulated with these sleeps {replayed}" + ("" if row["within"] else "   not within 10 %")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", default=",".join(SCHEDULES), help=f"some of {','.join(SCHEDULES)}")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--milliseconds", type=float, default=100.0, help="that a forward sleeps")
    parser.add_argument("--kib", type=int, default=0, help="size of what stages send; 0 = 4 bytes")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--format", choices=["text", "json"], default="text")
    asked = parser.parse_args()
    rows = []
    with Pool(RANKS) as pool:
        for schedule in asked.schedules.split(","):
            seconds = asked.milliseconds / 1e3
            rows.append(measure(pool, schedule, asked.micro_batches, seconds, asked.kib, asked.repetitions))
            print(table(rows[-1]), file=sys.stderr if asked.format == "json" else sys.stdout, flush=True)
    if asked.format == "json":
        print(json.dumps({"rows": rows}))
    sys.exit(not all(row["within"] for row in rows))


if __name__ == "__main__":
    main()
