"""`shoal simulate`: what a sync does, on simulated machines."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.cli.train import SHORT
from shoal.errors import JobError
from shoal.job import Job, blame, read
from shoal.job.check import at_least, one_of, positive, require
from shoal.job.idle import OF_MODE, refuse_idle
from shoal.job.server import OF_SO_MANY, ServerOptions, check_codec

if TYPE_CHECKING:
    from shoal.sync.simulate.scenario import Fault

_KILL = re.compile(r"(worker|shard):(\d+)@(\d+(?:\.\d+)?)|(coordinator)@(\d+(?:\.\d+)?)")

# The least rate of a link, in Mbit/s: a bit a second.
_SLOWEST = 1e-6
# Syncs that are simulated with a job.
_OF_JOBS = ("allreduce", "local", "gossip")
# Of the options of the server's simulator, those that a job's has too; and how a job says what others do.
_SHARED = {"sync", "codec", "speeds", "delay", "format"}
_INSTEAD = {
    "workers": "--layout replicas=4",
    "share": "--layout replicas=2,replica_share=2+1",
    "micro-batch": "--layout replicas=4,micro_batch=4",
    "updates": "--steps 200",
    "optimizer": "--optim.name sgd",
    "lr": "--optim.lr 1e-3",
    "momentum": "--optim.momentum 0.9",
    "clip": "--optim.clip 1",
    "seed": "--train.seed 1",
}


@dataclass(frozen=True)
class SimulateOptions:
    """Runs the sync code of shoal on simulated machines and a small problem, and compares it with bsp.

    $ shoal simulate --sync server --mode ssp --staleness 4 --workers 4 --speeds 1,1,1,4
    $ shoal simulate --mode asp --workers 4 --speeds 1,1,1,4 --compensation look-ahead
    $ shoal simulate --mode quorum --quorum 3 --workers 4 --kill worker:1@20,shard:0@30,coordinator@40

    The problem is least squares with 32 weights in float64; time is simulated, so the same command prints the same.
    What it tells: speed, waiting, staleness, rejected work. The loss is of this problem, not of a language model.

    With a recipe, or with --sync allreduce, local or gossip, the replicas of a job are simulated instead, with the real
    model and data: options of their own, see `shoal simulate --sync local --help`. With --cluster it is a planned run
    on a large cluster, with slow devices and failures: see `shoal simulate --cluster h100x64 --help`.
    """

    sync: str = "server"
    """`server`: the parameter server. `allreduce`, `local`, `gossip`: of a job."""
    mode: str = "ssp"
    """`bsp`: all workers' gradients, one update. `asp`: an update a push. `ssp`: the same, but no worker more than
    --staleness pushes ahead of the slowest. `quorum`: the first --quorum gradients, one update."""
    workers: int = 4
    """Number of workers."""
    join: str = ""
    """Simulated seconds at which more workers join, with commas: `20,40`. --speeds and --share are of these, too."""
    speeds: str = "1"
    """Seconds that each worker computes on a micro-batch, with commas; one number = the same for all."""
    staleness: int = 4
    """ssp: pushes that a worker may be ahead of the slowest."""
    max_staleness: int = -1
    """asp, ssp: commits between pull and commit after which a gradient is rejected; -1 = never."""
    quorum: int = 0
    """quorum: gradients that close a round; 0 = those of all workers but one, and at least one."""
    grace: float = 0.0
    """quorum: seconds that a round stays open after them."""
    level: str = "snapshot"
    """What a pull may see: `snapshot` = one version on all shards, `shard` = one on each, `hogwild` = torn reads."""
    compensation: str = "none"
    """Of staleness: `rate`, `age`, `dc`, `look-ahead`, `delayed-nesterov` (docs/parameter-server.md)."""
    codec: str = "none"
    """How gradients are pushed and weights are pulled, e.g. `int8`, `topk:0.05+int2` (docs/codecs.md)."""
    strength: float = -1.0
    """Of the compensation: power of `rate` and `age`, λ of `dc`; -1 = its default."""
    servers: int = 2
    """Server shards, at most 4."""
    copies: int = 1
    """Of each shard; with 1 it keeps a log."""
    updates: int = 200
    """Length: times a whole gradient of each of the --workers."""
    share: str = "2"
    """Micro-batches of each worker's gradient, with commas, e.g. fewer for a slow one; one number = the same for
    all."""
    micro_batch: int = 4
    """Samples in a micro-batch."""
    delay: float = 0.01
    """Seconds that a message is on its way."""
    jitter: float = 0.0
    """Mean of what comes on top of it, times --delay (exponential: messages overtake each other)."""
    drop: float = 0.0
    """Share of the messages that are lost."""
    double: float = 0.0
    """Share of the messages that arrive twice."""
    kill: str = ""
    """Who is killed when, in simulated seconds, and started again a second later: `worker:1@5,coordinator@8`."""
    lease: float = 5.0
    """Seconds of silence after which a worker is given up."""
    retry: float = 1.0
    """Seconds after which what was not answered is said again."""
    optimizer: str = "sgd"
    """`sgd` (with --momentum) or `adamw`."""
    lr: float = 0.02
    """Learning rate, constant."""
    momentum: float = 0.9
    """SGD: decay of the velocity."""
    clip: float = 0.0
    """Largest norm of an update's gradient; 0 = none."""
    seed: int = 0
    """Of the problem and the network."""
    patience: float = 1e6
    """Simulated seconds after which it is given up."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `outcome`, `bsp` and `speedup`."""

    def validate(self) -> None:
        one_of("--sync", self.sync, ("server", *_OF_JOBS))
        one_of("--optimizer", self.optimizer, ("sgd", "adamw"))
        for name, least in (("workers", 1), ("servers", 1), ("copies", 1), ("updates", 1),
                            ("micro_batch", 1), ("delay", 0), ("jitter", 0)):  # fmt: skip
            at_least(f"--{name.replace('_', '-')}", getattr(self, name), least)
        positive("--lr", self.lr)
        for name in ("drop", "double"):
            share = getattr(self, name)
            require(0 <= share < 1, f"--{name}={share} is not a share below 1", "e.g. 0.1")


