"""What it took to keep replicas consistent, in words and figures: bytes, what a codec saved, staleness, waste."""

from __future__ import annotations

from statistics import median
from typing import Any

from shoal.job import Job
from shoal.models.spec import count
from shoal.observe.charts import Rows, of_server
from shoal.observe.charts_server import staleness
from shoal.observe.units import counted, percent, short, size
from shoal.observe.waiting import shares, waited

Facts = list[tuple[str, str]]


def exchange(job: Job | None, rows: Rows) -> Facts:
    """(label, sentence) of each; nothing where nothing was sent."""
    return [*_network(rows), *(_saved(job, rows) if job else []), *_waiting(rows), *_gradients(rows)]


def figures(job: Job | None, rows: Rows) -> dict[str, Any]:
    """The same for scripts, of the whole run; without what is not known or would only be zero.

    sent_bytes, received_bytes: by all workers of a server, else by rank 0. times_fewer: bytes than in float32, of
    `pushed` and `pulled` with a server, else of what was `sent`. waited_s: seconds of each replica or worker.
    staleness: gradients by it. rejected, lost: gradients. wasted_s: seconds computed in vain. outer_drift: after the
    last local steps.
    """
    if not job:
        return {}
    added = {
        key: sum(row.get(key) or 0 for row in rows)
        for key in ("sent_bytes", "received_bytes", "rejected", "lost", "wasted_s")
    }
    drifts = [row["outer_drift"] for row in rows if row.get("outer_drift") is not None]
    found = added | {
        "times_fewer": _times(job, rows), "waited_s": {str(each): value for each, value in waited(rows).items()},
        "staleness": {str(late): number for late, number in sorted(staleness(rows).items())},
        "outer_drift": drifts[-1] if drifts else None,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value}


def _network(rows: Rows) -> Facts:
    sent, received = (sum(row.get(key) or 0 for row in rows) for key in ("sent_bytes", "received_bytes"))
    if not sent:
        return []
    text = f"{size(sent / len(rows))} sent and {size(received / len(rows))} received a step"
    if not of_server(rows):
        across = sum(row.get("sent_across_bytes") or 0 for row in rows)
        to_others = f"; to other replicas {size(across / len(rows))} sent" if across else ""
        return [("network", f"{text}, by one rank{to_others}")]
    tokens = sum(row.get("tokens") or 0 for row in rows)
    a_token = f"; both together {size((sent + received) / tokens)} a token" if tokens else ""
    return [("network", f"{text}, by all workers{a_token}")]


def _saved(job: Job, rows: Rows) -> Facts:
    times = _times(job, rows)
    if "sent" in times:
        return [("compression", f"{times['sent']:.3g} times fewer bytes than an all-reduce in float32 every step")]
    if times:
        text = f"pushed {times['pushed']:.3g}, pulled {times['pulled']:.3g} times fewer bytes than in float32"
        return [("compression", text)]
    return []


def _times(job: Job, rows: Rows) -> dict[str, float]:
    """How many times fewer bytes than plainly, where a codec or local steps save any: `pushed` and `pulled`, or `sent`.

    Plainly: in float32, 4 bytes a number. With a server a push has every parameter once, rejected or not, and so has a
    pull, the median of steps. Else an all-reduce of R replicas every step would send 2 (R − 1) / R of a rank's part of
    the gradient; all steps together. What ranks of one replica send each other (`fsdp`, `tensor` and the like) does not
    count: it goes over other connections.
    """
    known = [row for row in rows if row.get("sent_bytes") and row.get("received_bytes")]
    if not known or (job.sync.name in ("allreduce", "server") and job.sync.codec == "none"):
        return {}
    if of_server(known):
        whole = 4.0 * count(job.model)
        plain = [whole * (staleness([row]).total() + (row.get("rejected") or 0)) for row in known]
        sent, received = (
            median(at / row[key] for at, row in zip(plain, known, strict=True))
            for key in ("sent_bytes", "received_bytes")
        )
        return {"pushed": sent, "pulled": received}
    # A run that began with an earlier version has rows without.
    told = [row for row in rows if row.get("plain_bytes")]
    plain_bytes = sum(row["plain_bytes"] for row in told)
    sent_bytes = sum(row.get("sent_across_bytes", row.get("sent_bytes")) or 0 for row in told)
    return {"sent": plain_bytes / sent_bytes} if plain_bytes and sent_bytes else {}


def _waiting(rows: Rows) -> Facts:
    """Of replicas who waited for the others most, and for whom they waited; so of a server's workers."""
    served = of_server(rows)
    of_each = shares([row for row in rows if ("commits" in row) == served])
    if not of_each:
        return []
    most, least = (choose(of_each, key=of_each.__getitem__) for choose in (max, min))
    who, whom = ("worker", "pushes, pulls and others") if served else ("replica", "others")
    text = f"{who} {most} waited for {whom} most, {percent(of_each[most])} of the run"
    return [("waiting", f"{text}; {who} {least} least, {percent(of_each[least])}")]


def _gradients(rows: Rows) -> Facts:
    """Of a server: how many became updates, how late, and how many did not."""
    late = staleness(rows)
    if not late:
        return []
    rejected, lost = (sum(row.get(key) or 0 for row in rows) for key in ("rejected", "lost"))
    text = counted(late.total(), "gradient")
    if rejected:
        text += f"; {rejected:,} more ({percent(rejected / (rejected + late.total()))}) rejected"
    if lost:
        text += f"; {lost:,} lost with their worker"
    if wasted := sum(row.get("wasted_s") or 0.0 for row in rows):
        text += f"; {short(wasted)} computed in vain"
    facts = [("gradients", text)]
    if max(late):
        mean = sum(each * times for each, times in late.items()) / late.total()
        facts.append(("staleness", f"{mean:.3g} in the mean, {max(late)} at most"))
    return facts
