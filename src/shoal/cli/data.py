"""`shoal data prepare`, `append` and `inspect`: text into tokens, as training would, and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.errors import JobError
from shoal.job import blame, read
from shoal.job.check import count, nearest
from shoal.job.data import DataOptions

if TYPE_CHECKING:
    from shoal.data.counts import Counts

_VERBS = ("prepare", "append", "inspect")
# Segments that `inspect` lists.
_SHOWN = 20
SHORT = {"--data": "--data.source"}

_HELP = """usage: shoal data prepare|inspect [RECIPE.toml] [--data FILE ...] [--OPTION VALUE ...]
       shoal data append STORE FILE ... [--OPTION VALUE ...]

  prepare   tokenise the text of a recipe, or your own, before a run needs it
  append    add text to a growing store, also while a run trains on it; the first time makes the store
  inspect   what a run would train on: counts, document lengths, packing, and a row as text

`shoal data prepare --help` and `shoal data append --help` show the options.
"""


@dataclass(frozen=True)
class DataVerb:
    """Finds the text, cleans it, trains or loads the tokenizer, and keeps the tokens for all runs on it.

    $ shoal data prepare --data my.txt folder/ --data.tokenizer bytes
    $ shoal data inspect recipes/quickstart.toml --data.sequence-length 512

    What is prepared is kept in data.cache; the same text with the same options is not prepared twice.
    --data: short for --data.source.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE.toml]")] = ""
    """TOML file of options; its table [data] counts here. Or the job.toml of a run."""
    data: DataOptions = field(default_factory=DataOptions)
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: counts, lengths, packing, a row."""


@dataclass(frozen=True)
class TextOptions:
    """How text is read, and what a new store is made with."""

    text_field: str = "text"
    """JSONL: the key that holds the text."""
    include: tuple[str, ...] = ()
    """Folders: shell patterns of file names to take, e.g. '*.py'; empty = every text file."""
    tokenizer: str = "auto"
    """Of a new store: `bpe` (`auto`) trains a byte-level BPE on this first text; `bytes` takes every byte as a token;
    else a path to a Hugging Face tokenizer.json or a folder that holds one. Later text is tokenised by the store's."""
    vocab_size: int = 0
    """Of a new store: tokens of the BPE, the special one included; 0 = 4096. Later: 0, or the store's."""
    validation: float = -1.0
    """Of a new store: share of this first text kept for validation, as of any corpus; -1 = 0.02. What is appended later
    is all trained on."""
    workers: int = 0
    """Threads that tokenise; 0 = one per core."""


@dataclass(frozen=True)
class AppendVerb:
    """Adds text to a growing store: a folder of tokens that a run with a parameter server can read without an end.

    $ shoal data append news first.jsonl          makes the store `news`, its tokenizer and its validation text
    $ shoal data append news monday.jsonl tue/    adds a segment; runs that train on the store see it within seconds
    $ zcat wednesday.gz | shoal data append news -

    Killed at whatever moment, it leaves the store as it was or with all of this text.
    """

    store: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STORE")] = ""
    """Folder of the store. If it is not there, or empty, it is made."""
    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE ...")] = ()
    """Files or folders of text, *.jsonl (one object a line), or `-` for standard input."""
    data: TextOptions = field(default_factory=TextOptions)
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `store`, `segment` (0 = the store was made),
    counts of `train` and `validation`."""


def run(args: list[str]) -> Answer:
    """Prints what was prepared or appended; `inspect` also a sample of it."""
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(_HELP, end="")
        return Answer()
    if verb not in _VERBS:
        raise JobError(f"unknown verb 'data {verb}'", fix=nearest(verb, _VERBS))
    prog = f"shoal data {verb}"
    if verb == "append":
        return _append(flags.parse(AppendVerb, args[1:], prog))
    options = flags.parse(DataVerb, args[1:], prog, short=SHORT)
    if not options.recipe:
        flags.refuse_recipe_as_text(options.data.source, prog)
        options.data.validate()
    else:
        base = read(options.recipe)
        options = flags.parse(DataVerb, args[1:], prog, short=SHORT, default=DataVerb(data=base.data))
        try:
            options.data.validate()
        except JobError as error:
            raise blame(error, options.recipe, base) from None

    from shoal.data.describe import describe
    from shoal.data.growing import names_store
    from shoal.data.prepare import prepare

    data = options.data
    if verb == "inspect" and any(map(names_store, data.source)):
        data = replace(data, grow=True)  # it is only looked at
    facts = describe(prepare(data, say=print), data)
    print(_counts(facts))
    if verb == "inspect":
        print(_inside(facts))
    return Answer(facts)


def _append(verb: AppendVerb) -> Answer:
    if not verb.store or not verb.files:
        raise JobError("a store and a file of text are to be named", fix="shoal data append STORE FILE ...")
    asked = {f.name: value for f in fields(TextOptions) if (value := getattr(verb.data, f.name)) != f.default}
    options = DataOptions(source=verb.files, **asked)
    options.validate()

    from shoal.data.append import append

    done = append(verb.store, options, asked, say=print)
    if done.segment == 0:
        print(f"begun with {_text(done.train)} to train on, {_text(done.validation)} for validation")
    else:
        print(f"segment {done.segment:,}: {_text(done.train)}")
    print(f"in {done.store}")
    return Answer(done)


def _text(counts: Counts) -> str:
    return f"{count(counts.documents, 'document')}, {count(counts.tokens, 'token')}"


def _counts(facts: dict[str, Any]) -> str:
    shown = {split: facts[split] for split in ("train", "validation")}
    appended = list(enumerate(facts["segments"] or (), 1))
    shown |= {f"segment {number}": of for number, of in appended[-_SHOWN:]}
    lines = [f"{'':14}{'files':>8}{'documents':>12}{'tokens':>16}{'bytes':>16}"]
    for name, of in shown.items():
        lines.append(f"{name:14}{of['files']:8,}{of['documents']:12,}{of['tokens']:16,}{of['bytes']:16,}")
    if len(appended) > _SHOWN:
        lines.append(f"({len(appended):,} segments, the last {_SHOWN} of them shown; all are part of train)")
    lines.append(f"{facts['vocab_size']:,} different tokens, {facts['bytes_per_token']:.2f} bytes per token")
    lines.append(f"kept in {facts['folder']}")
    return "\n".join(lines)


def _inside(facts: dict[str, Any]) -> str:
    lengths = ", ".join(f"{share} %: {length:,}" for share, length in facts["length_percentiles"].items())
    packed, padded = facts["packing_efficiency"], facts["padding_efficiency"]
    files = facts["validation_files"]
    names = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
    lines = [
        f"tokens per document, percentiles: {lengths}",
        f"{facts['rows']:,} rows of {facts['sequence_length']:,} tokens, {packed:.1%} of them text",
        f"(with one piece of a document a row: {padded:.1%})",
        f"validation files: {names or 'none'}",
        "one row, as text:",
    ]
    pieces = facts["sample"]
    return "\n".join(lines + [f"--- piece {i} of {len(pieces)}\n{text}" for i, text in enumerate(pieces, 1)])
