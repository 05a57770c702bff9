"""A question's answer as `shoal plan` gives it: plans that the job can have, or what would make one fit."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import Any

from shoal.errors import JobError
from shoal.job import Job
from shoal.job.check import at_least
from shoal.planning import asked, here, show, show_pools, spanning, uneven, unfit, whatif
from shoal.planning.cluster import Cluster
from shoal.planning.plan import Answer, Plan, Question, refused, unlike
from shoal.planning.search import search

# Plans that are looked through for those that a job can have, for each that is wanted.
_SPARE = 5


def plan(what: Job | str, where: str, best: int = 10, price: float = 0.0, alike: bool = False, **wanted: Any) -> Answer:
    """The fastest layouts of a model on a cluster, as `shoal plan` finds them: `.plans`, the fastest first.

    what: a job, or a model by name or by the path of its config.json. where: a cluster's file, or `h100x64`; `here`, or
    the file of an entry: a machine that `shoal calibrate` has measured (jobs alone). price: of
    a device for an hour; 0 = as the file says. alike: also those that differ from a better one in nothing but
    schedule, stages or micro-batch. wanted: fields of `asked.Wanted`, such as sequence (tokens),
    global_batch (sequences), precision, tokens (as text, `15T`), replicas.

    Raises JobError, with what would do, where no layout fits; for what is unknown or absurd; for several pools with
    another sync than all-reduce.
    """
    options = asked.Wanted(**wanted)
    if known := here.machine(where):
        if not isinstance(what, Job):
            raise JobError("a measured machine is planned for a job", fix="shoal.plan(shoal.Job(...), 'here')")
        return here.plans(*here.question(what, known, options), known, best, alike)
    devices = asked.cluster_of(where, price)
    if isinstance(what, Job):
        return plans(asked.of_job(what, devices, options), best, what, alike)
    return plans(asked.of_model(what, devices, options), best, alike=alike)


def plans(question: Question, best: int, job: Job | None = None, alike: bool = False) -> Answer:
    """At most `best` of them, and one at least. alike: as in `search`. JobError where no layout fits, with what would
    make one fit; or where the job's own options refuse all that do."""
    at_least("best", best, 1)
    several = len(question.cluster.pools) > 1
    found = (_of_pools if several else search)(question, best * _SPARE if job else best, alike)
    if several and not found.plans:
        raise _fits_nowhere(question)
    if not found.plans:
        raise unfit.refusal(question, found)
    if job is None:
        return found
    wanted = replace(
        job,
        data=replace(job.data, sequence_length=question.sequence),
        train=replace(job.train, global_batch=question.global_batch),
    )
    reasons = [refused(wanted, plan.layout) for plan in found.plans]
    kept = tuple(plan for plan, error in zip(found.plans, reasons, strict=True) if error is None)
    if not kept:
        assert reasons[0] is not None
        raise JobError(f"the job refuses the layouts that fit: {reasons[0].what}", fix=reasons[0].fix)
    return replace(found, plans=kept[:best], more=found.more or len(kept) > best)


def _of_pools(question: Question, best: int, alike: bool) -> Answer:
    """Replicas with shares by speed, and pipelines through all pools, together."""
    looked = best if alike or best == 1 else best * _SPARE
    each, through = uneven.search(question, looked), spanning.search(question, looked)
    plans = sorted((*each.plans, *through.plans), key=lambda plan: plan.seconds)
    plans = plans if alike else unlike(plans)
    seconds, candidates = each.seconds + through.seconds, each.candidates + through.candidates
    compared, more = each.compared + through.compared, len(plans) > best or each.more or through.more
    return Answer(tuple(plans[:best]), seconds, candidates, compared, None, more)


def alone(question: Question, job: Job | None = None) -> list[tuple[str, Plan | None]]:
    """Of each of several pools by itself, with the same batch, the fastest; None where nothing fits. [] of one pool."""
    found: list[tuple[str, Plan | None]] = []
    for pool in question.cluster.pools if len(question.cluster.pools) > 1 else ():
        one = replace(question, cluster=Cluster(pool.name, (pool,), {}), replicas=0)
        try:
            found.append((pool.name, plans(one, 1, job).plans[0]))
        except JobError:
            found.append((pool.name, None))
    return found


def _fits_nowhere(question: Question) -> JobError:
    """Of several pools. What fits in one of them is said."""
    fitting = [name for name, plan in alone(question) if plan is not None]
    fix = f"pool {fitting[0]} alone: it fits there" if fitting else "plan for one pool: its answer says what would do"
    where = question.cluster
    common = math.gcd(*(pool.count for pool in where.pools))
    ranks = "one rank" if common == 1 else f"{common} ranks, or a divisor of them"
    what = (
        f"{question.shape.name} fits in no layout that replicas of all pools of {where.name} can share, of {ranks}, "
        "and in no pipeline through all of them"
    )
    return JobError(what, fix=f"{fix}; or numbers of devices that have a larger divisor in common")


def instead(
    question: Question, change: str, best: int, job: Job | None = None, alike: bool = False
) -> tuple[Question, Answer]:
    """The same batch on a changed cluster, and its plans."""
    try:
        other = replace(question, cluster=whatif.changed(question.cluster, change))
        return other, plans(other, best, job, alike)
    except JobError as error:
        raise type(error)(error.what, where=error.where or f"--what-if {change}", fix=error.fix) from None


def text(question: Question, answer: Answer, explain: int, job: Job | None = None) -> str:
    """The whole answer; of the first `explain` plans where time and memory go."""
    width = shutil.get_terminal_size((200, 24)).columns
    parts = [show.title(question), show.table(question, answer, width), show.remarks(question, answer)]
    if len(question.cluster.pools) > 1:
        parts.insert(2, show_pools.pools(question, answer.plans[0], alone(question, job)))
    parts += [show.explained(plan, number) for number, plan in enumerate(answer.plans[:explain], 1)]
    return "\n\n".join(parts)