@dataclass(frozen=True)
class SimulateJob(Job):
    """Trains the replicas of a job in one process, on simulated machines, and compares them with all-reduce every step.

    $ shoal simulate recipes/quickstart.toml --sync local --sync.every 20 --layout replicas=4 --steps 200 --rate 100
    $ shoal simulate recipes/quickstart.toml --sync gossip --layout replicas=4 --steps 200 --speeds 0.1,0.1,0.1,0.4

    Model, data, optimizer and sync are those of `shoal train`, and so are losses and weights; all of it is computed
    here, one replica after the other, on the CPU. Seconds are simulated, from --speeds, --rate and --delay, so the same
    command prints the same. docs/simulate.md says what they leave out.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[JOB.toml]")] = ""
    """TOML file of options, or the job.toml of a run."""
    speeds: str = "1"
    """Seconds that each replica computes on a sequence, with commas; one number = the same for all."""
    rate: float = 0.0
    """Mbit/s of each replica's line into the network, each way; 0 = without limit."""
    delay: float = 0.01
    """Seconds that a message is on its way besides."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `outcome`, `allreduce` and `speedup`."""


def run(args: list[str]) -> Answer:
    """Prints a table."""
    if any(word.partition("=")[0] == "--cluster" for word in args):
        from shoal.cli import simulate_cluster

        return simulate_cluster.run(args)
    if _of_a_job(args):
        return _run_job(args)
    options = flags.parse(SimulateOptions, args, "shoal simulate")
    options.validate()
    joins = _numbers("--join", options.join, options.join.count(",") + 1) if options.join else ()
    what = f"--join with --compensation {options.compensation}: servers go by the number of workers at the beginning"
    require(not joins or options.compensation not in OF_SO_MANY, what, "another compensation, or leave out --join")
    everybody = options.workers + len(joins)
    faults = _faults(options, everybody)
    speeds = _numbers("--speeds", options.speeds, everybody)
    shares = tuple(int(share) for share in _numbers("--share", options.share, everybody))

    from shoal.job.optim import OptimOptions
    from shoal.sync.server.rules import Rules
    from shoal.sync.simulate.outcome import simulate
    from shoal.sync.simulate.scenario import Scenario

    rules = Rules.of(
        _server(options), workers=options.workers, micro_batch=options.micro_batch, clip=options.clip,
        retry=options.retry, codec=options.codec,
    )  # fmt: skip
    batch = sum(shares[: options.workers]) * options.micro_batch
    scenario = Scenario(
        rules, speeds, batch * options.updates, options.seed, options.servers, options.copies, shares,
        options.delay, options.jitter, options.drop, options.double, faults, options.patience,
        starts=(0.0,) * options.workers + joins,
    )  # fmt: skip
    optim = OptimOptions(
        name=options.optimizer, lr=options.lr, momentum=options.momentum, schedule="constant", warmup=0.0,
        weight_decay=0.0,
    )  # fmt: skip
    optim.validate()
    simulation = simulate(scenario, optim, batch)
    print(simulation)
    return Answer(simulation)


