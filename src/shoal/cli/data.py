"""`shoal data prepare` and `shoal data inspect`: text into tokens, as training would, and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.errors import JobError
from shoal.job import blame, read
from shoal.job.check import nearest
from shoal.job.data import DataOptions

SHORT = {"--data": "--data.source"}

_HELP = """usage: shoal data prepare|inspect [RECIPE.toml] [--data FILE ...] [--OPTION VALUE ...]

  prepare   tokenise the text of a recipe, or your own, before a run needs it
  inspect   what a run would train on: counts, document lengths, packing, and a row as text

`shoal data prepare --help` shows the options.
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


def run(args: list[str]) -> Answer:
    """Prints what was prepared; `inspect` also a sample of it."""
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(_HELP, end="")
        return Answer()
    if verb not in ("prepare", "inspect"):
        raise JobError(f"unknown verb 'data {verb}'", fix=nearest(verb, ("prepare", "inspect")))
    prog = f"shoal data {verb}"
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
    from shoal.data.prepare import prepare

    facts = describe(prepare(options.data, say=print), options.data)
    print(_counts(facts))
    if verb == "inspect":
        print(_inside(facts))
    return Answer(facts)


def _counts(facts: dict[str, Any]) -> str:
    lines = [f"{'':12}{'files':>8}{'documents':>12}{'tokens':>16}{'bytes':>16}"]
    for split in ("train", "validation"):
        of = facts[split]
        lines.append(f"{split:12}{of['files']:8,}{of['documents']:12,}{of['tokens']:16,}{of['bytes']:16,}")
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
