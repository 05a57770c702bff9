"""What must hold after any run of the simulated server, whatever was lost, doubled, late or killed.

Judged from outside: by what workers were told, what the shards' ledgers hold and what the journal says, none of which
asks the coordinator whether it was right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from shoal.sync.server import records as r
from shoal.sync.server.messages import NOTHING, Key, Range
from shoal.sync.server.rules import Rules
from shoal.sync.simulate.ledger import Ledger, Token
from shoal.sync.simulate.world import World

# Worker and incarnation.
_Life = tuple[int, int]


def violations(world: World) -> list[str]:
    """One sentence for each thing that is wrong; none: all is well. The world's problem is `Ledgers`."""
    commits = [record for record in world.journal.history if isinstance(record, r.Committed)]
    return [
        *_ended(world),
        *_versions(world, commits),
        *_answers(world, commits),
        *_samples(world, commits),
        *_bounds(world, commits),
        *_snapshots(world, commits),
        *_owed(world),
        *_compensated(world, commits),
        *world.thin,
    ]


def _ended(world: World) -> Iterator[str]:
    if not world.finished and not world.over:
        yield f"after {world.now:.0f} simulated seconds some workers still wait"


def _versions(world: World, commits: list[r.Committed]) -> Iterator[str]:
    """Version v of every copy is exactly the commits ≤ v, each once, and the same bytes on every shard."""
    told = [record.keys for record in commits]
    if [record.version for record in commits] != list(range(1, len(commits) + 1)):
        yield "the journal's versions are not 1, 2, 3, …"
    everywhere: set[tuple[tuple[Token, ...], ...]] = set()
    for shard in world.shards():
        held = shard.held
        assert isinstance(held, Ledger)
        applied = [tuple(token[1] for token in tokens) for tokens in held.applied]
        if shard.version != len(applied):
            yield f"shard {shard.address} is at version {shard.version} and has applied {len(applied)} commits"
        if applied != told[: shard.version]:
            yield f"shard {shard.address} has applied other pushes than the journal's up to version {shard.version}"
        if world.finished and shard.version != len(commits):
            yield f"shard {shard.address} ends at version {shard.version} of {len(commits)}"
        everywhere.add(tuple(held.applied[: min(s.version for s in world.shards())]))
    if len(everywhere) > 1:
        yield "shards hold gradients of different processes under one name"


def _answers(world: World, commits: list[r.Committed]) -> Iterator[str]:
    """No acknowledged push is lost, none is applied twice, none is applied that was rejected."""
    if world.over:
        # Loudly. What was acknowledged since the last checkpoint is lost.
        return
    counts: dict[Token, int] = {}
    ledger = world.shards()[0].held if world.shards() else None
    assert isinstance(ledger, Ledger)
    for token in (token for tokens in ledger.applied for token in tokens):
        counts[token] = counts.get(token, 0) + 1
    keys = [key for record in commits for key in record.keys]
    if len(set(keys)) < len(keys):
        yield "a push is in two commits"
    for token in (token for token, count in counts.items() if count > 1):
        yield f"{token[1]} was applied {counts[token]} times"
    told: dict[Token, bool] = {}
    for seen in world.seen:
        for answer, token in seen.answers:
            applied = counts.get(token, 0)
            if answer.accepted and not applied:
                yield f"{token[1]} was acknowledged as version {answer.version} and is lost"
            if applied and not answer.accepted:
                yield f"{token[1]} was rejected ({answer.reason}) and is applied"
            if told.setdefault(token, answer.accepted) != answer.accepted:
                yield f"{token[1]} was answered in two ways"


def _samples(world: World, commits: list[r.Committed]) -> Iterator[str]:
    """Every sample is used up once."""
    used = sorted([r for record in commits for r in record.samples] + _skipped(world))
    for before, after in pairwise(used):
        if after.start < before.stop:
            yield f"samples {after.start} to {min(before.stop, after.stop) - 1} are in two commits"
    if world.finished and sum(stop - start for start, stop in used) != world.scenario.samples:
        yield f"{sum(stop - start for start, stop in used)} of {world.scenario.samples} samples were used"


def _skipped(world: World) -> list[Range]:
    found = [record.skipped for record in world.journal.history if isinstance(record, r.Rejected)]
    return [samples for samples in found if samples.stop > samples.start]


def _bounds(world: World, commits: list[r.Committed]) -> Iterator[str]:
    """Staleness by what workers really pulled, against what the mode promises."""
    version_of = {key: record.version for record in commits for key in record.keys}
    for seen in world.seen:
        for token, versions in seen.pulled.items():
            if token[1] in version_of and (late := version_of[token[1]] - 1 - min(versions)) < 0:
                yield f"{token[1]} was committed {-late} versions before what it was computed from"
    yield from exceeded(world.rules, world.journal.history)


