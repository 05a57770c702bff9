"""`layout = "auto"`: the layout that is predicted to be fastest on this machine, or one replica for each device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from shoal.errors import JobError, ShoalError
from shoal.job import Job, Layout
from shoal.launch.cores import cores, has_driver
from shoal.observe import machine
from shoal.observe.units import counted, short
from shoal.planning import answered, asked, cluster, devices, entry, here, local
from shoal.planning.local import Predicted
from shoal.planning.plan import CALLED, why

_MOST_CPU_RANKS = 8


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
    found = here.ranked(here.settled(job, known, most), known, most)
    best, rest = found[0], next((one for one in found[1:] if not _alike(one.layout, found[0].layout)), None)
    after = f"; next {rest.layout} with {short(rest.step.seconds)}{_because(best.step, rest.step)}" if rest else ""
    of = f"of {counted(len(found), 'layout')} that the machine's entry knows the fastest"
    return best.layout, f"{of}, {short(best.step.seconds)} a step predicted{after}"


def _alike(one: Layout, other: Layout) -> bool:
    return replace(one, micro_batch=0) == replace(other, micro_batch=0)


def _because(first: Predicted, second: Predicted) -> str:
    """The part of a step on which the second spends most more, or that the first was taken as the simpler of equals."""
    if second.seconds <= first.seconds * (1 + here.EQUAL):
        return ", about the same"
    more = {name: second.parts[name] - first.parts[name] for name in local.PARTS}
    part = max(more, key=lambda name: more[name])
    return f", which spends {short(more[part])} more on {CALLED[part]}"


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
