"""`shoal plan`: the layouts of a model on a cluster, the fastest first, before anything is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from shoal.cli import answer, flags
from shoal.errors import JobError
from shoal.job import Job, read
from shoal.job.check import at_least, require

if TYPE_CHECKING:
    from shoal.planning.entry import Entry
    from shoal.planning.plan import Question

_LISTED = "several changes have commas between them: --what-if devices=2x,network=0.5x"


@dataclass(frozen=True)
class PlanOptions:
    """Searches for the fastest layout of a model on a cluster, and predicts step time, memory and cost. Runs nothing.

    $ shoal plan --model llama3-70b --cluster h100x512
    $ shoal plan --model gpt3-175b --cluster clusters/a100-80-256.toml --global-batch 1024 --explain
    $ shoal plan --model llama3-8b --cluster h100x64 --price 2.50 --tokens 1T --what-if devices=2x,network=0.5x
    $ shoal plan recipes/quickstart.toml --cluster clusters/laptops.toml --out job.toml

    What the columns mean, and what is not predicted: docs/planning.md. Describing a cluster: docs/clusters.md.
    """

    job: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[JOB.toml]")] = ""
    """TOML file of options, whose model, batch, sequence length and precision are planned, in place of --model."""
    model: str = ""
    """A model's name (`llama3-70b`, `gpt3-175b`, `deepseek-v3`, ...: docs/planning-models.md), or a Hugging Face
    config.json."""
    cluster: str = ""
    """A file (docs/clusters.md), or so many devices: `h100x64`, `a100-80x512`; `here`, or the file of an entry: a
    machine that `shoal calibrate` has measured."""
    global_batch: int = 0
    """Sequences of a step; 0 = the job's, or by rule: 4 Mi tokens (half a Mi below 1 B parameters), and no less than
    1,024 for each device."""
    sequence: int = 0
    """Tokens of a sequence; 0 = the job's, or what the model was trained with."""
    precision: str = ""
    """`bf16`, `fp16` or `fp8`; empty = the job's, or bf16."""
    tokens: str = ""
    """To train on, e.g. `300B` or `15T`: says how many days that takes, and with a price its cost."""
    price: float = 0.0
    """Of one device for an hour, in your currency; 0 = as the cluster's file says, if it does."""
    sync: str = ""
    """How replicas agree: `allreduce`, `local`, `gossip`, `server`; empty = as the job says, or `allreduce`. What
    learning loses by it is not predicted."""
    codec: str = ""
    """How they write what they exchange, e.g. `bf16`, `int8`, `topk:0.05+int2` (docs/codecs.md); empty = as the job
    says, or `none`."""
    every: int = 0
    """local, gossip: steps between two exchanges; 0 = as the job says, or 50."""
    fragments: int = 0
    """local: parts of the model that are exchanged in turn; 0 = as the job says, or 1."""
    delay: int = 0
    """local: steps for which a part may be on its way while training goes on; 0 = as the job says, or none."""
    servers: int = 0
    """server: server shards; 0 = as the job says, or 1."""
    mode: str = ""
    """server: `bsp`, `asp`, `ssp` or `quorum`; empty = as the job says, or bsp."""
    local_steps: int = 0
    """server: steps of its own that a worker takes between a pull and a push; 0 = as the job says, or 1."""
    replicas: int = 0
    """Only layouts with so many replicas (workers of a server); 0 = whichever are fastest."""
    restart: float = 600.0
    """Seconds from a failure until training goes on from the last checkpoint, where the cluster says how often devices
    fail."""
    storage: float = 0.12
    """GB/s that one device writes of a checkpoint, while all of them do."""
    best: int = 10
    """Layouts to show."""
    alike: bool = False
    """Also layouts that differ from a better one in nothing but schedule, stages or micro-batch."""
    what_if: str = ""
    """Plans a changed cluster too, with the same batch, and compares: `devices=2x` (or a number), `device=h200`,
    `network=0.5x` (between nodes), `link=2x` (within a node), `memory=2x`, `price=2.50`; several with commas."""
    explain: int = 0
    """Of so many plans, where time and memory go; `--explain` alone is 1."""
    out: str = ""
    """Writes the first plan's layout into this job.toml: one that is there keeps all else, a new one is whole."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `seconds`, `plans`, with --what-if `what_if`
    too (docs/planning.md)."""


