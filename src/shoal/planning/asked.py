"""What is asked of the planner -> Question: of a model's name or a job, a cluster, and what is left to rules."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from shoal.errors import JobError
from shoal.job import Job
from shoal.job.check import at_least, one_of, positive, require
from shoal.job.codec import POWERSGD
from shoal.job.idle import without_idle
from shoal.job.server import ServerOptions, check_server
from shoal.job.sync import SyncOptions
from shoal.planning import cluster, cluster_file, shapes
from shoal.planning.cluster import Cluster
from shoal.planning.plan import RESTART, STORAGE, Question
from shoal.planning.shapes import Shape

PRECISIONS = ("bf16", "fp16", "fp8")
MOST = 2**26
"""Sequences of a batch, or tokens of a sequence."""
# Tokens of a batch, by rule: of a model of less than _SMALL parameters, of a larger one, and for each device.
_SMALL, _FEW, _USUAL, _EACH = 1e9, 2**19, 2**22, 2**10
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def usual_batch(parameters: float, sequence: int, devices: int) -> int:
    """Sequences of a step where nobody says how many: 4 Mi tokens (as Llama 2's, Touvron et al. 2023), half a Mi of
    models below a billion parameters (as GPT-3's small ones, Brown et al. 2020, table 2.1), and 1,024 for each device
    where these are more (as Llama 3 405B's 16 Mi on 16,384). Rounded, so that a power of two times the odd factor of
    the devices comes out, which many layouts can share."""
    tokens = max(_FEW if parameters < _SMALL else _USUAL, _EACH * devices)
    odd = devices // (devices & -devices)
    return odd * 2 ** max(0, round(math.log2(tokens / sequence / odd)))


def tokens_of(told: str | float) -> float | None:
    """`15T`, `300B`, `1e12` -> a number; None of nothing."""
    if (text := str(told)) == "":
        return None
    found = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([kmbgt]?)\s*", text.lower())
    if found is None:
        raise JobError(f"--tokens={text} is no number of tokens", fix="e.g. --tokens 15T, 300B or 1e12")
    number = float(found[1]) * _SCALES[found[2]]
    positive("--tokens", number)
    require(
        number >= 1e3, f"--tokens={text} is {number:g} tokens", "e.g. --tokens 300B; k, M, B, T: thousands and so on"
    )
    return number


def cluster_of(text: str, price: float) -> Cluster:
    """A file, or a name. price: of one device for an hour, over what the file says; 0 = as it says."""
    of_file = text.endswith(".toml") or Path(text).is_file()
    found = cluster_file.read(text) if of_file else cluster.named(text)
    at_least("--price", price, 0)
    return replace(found, pools=tuple(replace(pool, price=price or pool.price) for pool in found.pools))


@dataclass(frozen=True)
class Wanted:
    """sequence, global_batch: 0 = the job's, or by rule. precision: empty = the job's, or bf16. tokens: `15T` or
    1e12. restart, storage, replicas: as in Question. sync, server: None = the job's, or all-reduce."""

    sequence: int = 0
    global_batch: int = 0
    precision: str = ""
    tokens: str | float = ""
    restart: float = RESTART
    storage: float = STORAGE
    replicas: int = 0
    sync: SyncOptions | None = None
    server: ServerOptions | None = None


def synced(job: Job, sync: dict[str, Any], server: dict[str, Any]) -> Job:
    """The job with other options of its [sync] and [server]: those that are empty, or 0, are the job's. What it says
    of a sync that it has no longer is dropped. JobError for what cannot be."""
    said, of_server = ({k: v for k, v in options.items() if v not in ("", 0)} for options in (sync, server))
    before = replace(job, sync=replace(job.sync, name=str(said.get("name", job.sync.name))))
    if of_server.get("mode") or said.get("name"):
        mode = str(of_server.get("mode", job.server.mode))
        before = without_idle(replace(before, server=replace(before.server, mode=mode)))
    found = replace(before, sync=replace(before.sync, **said), server=replace(before.server, **of_server))
    found.sync.validate()
    found.server.validate()
    check_server(replace(found, layout=None))
    return found


def of_model(name: str, where: Cluster, wanted: Wanted) -> Question:
    """Of a model by name or config.json. JobError for what is unknown or absurd."""
    return _question(shapes.named(name), where, wanted)


def of_job(job: Job, where: Cluster, wanted: Wanted) -> Question:
    """Of a job's model, with its batch, sequence length and precision where none are given (`auto`: bf16)."""
    said = "bf16" if job.train.precision == "auto" else job.train.precision
    fix = "--precision bf16"
    require(bool(wanted.precision) or said in PRECISIONS, f"train.precision={said}: no speed of it is known", fix)
    own = Wanted(
        job.data.sequence_length, job.train.global_batch, said, sync=job.sync, server=job.server
    )  # fmt: skip
    given = {f.name: value for f in fields(Wanted) if (value := getattr(wanted, f.name)) != f.default}
    return _question(shape_of(job), where, replace(own, **given))


def shape_of(job: Job) -> Shape:
    """Of the model that the job trains. A vocabulary that its tokenizer is to decide is taken from data.vocab_size."""
    if job.model.weights:
        return shapes.named(str(Path(job.model.weights) / "config.json"))
    vocab = job.model.vocab_size or (257 if job.data.tokenizer == "bytes" else job.data.vocab_size)
    return shapes.of_options(replace(job.model, vocab_size=vocab))


def _question(shape: Shape, where: Cluster, wanted: Wanted) -> Question:
    for name, number in (("--sequence", wanted.sequence), ("--global-batch", wanted.global_batch)):
        at_least(name, number, 0)
        require(number <= MOST, f"{name}={number} is more than {MOST}", "give a smaller number")
    precision = wanted.precision or "bf16"
    one_of("--precision", precision, PRECISIONS)
    lacking = [pool.device.name for pool in where.pools if precision == "fp8" and "fp8" not in pool.device.peak]
    require(not lacking, f"--precision=fp8: {' and '.join(lacking)} has no peak in fp8", "--precision bf16")
    length, positions = wanted.sequence or shape.sequence, shape.positions
    what = f"--sequence={length} is more than the {positions} positions that {shape.name} has learned"
    require(not positions or length <= positions, what, f"--sequence {positions} or less")
    size = wanted.global_batch or usual_batch(shape.parameters, length, where.count)
    at_least("--restart", wanted.restart, 0)
    positive("--storage", wanted.storage)
    at_least("--replicas", wanted.replicas, 0)
    what = f"--replicas={wanted.replicas} does not divide the {where.count} devices"
    require(where.count % max(1, wanted.replicas) == 0, what, "a divisor of them, or 0 for whichever are fastest")
    sync, server = wanted.sync or SyncOptions(), wanted.server or ServerOptions()
    what = f"sync.codec={sync.codec}: how long its products take is not predicted"
    require(not sync.codec.startswith(POWERSGD), what, "--codec int8, or another that writes numbers")
    return Question(
        shape, where, length, size, precision, tokens=tokens_of(wanted.tokens), restart=wanted.restart,
        storage=wanted.storage, sync=sync, server=server, replicas=wanted.replicas,
    )  # fmt: skip
