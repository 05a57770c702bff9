"""A plan's layout, written into a job's TOML: one that is there keeps all else, a new one is whole."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shoal.durable import sync
from shoal.errors import JobError
from shoal.job import Job, Layout, parse, read, write
from shoal.job.model import ModelOptions
from shoal.job.source import Source
from shoal.models import config
from shoal.planning import asked, shapes
from shoal.planning.plan import Plan, Question

_KEY = re.compile(r"""(\s*(?:layout|"layout"|'layout')\s*=\s*)("[^"\\]*"|'[^']*')(.*)""")

# Options of [sync] and [server] that a step's time depends on.
_OF_TIME = {
    "sync": ("name", "codec", "feedback", "every", "fragments", "delay"),
    "server": ("shards", "mode", "local_steps"),
}


def of_layout(
    path: str | Path, question: Question, plan: Plan, model: str = "", job: Job | None = None, recipe: str = ""
) -> str:
    """Writes it. model: as it was named; or job: what was planned, read from the file `recipe`. Returns what was done,
    in a sentence. JobError where the job there is not what was planned, or cannot have the layout; the file is then as
    it was."""
    file = Path(path)
    require_toml(file)
    if file.exists():
        return _into(file, question, plan)
    text = _of_job(question, plan, job, recipe) if job else _new(file, question, plan, model)
    _check(text, file)
    _put(file, text)
    chosen = f"all else as in {recipe}" if job else "its data and its length are still to be chosen"
    return f"{file}: a new job with that layout; {chosen}"


def require_toml(file: Path) -> None:
    if file.suffix != ".toml" or file.is_dir():
        raise JobError("the job is to be a TOML file", where=str(file), fix="--out job.toml")


def _into(file: Path, question: Question, plan: Plan) -> str:
    job = read(file)
    _refuse_another(file, job, question)
    with _reported(file), open(file, encoding="utf-8", newline="") as opened:
        before = opened.read()
    text = with_layout(before, plan.layout, str(file))
    _check(text, file)
    if text != before:
        _put(file, text)
    return f"{file}: layout = {str(plan.layout)!r}, and all else as it was"


def _refuse_another(file: Path, job: Job, question: Question) -> None:
    """A layout of another batch, sequence or model would be a guess about this job."""
    sizes = (
        ("data.sequence_length", job.data.sequence_length, question.sequence, "--sequence"),
        ("train.global_batch", job.train.global_batch, question.global_batch, "--global-batch"),
    )
    for name, has, planned, flag in sizes:
        if has != planned:
            fix = f"plan with {flag} {has}, or for the job itself: shoal plan {file} --cluster ... --out {file}"
            raise JobError(f"{name} is {has} there, and the plan is for {planned}", where=str(file), fix=fix)
    for table, of_time in _OF_TIME.items():
        options, asked_for = getattr(job, table), getattr(question, table)
        for name in of_time:
            has, planned = getattr(options, name), getattr(asked_for, name)
            what = f"{table}.{name} is {has} there, and the plan is for {planned}"
            fix = f"write {table}.{name} = {planned} there first, or plan for the job itself: shoal plan {file} ..."
            if has != planned:
                raise JobError(what, where=str(file), fix=fix)
    shape, wanted = asked.shape_of(job), question.shape
    # The tokenizer decides about some jobs' vocabulary, and a name says nothing.
    skip = {"name", "sequence", "positions", "vectors"} | (set() if job.model.vocab_size else {"vocab"})
    names = [f.name for f in fields(shape) if f.name not in skip]
    pairs = [(name, getattr(shape, name), getattr(wanted, name)) for name in names]
    differ = [f"{name} {has}, not {planned}" for name, has, planned in pairs if has != planned]
    if differ:
        fix = f"plan for the job itself: shoal plan {file} --cluster ... --out {file}; or name another file"
        raise JobError(f"the job there has another model than was planned: {differ[0]}", where=str(file), fix=fix)


def with_layout(text: str, layout: Layout, path: str) -> str:
    """The TOML text of a job with that layout, above all tables; comments, line ends and all other keys stay."""
    tables = tomllib.loads(text.removeprefix("\ufeff"))
    lines = re.split(r"(?<=\n)", text) if text else []
    end = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    if "layout" in tables:
        plain = text.removeprefix("\ufeff").replace("\r\n", "\n")
        at = int(Source(path, plain).where("layout").rpartition(":")[2]) - 1
        line = lines[at].rstrip("\r\n")
        found = _KEY.fullmatch(line)
        if found:
            lines[at] = f'{found[1]}"{layout}"{found[3]}{lines[at][len(line) :]}'
    else:
        # Below the comment that such a file often begins with.
        at = next((n for n, line in enumerate(lines) if not line.lstrip("\ufeff").startswith("#")), len(lines))
        if at and not lines[at - 1].endswith("\n"):
            lines[at - 1] += end
        lines.insert(at, f'layout = "{layout}"{end}')
    changed = "".join(lines)
    try:
        as_meant = tomllib.loads(changed.removeprefix("\ufeff")) == tables | {"layout": str(layout)}
    except tomllib.TOMLDecodeError:
        as_meant = False
    if not as_meant:
        fix = f'write it yourself: layout = "{layout}", above all tables'
        raise JobError("the layout there is written in a way that cannot be changed here", where=path, fix=fix)
    return changed


