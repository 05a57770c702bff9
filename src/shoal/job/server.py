"""The parameter server of `sync.name = server`: how many hold the weights, who waits for whom, who may connect."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from shoal.errors import JobError
from shoal.job.check import at_least, nearest, one_of, positive, require
from shoal.job.codec import POWERSGD, parse
from shoal.job.idle import OF_MODE, refuse_idle
from shoal.job.shares import AUTO
from shoal.job.sync import SyncOptions

if TYPE_CHECKING:
    from shoal.job.job import Job

MODES = ("bsp", "asp", "ssp", "quorum")
ROUNDS = ("bsp", "quorum")
"""Modes in which several workers' gradients are one update, and none is stale."""

LEVELS = ("snapshot", "shard", "hogwild")
COMPENSATIONS = ("none", "rate", "age", "dc", "delayed-nesterov", "look-ahead")
OF_SO_MANY = ("look-ahead", "delayed-nesterov")
"""Compensations for which servers go by the number of workers of the job: no other can join."""

STRENGTHS = {"rate": 1.0, "age": 0.5, "dc": 0.04}
"""Compensations that can be stronger or weaker, and how strong they usually are."""


@dataclass(frozen=True)
class ServerOptions:
    """Only with `sync.name=server`: workers push gradients to servers and pull weights, and need not wait for each
    other. Workers are the replicas of the layout (docs/parameter-server.md)."""

    shards: int = 1
    """Server processes among which parameters and the optimizer's state are divided, by bytes; at most as many as the
    model has parameters (tensors). More of them share the traffic where links or updates are slow (--servers)."""
    copies: int = 1
    """Processes that hold the same shard. With 2 or more, another goes on when one is lost; with 1, what workers push
    is also in a log on disk, from which it starts again."""
    mode: str = "bsp"
    """Who waits for whom. `bsp`: all gradients are one update, everybody waits for the slowest; the same answer as
    all-reduce. `asp`: each gradient is an update, nobody waits. `ssp`: as asp, but nobody is more than `staleness`
    pushes ahead of the slowest. `quorum`: the first `quorum` gradients are one update, late ones are rejected."""
    staleness: int = 4
    """ssp: pushes that a worker may be ahead of the slowest one; 0 = none."""
    max_staleness: int = -1
    """asp, ssp: a gradient is rejected after more updates than this since its weights were pulled; -1 = never."""
    quorum: int = 0
    """quorum: gradients that close a round; 0 = those of all workers but one, and at least one."""
    grace: float = 0.0
    """quorum: seconds for which a round stays open after them, for the others."""
    level: str = "snapshot"
    """What a pull may see. `snapshot`: one version on all shards, for up to two more copies of the weights there.
    `shard`: one version on each shard. `hogwild`: the weights while updates change them, without a copy."""
    compensation: str = "none"
    """asp, ssp: what is done about stale gradients. With τ updates since the pull: `rate` divides the learning rate by
    (1 + τ)^p, `age` the gradient; `dc` corrects it by how far the weights have moved (snapshot only); `look-ahead`
    lets workers pull weights where momentum will have taken them (not with hogwild); `delayed-nesterov` gives
    momentum the mean of several gradients at a time (optim.name=sgd only)."""
    strength: float = -1.0
    """Of the compensation: the power p of `rate` and `age`, the factor λ of `dc`; -1 = the usual 1, 0.5 and 0.04."""
    local_steps: int = 1
    """Steps of its own, with `optim`, that a worker takes between a pull and a push. With more than 1 it pushes how far
    they took it, and servers follow by Nesterov momentum with sync.outer_lr and sync.outer_momentum: asynchronous
    DiLoCo with asp or ssp."""
    lease: float = 5.0
    """Seconds of silence after which a worker is given up and its samples go to others; for processes that hang."""
    reconnect: float = 0.5
    """Seconds after which a worker is given up whose connection broke, unless it is back; 0 = at once."""
    host: str = "127.0.0.1"
    """Address of the interface on which coordinator and shards listen; beyond loopback a `token` is needed."""
    elsewhere: tuple[str, ...] = ()
    """Parts that other machines start, by `shoal join RUN 'worker 1'`: any of `worker 0`, `worker 1`, …, `server 0`, …;
    all machines see the run's folder and data.cache."""
    token: str = ""
    """File with the job token, any text of at least 16 bytes that only this job's machines know: who does not know it
    cannot connect. Empty = one is made for the run and kept in its folder."""
    certificate: str = ""
    """PEM file with each machine's own certificate. With `key` and `authority`: connections are encrypted (TLS 1.3)."""
    key: str = ""
    """PEM file with the private key of `certificate`, without a passphrase."""
    authority: str = ""
    """PEM file with the certificates by which those of all machines are signed."""

    def validate(self) -> None:
        self.check("server.")

    def check(self, table: str) -> None:
        """Raises JobError for options out of range, or that exclude each other. table: before their names in it."""
        for name, known in (("mode", MODES), ("level", LEVELS), ("compensation", COMPENSATIONS)):
            one_of(table + name, getattr(self, name), known)
        least = {
            "shards": 1,
            "copies": 1,
            "local_steps": 1,
            "staleness": 0,
            "max_staleness": -1,
            "quorum": 0,
            "grace": 0,
            "reconnect": 0,
        }
        for name, number in least.items():
            at_least(table + name, getattr(self, name), number)
        positive(f"{table}lease", self.lease)
        if self.max_staleness >= 0:
            what = f"{table}max_staleness={self.max_staleness} with {table}mode={self.mode}, where no gradient is stale"
            require(self.mode not in ROUNDS, what, f"{table}mode asp or ssp, or leave it out")
        self._check_compensation(table)
        self._check_connections(table)

    def _check_compensation(self, table: str) -> None:
        given = f"{table}compensation={self.compensation}"
        if self.compensation != "none":
            what = f"{given} with {table}mode={self.mode}, where no gradient is stale"
            require(self.mode not in ROUNDS, what, f"{table}mode asp or ssp, or {table}compensation none")
        if self.compensation == "dc":
            what = f"{given} with {table}level={self.level}: it measures from the weights that a worker pulled"
            require(self.level == "snapshot", what, f"{table}level snapshot")
        if self.compensation == "look-ahead":
            what = f"{given} with {table}level=hogwild: it serves the weights themselves, which do not look ahead"
            require(self.level != "hogwild", what, f"{table}level snapshot or shard")
        if self.local_steps > 1:
            what = f"{given} with {table}local_steps={self.local_steps}: it is made for single gradients"
            fits = ("none", "rate", "age", "delayed-nesterov")
            require(self.compensation in fits, what, f"one of {', '.join(fits)}")
        if self.strength == -1:
            return
        at_least(f"{table}strength", self.strength, 0)
        what = f"{table}strength={self.strength} has no effect with {given}"
        require(self.compensation in STRENGTHS, what, f"leave it out, or take one of {', '.join(STRENGTHS)}")

    def _check_connections(self, table: str) -> None:
        require(bool(self.host), f"{table}host is empty", "127.0.0.1, or the address of an interface")
        files = {name: getattr(self, name) for name in ("certificate", "key", "authority")}
        missing = [table + name for name, file in files.items() if not file]
        what = f"TLS needs three files, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given"
        require(len(missing) in (0, 3), what, "give certificate, key and authority, or none of them")
        what = f"{table}host={self.host} without {table}token: beyond loopback, strangers could take part"
        fix = f"{table}token=FILE with the same text on all machines, or {table}host=127.0.0.1"
        require(bool(self.token) or _loopback(self.host), what, fix)
        what = f"{table}host={self.host} is every interface, and no address by which others could find this machine"
        require(not _everywhere(self.host), what, "the address of one of its interfaces (`ip -brief address`)")

    def closing(self, workers: int, table: str = "server.") -> int:
        """Gradients that close a round of `quorum`, of so many workers. Raises JobError for more than there are."""
        what = f"{table}quorum={self.quorum} of {workers} workers"
        require(self.quorum <= workers, what, f"{workers} or fewer, or more workers (--workers)")
        return self.quorum or max(1, workers - 1)


