"""A parameter server's machines in one process: a queue of events, a network that loses and doubles, hosts that die."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.coordinator import Coordinator
from shoal.sync.server.effects import Effect, Keep, Send, Summary, Write
from shoal.sync.server.encoding import Encoder
from shoal.sync.server.messages import COORDINATOR, Address, Key
from shoal.sync.server.shard import ServerShard
from shoal.sync.server.standing import Standing
from shoal.sync.server.worker import Worker
from shoal.sync.simulate.disk import Disk
from shoal.sync.simulate.journal import Journal
from shoal.sync.simulate.machines import Machines
from shoal.sync.simulate.scenario import Fault, Problem, Scenario

# Seconds that a shard's part of a checkpoint takes; and after which a copy that lacks bytes is started again.
_SAVING, _STUCK = 0.2, 10.0


@dataclass
class _Host:
    """A process. life: how often it was started. fuse: effects until it is killed. asleep: hangs until then.

    encoder: of a worker, where there is a codec. filled: what a copy of a shard holds is all there. stuck:
    since when it has not had what it is to apply.
    """

    machine: Any
    encoder: Encoder | None = None
    life: int = 0
    up: bool = True
    fuse: int | None = None
    down: float = 0.0
    asleep: float = 0.0
    alarm: float = -1.0
    busy: Key | None = None
    filled: bool = True
    stuck: float | None = None


@dataclass
class Seen:
    """What happened to one worker. idle: seconds that it waited. computed, wasted: micro-batches; the latter rejected.

    answers: as they came. pulled: versions, by push.
    """

    idle: float = 0.0
    since: float = 0.0
    computed: int = 0
    wasted: int = 0
    answers: list[tuple[m.Answer, tuple[int, Key]]] = field(default_factory=list)
    pulled: dict[tuple[int, Key], tuple[int, ...]] = field(default_factory=dict)


class World:
    """Run it once with `run`, then read `journal`, `committed` (the times of commits), `seen`, `shards`, `now`.

    over: why it ended before its end. thin: commits whose bytes were in fewer places than was promised.
    """

    def __init__(self, scenario: Scenario, problem: Problem, coordinator: type[Coordinator] = Coordinator):
        """coordinator: the class; a test may give one with a mistake in it."""
        self.scenario, self.problem, self.rules = scenario, problem, scenario.rules
        self.machines = Machines(scenario, problem, coordinator)
        self.rng = random.Random(scenario.seed)
        self.now, self._count = 0.0, 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.journal, self.disk = Journal(), Disk()
        self.committed: list[float] = []
        self.over = ""
        self.thin: list[str] = []
        self.seen = [Seen() for _ in scenario.speeds]
        self.hosts: dict[Address, _Host] = {}
        self.live_workers: dict[int, Address] = {}
        self._done: set[int] = set()
        self._ended: set[Address] = set()
        self._next_copy = scenario.copies
        self.hosts[COORDINATOR] = _Host(self._coordinator())
        for shard in range(scenario.shards):
            for copy in range(scenario.copies):
                others = tuple(range(1, scenario.copies)) if copy == 0 else ()
                self.hosts[Address("shard", shard, copy)] = _Host(self.machines.shard(shard, copy, others))
        for number, time in enumerate(scenario.starts or [0.0] * len(scenario.speeds)):
            if time > 0:
                self._at(time, self._on_first_start, number)
            else:
                self._start_worker(number, _Host(None))
        for fault in scenario.faults:
            self._at(fault.time, self._on_fault, fault)
        for time, _ in scenario.arrivals:
            self._at(time, self._on_arrival)
        for address in self.hosts:
            self._at(self.rules.retry * (1 + self.rng.random()), self._on_tick, address)

    @property
    def finished(self) -> bool:
        """Every worker has been told that all samples are used up."""
        return len(self._done) == len(self.scenario.speeds)

    def run(self) -> World:
        """Until it is finished and every commit is applied, or patience ends."""
        queue, workers = self._queue, len(self.scenario.speeds)
        while queue and not self.over and not (len(self._done) == workers and self._settled()):
            self.now, _, event, given = heapq.heappop(queue)
            if self.now > self.scenario.patience:
                break
            event(*given)
        return self

    def shards(self) -> list[ServerShard]:
        """The copies that live."""
        shards = [host for address, host in self.hosts.items() if address.role == "shard"]
        return [host.machine for host in shards if host.up and host.filled]

    def _settled(self) -> bool:
        coordinator = self.hosts[COORDINATOR]
        alive = coordinator.up and all(map(self._up, coordinator.machine.at.copies.addresses()))
        return alive and all(s.version == coordinator.machine.version for s in self.shards()) and not self._broken()

    def _up(self, address: Address) -> bool:
        """The journal may name a copy that never came to be, because the coordinator died meanwhile."""
        host = self.hosts.get(address)
        return host is not None and host.up

    def _broken(self) -> bool:
        """Some copy has yet to be started again."""
        return len(self.shards()) < self.scenario.shards * self.scenario.copies

    # Hosts and what they do.

    def _coordinator(self) -> Coordinator:
        return self.machines.coordinator(self.journal.records, self.now, self._due)

    def _due(self, at: Standing) -> bytes | None:
        if self.disk.saving is not None or not self.scenario.saves or self.rng.random() >= self.scenario.saves:
            return None
        self.disk.saving = at.version
        return b""

    def _start_worker(self, number: int, host: _Host) -> None:
        """A new process in the place of the old one."""
        host.machine, host.encoder = self.machines.worker(number), self.machines.encoder(number)
        self._join(number, host)

    def _join(self, number: int, host: _Host) -> None:
        if (old := self.live_workers.pop(number, None)) is not None:
            self.hosts.pop(old, None)
        if host.encoder is not None:
            host.encoder.settle(False)
        effects = host.machine.start(self.rng.getrandbits(32), self.now)
        address = self.live_workers[number] = host.machine.address
        host.busy = None
        self.hosts[address] = host
        self._do(address, host, effects)

    def _do(self, address: Address, host: _Host, effects: Sequence[Effect]) -> None:
        """Effects in order; a host with a burning fuse dies between two of them."""
        for effect in effects:
            if host.fuse is not None:
                if host.fuse == 0:
                    self._kill(address, host)
                    return
                host.fuse -= 1
            if isinstance(effect, Send):
                self._send(address, effect)
            elif isinstance(effect, Summary):
                self.journal.mark(effect.version, effect.records)
            elif isinstance(effect, Keep):
                self._keep(address, host, effect.version)
            elif isinstance(effect.what, m.Stage):
                self.disk.log(address.number, effect.what, effect.tensors)
            else:
                self._write(effect)
        if address.role == "worker":
            self._follow(address, host)
        elif address is COORDINATOR and host.machine.alarm not in (None, host.alarm):
            host.alarm = host.machine.alarm
            self._at(host.alarm, self._on_alarm, host.life)

    def _write(self, effect: Write) -> None:
        self.journal.append(effect.what, effect.durable)
        if isinstance(effect.what, r.Committed):
            self.committed.append(self.now)
            self._places(effect.what)

    def _keep(self, address: Address, host: _Host, version: int) -> None:
        """A shard's part of a checkpoint; it is on the disk a little later, if the shard is still there."""
        shard: ServerShard = host.machine
        if self.scenario.copies == 1:
            self.disk.turn(address.number, version, shard.carried())
        _, values, tensors = shard.held.whole()
        self._at(self.now + _SAVING, self._on_kept_part, address, host.life, version, (values, tensors))

    def _places(self, record: r.Committed) -> None:
        """Looks where the bytes of a commit are, as it goes into the journal. What a copy had when it was killed counts
        until the coordinator can know."""
        for shard, copies in enumerate(self.hosts[COORDINATOR].machine.at.copies.of_shard):
            machines = [self.hosts[Address("shard", shard, copy)].machine for copy in copies]
            places = sum(
                machine.version >= record.version
                or all(key in machine.staged and machine.staged[key].squares is not None for key in record.keys)
                for machine in machines
            )
            if places < len(copies) or places < min(2, self.scenario.copies):
                self.thin.append(f"version {record.version} was committed with shard {shard} of it in {places} places")

    def _follow(self, address: Address, host: _Host) -> None:
        """What a worker's own program does: it computes when there is something to, joins again when it was fenced."""
        worker: Worker = host.machine
        seen = self.seen[worker.number]
        if worker.state == "computing" and host.busy != worker.key:
            assert worker.grant is not None
            host.busy = worker.key
            seen.idle += self.now - seen.since
            samples = worker.grant.samples
            batches = (samples.stop - samples.start) / self.rules.micro_batch
            self._at(self.now + batches * self.scenario.speeds[worker.number], self._on_computed, address, host.life)
        elif worker.state == "fenced":
            self._join(worker.number, host)
        elif worker.state == "finished":
            self._done.add(worker.number)
            self._do(address, host, worker.leave(self.now))

    def _send(self, sender: Address, send: Send) -> None:
        scenario, random = self.scenario, self.rng.random
        for _ in range(2 if scenario.double and random() < scenario.double else 1):
            if scenario.loss and random() < scenario.loss:
                # Over TCP nothing is lost but with its connection, of whose end both sides hear.
                self._at(self.now + scenario.delay, self._on_broken, (sender, send.to))
                continue
            late = self.rng.expovariate(1.0) * scenario.jitter if scenario.jitter else 0.0
            self._at(self.now + scenario.delay * (1 + late), self._on_message, sender, send)

    def _at(self, time: float, event: Callable[..., None], *given: Any) -> None:
        self._count += 1
        heapq.heappush(self._queue, (time, self._count, event, given))

    # Events.

    def _on_message(self, sender: Address, send: Send) -> None:
        host = self.hosts.get(send.to)
        if host is None or not host.up:
            return
        if host.asleep > self.now:
            self._at(host.asleep, self._on_message, sender, send)
            return
        if sender in self._ended and send.to == COORDINATOR:
            # Nothing comes out of a connection after its end.
            return
        message, tensors = send.message, send.tensors
        if send.to.role == "coordinator":
            self._do(COORDINATOR, host, host.machine.handle(sender, message, self.now))
        elif send.to.role == "shard":
            self._to_shard(sender, send.to, host, message, tensors)
        else:
            self._to_worker(send.to, host, message, tensors)

    def _to_shard(
        self, sender: Address, address: Address, host: _Host, message: m.Message, tensors: Sequence[Any]
    ) -> None:  # fmt: skip
        """What its process does with a message, besides giving it to the machine (`node.serve`)."""
        shard: ServerShard = host.machine
        if not host.filled:
            if isinstance(message, m.Whole):
                shard.take(message, tensors)
            elif isinstance(message, m.Stage):
                shard.handle(sender, message, tensors, self.now)
            if shard.filled:
                host.filled = True
                self._do(address, host, shard.hello())
            return
        if isinstance(message, m.Clone):
            self._do(address, host, shard.give(message.copy))
        elif isinstance(message, m.Kept):
            self.disk.forget(address.number, message.version)
        elif not isinstance(message, m.Whole):
            self._do(address, host, shard.handle(sender, message, tensors, self.now))

    def _to_worker(self, address: Address, host: _Host, message: m.Message, tensors: Sequence[Any]) -> None:
        worker: Worker = host.machine
        before, nonce = worker.answer, worker.nonce
        if isinstance(message, m.Pulled) and self.rules.level == "hogwild":
            tensors = self.problem.copy(tensors)
        effects = worker.handle(message, tensors, self.now)
        if worker.answer is not before:
            assert worker.answer is not None
            self._answered(worker, nonce)
            if host.encoder is not None:
                host.encoder.settle(worker.answer.accepted)
        self._do(address, host, effects)

    def _answered(self, worker: Worker, nonce: int) -> None:
        seen, answer = self.seen[worker.number], worker.answer
        assert answer is not None
        seen.answers.append((answer, (nonce, answer.key)))
        if not answer.accepted:
            seen.wasted += 1

    def _on_computed(self, address: Address, life: int) -> None:
        host = self.hosts.get(address)
        if host is None or not host.up or host.life != life:
            return
        if host.asleep > self.now:
            self._at(host.asleep, self._on_computed, address, life)
            return
        worker: Worker = host.machine
        if worker.state != "computing" or worker.key != host.busy:
            return
        assert worker.grant is not None
        if worker.grant.rest:
            assert host.encoder is not None
            rest, weight = host.encoder.rest()
            self._do(address, host, worker.push(rest, weight, 0.0, self.now))
            return
        token, seen = (worker.nonce, worker.key), self.seen[worker.number]
        seen.pulled[token] = tuple(pulled.version for pulled, _ in worker.pulled.values())
        seen.computed += 1
        seen.since = self.now
        weights = {shard: tensors for shard, (_, tensors) in worker.pulled.items()}
        gradients, weight, loss = self.problem.gradient(weights, worker.grant.samples, token)
        if host.encoder is not None:
            gradients = host.encoder.encode(gradients, weight, worker.clock)
        owes = host.encoder is not None and host.encoder.feedback
        self._do(address, host, worker.push(gradients, weight, loss, self.now, owes=owes))

    def _on_tick(self, address: Address) -> None:
        """Of servers by address; of workers by number, whichever incarnation."""
        now_at = self.live_workers.get(address.number, address) if address.role == "worker" else address
        host = self.hosts.get(now_at)
        if host is None or (address.role == "worker" and address.number in self._done):
            return
        if not host.up and address.role == "shard" and self.scenario.copies > 1:
            # Another one has taken its place.
            return
        self._at(self.now + self.rules.retry, self._on_tick, address)
        if not host.up or host.asleep > self.now:
            return
        if address.role == "shard":
            self._look_after(address, host)
        else:
            self._do(now_at, host, host.machine.tick(self.now))

    def _look_after(self, address: Address, host: _Host) -> None:
        """A shard's process, now and then: takes all from another copy, greets the coordinator, ends if it is stuck."""
        shard: ServerShard = host.machine
        if not host.filled:
            first = self.hosts[COORDINATOR].machine.at.copies.primaries()[address.number]
            self._send(address, Send(Address("shard", address.number, first), m.Clone(address.number, address.copy)))
            return
        host.stuck = (host.stuck or self.now) if shard.stuck and self.scenario.copies > 1 else None
        late = host.stuck is not None and self.now - host.stuck > _STUCK
        if late or (shard.refused is not None and self.scenario.copies > 1):
            self._kill(address, host)
            return
        # Whoever the coordinator is connected with has told it so: it would say it again to a new one.
        known: Coordinator = self.hosts[COORDINATOR].machine
        copy = address.number, address.copy
        hello = [] if copy in known.at.copies.applied and copy not in known.presence.unheard else shard.hello()
        self._do(address, host, [*hello, *shard.tick(self.now)])

    def _on_kept_part(self, address: Address, life: int, version: int, part: tuple[bytes, Sequence[Any]]) -> None:
        host = self.hosts[address]
        if not host.up or host.life != life:
            return
        if self.disk.part(version, address.number, part, self.scenario.shards):
            self._at(self.now + self.scenario.delay, self._on_saved, version)

    def _on_saved(self, version: int) -> None:
        """The coordinator hears that a checkpoint is complete: its journal begins anew there."""
        host = self.hosts[COORDINATOR]
        if not host.up or self.disk.saving != version:
            return
        self.disk.saving = None
        self.journal.restart(version)
        self._do(COORDINATOR, host, host.machine.kept(version))

    def _on_alarm(self, life: int) -> None:
        host = self.hosts[COORDINATOR]
        if host.up and host.life == life:
            self._do(COORDINATOR, host, host.machine.tick(self.now))

    def _on_arrival(self) -> None:
        """Its coordinator looks at the store at once, unless it hangs; one that is down does when it is back."""
        host = self.hosts[COORDINATOR]
        if host.asleep > self.now:
            self._at(host.asleep, self._on_arrival)
        elif host.up:
            self._do(COORDINATOR, host, host.machine.grow(*self.scenario.arrived(self.now), self.now))

    def _on_fault(self, fault: Fault) -> None:
        if fault.role == "coordinator":
            address = COORDINATOR
        elif fault.role == "worker":
            # Of one that has not been started yet there is nothing to kill.
            address = self.live_workers.get(fault.number, Address("worker", fault.number, -1))
        else:
            address = self._a_copy(fault)
        if not self._up(address):
            return
        host = self.hosts[address]
        if fault.role == "worker" and fault.number in self._done:
            return
        if fault.hang:
            host.asleep = max(host.asleep, self.now + fault.down)
        else:
            host.fuse, host.down = fault.effects, fault.down
            if fault.effects == 0:
                self._kill(address, host)

    def _a_copy(self, fault: Fault) -> Address:
        """The copy that workers talk to, by what the coordinator last knew."""
        coordinator: Coordinator = self.hosts[COORDINATOR].machine
        return Address("shard", fault.number, coordinator.at.copies.primaries()[fault.number])

    def _kill(self, address: Address, host: _Host) -> None:
        """Where nothing is left of a shard without a log, the run is over: what it held cannot be had again."""
        host.fuse = None
        host.up, host.life = False, host.life + 1
        if address.role != "worker":
            self.disk.saving = None
        if address.role == "shard" and self.scenario.copies > 1 and self._last(address):
            self.over = f"no copy of shard {address.number} is left"
        self._at(self.now + host.down, self._on_start, address)
        self._at(self.now + self.scenario.delay, self._on_broken, tuple(self.hosts))
        if address is not COORDINATOR:
            self._at(self.now + self.scenario.delay, self._on_lost, address)

    def _last(self, address: Address) -> bool:
        return all(shard.number != address.number for shard in self.shards())

    def _on_broken(self, ends: Sequence[Address]) -> None:
        """Workers among them learn that a connection of theirs has ended (`node.client`)."""
        for end in ends:
            if end.role == "worker" and (host := self.hosts.get(end)) is not None and host.up:
                host.machine.lost()

    def _on_lost(self, address: Address) -> None:
        host = self.hosts[COORDINATOR]
        for shard in self.shards():
            shard.lost(address)
        if address.role == "shard" and self.scenario.copies > 1:
            self._ended.add(address)
        # A coordinator that is not there has no connections that could break.
        if host.up:
            self._do(COORDINATOR, host, host.machine.lost(address, self.now))

    def _on_first_start(self, number: int) -> None:
        self.seen[number].since = self.now
        self._start_worker(number, _Host(None))
        self._on_tick(self.live_workers[number])

    def _on_start(self, address: Address) -> None:
        if address is COORDINATOR:
            self._start_coordinator()
        elif address.role == "worker":
            self._start_worker(address.number, self._revived(address))
        elif self.scenario.copies == 1:
            host = self._revived(address)
            host.machine = self.machines.shard(address.number, address.copy)
            self.disk.recover(host.machine)
            self._do(address, host, host.machine.hello())
        else:
            self._start_copy(address)

    def _revived(self, address: Address) -> _Host:
        host = self.hosts[address]
        host.up, host.fuse, host.asleep, host.busy = True, None, 0.0, None
        return host

    def _start_coordinator(self) -> None:
        host = self._revived(COORDINATOR)
        self.journal.crash(self.rng)
        host.machine = self._coordinator()

    def _start_copy(self, address: Address) -> None:
        """A new process, which takes all from the copy that workers talk to."""
        made = self.machines.shard(address.number, self._next_copy)
        self._next_copy += 1
        self.hosts[made.address] = _Host(made, filled=False)
        self._on_tick(made.address)
