"""`shoal VERB ...`: finds the verb, and ends with the exit code that its answer or its error has."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from signal import Signals
from types import ModuleType

from shoal import __version__
from shoal.cli import answer
from shoal.errors import JobError, ShoalError

VERBS = {
    "train": "train a model from a recipe or on your own text, or resume a run",
    "join": "take a part in a run with a parameter server, from another machine",
    "check": "does your job compute the same in every layout? Small, against one process",
    "data": "prepare text for training, or inspect what was prepared",
    "generate": "continue a text with a trained model",
    "ckpt": "show, verify and reshard checkpoints; to and from Hugging Face's format",
    "pull": "the weights of a run with a parameter server, while it trains",
    "plan": "the fastest layout of a model on a cluster: step time, memory, cost, predicted",
    "simulate": "what a sync does to speed, bytes and waiting, on simulated machines",
    "calibrate": "measure this machine, to predict what runs on it",
    "doctor": "what this machine has, how fast it is, and what is wrong with it",
    "report": "write a run's report.html again",
    "runs": "list the runs in a folder",
}

_USAGE = "usage: shoal VERB [ARGUMENT ...] [--OPTION VALUE ...]"

_HELP = f"""{_USAGE}

Trains, fine-tunes and serves language models on more than one device.

verbs:
{chr(10).join(f"  {verb:<10}{what}" for verb, what in VERBS.items())}

`shoal VERB --help` shows the verb's options: meaning, unit and default of each. With `--format json` a verb
prints one JSON object as its last line on standard output, and everything else on standard error.
"""


def main(args: list[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0; 2 for a mistake of the user's; 1 for a run that failed; 128 +
    n for one that signal n stopped.
    """
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if args[0] in ("-V", "--version"):
        print(f"shoal {__version__}")
        return 0
    form = "text"
    try:
        form = answer.form(args)
        with answer.channel(form):
            given = _verb(args[0]).run(args[1:])
        answer.give(given.result, form)
    except ShoalError as error:
        from shoal.launch import elastic

        if elastic.to_be_said(error):
            answer.refuse(error, form)
        return error.exit_code
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted", file=sys.stderr)
        answer.give({"error": {"what": str(stopped) or "interrupted", "where": "", "fix": ""}}, form)
        return 128 + Signals[getattr(stopped, "name", "SIGINT")]
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python must not complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    return given.exit_code


def _verb(name: str) -> ModuleType:
    """The file of a verb: it has `run(args) -> Answer`."""
    if name not in VERBS:
        from shoal.job.check import nearest

        raise JobError(f"unknown verb '{name}'", fix=nearest(name, VERBS))
    return import_module(f"shoal.cli.{name}")


if __name__ == "__main__":
    sys.exit(main())