def _check_elsewhere(job: Job) -> None:
    """The parts that other machines start are parts of the job, and what is measured here is not of them."""
    options, named = job.server, job.server.elsewhere
    servers = [name for name in named if name.startswith("server ")]
    what = f"server.elsewhere={servers} with server.copies={options.copies}: a copy that comes again would begin anew"
    require(not servers or options.copies == 1, what, "server.copies=1 (a log on disk), or keep servers together")
    twice = [name for name in named if named.count(name) > 1]
    require(not twice, f"server.elsewhere names '{''.join(twice[:1])}' twice", "name each part once")
    if job.layout is None:
        return
    what = f"replica_share=auto with server.elsewhere={list(named)}: they cannot be measured before they are there"
    require(not named or job.layout.replica_share != AUTO, what, "give the shares, e.g. replica_share=2+1")
    known = [f"worker {n}" for n in range(job.layout.replicas)] + [f"server {n}" for n in range(options.shards)]
    for name in named:
        require(name in known, f"server.elsewhere: the job has no '{name}'", nearest(name, known))


def check_server(job: Job) -> None:
    """The parameter server and the rest of the job go together. Raises JobError that names two options."""
    options, sync = job.server, job.sync.name
    if sync != "server":
        for field in fields(options):
            value = getattr(options, field.name)
            what = f"server.{field.name}={value} has no effect with sync.name={sync}"
            require(value == field.default, what, f"--sync server, or leave out server.{field.name}")
        return
    refuse_idle(options, OF_MODE, "server.", "mode")
    what = f"run.trace={job.run.trace} has no effect with sync.name=server: its workers have no steps in common"
    require(job.run.trace == 0, what, "leave it out (--trace 0); metrics and report say how long each worker waited")
    _check_elsewhere(job)
    if options.local_steps == 1:
        check_optimizer(options.compensation, job.optim.name)
        for name in ("outer_lr", "outer_momentum"):
            what = f"sync.{name} has no effect with server.local_steps=1: workers push every gradient"
            usual = getattr(job.sync, name) == getattr(SyncOptions, name)
            require(usual, what, f"leave it out, or take server.local_steps, e.g. {job.sync.every}")
    require(
        job.model.bias_update_rate == 0,
        f"model.bias_update_rate={job.model.bias_update_rate} with sync.name=server: servers move weights "
        "by gradients, and balancing biases move by how many tokens each expert got",
        "model.bias_update_rate=0 (balance by model.router_aux_loss_coef), or sync.name=allreduce",
    )
    check_codec(job.sync.codec, options)
    if job.layout is not None:
        options.closing(job.layout.replicas)


