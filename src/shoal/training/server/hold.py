"""One copy of a server shard: its part of the weights and of the optimizer, from first weights or a checkpoint on."""

from __future__ import annotations

import contextlib
import math
import secrets
from pathlib import Path
from typing import Any

import msgspec
import torch

from shoal import checkpoint
from shoal.checkpoint import Pending, Saver, manifest
from shoal.checkpoint.huggingface import load as load_huggingface
from shoal.checkpoint.manifest import Manifest
from shoal.errors import CheckpointError
from shoal.job import Job, parse
from shoal.mesh import Seat
from shoal.models.spec import parameters
from shoal.observe.log import speaker
from shoal.ops.initialise import initialise_
from shoal.shard import Shard, State
from shoal.sync import saved
from shoal.sync.server import messages as m
from shoal.sync.server.messages import Chain
from shoal.sync.server.node.book import FOLDER
from shoal.sync.server.node.refusals import Refusals
from shoal.sync.server.node.serve import Serving, join
from shoal.sync.server.node.shard_log import ShardLog, only_one
from shoal.sync.server.parameters import Parameters
from shoal.sync.server.placement import Block
from shoal.sync.server.shadow import Shadow
from shoal.sync.server.shard import ServerShard
from shoal.sync.server.wire.credentials import Credentials, has_checksums
from shoal.training.precision import stored
from shoal.training.server import plan

# Seconds without progress after which the first shard gives up on another one's part of a checkpoint.
_PARTS = 60.0
# Seconds in which a new copy must find another one.
_CLONED = 60.0


def main(
    seat: Seat, *, folder: str, job: str, number: int, copy: int, nonce: str, host: str, life: int, joined: bool = False
) -> None:
    """Holds a copy of shard `number` until the job is over.

    copy: which of its copies. nonce: of this start of the run. host: to listen on. life: how often it was
    started before; where there are several copies, a new life is a new one, which takes all from another: by its number
    the coordinator knows that those before it in this place are gone (`Coordinator.replaced`). joined: by `shoal join`,
    so that it says itself how it stands with the coordinator.
    """
    run, given = Path(folder), parse(job)
    rules, options = plan.rules(given), given.server
    held = empty(given, number)
    alone = options.copies == 1
    cloned = life > 0 and not alone
    version = 0 if cloned else _fill(run, given, held)
    machine = ServerShard(
        number, held, copy=copy if alone else copy + options.copies * life, version=version,
        level=served(rules.level, host, Credentials.of(options)),
        others=range(1, options.copies) if copy == 0 and not cloned else (), logged=alone, retry=rules.retry,
        backups=rules.compensation == "dc", shadow=_shadow(given, number, copy),
    )  # fmt: skip
    with contextlib.ExitStack() as ending:
        log = None
        if alone:
            logs = run / FOLDER / f"shard-{number}"
            ending.enter_context(only_one(logs))
            log = ShardLog(logs, stored(given.train.precision))
            ending.callback(log.close)
            machine.recover(log.read(version))
        saver = ending.enter_context(
            Saver(run / "checkpoints", number, options.shards, given.checkpoint.keep, nonce=nonce, timeout=_PARTS)
        )
        station = ending.enter_context(plan.station(given, run, machine.address, ("coordinator", "shard"), nonce))
        say = speaker(None if joined else run)
        refusals = Refusals(lambda text: say(f"server {number}: {text}"))
        station.listen(host, refusals, most=_pushed(held))
        if cloned:
            join(machine, station, _CLONED)
        part = _Part(number, held, saver)
        Serving(machine, station, log, save=part.save, poll=part.poll, say=say if joined else None).run()


def _pushed(held: Parameters) -> int:
    """Bytes of a push, at most: of each number itself and its place, in 4 bytes each, and what codecs put before."""
    pieces = held.pieces()
    return sum(8 * math.prod(piece.shape) + 4096 for piece in pieces)


def served(level: str, host: str, credentials: Credentials) -> str:
    """How much of an update a pull may see. Where what is sent has a CRC, not its middle: that would be other bytes
    than the CRC is of."""
    return "shard" if level == "hogwild" and has_checksums(host, credentials) else level


