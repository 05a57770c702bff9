"""Random schedules: modes, speeds, networks and crashes, all from one seed."""

from __future__ import annotations

import random
from dataclasses import replace

from shoal.sync.server.rules import Rules
from shoal.sync.simulate.scenario import Fault, Scenario


def schedule(seed: int) -> Scenario:
    """A small one: 2 to 4 workers, 1 or 2 shards, 4 to 9 gradients, up to 4 faults."""
    rng, more = random.Random(seed), random.Random(f"{seed} more")
    workers, mode = rng.randint(2, 4), rng.choice(("bsp", "asp", "ssp", "ssp", "quorum"))
    micro_batch, share = rng.choice((1, 2)), rng.choice((1, 1, 2))
    rules = Rules(
        mode=mode,
        workers=workers,
        staleness=rng.randint(0, 2),
        max_staleness=rng.choice((None, None, 0, 1, 2)) if mode in ("asp", "ssp") else None,
        quorum=rng.randint(1, workers),
        grace=rng.choice((0.0, 0.5)),
        level=rng.choice(("snapshot", "snapshot", "snapshot", "shard", "hogwild")),
        lease=rng.choice((2.5, 4.0)),
        reconnect=rng.choice((0.0, 0.3)),
        retry=1.0,
        micro_batch=micro_batch,
    )
    if mode in ("asp", "ssp") and rules.level == "snapshot":
        rules = replace(rules, compensation=more.choice(("none", "dc")))
    shards, copies = rng.randint(1, 2), rng.choice((1, 1, 2, 2, 3))
    lossy = rng.random() < 0.5
    return Scenario(
        rules,
        speeds=tuple(rng.choice((0.3, 0.5, 1.0, 2.0)) for _ in range(workers)),
        samples=rng.randint(4, 9) * micro_batch * share,
        seed=seed,
        shards=shards,
        copies=copies,
        shares=(share,) * workers,
        delay=rng.choice((0.001, 0.05, 0.2)),
        jitter=rng.choice((0.0, 0.5, 2.0)),
        loss=0.1 if lossy else 0.0,
        double=0.1 if lossy else 0.0,
        saves=more.choice((0.0, 0.3, 1.0)),
        faults=_faults(rng, workers, shards) + _shards_faults(more, shards),
        patience=300.0,
    )


def joined(seed: int) -> Scenario:
    """The same, longer, with one or two workers more that join on the way, and may be killed as any."""
    scenario, rng = schedule(seed), random.Random(f"{seed} joined")
    rules, own = scenario.rules, len(scenario.speeds)
    more = rng.randint(1, 2)
    number, time = own + rng.randrange(more), rng.uniform(2.0, 12.0)
    return replace(
        scenario,
        speeds=scenario.speeds + tuple(rng.choice((0.3, 1.0, 2.0)) for _ in range(more)),
        shares=scenario.shares + tuple(rng.choice((1, scenario.shares[0])) for _ in range(more)),
        starts=(0.0,) * own + tuple(rng.uniform(0.0, 8.0) for _ in range(more)),
        samples=scenario.samples + rng.randint(8, 20) * rules.micro_batch * scenario.shares[0],
        faults=(*scenario.faults, Fault(time, "worker", number, rng.randint(0, 8), rng.choice((0.1, 1.0, 5.0)))),
        patience=2000.0,
    )


def _faults(rng: random.Random, workers: int, shards: int) -> tuple[Fault, ...]:
    return tuple(_fault(rng, workers, shards) for _ in range(rng.choice((0, 1, 1, 2, 3))))


def _shards_faults(rng: random.Random, shards: int) -> tuple[Fault, ...]:
    """A shard is killed late, when there are checkpoints; sometimes again, before or after another copy is filled."""
    number, first = rng.randrange(shards), rng.uniform(1.0, 6.0)
    times = rng.choice(((), (), (first,), (first, first + rng.choice((0.3, 1.5, 3.0)))))
    return tuple(Fault(time, "shard", number, rng.randint(0, 8), rng.choice((0.1, 1.0))) for time in times)


def _fault(rng: random.Random, workers: int, shards: int) -> Fault:
    role = rng.choice(("worker", "shard", "coordinator"))
    number = rng.randrange(workers if role == "worker" else shards) if role != "coordinator" else 0
    return Fault(
        time=rng.uniform(0.0, 4.0),
        role=role,
        number=number,
        effects=rng.randint(0, 8),
        down=rng.choice((0.1, 1.0, 5.0)),
        hang=rng.random() < 0.3,
    )