def _of_job(question: Question, plan: Plan, job: Job, recipe: str) -> str:
    """The job that was planned with that layout: the recipe's own text where the two differ in nothing else."""
    with _reported(Path(recipe)), open(recipe, encoding="utf-8", newline="") as opened:
        text = opened.read()
    planned = replace(
        job,
        data=replace(job.data, sequence_length=question.sequence),
        train=replace(job.train, global_batch=question.global_batch),
    )
    before = read(recipe)
    if replace(before, layout=None) == replace(planned, layout=None):
        return with_layout(text, plan.layout, recipe)
    return write(replace(planned, layout=plan.layout))


def _new(file: Path, question: Question, plan: Plan, model: str) -> str:
    """A job that `shoal train` reads: all tables are in it that a plan says something of."""
    said = _options(question, model)
    job = Job(
        layout=plan.layout,
        model=said,
        data=replace(Job().data, sequence_length=question.sequence),
        train=replace(Job().train, global_batch=question.global_batch, precision=question.precision),
        sync=question.sync,
        server=question.server,
        run=replace(Job().run, name=re.sub(r"[^\w.-]", "-", question.shape.name).strip(".") or "run"),
    )
    whole, usual = tomllib.loads(write(job)), tomllib.loads(write(Job()))
    changed = {t: {k: v for k, v in rows.items() if v != usual[t][k]} for t, rows in whole.items() if t != "layout"}
    lines = [
        f"# {question.shape.name} on {question.cluster.name}: {plan.seconds:.4g} s a step predicted, by `shoal plan`.",
        "# Its text and its length are to be chosen: [data] source, [train] steps. All options: shoal train --help.",
        "# A model's name says its sizes; rope_theta and the like are those of shoal. To go on with published weights,",
        "# take [model] weights = FOLDER alone.",
        "",
        f'layout = "{plan.layout}"',
    ]
    kept = _lines(write(job))
    for table, rows in changed.items():
        lines += ["", f"[{table}]", *(kept[table, key] for key in rows)] if rows else []
    return "\n".join(lines) + "\n"


def _lines(text: str) -> dict[tuple[str, str], str]:
    """(table, key) -> the line of a job as it is written."""
    found, table = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif line:
            found[table, line.partition(" =")[0]] = line
    return found


def _options(question: Question, model: str) -> ModelOptions:
    """Of a model that shoal can train; of a name or a config.json."""
    if question.precision != "bf16":
        fix = "plan with --precision bf16, or leave out --out"
        raise JobError(f"a job cannot be trained in {question.precision}", fix=fix)
    found, where = _config(question, model)
    if found.get("model_type") not in config.FAMILIES:
        known = ", ".join(config.FAMILIES)
        what = f"shoal plans {question.shape.name} ({found.get('model_type')}), but cannot train it"
        raise JobError(what, fix=f"a model of these: {known}; or leave out --out")
    options = config.from_hf(found, where)
    if where == question.shape.name:  # of a name sizes are known, and no more
        usual = ModelOptions()
        options = replace(options, rope_theta=usual.rope_theta, rms_norm_eps=usual.rms_norm_eps)
    return replace(options, max_position_embeddings=max(options.max_position_embeddings, question.sequence))


def _config(question: Question, model: str) -> tuple[dict[str, Any], str]:
    """(what its config.json says, where it stands)."""
    path = Path(model).expanduser()
    table = None if len(path.parts) > 1 or path.suffix == ".json" else shapes.tables().get(question.shape.name)
    if table:
        return dict(table["config"]), question.shape.name
    path = path / "config.json" if path.is_dir() else path
    return config.read_json(path), str(path)


def _check(text: str, file: Path) -> None:
    """It is a job, and may have this layout."""
    try:
        parse(text, str(file)).validate()
    except JobError as error:
        raise type(error)(error.what, where=error.where or str(file), fix=error.fix) from None


def _put(file: Path, text: str) -> None:
    """In place of what is there, whole or not at all; where `file` is a link, of what it points to."""
    target = file.resolve()
    with _reported(file):
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with open(handle, "w", encoding="utf-8", newline="") as opened:
                opened.write(text)
            sync(Path(name))
            if target.exists():
                shutil.copymode(target, name)
            else:
                os.chmod(name, 0o666 & ~_umask())
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _reported(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JobError(f"cannot write the job: {error.strerror}", where=str(file), fix="another --out") from None