def _shadow(job: Job, number: int, copy: int) -> Shadow | None:
    """What workers follow, where there is a codec: in each life another one."""
    if job.sync.codec == "none":
        return None
    return Shadow(job.sync.codec, Chain(copy, secrets.randbits(62)), seed=job.train.seed, shard=number)


def empty(job: Job, number: int, where: str = "cpu") -> Parameters:
    """What shard `number` holds, before it has values. where: a device, `meta` for shapes alone."""
    specs, dtype = parameters(job.model), stored(job.train.precision)
    learned: list[Shard] = []
    fixed: list[Shard] = []
    for block in plan.placement(job)[number]:
        spec = specs[block.name]
        (learned if spec.learned else fixed).append(_blank(block, spec.shape, dtype, where))
    return Parameters(learned, plan.rules(job), plan.optim(job), max(1, job.train.steps), fixed)


def _blank(block: Block, shape: tuple[int, ...], dtype: torch.dtype, where: str) -> Shard:
    rest = shape[1:]
    offsets = (block.start, *[0] * len(rest)) if shape else ()
    size = (block.stop - block.start, *rest) if shape else ()
    return Shard(block.name, shape, offsets, torch.empty(size, dtype=dtype, device=where))


def _fill(run: Path, job: Job, held: Parameters) -> int:
    """First weights, or those of the newest checkpoint. Returns the version that this is."""
    newest = checkpoint.newest(run / "checkpoints", lambda text: None)
    if newest is None:
        first_weights(held.shards, job)
        return 0
    values = checkpoint.load(newest, wanted(held, manifest.read(newest)), verified=True)
    held.restored(State([], {**values["update"], "lr": values.get("sync", {}).get("lr", 0.0)}))
    return version_of(values)


def wanted(held: Parameters, what: Manifest) -> list[Shard]:
    """What a shard fills from a checkpoint, before `restored`."""
    known = [slot for slot in held.optimizer.state() if slot.name in what.tensors or not _is_new(slot.name)]
    return [*held.shards, *saved.moments(known, what.values, held.rules.outer)]


def _is_new(name: str) -> bool:
    """State that only a server's optimizer has: it begins with nothing where another one has trained before."""
    return name.startswith("gathered.")


def version_of(values: dict[str, Any]) -> int:
    """Updates in the weights of a checkpoint. values: of its manifest."""
    return int(values["update"]["updates"])


def first_weights(shards: list[Shard], job: Job) -> None:
    """As every layout begins."""
    if job.model.weights:
        load_huggingface(Path(job.model.weights), shards)
        return
    fills = parameters(job.model)
    for shard in shards:
        initialise_(shard.local, shard.name, shard.global_shape, shard.offsets, fills[shard.name].fill, job.train.seed)


class _Part:
    """This shard's part of checkpoints."""

    def __init__(self, number: int, held: Parameters, saver: Saver):
        self.number, self.held, self.saver = number, held, saver
        self._pending: tuple[int, Pending] | None = None
        self._said: list[m.Saved] = []

    def save(self, version: int, values: bytes) -> None:
        """Copies what is held; never waits for the save before."""
        if self._pending is not None and not self._pending[1].done():
            # It waits for the part of a shard that was lost.
            self.saver.break_off()
        told = msgspec.json.decode(values)
        state = self.held.state()
        told["update"] = {**told["update"], **self.held.optimizer.values()}
        try:
            pending = self.saver.save(State(state.shards, told), told["step"], attempt=version + 1)
        except OSError as error:
            self._said.append(m.Saved(self.number, version, error.strerror or str(error)))
            return
        self._pending = version, pending

    def poll(self) -> list[m.Saved]:
        """What has become of it; of the first shard's part, when the others' are there, too."""
        if self._pending is not None and self._pending[1].done():
            version, pending = self._pending
            self._pending = None
            error: CheckpointError | None = pending.error
            self._said.append(m.Saved(self.number, version, str(error) if error else ""))
        said, self._said = self._said, []
        return said
