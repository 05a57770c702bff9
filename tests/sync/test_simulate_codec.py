"""The simulated server with a codec: random schedules pass the audit, all who follow hold the same bits, it trains."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.job.optim import OptimOptions
from shoal.sync.server.encoding import Encoder
from shoal.sync.server.follower import Follower
from shoal.sync.server.messages import Key
from shoal.sync.server.parameters import Parameters
from shoal.sync.server.rules import Rules
from shoal.sync.simulate.audit import violations
from shoal.sync.simulate.ledger import Ledger
from shoal.sync.simulate.problem import LeastSquares
from shoal.sync.simulate.scenario import Fault, Scenario
from shoal.sync.simulate.world import World
from tests.sync.schedules import schedule

SGD = OptimOptions(name="sgd", lr=0.01, schedule="constant", warmup=0.0, weight_decay=0.0)
CODECS = ("int8", "int4:unbiased", "sign", "topk:0.02+int2", "randomk:0.25")


class Names(dict[Key, int]):
    """Which process computed a push. The same for all copies of a shard."""

    def __deepcopy__(self, memo: object) -> Names:
        return self


class Recorded(Ledger):
    """A ledger of what was applied, beside the parameters that it was applied to."""

    def __init__(self, parameters: Parameters, names: Names):
        super().__init__()
        self.parameters, self.names = parameters, names
        for name in ("blank", "put", "squares", "total", "freeze", "live", "master", "pieces", "places", "cut"):
            setattr(self, name, getattr(parameters, name))

    def __deepcopy__(self, memo: dict[int, object]) -> Recorded:
        made = Recorded(deepcopy(self.parameters, memo), self.names)
        made.applied = list(self.applied)
        return made

    def whole(self):
        pieces, values, tensors = self.parameters.whole()
        return pieces, values, (*tensors, list(self.applied))

    def fill(self, values, tensors):
        *tensors, applied = tensors
        self.parameters.fill(values, tensors)
        self.applied = list(applied)

    def apply(self, gradient, order, pulled):
        self.parameters.apply(gradient, order, pulled)
        self.applied.append(tuple((self.names[key], key) for key in order.keys))


class Recording(LeastSquares):
    def __init__(self, scenario: Scenario):
        super().__init__(scenario.rules, SGD, scenario.shards, 10, 4, scenario.seed)
        self.names = Names()

    def held(self, shard):
        return Recorded(super().held(shard), self.names)

    def gradient(self, pulled, samples, token):
        self.names[token[1]] = token[0]
        return super().gradient(pulled, samples, token)


class Named(World):
    """A rest is named, too, as a gradient is."""

    problem: Recording

    def _on_computed(self, address, life):
        if (host := self.hosts.get(address)) is not None:
            self.problem.names[host.machine.key] = host.machine.nonce
        super()._on_computed(address, life)


def encoded(seed: int) -> Scenario:
    scenario = schedule(seed)
    level = "shard" if scenario.rules.level == "hogwild" else scenario.rules.level
    # Which of a shadow's weights a gradient was computed from differs between copies, so dc is refused.
    rules = replace(scenario.rules, level=level, compensation="none", codec=random.Random(seed).choice(CODECS))
    return replace(scenario, rules=rules)


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Counts pulls, and those that are not bit for bit what others have of the same shadow and version."""
    take, counts, bits = Follower.take, Counter(), {}

    def taken(follower: Follower, message, tensors, wanted):
        found = take(follower, message, tensors, wanted)
        if found is not None:
            place = (message.shard, message.chain, message.version)
            first: list[Tensor] = bits.setdefault(place, [tensor.clone() for tensor in found[1]])
            same = all(map(torch.equal, first, found[1]))
            counts["dense" if message.base < 0 else "deltas"] += 1
            counts["different"] += not same
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Follower, "take", taken)
        yield counts


def run(scenario: Scenario) -> tuple[list[str], Counter[str]]:
    with watched() as counts:
        world = Named(scenario, Recording(scenario)).run()
    copies = {}
    for shard in world.shards():
        held = shard.held.parameters.live()
        if not all(map(torch.equal, copies.setdefault(shard.number, held), held)) and world.finished:
            counts["copies apart"] += 1
    return violations(world), counts


def test_random_schedules_with_a_codec():
    total = Counter()
    for seed in range(60):
        wrong, counts = run(encoded(seed))
        assert wrong == [], f"schedule {seed}"
        assert counts["different"] == counts["copies apart"] == 0, f"schedule {seed}"
        total += counts
    assert total["deltas"] > 200
    assert total["dense"] > 100


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(20))
def test_thousands_of_schedules_with_a_codec(part):
    for seed in range(1000 + 250 * part, 1250 + 250 * part):
        wrong, counts = run(encoded(seed))
        assert wrong == [], f"schedule {seed}"
        assert counts["different"] == counts["copies apart"] == 0, f"schedule {seed}"


def trained(mode: str, codec: str, lr: float, **options) -> float:
    """Loss after 60 gradients of each of three workers, as a share of that before them."""
    rules = Rules(mode, workers=3, clip=0.0, codec=codec, **options).validate()
    scenario = Scenario(rules, (1.0, 1.0, 2.0), 180, shards=2, loss=0.02, faults=(Fault(20.0, "shard"),))
    problem = LeastSquares(rules, replace(SGD, lr=lr), scenario.shards, 60, 3, 0)
    world = World(scenario, problem).run()
    assert world.finished
    return problem.loss(world.shards()) / problem.loss_of(problem.values)


@pytest.mark.parametrize(
    ("mode", "codec", "lr", "most"),
    [
        # Without a codec: 0.032, 0.020, 0.021, 0.021.
        ("bsp", "int4:unbiased", 0.01, 0.035),
        ("asp", "int8", 0.01, 0.025),
        ("asp", "sign", 0.005, 0.03),
        ("asp", "randomk:0.25", 0.005, 0.05),
    ],
)
def test_it_trains_with_a_codec(mode, codec, lr, most):
    assert trained(mode, codec, lr) < most


def test_it_trains_with_a_codec_looking_ahead():
    assert trained("asp", "int8", 0.01, compensation="look-ahead") < 0.03


def test_residuals_of_rejected_pushes_are_as_they_were(monkeypatch):
    settled, settle = Counter(), Encoder.settle

    def counted(encoder: Encoder, accepted: bool) -> None:
        settled[accepted] += encoder._after is not None
        settle(encoder, accepted)

    monkeypatch.setattr(Encoder, "settle", counted)
    rules = Rules("asp", workers=3, max_staleness=1, clip=0.0, codec="sign")
    scenario = Scenario(rules, (0.5, 0.5, 4.0), 60)
    world = Named(scenario, Recording(scenario)).run()
    answers = Counter(answer.accepted for seen in world.seen for answer, _ in seen.answers)
    assert settled == answers
    assert answers[False] > 0