def check_optimizer(compensation: str, optimizer: str) -> None:
    """Server shards can compensate staleness with this optimizer. Raises JobError."""
    known = {"delayed-nesterov": ("sgd",), "look-ahead": ("sgd", "adamw")}.get(compensation, (optimizer,))
    if optimizer not in known:
        what = {
            "delayed-nesterov": f"delayed-nesterov is an optimizer of its own, optim.name={optimizer} another one",
            "look-ahead": f"look-ahead does not know where optim.name={optimizer} goes without a gradient",
        }
        raise JobError(what[compensation], fix=f"optim.name={' or '.join(known)}, or another server.compensation")


def check_codec(codec: str, options: ServerOptions, name: str = "sync.codec", table: str = "server.") -> None:
    """Gradients can be pushed and weights pulled in it. Raises JobError.

    name: of its option. table: before the names of the server's.
    """
    if codec == "none":
        return
    what = f"{name}={codec} with {table}level=hogwild: a pull has no version to tell the changes since"
    require(options.level != "hogwild", what, f"{table}level=snapshot, or {name}=none")
    what = f"{name}={codec} with {table}compensation=dc: each copy of a shard has sent workers other weights"
    require(options.compensation != "dc", what, f"another {table}compensation, or {name}=none")
    kept = parse(codec, name)[0] if codec != "auto" else None
    if kept is not None and kept.name == POWERSGD:
        what = f"{name}={codec} with a server: its matrices are of all replicas' gradients together"
        raise JobError(what, fix=f"{name}=int8, or another that writes numbers")
    if kept is not None and kept.name == "randomk" and kept.unbiased:
        what = f"{name}={codec} with a server: what a pull loses of the weights would be more each time"
        raise JobError(what, fix=codec.replace(":unbiased", "", 1))


def pushed_batch(job: Job) -> int:
    """Sequences that one gradient of each worker has, all together: train.global_batch where they make one update.

    With asp and ssp each gradient is an update by itself, and they need only be equally large: of the batch as much as
    can be shared evenly among all that read, in whole micro-batches.
    """
    batch, layout = job.train.global_batch, job.layout
    if job.sync.name != "server" or job.server.mode in ROUNDS or layout is None:
        return batch
    unit = layout.pieces * max(1, layout.micro_batch)
    return batch // unit * unit or batch


def _loopback(host: str) -> bool:
    """Of an address or a name, without asking who has that name: `localhost` alone is known."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _everywhere(host: str) -> bool:
    """`0.0.0.0` and the like."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def too_many(shards: int, parameters: int) -> JobError:
    """For more server shards than there are parameters."""
    what = f"{shards} server shards for {parameters} parameters: some would hold nothing"
    return JobError(what, where="--servers", fix=f"at most {parameters}")
