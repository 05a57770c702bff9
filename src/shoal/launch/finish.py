"""What follows the last step of a run: the model in Hugging Face's format, a sample, result.json and the report."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from shoal import checkpoint
from shoal.checkpoint import huggingface
from shoal.data import tokenizer as tokenizers
from shoal.data.describe import compressed_bits_per_byte
from shoal.data.prepare import Prepared
from shoal.errors import ShoalError
from shoal.job import Job, parse
from shoal.mesh import Seat
from shoal.models.decoder import Decoder
from shoal.models.spec import count
from shoal.models.storage import canonical
from shoal.observe import exchange, metrics, report, result, summary
from shoal.observe.hold import hold
from shoal.observe.log import speaker
from shoal.observe.result import Result
from shoal.serving.generate import generate
from shoal.serving.load import load
from shoal.training.folder import fill

# Steps whose median stands beside what was predicted.
_LATEST = 100
# Beginnings to go on from: of source code, and of a new document for any other text.
_PROMPT = "def main("
_SAMPLE_TOKENS = 120
# Parameters below which several threads wait for each other longer than they compute a token.
_SMALL = 50_000_000


def main(seat: Seat, *, folder: str, prepared: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Closes a run from what its checkpoint and metrics say. figures: what the worker returned.

    Returns the fields of the run's Result. Nothing here can fail the run, a full disk neither: training has ended
    and its state is saved.
    """
    run, corpus = Path(folder), None
    say = speaker(run)
    with contextlib.suppress(OSError):  # deleted, maybe; the log goes there
        run.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as ending:
        try:
            corpus = Prepared.load(Path(prepared))
        except ShoalError as error:
            say(f"warning: bits per byte are not known, since the prepared text is gone: {error.where}")
        try:
            with contextlib.suppress(OSError):
                ending.enter_context(hold(run))
        except ShoalError:  # it came in the moment since the worker left: what it finds is not ours to replace
            say(f"warning: {run} is trained in again already: model/, result.json and report.html are left to that")
            outcome = _result(run, parse(figures["job"]), corpus, figures, "", "")
        else:
            outcome = _finish(run, corpus, figures, say)
        if figures["skipped"]:
            say(f"warning: {figures['skipped']:,} updates were not applied: loss or gradient was not finite")
        for line in summary.lines(outcome):
            say(line)
        return asdict(outcome)


def _finish(run: Path, corpus: Prepared | None, figures: dict[str, Any], say: Callable[[str], None]) -> Result:
    job = parse(figures["job"])
    prompt, sample = "", ""
    try:
        if not (run / "job.toml").is_file():
            say(f"warning: {run} was deleted while the run went on; what can be written again now is")
            if corpus:
                fill(run, job, corpus)
        model = load(run, say)
        _tell_if_older(run, figures["step"], say)
        if count(model.options) < _SMALL:
            torch.set_num_threads(1)
        _export(model, run, job)
    except (ShoalError, OSError) as error:
        say(f"warning: the trained model was not written to {run / 'model'}: {error}")
    else:
        try:
            prompt, sample = _sample(model, run, job)
        except (ShoalError, OSError) as error:
            say(f"warning: there is no sample: {error}")
    outcome = _result(run, job, corpus, figures, prompt, sample)
    for write in (lambda: result.write(run, outcome), lambda: report.write(run, over=True)):
        try:
            write()
        except (ShoalError, OSError) as error:  # the former where nothing of a run is left to report on
            say(f"warning: {error}")
    return outcome


def _tell_if_older(run: Path, step: int, say: Callable[[str], None]) -> None:
    """Where the last state could not be saved, model and sample are those of an earlier step."""
    saved = _saved_step(run)
    if saved is not None and saved != step:
        say(f"warning: sample and model/ are those of step {saved}, the last one saved, not of step {step}")


def _saved_step(run: Path) -> int | None:
    with contextlib.suppress(ShoalError, OSError):  # somebody may be deleting them
        for newest in checkpoint.complete(run / "checkpoints"):
            return int(checkpoint.describe(newest)["step"])
    return None


def _export(model: Decoder, run: Path, job: Job) -> None:
    tokenizer = tokenizers.load(run)
    huggingface.export(
        model.options,
        canonical(model),
        run / "model",
        tokenizer=run,
        start_token=tokenizer.start,
        end_token=tokenizer.end,
        source=Path(job.model.weights) if job.model.weights else None,
    )


def _sample(model: Decoder, run: Path, job: Job) -> tuple[str, str]:
    prompt = _PROMPT if job.data.source == ("python",) else ""
    return prompt, generate(model, prompt, tokenizer=run, max_tokens=_SAMPLE_TOKENS)


def _result(run: Path, job: Job, corpus: Prepared | None, figures: dict[str, Any], prompt: str, sample: str) -> Result:
    rows = metrics.read(run)
    tokens, seconds = sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows)
    validation = figures["validation"]
    loss = validation["nats"] if validation and math.isfinite(validation["nats"]) else None
    # Bytes are known of the validation text as a whole (train.validate_tokens may ask for less).
    whole = corpus is not None and loss is not None and validation["tokens"] == corpus.validation.predictions
    rivals = compressed_bits_per_byte(corpus) if corpus and whole else {}
    bits = loss * validation["tokens"] / math.log(2) / corpus.validation.bytes if corpus and loss and whole else None
    # The first steps of a run are slower.
    latest = [row["seconds"] for row in rows[2:][-_LATEST:] if row.get("seconds") is not None]
    memory = [row["memory_gib"] for row in rows if row.get("memory_gib") is not None]
    mfus = [row["mfu"] * row["seconds"] for row in rows if row.get("mfu")]
    return Result(
        run=str(run),
        steps=figures["step"],
        tokens=tokens,
        loss_first=rows[0]["loss"] if rows else None,
        loss_last=rows[-1]["loss"] if rows else None,
        val_loss=loss,
        bits_per_byte=bits,
        tokens_per_second=tokens / seconds if seconds else None,
        mfu=sum(mfus) / seconds if mfus else None,
        seconds=figures["seconds"],
        stopped_by=figures["stopped_by"],
        saved_step=_saved_step(run),
        parameters=count(job.model),
        devices=figures["devices"],
        mfu_note=figures["mfu_note"],
        prompt=prompt,
        sample=sample,
        gzip_bits_per_byte=rivals.get("gzip -9"),
        xz_bits_per_byte=rivals.get("xz -9"),
        step_seconds=median(latest) if latest else None,
        predicted_step_seconds=figures.get("predicted_step_seconds"),
        predicted_memory_gib=figures.get("predicted_memory_gib"),
        memory_gib=max(memory, default=None),
        exchange=exchange.figures(job, rows),
    )
