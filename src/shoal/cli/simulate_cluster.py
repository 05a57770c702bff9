"""`shoal simulate --cluster`: a planned run, step by step, with slow devices, failures and checkpoints."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.errors import JobError
from shoal.job import Job, read
from shoal.job.check import at_least, positive, require
from shoal.job.layout import Layout

if TYPE_CHECKING:
    from shoal.planning.plan import Question
    from shoal.planning.scene import Staged

_EXAMPLE = "shoal simulate --model llama3-8b --cluster h100x64"
_SLOW = re.compile(r"(\d+):(\d+)=(\d+(?:\.\d+)?)")
_HOUR = 3600.0


@dataclass(frozen=True)
class SimulateCluster:
    """Simulates a planned run on a cluster: every rank of every pipeline, step by step, at any scale. Runs nothing.

    $ shoal simulate --model llama3-405b --cluster h100x16384 --steps 2000
    $ shoal simulate --model llama3-8b --cluster h100x64 --layout replicas=8,pipeline=4,tensor=2 --spread 0.03
    $ shoal simulate --model gpt3-175b --cluster a100-80x1024 --slow 3:2=1.5 --timeline step.html --perfetto step.json

    What a step takes without trouble is what `shoal plan` predicts of it. How it goes on: docs/simulate.md.
    """

    job: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[JOB.toml]")] = ""
    """TOML file of options, whose model, batch, sequence length and precision are taken, in place of --model."""
    model: str = ""
    """A model's name (docs/planning-models.md), or a Hugging Face config.json."""
    cluster: str = ""
    """A file (docs/clusters.md), or so many devices: `h100x64`."""
    layout: str = ""
    """As in a job, with all its degrees: `replicas=8,pipeline=4,tensor=2`; empty = the fastest. A micro-batch that it
    does not say is the fastest that fits."""
    global_batch: int = 0
    """Sequences of a step; 0 = as `shoal plan` has it."""
    sequence: int = 0
    """Tokens of a sequence; 0 = the job's, or what the model was trained with."""
    precision: str = ""
    """`bf16`, `fp16` or `fp8`; empty = the job's, or bf16."""
    tokens: str = ""
    """To train on, e.g. `300B` or `15T`: says how many days that takes, going on as in the simulated steps."""
    sync: str = ""
    """How replicas agree: `allreduce`, or `server`; empty = as the job says, or `allreduce`."""
    codec: str = ""
    """How they write what they exchange (docs/codecs.md); empty = as the job says, or `none`."""
    servers: int = 0
    """server: server shards; 0 = as the job says, or 1."""
    mode: str = ""
    """server: `bsp`, `asp` or `ssp`; empty = as the job says, or bsp."""
    staleness: int = -1
    """ssp: pushes that a worker may be ahead of the slowest; -1 = as the job says, or 4."""
    local_steps: int = 0
    """server: steps of its own that a worker takes between a pull and a push; 0 = as the job says, or 1."""
    replicas: int = 0
    """Only layouts with so many replicas (workers of a server); 0 = whichever are fastest."""
    steps: int = 100
    """To simulate."""
    spread: float = 0.0
    """How much devices differ in speed, always: standard deviation of the logarithm of their seconds (0.03: 3 %)."""
    jitter: float = 0.0
    """How much a device differs from step to step, likewise."""
    slow: str = ""
    """Devices that are slower than all others: `3:2=1.5`, of pipeline 3 rank 2 takes 1.5 times as long; several with
    commas."""
    mtbf: float = 0.0
    """Hours between failures of one device; 0 = as the cluster says; `inf` = none fails."""
    restart: float = 600.0
    """Seconds from a failure until training goes on from the last checkpoint."""
    every: int = 0
    """Steps between two checkpoints; 0 = as is best for these failures."""
    storage: float = 0.12
    """GB/s that one device writes of a checkpoint, while all of them do."""
    seed: int = 0
    """Of speeds and failures."""
    timeline: str = ""
    """Draws the first step on a page: FILE.html."""
    perfetto: str = ""
    """Writes the first step for ui.perfetto.dev: FILE.json."""
    drawn: int = 1
    """Pipelines that are drawn."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output (docs/simulate.md)."""

    def validate(self) -> None:
        for flag, file, suffix in (("--timeline", self.timeline, ".html"), ("--perfetto", self.perfetto, ".json")):
            path = Path(file)
            fitting = not file or (path.suffix == suffix and path.parent.is_dir() and not path.is_dir())
            require(
                fitting, f"{flag}={file} is no file that can be written", f"a name that ends in {suffix}, in a folder"
            )
        for name in ("steps", "drawn"):
            at_least(f"--{name}", getattr(self, name), 1)
        for name in ("spread", "jitter", "restart", "every", "seed"):
            at_least(f"--{name}", getattr(self, name), 0)
        if self.mtbf != math.inf:
            at_least("--mtbf", self.mtbf, 0)
        require(max(self.spread, self.jitter) <= 1, "--spread or --jitter is more than 1", "3 % is 0.03")
        positive("--storage", self.storage)