def run(args: list[str]) -> answer.Answer:
    """Prints a table."""
    options = flags.parse(PlanOptions, _with_number(args), "shoal plan")
    job = _job(options)
    at_least("--best", options.best, 1)
    at_least("--explain", options.explain, 0)

    from shoal.planning import answered, asked, here, show, show_pools, written

    if options.out:
        written.require_toml(Path(options.out))
    agreed = asked.synced(job or Job(), *_of_sync(options))
    job = agreed if job else None
    if known := here.machine(options.cluster):
        return _of_machine(options, job, known)
    question = _question(options, job, agreed)
    found = answered.plans(question, options.best, job, options.alike)
    texts, result = [answered.text(question, found, options.explain, job)], show.result(question, found)
    if others := answered.alone(question, job):
        result["alone"] = {name: plan and show.told(question, plan) for name, plan in others}
    if options.what_if:
        other, after = answered.instead(question, options.what_if, options.best, job, options.alike)
        texts += [answered.text(other, after, options.explain, job), show.compared(found, after)]
        result["what_if"] = {"change": options.what_if} | show.result(other, after)
    if options.out:
        best = found.plans[0]
        said = written.of_layout(options.out, question, best, options.model, job, options.job)
        texts.append(said + show_pools.better_alone(best, others))
        result["out"] = options.out
    # Whatever is wrong with the options has been said by now.
    print("\n\n".join(texts))
    return answer.Answer(result)


def _of_machine(options: PlanOptions, job: Job | None, known: Entry) -> answer.Answer:
    """Of one that `shoal calibrate` has measured."""
    from shoal.planning import asked, here, show, written

    if job is None:
        raise JobError("a measured machine is planned for a job", fix="shoal plan JOB.toml --cluster here")
    given = {"--what-if": options.what_if, "--price": options.price}
    what = next((name for name, value in given.items() if value), "")
    require(not what, f"{what}: a measured machine is what it is", f"leave out {what}; or name a cluster: h100x8")
    size = asked.Wanted(options.sequence, options.global_batch, options.precision, options.tokens)
    question, settled = here.question(job, known, replace(size, replicas=options.replicas))
    found = here.plans(question, settled, known, options.best, options.alike)
    texts, result = [here.text(question, found, known, options.explain)], show.result(question, found)
    if options.out:
        texts.append(written.of_layout(options.out, question, found.plans[0], job=job, recipe=options.job))
        result["out"] = options.out
    print("\n\n".join(texts))
    return answer.Answer(result)


def _with_number(args: list[str]) -> list[str]:
    """`--explain` without one is `--explain 1`, `--alike` is `--alike True`."""
    found: list[str] = []
    for word, after in zip(args, [*args, ""][1:], strict=True):
        found += [word, _USUAL[word]] if word in _USUAL and _none(after) else [word]
    return found


_USUAL = {"--explain": "1", "--alike": "True"}


def _none(word: str) -> bool:
    return not word or word.startswith("--") or word.endswith(".toml")


def _job(options: PlanOptions) -> Job | None:
    """What is planned is named, once."""
    example = "shoal plan --model llama3-8b --cluster h100x64"
    if options.job and not options.job.endswith(".toml"):
        named = f"a model is named by --model {options.job}"
        raise JobError(f"{options.job} is no job (.toml)", fix=_LISTED if "=" in options.job else named)
    if options.job and options.model:
        raise JobError("a job and --model are both given", fix="leave out one of them")
    if not options.job and not options.model:
        raise JobError("no model is named", fix=f"{example}; or a job: shoal plan job.toml --cluster h100x64")
    if not options.cluster:
        raise JobError("no cluster is named", fix=f"{example}; or a file: docs/clusters.md")
    return read(options.job) if options.job else None


def _of_sync(options: PlanOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """By the names of [sync] and of [server]."""
    sync = {"name": options.sync, "codec": options.codec, "every": options.every, "fragments": options.fragments}
    server = {"shards": options.servers, "mode": options.mode, "local_steps": options.local_steps}
    return sync | {"delay": options.delay}, server


def _question(options: PlanOptions, job: Job | None, agreed: Job) -> Question:
    """agreed: whose sync is planned."""
    from shoal.planning import asked

    where = asked.cluster_of(options.cluster, options.price)
    wanted = asked.Wanted(
        options.sequence, options.global_batch, options.precision, options.tokens, options.restart,
        options.storage * 1e9, options.replicas, agreed.sync, agreed.server,
    )  # fmt: skip
    return asked.of_job(job, where, wanted) if job else asked.of_model(options.model, where, wanted)
