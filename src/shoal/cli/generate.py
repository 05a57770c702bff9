"""`shoal generate`: prints what a trained model writes after a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.errors import JobError
from shoal.job import Layout


@dataclass(frozen=True)
class Generate:
    """Continues a text with a trained model: of a run, or of a folder in Hugging Face's format.

    $ shoal generate runs/quickstart-... --prompt "def "
    $ shoal generate SmolLM2-135M/ --prompt "Once upon a time" --max-tokens 100 --temperature 0
    $ shoal generate runs/quickstart-... --layout pipeline=2,schedule=zbv
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a run, or a Hugging Face folder (config.json, safetensors, tokenizer.json)."""
    prompt: str = ""
    """Text to go on from; empty = a new document."""
    max_tokens: int = 200
    """Tokens written at most; fewer where the model ends the document or its context is full."""
    temperature: float = 0.8
    """Divides the logits: below 1 likelier tokens, above 1 more surprising ones; 0 = always the likeliest."""
    top_k: int = 0
    """Draw among this many likeliest tokens only; 0 = all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability only; 1 = all."""
    seed: int = 0
    """Seed of the draw: the same seed gives the same text on the same machine."""
    layout: str = ""
    """`pipeline=N` (blocks), `tensor=N` (a part of every matrix) or both, as in training: so many local ranks have the
    model between them, and none the whole; empty = in this process."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `model`, `prompt`, `text`."""


def run(args: list[str]) -> Answer:
    """Prints the text as it comes."""
    options = flags.parse(Generate, args, "shoal generate")
    if not options.model:
        raise JobError("no model is named", fix="shoal generate RUN --prompt TEXT; `shoal runs` lists the runs")

    from shoal.launch.generate import generate
    from shoal.observe.screen import shown

    begun = iter([options.prompt])  # printed with the first piece, when all has been checked
    text = generate(
        options.model,
        options.prompt,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        layout=options.layout,
        on_text=lambda piece: print(shown(next(begun, "") + piece, sys.stdout), end="", flush=True),
        say=lambda line: print(f"\n{line}", end="", file=sys.stderr, flush=True),
    )
    if not options.layout or Layout.parse(options.layout).world == 1:  # else the ranks have printed it
        print(shown(next(begun, ""), sys.stdout), flush=True)
    return Answer({"model": options.model, "prompt": options.prompt, "text": text})