def run(args: list[str]) -> Answer:
    """Prints a table."""
    options = flags.parse(SimulateCluster, args, "shoal simulate")
    options.validate()
    slow = _slow(options.slow)
    job = _job(options)

    from shoal.planning import simulated, simulated_workers

    question = _question(options, job)
    staged = _staged(question, job, options.layout)
    uneven = replace(staged.scene, spread=options.spread, jitter=options.jitter, slow=slow)
    staged, where = replace(staged, scene=uneven), question.cluster
    mtbf = None if options.mtbf == math.inf else options.mtbf * _HOUR / where.count or where.mtbf
    if staged.shared is None:
        found = simulated.simulate(question, staged, options.steps, mtbf, options.every, options.seed)
        text, result = simulated.text(found), simulated.result(found)
    else:
        workers = simulated_workers.simulate(question, staged, options.steps, mtbf, options.seed)
        text, result = simulated_workers.text(workers), simulated_workers.result(workers)
    print(text)
    if options.timeline or options.perfetto:
        print(simulated.draw(question, staged, options.seed, options.drawn, options.timeline, options.perfetto))
    return Answer(result)


def _question(options: SimulateCluster, job: Job | None) -> Question:
    from shoal.planning import asked

    of_server = {"shards": options.servers, "mode": options.mode, "local_steps": options.local_steps}
    agreed = asked.synced(job or Job(), {"name": options.sync, "codec": options.codec}, of_server)
    if options.staleness >= 0:
        agreed = replace(agreed, server=replace(agreed.server, staleness=options.staleness))
    where = asked.cluster_of(options.cluster, 0.0)
    wanted = asked.Wanted(
        options.sequence, options.global_batch, options.precision, options.tokens, options.restart,
        options.storage * 1e9, options.replicas, agreed.sync, agreed.server,
    )  # fmt: skip
    return asked.of_job(agreed, where, wanted) if job else asked.of_model(options.model, where, wanted)


def _job(options: SimulateCluster) -> Job | None:
    """What is simulated is named, once."""
    if options.job and not options.job.endswith(".toml"):
        raise JobError(f"{options.job} is no job (.toml)", fix=f"a model is named by --model {options.job}")
    require(not (options.job and options.model), "a job and --model are both given", "leave out one of them")
    named = bool(options.job or options.model)
    require(named, "no model is named", f"{_EXAMPLE}; or a job: shoal simulate job.toml --cluster h100x64")
    return read(options.job) if options.job else None


def _staged(question: Question, job: Job | None, layout: str) -> Staged:
    """The layout that is asked for, or the fastest that the job can have."""
    from shoal.planning import answered, scene

    if layout:
        asked = Layout.parse(layout)
        asked.validate()
        return scene.staged(question, asked)
    best = answered.plans(question, 1, job).plans[0]
    return scene.staged(question, best.layout, best.chunks, [name for name, _ in best.along])


def _slow(text: str) -> dict[tuple[int, int], float]:
    """`3:2=1.5,0:0=2` by pipeline and rank."""
    found = {}
    for word in filter(None, text.split(",")):
        parts = _SLOW.fullmatch(word.strip())
        if parts is None:
            raise JobError(f"--slow: '{word}' is not PIPELINE:RANK=TIMES", fix="e.g. --slow 3:2=1.5")
        pipeline, rank, times = parts.groups()
        found[int(pipeline), int(rank)] = float(times)
    return found
