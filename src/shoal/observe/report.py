"""report.html: one run on one page, readable without a network and without shoal."""

from __future__ import annotations

import contextlib
from datetime import datetime
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.job import Job
from shoal.job import read as read_job
from shoal.models.spec import count
from shoal.observe import commands, environment, files, metrics, page, perfetto, result
from shoal.observe.charts import Rows, charts, median, parts
from shoal.observe.charts_server import server_charts
from shoal.observe.charts_trace import trace_chart
from shoal.observe.exchange import exchange
from shoal.observe.hold import held
from shoal.observe.log import Log, tail
from shoal.observe.result import Result
from shoal.observe.summary import of_memory, off
from shoal.observe.units import counted, duration, number, percent, short
from shoal.observe.waiting import waiting_charts

FILE = "report.html"
# Of the log, on the page of a run that failed: an error has up to two, before them what led to it.
_LAST_WORDS = 8


def write(folder: Path, over: bool = False) -> Path:
    """Writes the report of the run in `folder`, whatever of it there is, and returns its path.

    over: whether the run has ended though somebody still holds the folder: who writes this, to finish it.
    ShoalError if the folder holds no run, OSError if the page cannot be written.
    """
    return _write(folder, running=not over and held(folder))


def failed(folder: Path, error: BaseException) -> None:
    """For a run that ended in `error`: logs it, and writes the report, which tells it.

    Never raises for a full disk or a folder that is gone: the error is what the user must see.
    """
    with contextlib.suppress(OSError, ShoalError):
        with contextlib.closing(Log(folder)) as log:
            log.write(str(error) or type(error).__name__)
        _write(folder, running=False)  # ranks that are being killed may still hold the folder


def _write(folder: Path, running: bool) -> Path:
    if not (folder / "job.toml").is_file() and not (folder / metrics.FILE).is_file():
        raise ShoalError("there is no run here: job.toml is missing", where=str(folder), fix="see `shoal runs`")
    path = folder / FILE
    files.replace(path, render(folder, running).encode())
    return path


def render(folder: Path, running: bool) -> str:
    """The page as text. running: whether some process holds the folder."""
    rows, job, where = metrics.read(folder), _job(folder), environment.read(folder)
    done = result.current(folder, _last(rows))
    state = _state(done, job, running)
    drawn = charts(rows) + waiting_charts(rows) + server_charts(rows)
    if chart := trace_chart(perfetto.read(folder / perfetto.FILE)):
        drawn.append(chart)
    facts = [page.table("Run", _run_rows(folder, job, rows, done)), page.code("Go on", _go_on(folder, done))]
    more = [page.table("Machine", _machine_rows(where))] if where else []
    if done and done.bits_per_byte:
        more.insert(0, _compression(done))
    if done and done.sample:
        more.append(page.code("Sample", done.sample, marked=done.prompt))
    if state == "failed" and (words := tail(folder, _LAST_WORDS)):
        more.insert(0, page.code("Last lines of log.txt", words))
    sections = [page.figures(_headline(rows, done)), page.plots(drawn), page.columns(facts, more)]
    return page.page(folder.resolve().name, _under(rows, done, job, state), sections, drawn)


def _job(folder: Path) -> Job | None:
    try:
        return read_job(folder / "job.toml")
    except ShoalError:
        return None  # of another release of shoal, or damaged: the metrics are still worth a page


def _last(rows: Rows) -> int:
    return rows[-1]["step"] if rows else 0


def _state(done: Result | None, job: Job | None, running: bool) -> str:
    if running:
        return "running"
    state = result.state(done, job.train.steps if job else None)
    return f"{state} by {done.stopped_by}" if done and done.stopped_by and state == "stopped" else state


def _under(rows: Rows, done: Result | None, job: Job | None, state: str) -> str:
    step, steps = done.steps if done else _last(rows), job.train.steps if job else 0
    reached = f"{step:,} of {counted(steps, 'step')}" if steps else counted(step, "step")
    return f"{reached}, {state} · written {datetime.now().strftime('%Y-%m-%d %H:%M')}"


