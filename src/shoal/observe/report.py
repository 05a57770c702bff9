"""report.html: one run on one page, readable without a network and without shoal."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.job import Job
from shoal.job import read as read_job
from shoal.models.spec import count
from shoal.observe import commands, environment, metrics, page, result
from shoal.observe.charts import PARTS, Rows, charts, median
from shoal.observe.result import Result
from shoal.observe.units import duration, number, percent, short

FILE = "report.html"


def write(folder: Path) -> Path:
    """Writes the report of the run in `folder`, whatever of it there is, and returns its path.

    ShoalError if the folder holds no run.
    """
    if not (folder / "job.toml").is_file() and not (folder / metrics.FILE).is_file():
        raise ShoalError("there is no run here: job.toml is missing", where=str(folder), fix="see `shoal runs`")
    path = folder / FILE
    fresh = path.with_suffix(".new")
    fresh.write_text(render(folder), encoding="utf-8")
    fresh.replace(path)
    return path


def render(folder: Path) -> str:
    """The page as text."""
    rows, done = metrics.read(folder), result.read(folder)
    job, where = _job(folder), environment.read(folder)
    drawn = charts(rows)
    facts = [page.table("Run", _run_rows(folder, job, rows, done)), page.code("Go on", _go_on(folder, done))]
    more = [page.table("Machine", _machine_rows(where))] if where else []
    if done and done.bits_per_byte:
        more.insert(0, _compression(done))
    if done and done.sample:
        more.append(page.code("Sample", done.sample, marked=done.prompt))
    sections = [page.figures(_headline(rows, done)), page.plots(drawn), page.columns(facts, more)]
    return page.page(folder.resolve().name, _under(rows, done, job), sections, drawn)


def _job(folder: Path) -> Job | None:
    try:
        return read_job(folder / "job.toml")
    except ShoalError:
        return None  # of another release of shoal, or damaged: the metrics are still worth a page


def _under(rows: Rows, done: Result | None, job: Job | None) -> str:
    steps = rows[-1]["step"] if rows else 0
    of = f" of {job.train.steps:,}" if job and job.train.steps else ""
    state = ""
    if done:
        state = f", stopped by {done.stopped_by}" if done.stopped_by else ", finished"
    return f"{steps:,}{of} steps{state} · written {datetime.now().strftime('%Y-%m-%d %H:%M')}"


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
        ("duration", duration(done.seconds if done else sum(r.get("seconds") or 0 for r in rows)), ""),
    ]


def _run_rows(folder: Path, job: Job | None, rows: Rows, done: Result | None) -> list[tuple[str, str]]:
    found = [("folder", str(folder))]
    if job:
        found += _job_rows(job)
    if done:
        found.append(("tokens trained on", f"{done.tokens:,}"))
    found.append(("step", _step(rows)))
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
        ("layout", f"{job.layout or 'auto'}, sync {job.sync.name}"),
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


def _step(rows: Rows) -> str:
    """`123 ms in the median: forward 31 %, backward 58 %, ...`"""
    seconds = median(rows, "seconds")
    if not seconds:
        return "not measured"
    parts = [(name, median(rows, key)) for key, name, _ in PARTS]
    shares = ", ".join(f"{name} {100 * part / seconds:.0f} %" for name, part in parts if part is not None)
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
