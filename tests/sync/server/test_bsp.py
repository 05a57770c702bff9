"""bsp is bitwise one process that sums in rank order and takes norms as float64 partial sums in name order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from shoal.job.optim import OptimOptions
from shoal.optim.norm import sum_of_squares
from shoal.optim.update import Update
from shoal.shard import Shard
from shoal.sync.server.messages import COORDINATOR, Key, Piece, Range
from shoal.sync.server.parameters import Parameters, blocks
from shoal.sync.server.placement import place
from shoal.sync.server.records import Begun, Committed, Entered
from shoal.sync.server.rules import Rules
from shoal.sync.server.staleness import token_schedule
from shoal.sync.server.worker import Pushed
from shoal.sync.simulate.scenario import Fault, Scenario
from shoal.sync.simulate.world import World

SHAPES = {
    "embed": (40, 7),
    "model.layers.10.weight": (9, 7),
    "model.layers.2.weight": (7, 9),
    "norm": (7,),
    "head": (33, 7),
}
SHARE, STEPS = 3, 5


def gradient(name: str, value: Tensor, samples: Range) -> Tensor:
    """In fp32, another for each sample, dependent on the weights."""
    total = torch.zeros_like(value)
    for sample in range(*samples):
        generator = torch.Generator().manual_seed(1000 * sample + list(SHAPES).index(name))
        total += torch.tanh(value * (1 + sample % 5)) + torch.randn(value.shape, generator=generator)
    return total


def weight(samples: Range) -> float:
    """Valid tokens: not the same for each worker."""
    return float(sum(7 + sample * 5 % 11 for sample in range(*samples)))


def initial() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@dataclass
class Model:
    """The `Problem` of the simulated world: fp32 tensors over server shards."""

    rules: Rules
    options: OptimOptions
    shards: int
    parameters: type[Parameters] = Parameters
    fixed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.placement = place(SHAPES, self.shards)
        self.rate = token_schedule(self.options, self.rules.workers * SHARE, STEPS)

    def held(self, shard: int) -> Parameters:
        held = blocks(initial(), self.placement[shard])
        fixed = [shard for shard in held if shard.name in self.fixed]
        learned = [shard for shard in held if shard.name not in self.fixed]
        return self.parameters(learned, self.rules, self.options, STEPS, fixed)

    def copy(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensor.clone() for tensor in tensors]

    def gradient(self, pulled: Mapping[int, Sequence[Tensor]], samples: Range, token: tuple[int, Key]):
        pushed = {}
        for shard, tensors in pulled.items():
            names = [block.name for block in self.placement[shard]]
            found = {
                Piece(name, (0,) * len(SHAPES[name]), SHAPES[name]): gradient(name, value, samples)
                for name, value in zip(names, tensors, strict=True) if name not in self.fixed
            }  # fmt: skip
            pushed[shard] = Pushed(tuple(found), tuple(found.values()))
        return pushed, weight(samples), 0.0


def one_process(
    rules: Rules, options: OptimOptions, fixed: Sequence[str] = (), more: dict[int, int] | None = None
) -> dict[str, Tensor]:
    """more: from which version on there are how many workers, where that changes."""
    values, workers, start = initial(), rules.workers, 0
    learned = sorted(SHAPES.keys() - {*fixed})
    held = [Shard(name, SHAPES[name], (0,) * len(SHAPES[name]), values[name]) for name in learned]
    update = Update(held, options, STEPS)
    rate = token_schedule(options, rules.workers * SHARE, STEPS)
    step, end = 0, STEPS * rules.workers * SHARE
    while start < end:
        step += 1
        workers = (more or {}).get(step, workers)
        firsts = [first for rank in range(workers) if (first := start + rank * SHARE) < end]
        parts = [Range(first, min(first + SHARE, end)) for first in firsts]
        for shard in held:
            shard.grad = gradient(shard.name, shard.local, parts[0])
            for part in parts[1:]:
                shard.grad += gradient(shard.name, shard.local, part)
        tokens = sum(weight(part) for part in parts)
        norm = math.sqrt(sum(sum_of_squares([shard]).item() for shard in held)) / tokens
        clip = min(1.0, rules.clip / norm) if rules.clip else 1.0
        update.apply(clip / tokens, rate(start))
        start = parts[-1].stop
    return values


def served(rules: Rules, problem: Model, starts: tuple[float, ...] = (), **network) -> tuple[dict[str, Tensor], World]:
    workers = len(starts) or rules.workers
    scenario = Scenario(
        rules, tuple(0.5 + 0.3 * rank for rank in range(workers)), rules.workers * SHARE * STEPS,
        shards=problem.shards, shares=(SHARE,) * workers, jitter=1.0, starts=starts, **network,
    )  # fmt: skip
    world = World(scenario, problem).run()
    assert world.finished
    return {s.name: s.local for shard in world.shards() for s in shard.held.shards}, world


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


OPTIMIZERS = {
    "sgd": OptimOptions(name="sgd", lr=0.05, momentum=0.0),
    "momentum": OptimOptions(name="sgd", lr=0.05),
    "adamw": OptimOptions(lr=0.01),
    "muon": OptimOptions(name="muon", lr=0.01),
}


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("clip", [0.0, 0.7])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bsp_is_bitwise_one_process(name, clip, workers):
    rules = Rules("bsp", workers=workers, clip=clip)
    found, world = served(rules, Model(rules, OPTIMIZERS[name], shards=3))
    assert equal(found, one_process(rules, OPTIMIZERS[name]))
    clips = [record.clip for record in world.journal.records if hasattr(record, "clip")]
    assert len(clips) == STEPS
    assert all((value < 1) == bool(clip) for value in clips)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_learned_is_in_no_norm_and_in_no_update(name):
    rules, fixed = Rules("bsp", workers=3, clip=0.7), ("model.layers.10.weight", "norm")
    found, _ = served(rules, Model(rules, OPTIMIZERS[name], shards=2, fixed=fixed))
    assert equal(found, one_process(rules, OPTIMIZERS[name], fixed))
    assert all(torch.equal(found[each], initial()[each]) for each in fixed)


@pytest.mark.parametrize("seed", range(4))
def test_also_when_frames_are_lost_doubled_and_late_and_servers_die(seed):
    rules = Rules("bsp", workers=3, clip=0.7, lease=60.0)
    faults = (Fault(1.0 + seed, "coordinator", effects=2 + seed), Fault(2.5 + seed, "shard", seed % 3, effects=2))
    network = {"loss": 0.1, "double": 0.1, "delay": 0.1, "seed": seed, "faults": faults}
    for copies in (1, 2):
        model = Model(rules, OPTIMIZERS["adamw"], shards=3)
        found, world = served(rules, model, copies=copies, **network)
        assert equal(found, one_process(rules, OPTIMIZERS["adamw"]))
        assert world.hosts[next(iter(world.hosts))].life == 1, "the coordinator was killed once"


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_the_next_whole_update_on_who_joins_is_in_the_mean(name, copies):
    """Two more than the job has, in the midst of updates; messages get lost, and the coordinator dies after that."""
    rules, starts = Rules("bsp", workers=2, clip=0.7, lease=60.0), (0.0, 0.0, 4.0, 13.0)
    faults = (Fault(11.0, "coordinator", effects=1),)
    network = {"copies": copies, "loss": 0.05, "double": 0.1, "delay": 0.1, "faults": faults}
    found, world = served(rules, Model(rules, OPTIMIZERS[name], shards=3), starts, **network)
    more, members, workers, version = {}, 2, 2, 0
    for record in world.journal.history:
        if isinstance(record, Entered) and record.worker >= 2:
            members += 1
        if isinstance(record, Begun) and members > workers:
            workers = members
            more[version + 1] = workers
        if isinstance(record, Committed):
            version = record.version
    assert list(more.values()) == [3, 4], "each came while there was something to do"
    assert min(more) > 1
    assert world.hosts[COORDINATOR].life == 1, "the coordinator was killed once"
    assert equal(found, one_process(rules, OPTIMIZERS[name], more=more))
    assert not equal(found, one_process(rules, OPTIMIZERS[name], more={at + 1: n for at, n in more.items()}))


class EachClipped(Parameters):
    """The mistake of clipping every push in the place of their mean."""

    def total(self, gradients):
        for gradient in gradients:
            norm = math.sqrt(sum(square.value for square in self.squares(gradient)))
            torch._foreach_mul_(gradient, min(1.0, 20 / norm))
        return super().total(gradients)


class OtherOrder(Parameters):
    """The mistake of summing in the order of arrival, here the reverse one."""

    def total(self, gradients):
        return super().total(gradients[::-1])


@pytest.mark.parametrize("wrong", [EachClipped, OtherOrder])
def test_other_sums_are_seen(wrong):
    rules = Rules("bsp", workers=4, clip=0.7)
    found, _ = served(rules, Model(rules, OPTIMIZERS["sgd"], 3, wrong))
    assert not equal(found, one_process(rules, OPTIMIZERS["sgd"]))


def test_asp_is_another_thing():
    """The comparison can fail: a push at a time is not a mean."""
    rules = Rules("bsp", workers=2, clip=0.7)
    asp = replace(rules, mode="asp")
    found, _ = served(asp, Model(asp, OPTIMIZERS["sgd"], shards=3))
    assert not equal(found, one_process(rules, OPTIMIZERS["sgd"]))
