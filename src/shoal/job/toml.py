"""Job <-> TOML. Unknown keys and values of the wrong type are refused: file, line, nearest known key."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shoal.errors import JobError
from shoal.job.check import fit, kinds, nearest
from shoal.job.job import Job, parts
from shoal.job.layout import Layout
from shoal.job.source import Source


def read(path: str | Path, base: Job | None = None) -> Job:
    """The job in a TOML file, over `base` (default: Job()). Not validated: the command line may change it."""
    return parse(Source.read(path, "the recipe").text, str(path), base)


def read_run(folder: str | Path) -> Job:
    """The job of the run in a folder."""
    file = Path(folder) / "job.toml"
    if not Path(folder).exists():
        raise JobError("no run to resume: there is no such folder", where=str(folder), fix="see `shoal runs`")
    if not file.is_file():
        raise JobError("no run to resume: it has no job.toml", where=str(folder), fix="see `shoal runs`")
    return read(file)


def parse(text: str, path: str = "<text>", base: Job | None = None) -> Job:
    """The job in a TOML text, over `base` (default: Job()); `path` is named in errors."""
    file = Source(path, text)
    table = file.tables()
    job = base or Job()
    changes: dict[str, Any] = {}
    for key, value in table.items():
        if key == "layout":
            if not isinstance(value, str):
                fix = 'write layout = "replicas=2" above all tables'
                raise JobError(f"layout={value!r} is not text", where=file.where(key), fix=fix)
            with file.at(key):
                changes[key] = layout(value)
        elif key not in dict(parts(job)):
            # A table was meant to be a table; anything else may be an option that lacks its table.
            known = [f.name for f in fields(Job)] if isinstance(value, dict) else kinds(Job)
            raise JobError(f"unknown key '{key}'", where=file.where(key), fix=nearest(key, known))
        elif isinstance(value, dict):
            changes[key] = _part(getattr(job, key), key, value, file)
        else:
            fix = f"write [{key}] above its options"
            raise JobError(f"'{key}' is a table, not {value!r}", where=file.where(key), fix=fix)
    return replace(job, **changes)


def blame(error: JobError, path: str | Path, base: Job) -> JobError:
    """An error of validating a job, with file and line if the file at `path` is wrong by itself.

    base: the job of that file, before the command line changed it.
    """
    named = re.match(r"(?:(\w+)\.)?(\w+)[=: ]", error.what)
    # Table by table too: the first mistake of the file may be one that the command line mends.
    if not named or error.where or error.what not in map(_mistake, (base, *(part for _, part in parts(base)))):
        return error
    keys = [key for key in named.groups() if key]
    file = Source(str(path), Path(path).read_text(encoding="utf-8-sig"))
    return type(error)(error.what, where=file.where(*keys), fix=error.fix) if file.holds(*keys) else error


def _mistake(options: Any) -> str:
    try:
        options.validate()
    except JobError as error:
        return error.what
    return ""


def layout(text: str) -> Layout | None:
    """`replicas=2,fsdp=2` -> Layout, `auto` -> None. Raises LayoutError."""
    return None if text == "auto" else Layout.parse(text)


def _part(part: Any, table: str, values: dict[str, Any], file: Source) -> Any:
    known = kinds(Job)
    changes = {}
    for key, value in values.items():
        name = f"{table}.{key}"
        if name not in known:
            raise JobError(f"unknown key '{name}'", where=file.where(table, key), fix=nearest(name, known))
        with file.at(table, key):
            changes[key] = fit(name, value, known[name])
    return replace(part, **changes)


def write(job: Job) -> str:
    """The job as TOML, every option in it; `parse` of it gives the same job."""
    lines = [f"layout = {_text(str(job.layout or 'auto'))}"]
    for name, part in parts(job):
        lines += ["", f"[{name}]"]
        lines += [f"{f.name} = {_text(getattr(part, f.name))}" for f in fields(part)]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'
    return repr(value)