def _headline(rows: Rows, done: Result | None) -> list[tuple[str, str, str]]:
    last = rows[-1] if rows else {}
    validation = done.val_loss if done else next((r["val_loss"] for r in reversed(rows) if "val_loss" in r), None)
    speed = done.tokens_per_second if done else median(rows, "tokens_per_second")
    return [
        ("validation loss", number(validation, ".3f"), "nats/token"),
        ("bits per byte", number(done.bits_per_byte if done else None, ".3f"), ""),
        (
            "training loss, last step",
            number(done.loss_last if done else last.get("loss"), ".3f"),
            "nats/token",
        ),
        ("throughput", number(speed), "tokens/s"),
        ("MFU", percent(done.mfu if done else median(rows, "mfu")), ""),
        ("duration of all steps", duration(sum(row.get("seconds") or 0 for row in rows)), ""),
    ]


def _run_rows(folder: Path, job: Job | None, rows: Rows, done: Result | None) -> list[tuple[str, str]]:
    found = [("folder", str(folder))]
    if job:
        found += _job_rows(job)
    if done:
        found.append(("tokens trained on", f"{done.tokens:,}"))
        found.append(("last command", f"{duration(done.seconds)} to the end of its last step"))
    found.append(("step", _step(rows)))
    if done and done.predicted_step_seconds:
        far = off(done.predicted_step_seconds, done.step_seconds) if done.step_seconds else ""
        beside = f"{far} than measured" if far else ""
        told = f"{short(done.predicted_step_seconds)}{beside}, by what shoal calibrate had found"
        found.append(("step, predicted", told))
    if done and done.memory_gib:
        found.append(("memory", f"{done.memory_gib:.2f} GiB at most, of the fullest rank{of_memory(done)}"))
    found += exchange(job, rows)
    if done and done.mfu_note:
        found.append(("MFU", done.mfu_note))
    return found


def _job_rows(job: Job) -> list[tuple[str, str]]:
    model, train, data = job.model, job.train, job.data
    parameters = f"{count(model):,} parameters, " if model.vocab_size else ""
    return [
        (
            "model",
            f"{model.family}, {parameters}{model.num_hidden_layers} layers, width {model.hidden_size}, "
            f"vocabulary {model.vocab_size:,}",
        ),
        (
            "data",
            f"{', '.join(data.source)}; {data.tokenizer} tokenizer, sequences of {data.sequence_length}",
        ),
        ("layout", f"{job.layout or 'auto'}, sync {_sync(job)}"),
        (
            "batch",
            f"{train.global_batch} sequences, {train.global_batch * data.sequence_length:,} tokens at most",
        ),
        (
            "optimizer",
            f"{job.optim.name}, lr {job.optim.lr:g}, {job.optim.schedule}, clip {job.optim.clip:g}",
        ),
        ("precision", f"{train.precision}, compile {train.compile}"),
        ("seed", str(train.seed)),
    ]


def _sync(job: Job) -> str:
    """`allreduce`, `local with codec int8`, `server (asp, 2 shards)`."""
    server, codec = job.server, job.sync.codec
    how = f" ({server.mode}, {counted(server.shards, 'shard')})" if job.sync.name == "server" else ""
    return f"{job.sync.name}{how}" + (f" with codec {codec}" if codec != "none" else "")


def _step(rows: Rows) -> str:
    """`123 ms in the median: forward 31 %, backward 58 %, ...`"""
    seconds = median(rows, "seconds")
    if not seconds:
        return "not measured"
    known = [(name, median(rows, key)) for key, name, _ in parts(rows)]
    shares = ", ".join(f"{name} {100 * part / seconds:.0f} %" for name, part in known if part is not None)
    return f"{short(seconds)} in the median{': ' * bool(shares)}{shares}"


def _machine_rows(where: dict[str, Any]) -> list[tuple[str, str]]:
    names = (
        "host",
        "device",
        "ranks",
        "threads",
        "system",
        "python",
        "torch",
        "shoal",
        "commit",
        "command",
        "time",
    )
    found = [(name, where[name]) for name in names if where.get(name) is not None]
    return [(name, " ".join(value) if isinstance(value, list) else str(value)) for name, value in found]


def _compression(done: Result) -> str:
    values = [
        ("this model", done.bits_per_byte),
        ("xz -9", done.xz_bits_per_byte),
        ("gzip -9", done.gzip_bits_per_byte),
    ]
    note = "All of the same validation text; less is better. The model's is its loss / ln 2 / bytes of text."
    return page.bars("Bits per byte", [(name, value) for name, value in values if value], note)


def _go_on(folder: Path, done: Result | None) -> str:
    prompt = done.prompt if done and done.prompt else commands.PROMPT
    return "\n".join((commands.generate(folder, prompt), commands.resume(folder), commands.report(folder)))
