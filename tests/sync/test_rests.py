"""What codecs have lost comes in when there is nothing more to compute: all gradients arrive, once, and nobody owes."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.sync.server import records as r
from shoal.sync.server.encoding import Encoder
from shoal.sync.server.messages import COORDINATOR, NOTHING, Key
from shoal.sync.server.worker import Worker
from shoal.sync.simulate.audit import violations
from shoal.sync.simulate.scenario import Scenario
from tests.sync.test_simulate_codec import Named, Recorded, Recording, encoded


class Summed(Recorded):
    """Also adds up what was applied: bsp, quorum sums over samples; asp, ssp the mean of each push."""

    def __init__(self, parameters, names):
        super().__init__(parameters, names)
        self.sum = [torch.zeros_like(shard.local) for shard in parameters.shards]

    def __deepcopy__(self, memo):
        made = Summed(deepcopy(self.parameters, memo), self.names)
        made.applied, made.sum = list(self.applied), [part.clone() for part in self.sum]
        return made

    def whole(self):
        pieces, values, tensors = super().whole()
        return pieces, values, (*tensors, [part.clone() for part in self.sum])

    def fill(self, values, tensors):
        *tensors, total = tensors
        super().fill(values, tensors)
        self.sum = [part.clone() for part in total]

    def apply(self, gradient, order, pulled):
        unit = 1.0 if self.parameters.rules.rounds else order.scale
        for total, part in zip(self.sum, gradient, strict=True):
            total += part * unit
        super().apply(gradient, order, pulled)


class Summing(Recording):
    """Remembers the gradient of each push, before a codec has it."""

    def __init__(self, scenario):
        super().__init__(scenario)
        self.made: dict[Key, Tensor] = {}

    def held(self, shard):
        return Summed(super().held(shard).parameters, self.names)

    def gradient(self, pulled, samples, token):
        found = pushed, weight, _ = super().gradient(pulled, samples, token)
        unit = 1.0 if self.rules.rounds else 1.0 / weight
        self.made[token[1]] = torch.cat([part for n in sorted(pushed) for part in pushed[n].tensors]) * unit
        return found


def unclipped(seed: int, drained: float | None = None) -> Scenario:
    """A random schedule in which no worker dies or hangs, so that none takes a residual with it.

    drained: by a coordinator that lives on to know it.
    """
    spared = ("worker",) if drained is None else ("worker", "coordinator")
    scenario = encoded(seed)
    rules = replace(scenario.rules, clip=0.0, lease=30.0, reconnect=30.0)
    faults = tuple(fault for fault in scenario.faults if fault.role not in spared)
    return replace(scenario, rules=rules, faults=faults)


def run(
    scenario: Scenario, counts: Counter[str], drained: float | None = None, leaves: float | None = None
) -> tuple[list[str], float]:
    """What is wrong, and how far what was applied is from all gradients that were accepted, as a share of these.

    drained: when the job is asked to end. leaves: when worker 1 is asked to.
    """
    problem = Summing(scenario)
    world = Named(scenario, problem)

    def drain() -> None:
        host = world.hosts[COORDINATOR]
        if host.up:
            world._do(COORDINATOR, host, host.machine.drain(world.now))

    def leave() -> None:
        host = world.hosts[COORDINATOR]
        if not (host.up and host.machine.at.started):
            # Others would wait for who takes its place, and here nobody does. What one that is down knew may be lost.
            world._at(world.now + 0.1, leave)
            return
        address = world.live_workers[1]
        world._do(address, world.hosts[address], world.hosts[address].machine.retire(world.now))

    if drained is not None:
        world._at(drained, drain)
    if leaves is not None:
        world._at(leaves, leave)
    wrong = [text for text in violations(world.run()) if drained is None or "samples were used" not in text]
    commits = [record for record in world.journal.history if isinstance(record, r.Committed)]
    pushes = [(key, samples) for c in commits for key, samples in zip(c.keys, c.samples, strict=True)]
    counts["rests"] += sum(samples == NOTHING for _, samples in pushes)
    counts["together"] += sum(len(c.keys) > 1 and c.samples[0] == NOTHING for c in commits)
    counts["beside"] += sum(len({samples == NOTHING for samples in c.samples}) > 1 for c in commits)
    counts["rejected"] += sum(isinstance(record, r.Rejected) for record in world.journal.history)
    if world.over:
        # No copy of a shard is left: loudly, and nothing can be said of what was applied.
        return wrong, 0.0
    expected = sum((problem.made[key] for key, samples in pushes if samples != NOTHING), torch.zeros(32).double())
    first = {shard.number: shard.held.sum for shard in reversed(world.shards())}
    applied = torch.cat([part for number in sorted(first) for part in first[number]])
    return wrong, ((applied - expected).norm() / expected.norm().clamp(min=1e-9)).item()


def test_all_gradients_arrive_whatever_is_rejected_lost_doubled_or_killed():
    counts: Counter[str] = Counter()
    for seed in range(30):
        wrong, far = run(unclipped(seed), counts)
        assert (wrong, far < 1e-12) == ([], True), f"schedule {seed}: {far}"
    assert counts["rests"] > 60
    assert counts["together"] > 5
    assert counts["rejected"] > 5


def test_all_gradients_arrive_when_the_job_is_asked_to_end():
    counts: Counter[str] = Counter()
    for seed in range(40, 60):
        drained = 0.4 + 0.1 * (seed % 20)
        wrong, far = run(unclipped(seed, drained), counts, drained)
        assert (wrong, far < 1e-12) == ([], True), f"schedule {seed}: {far}"
    assert counts["rests"] > 30


def test_all_gradients_arrive_when_a_worker_leaves():
    counts: Counter[str] = Counter()
    for seed in range(70, 90):
        leaves = 0.2 * (seed % 20)
        wrong, far = run(unclipped(seed), counts, leaves=leaves)
        assert (wrong, far < 1e-12) == ([], True), f"schedule {seed}: {far}"
    assert counts["rests"] > 40
    assert counts["beside"] > 2


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(10))
def test_all_gradients_arrive_in_thousands_of_schedules(part):
    for seed in range(1000 + 200 * part, 1200 + 200 * part):
        for drained, leaves in ((None, None), (0.1 * (seed % 40), None), (None, 0.1 * (seed % 40))):
            wrong, far = run(unclipped(seed, drained), Counter(), drained, leaves)
            assert (wrong, far < 1e-12) == ([], True), f"schedule {seed}, {drained}, {leaves}: {far}"


class Silent(Worker):
    """Never says that it owes something."""

    def push(self, *args, owes=False, **more):
        return super().push(*args, **more)


class Impatient(Worker):
    """What is not answered goes out again under another name."""

    def tick(self, now):
        if self.state == "pushing" and self._push.rest and now - self._said >= self.retry:
            self.clock, self.state = self.clock + 1, "asking"
        return super().tick(now)


class Anyhow(Encoder):
    """Gives the rest again before the last one is settled."""

    def rest(self):
        self._after = None
        return super().rest()


def test_a_rest_that_is_not_pushed_is_seen(monkeypatch):
    monkeypatch.setattr("shoal.sync.simulate.machines.Worker", Silent)
    wrong, far = run(unclipped(0), Counter())
    assert far > 1e-6
    assert any("still owes" in text for text in wrong)


def test_a_rest_that_is_pushed_twice_is_seen(monkeypatch):
    monkeypatch.setattr("shoal.sync.simulate.machines.Worker", Impatient)
    monkeypatch.setattr("shoal.sync.simulate.machines.Encoder", Anyhow)
    found = (run(replace(unclipped(seed), patience=30.0), Counter()) for seed in range(40))
    assert any(not wrong and far > 1e-6 for wrong, far in found)