def exceeded(rules: Rules, journal: Sequence[r.AnyRecord]) -> Iterator[str]:
    """What a journal says that its mode does not allow: the gate of ssp at every grant and commit, staleness."""
    clocks: dict[_Life, int] = {}
    # Of each life all that have lived since its present clock began; of each grant all since that.
    since: dict[_Life, set[_Life]] = {}
    granted: dict[Key, tuple[int, set[_Life]]] = {}
    version = 0
    for record in _grants_apart(journal):
        if isinstance(record, r.Opened):
            version = record.version
        elif isinstance(record, r.Entered):
            for lives in (*since.values(), *(lives for _, lives in granted.values())):
                lives.add((record.worker, record.incarnation))
            clocks[record.worker, record.incarnation] = record.clock
            since[record.worker, record.incarnation] = set(clocks)
        elif isinstance(record, r.Left):
            del clocks[record.worker, record.incarnation], since[record.worker, record.incarnation]
        elif isinstance(record, r.Anew):
            clocks.clear()
            since.clear()
        elif isinstance(record, r.Paced):
            # Where a journal has begun anew: some have left before.
            (life,) = (life for life in clocks if life[0] == record.worker)
            since[life] |= {(-1, i) for i in range(record.peers + 1 - len(since[life]))}
        elif isinstance(record, r.Granted):
            # One that was lost in a crash is of a version of that time.
            again = record.version < version
            granted[record.key] = record.version, set(since[_life(record.key)] if again else clocks)
            if record.samples != NOTHING:
                yield from _ahead(rules, record.key, clocks)
        elif isinstance(record, r.Rejected):
            version = record.version
            _answered(record.key, clocks, since)
        elif isinstance(record, r.Committed):
            version = record.version
            for key, samples in zip(record.keys, record.samples, strict=True):
                yield from _stale(rules, version, key, samples, granted.get(key))
                if samples != NOTHING:
                    yield from _ahead(rules, key, clocks)
                _answered(key, clocks, since)


def _life(key: Key) -> _Life:
    return key.worker, key.incarnation


def _answered(key: Key, clocks: dict[_Life, int], since: dict[_Life, set[_Life]]) -> None:
    """Its next clock begins."""
    if (life := _life(key)) in clocks:
        clocks[life] += 1
        since[life] = set(clocks)


def _ahead(rules: Rules, key: Key, clocks: dict[_Life, int]) -> Iterator[str]:
    """What is left at the end is pushed by all at once, whatever clocks they are at: not for that."""
    ahead = key.clock - min(clocks.values(), default=key.clock)
    if rules.mode == "ssp" and ahead > rules.staleness:
        yield f"{key} is {ahead} clocks ahead of the slowest"


def _grants_apart(journal: Sequence[r.AnyRecord]) -> Iterator[r.AnyRecord]:
    for record in journal:
        yield from record.grants if isinstance(record, r.Begun) else (record,)


def _stale(rules: Rules, version: int, key: Key, samples: Range, grant: tuple[int, set[_Life]] | None) -> Iterator[str]:
    if grant is None:
        yield f"{key} was committed and never granted"
        return
    late, others = version - 1 - grant[0], len(grant[1] - {_life(key)})
    if rules.rounds and late:
        yield f"{key} is {late} commits late in a round"
    if samples == NOTHING:
        return
    if rules.max_staleness is not None and late > rules.max_staleness:
        yield f"{key} is {late} commits late, more than {rules.max_staleness}"
    if rules.mode == "ssp" and late > others * (2 * rules.staleness + 1):
        yield f"{key} is {late} commits late, with {others} others and staleness {rules.staleness}"


def _snapshots(world: World, commits: list[r.Committed]) -> Iterator[str]:
    """A snapshot is of one version."""
    if world.rules.level != "snapshot":
        return
    for seen in world.seen:
        for (_, key), versions in seen.pulled.items():
            if len(set(versions)) > 1:
                yield f"{key} was computed on versions {sorted(set(versions))} at once"


def _owed(world: World) -> Iterator[str]:
    """Nobody keeps to itself what its codec has lost."""
    for address, host in world.hosts.items():
        if world.finished and host.up and host.encoder is not None and host.encoder.owed:
            yield f"{address} has ended and still owes what its codec lost"


def _compensated(world: World, commits: list[r.Committed]) -> Iterator[str]:
    """`dc` measures a gradient that is late from the very weights that its worker pulled, on every copy."""
    if world.rules.compensation != "dc":
        return
    for shard in world.shards():
        held = shard.held
        assert isinstance(held, Ledger)
        for record, measured in zip(commits, held.measured, strict=False):
            pulled = record.version - 1 - record.staleness[0]
            if record.staleness[0] and measured != pulled:
                yield f"{record.keys[0]} pulled version {pulled} and is compensated from {measured}"