def _of_a_job(args: list[str]) -> bool:
    """Whether a recipe is given, or a sync that is simulated with one."""
    pairs = [word.split("=", 1) if "=" in word else [word, after] for word, after in pairwise([*args, ""])]
    named = any(name in ("--sync", "--sync.name") and value in _OF_JOBS for name, value in pairs)
    return named or any(word.endswith(".toml") for word in args) or bool(args and not args[0].startswith("-"))


def _run_job(args: list[str]) -> Answer:
    _refuse_of_server(args)
    options = flags.parse(SimulateJob, args, "shoal simulate", short=SHORT)
    if options.recipe:
        base = read(options.recipe)
        options = flags.parse(SimulateJob, args, "shoal simulate", short=SHORT, default=SimulateJob(**vars(base)))
    else:
        flags.refuse_recipe_as_text(options.data.source, "shoal simulate")
    job = Job(**{f.name: getattr(options, f.name) for f in fields(Job)})
    try:
        job = job.validate()
    except JobError as error:
        raise blame(error, options.recipe, base) if options.recipe else error from None
    at_least("--rate", options.rate, _SLOWEST if options.rate > 0 else 0)
    at_least("--delay", options.delay, 0)

    from shoal.launch.simulate import simulate
    from shoal.training.simulated import Machines

    def machines(replicas: int) -> Machines:
        speeds = _numbers("--speeds", options.speeds, replicas, "replicas")
        return Machines(speeds, 1e6 * options.rate or math.inf, options.delay)

    simulation = simulate(job, machines, print)
    print(simulation)
    return Answer(simulation)


def _refuse_of_server(args: list[str]) -> None:
    """JobError for an option that only the server's simulator has: what to say instead."""
    words = {word.partition("=")[0].replace("_", "-") for word in args}
    require(
        "--kill" not in words,
        "--kill is of --sync server: with all-reduce, local steps or gossip, a lost replica ends the run",
        "leave it out; `shoal train --resume` goes on from the last checkpoint, on other numbers of replicas too",
    )
    for field in fields(SimulateOptions):
        name = field.name.replace("_", "-")
        instead = _INSTEAD.get(name, "leave it out")
        what = f"--{name} is of --sync server, and here the replicas of a job are simulated"
        require(name in _SHARED or f"--{name}" not in words, what, instead)


def _server(options: SimulateOptions) -> ServerOptions:
    """Of the simulated server what `shoal train` has in its table [server] too, checked."""
    given = ServerOptions(
        mode=options.mode,
        staleness=options.staleness,
        max_staleness=options.max_staleness,
        quorum=options.quorum,
        grace=options.grace,
        level=options.level,
        compensation=options.compensation,
        strength=options.strength,
        lease=options.lease,
    )
    given.check("")
    refuse_idle(given, OF_MODE, "", "mode")
    require(options.codec != "auto", "codec=auto measures a real link", "name a codec, e.g. --codec int8")
    check_codec(options.codec, given, "codec", "")
    return replace(given, quorum=given.closing(options.workers, ""))


def _numbers(flag: str, text: str, workers: int, who: str = "workers") -> tuple[float, ...]:
    """One for each worker or replica. Whole ones for --share."""
    kind = int if flag == "--share" else float
    try:
        found = tuple(kind(word) for word in text.split(","))
    except ValueError:
        raise JobError(f"{flag}={text} is not numbers with commas", fix=f"e.g. {flag} 1,1,1,4") from None
    found = found * workers if len(found) == 1 else found
    require(len(found) == workers, f"{flag} has {len(found)} numbers for {workers} {who}", "one each, or one for all")
    for number in found:
        positive(flag, number)
    return found


def _faults(options: SimulateOptions, workers: int) -> tuple[Fault, ...]:
    """`worker:1@5,coordinator@8` as faults."""
    from shoal.sync.simulate.scenario import Fault

    found = []
    for word in filter(None, options.kill.split(",")):
        parts = _KILL.fullmatch(word)
        if parts is None:
            raise JobError(f"--kill: '{word}' is not who@when", fix="e.g. worker:1@5, shard:0@8 or coordinator@8")
        role, number, time, coordinator, its_time = parts.groups()
        most = {"worker": workers, "shard": options.servers}.get(role, 1)
        require(int(number or 0) < most, f"--kill: there is no {role} {number}", f"0 to {most - 1}")
        found.append(Fault(float(time or its_time), role or coordinator, int(number or 0)))
    return tuple(found)
