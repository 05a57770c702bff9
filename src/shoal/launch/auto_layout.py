"""`layout = "auto"`: the layout that is predicted to be fastest on this machine, or one replica for each device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from shoal.errors import JobError, ShoalError
from shoal.job import Job, Layout
from shoal.launch.cores import cores, has_driver
from shoal.observe import machine
from shoal.observe.units import counted, short
from shoal.planning import answered, asked, cluster, devices, entry, local
from shoal.planning.local import Predicted
from shoal.planning.plan import why

_MOST_CPU_RANKS = 8
# Layouts that differ by less are equal, and the simpler one is taken.
_EQUAL = 0.005
# What the parts of a step (local.PARTS) are called in a sentence.
_CALLED = {
    "products": "matrix products", "attention": "attention", "elements": "operations of each number by itself",
    "launch": "Python between operations", "exchange": "exchanges", "update": "the update",
    "bubble": "waiting for the pipeline",
}  # fmt: skip


def choose(job: Job, say: Callable[[str], None]) -> Layout:
    """For a job that leaves its layout open: by what `shoal calibrate` measured of this CPU, by the planner for GPUs of
    its catalogue; where it is not predicted, one replica for each GPU or core, as many as divide the batch. Says which,
    and why."""
    gpus = _gpus()
    most = gpus or min(cores(), _MOST_CPU_RANKS)
    usual = Layout(replicas=max(n for n in range(1, most + 1) if job.train.global_batch % n == 0))
    try:
        layout, sentence = _planned(job, gpus) if gpus else _measured(job, most)
    except ShoalError as error:
        layout, sentence = usual, f"one replica for each {'GPU' if gpus else 'core'}; not predicted: {error.what}"
    say(f"layout {layout}: {sentence}")
    return layout


def _measured(job: Job, most: int) -> tuple[Layout, str]:
    """On this CPU, with at most so many ranks."""
    path = entry.home()
    if not path.is_file():
        raise JobError("`shoal calibrate` has not measured this machine")
    known = entry.read(path)
    if known.kind != "cpu" or known.machine != machine.host():
        raise JobError(f"{path} is of another machine")
    # As a run decides it where nothing is gained by anything else.
    train = replace(job.train, compile="off" if job.train.compile == "auto" else job.train.compile)
    train = replace(train, precision="fp32" if train.precision == "auto" else train.precision)
    found: list[tuple[Predicted, int, Layout]] = []
    refused: ShoalError | None = None
    for layout in layouts([side.ranks for side in known.sides if side.ranks <= most]):
        try:
            step = local.predict(replace(job, train=train, layout=layout), known)
        except ShoalError as error:
            refused = refused or error
        else:
            found.append((step, _axes(layout), layout))
    if not found:
        raise refused or JobError("none fits this machine")
    least = min(step.seconds for step, _, _ in found)
    equal = (one for one in found if one[0].seconds <= least * (1 + _EQUAL))
    best = min(equal, key=lambda one: (one[1], one[0].seconds))
    rest = min((one for one in found if one is not best), default=None, key=lambda one: one[0].seconds)
    after = f"; next {rest[2]} with {short(rest[0].seconds)}{_because(best[0], rest[0])}" if rest else ""
    of = f"of {counted(len(found), 'layout')} that the machine's entry knows the fastest"
    return best[2], f"{of}, {short(best[0].seconds)} a step predicted{after}"


def _because(first: Predicted, second: Predicted) -> str:
    """The part of a step on which the second spends most more, or that the first was taken as the simpler of equals."""
    if second.seconds <= first.seconds * (1 + _EQUAL):
        return ", about the same"
    more = {name: second.parts[name] - first.parts[name] for name in local.PARTS}
    part = max(more, key=lambda name: more[name])
    return f", which spends {short(more[part])} more on {_CALLED[part]}"


def layouts(worlds: list[int]) -> Iterator[Layout]:
    """Of so many ranks all by replicas, fsdp, tensor and pipeline."""
    for world in worlds:
        for replicas, fsdp, tensor in _triples(world):
            yield Layout(replicas=replicas, fsdp=fsdp, tensor=tensor, pipeline=world // (replicas * fsdp * tensor))


def _triples(world: int) -> Iterator[tuple[int, int, int]]:
    """Factors whose product divides it."""
    parts = [n for n in range(1, world + 1) if world % n == 0]
    return ((a, b, c) for a in parts for b in parts for c in parts if world % (a * b * c) == 0)


def _axes(layout: Layout) -> int:
    return sum(getattr(layout, axis) > 1 for axis in ("replicas", "fsdp", "tensor", "pipeline"))


def _planned(job: Job, gpus: int) -> tuple[Layout, str]:
    """On so many GPUs of this machine, all of the first one's kind."""
    import torch

    from shoal import device

    name = device.name(torch.device(device.kind(), 0))
    kind = devices.published(name)
    if kind is None:
        raise JobError(f"{name} is not in the planner's catalogue")
    question = asked.of_job(job, cluster.named(f"{kind.name}x{gpus}"), asked.Wanted())
    plans = answered.plans(question, 2, job).plans
    reason = why(plans[0], plans[1]) if len(plans) > 1 else "no other fits"
    return plans[0].layout, f"{short(plans[0].seconds)} a step predicted of {kind.title}; {reason}"


def _gpus() -> int:
    """GPUs that ranks will see. Torch is asked only where a driver is: importing it takes a second."""
    if not has_driver():
        return 0
    from shoal import device

    return device.count() if device.kind() != "cpu" else 0
