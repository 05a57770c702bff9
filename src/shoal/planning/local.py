"""How long a step takes on a machine that `shoal calibrate` has measured: the sum of what its operations took there.

Nothing is fitted. Each operation is looked up by its size in the tables of as many ranks computing at once, so that
what ranks take from each other's cores and memory is in them. On a CPU nothing is hidden: what moves a message is a
core that would otherwise compute, and communication is added to computing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from shoal.errors import JobError, LayoutError
from shoal.job import Job, Layout
from shoal.job.fits import check_layout, check_model
from shoal.job.model import ModelOptions
from shoal.models.spec import count
from shoal.parallel.stages import layers_of_stages
from shoal.planning import timeline
from shoal.planning.entry import Entry, Precision, Side

PARTS = ("products", "attention", "elements", "launch", "exchange", "update", "bubble")
"""Of a step's seconds. elements: operations of each number by itself. launch: what Python and autograd do between
operations. update: of the weights, with norm and clipping. bubble: ranks of a pipeline that wait for each other."""
HEADS = 8
"""Of which attention is measured."""
TINY, TINY_LENGTH = ModelOptions(
    hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1,
    vocab_size=64,
), 16  # fmt: skip
"""A block that is measured for what lies between operators."""
# Bytes of a number: of weights, gradients and hidden states; of what blocks are computed in.
_WIDE = 4
# Of a tile of logits (ops/loss.py), and of the first bucket of gradients (parallel/buckets.py).
_TILE, _FIRST = 16 << 20, 1 << 20


class Parts(dict[str, float]):
    """Seconds by part."""

    def __missing__(self, part: str) -> float:
        return 0.0

    def __add__(self, other: Mapping[str, float]) -> Parts:
        return Parts({part: self[part] + other.get(part, 0.0) for part in (*self, *other)})

    def times(self, factor: float) -> Parts:
        return Parts({part: factor * seconds for part, seconds in self.items()})

    def total(self) -> float:
        return sum(self.values())


@dataclass(frozen=True)
class Predicted:
    """seconds: of a step. parts: by PARTS, of the rank that computes most; they add up to it."""

    seconds: float
    parts: Mapping[str, float]


def predict(job: Job, entry: Entry) -> Predicted:
    """A step of a dense model on ranks of this machine alone. The job has its layout, and no `auto` left.

    Raises JobError where the entry or these tables do not know what the job does.
    """
    job = replace(job, layout=check_layout(job))
    assert job.layout is not None
    check_model(job.model, job.data.sequence_length, job.layout)
    _refuse(job)
    side = entry.side(job.layout.world)
    if job.run.threads not in (0, side.threads):
        what = f"run.threads={job.run.threads}, and {side.ranks} ranks were measured with {side.threads}"
        raise JobError(what, fix="leave run.threads out")
    if job.train.precision not in side.precisions:
        what = f"{job.train.precision} was not measured with {side.ranks} ranks"
        raise JobError(what, fix="shoal calibrate, with more --seconds")
    return _Step(job, job.layout, side, side.precisions[job.train.precision]).predicted()


def _refuse(job: Job) -> None:
    """What the tables do not hold."""
    model, layout = job.model, job.layout
    assert layout is not None
    unknown = {
        "a model with experts": bool(model.num_experts),
        "latent attention": bool(model.kv_lora_rank),
        f"layout context={layout.context}": layout.context > 1,
        "layout tensor_by=ring": layout.tensor_by == "ring",
        "layout replica_share": bool(layout.replica_share),
        "pipeline with fsdp": layout.pipeline > 1 and layout.fsdp > 1,
        f"sync.name={job.sync.name}": job.sync.name != "allreduce",
        f"sync.codec={job.sync.codec}": job.sync.codec != "none",
        f"optim.name={job.optim.name}": job.optim.name != "adamw",
        "train.compile=on": job.train.compile == "on",
        "dropout": bool(job.train.dropout or job.train.attention_dropout),
        f"layout schedule={layout.schedule}": layout.pipeline > 1 and layout.schedule not in ("gpipe", "1f1b"),
    }
    what = next((name for name, wrong in unknown.items() if wrong), "")
    if what:
        raise LayoutError(f"{what}: steps on this machine are predicted without", fix="measure it: shoal train")


@dataclass(frozen=True)
class _Step:
    job: Job
    layout: Layout
    side: Side
    measured: Precision

    @property
    def model(self) -> ModelOptions:
        return self.job.model

    @property
    def micro_batches(self) -> int:
        sequences = self.job.train.global_batch // self.layout.readers
        return sequences // (self.layout.micro_batch or sequences)

    @property
    def sequences(self) -> int:
        """Of a micro-batch."""
        return self.job.train.global_batch // self.layout.readers // self.micro_batches

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequences * self.job.data.sequence_length

    @property
    def own_tokens(self) -> int:
        """Of them those whose residual stream is on a rank of the tensor axis."""
        return self.tokens // self.layout.tensor

    @property
    def narrow(self) -> bool:
        return self.job.train.precision == "bf16"

    def predicted(self) -> Predicted:
        number, stages = self.micro_batches, self._stages()
        forward = np.array([one.total() for one, _ in stages])
        backward = np.array([other.total() for _, other in stages])
        worst = int(np.argmax(forward + backward))
        parts = (stages[worst][0] + stages[worst][1]).times(number)
        if self.layout.pipeline > 1:
            taken = timeline.Seconds(forward, backward, np.zeros(len(stages)))
            message = self._exchange("message", self.tokens // self.layout.tensor * self.model.hidden_size * _WIDE)
            # Whoever sends on a CPU computes nothing meanwhile.
            how = self.layout.schedule, len(stages), 1, number
            seconds = float(timeline.seconds(*how, taken, message, waits=True)[0])
            parts["bubble"] = max(0.0, seconds - parts.total())
        owned = [self._parameters(stage) for stage in range(self.layout.pipeline)]
        parts = parts + self._once(owned[worst], max(owned))
        return Predicted(parts.total(), {name: parts[name] for name in PARTS})

    def _stages(self) -> list[tuple[Parts, Parts]]:
        """Of each rank of the pipeline, forward and backward of a micro-batch."""
        found = []
        forward, backward = self._block()
        for parts, between in zip((forward, backward), self._between(), strict=True):
            parts["launch"] = between
        if self.layout.recompute == "block":
            backward = backward + forward
        for stage, layers in enumerate(self._layers()):
            one, other = forward.times(len(layers)), backward.times(len(layers))
            if stage == 0:
                one, other = one + self._embedding(), other + self._embedding_backward()
            if stage == self.layout.pipeline - 1:
                one, other = one + self._head(), other + self._head_backward()
            found.append((one, other + self._accumulate(stage)))
        return found

    def _layers(self) -> list[range]:
        return layers_of_stages(self.model, self.layout, self.job.data.sequence_length)

    def _product(self, m: float, n: float, k: float) -> float:
        odd = any(size % 2 for size in (m, n, k))
        return self.measured.products.at(m, n, k) * (self.measured.odd if odd else 1.0)

    def _operator(self, name: str, numbers: float) -> float:
        return self.measured.operators[name].at(numbers)

    def _exchange(self, kind: str, size: float) -> float:
        return self.side.exchanges[kind].at(size) if self.side.ranks > 1 else 0.0

    @property
    def _matrices(self) -> list[tuple[float, float]]:
        """Outputs and inputs of a block's products, on a rank."""
        o, t = self.model, self.layout.tensor
        queries, keys = o.num_attention_heads * o.head_size / t, o.num_key_value_heads * o.head_size / t
        h, feed = o.hidden_size, o.intermediate_size / t
        return [(queries + 2 * keys, h), (h, queries), (2 * feed, h), (h, feed)]

    def _block(self) -> tuple[Parts, Parts]:
        o, t, m = self.model, self.layout.tensor, self.tokens
        forward, backward = Parts(), Parts()
        for n, k in self._matrices:
            forward["products"] += self._product(m, n, k)
            backward["products"] += self._product(m, k, n) + self._product(n, k, m)
            if self.narrow:  # weights and what they multiply are cast on the way in, gradients on the way back
                forward["elements"] += self._operator("cast", n * k)
                backward["elements"] += self._operator("cast", n * k)
        heads = self.sequences * o.num_attention_heads / t / HEADS
        for parts, grid in ((forward, self.measured.attention), (backward, self.measured.attention_backward)):
            longest = max(length for length, _ in grid.shapes)
            length = self.job.data.sequence_length
            beyond = max(1.0, length / longest)
            parts["attention"] += heads * beyond**2 * grid.at(length / beyond, o.head_size)
        hidden, rotated = self.own_tokens * o.hidden_size, (o.num_attention_heads + o.num_key_value_heads) * o.head_size
        gated = m * o.intermediate_size / t
        numbers = [("norm", 2.0, hidden), ("add", 2.0, hidden), ("gate", 1.0, gated), ("rotate", 1.0, m * rotated / t)]
        for name, times, size in numbers:
            forward["elements"] += times * self._operator(name, size)
            backward["elements"] += times * self._operator(f"{name}.backward", size)
        whole = m * o.hidden_size * (2 if self.narrow else _WIDE)
        if t > 1:  # the sequence is gathered before, and its sums scattered behind, attention and feed-forward
            each = 2 * (self._exchange("all_gather", whole) + self._exchange("reduce_scatter", whole))
            forward["exchange"] += each
            backward["exchange"] += each
        return forward, backward

    def _between(self) -> tuple[float, float]:
        """What a block takes beyond its operators, forward and backward: as one does whose operators are tiny."""
        data, train = replace(self.job.data, sequence_length=TINY_LENGTH), replace(self.job.train, global_batch=1)
        job = replace(self.job, model=TINY, data=data, train=train)
        forward, backward = replace(self, job=job, layout=Layout())._block()
        known = self.measured
        return max(0.0, known.block - forward.total()), max(0.0, known.block_backward - backward.total())

    def _embedding(self) -> Parts:
        numbers = self.own_tokens * self.model.hidden_size
        found = Parts(elements=self._operator("copy", numbers))
        if self.layout.tensor > 1:
            found["exchange"] += self._exchange("reduce_scatter", numbers * self.layout.tensor * _WIDE)
        return found

    def _embedding_backward(self) -> Parts:
        """A gradient as large as the table, zero but for its rows."""
        numbers, table = self.tokens * self.model.hidden_size, self._table
        found = Parts(elements=self._operator("copy", table) + 2 * self._operator("copy", numbers))
        if self.layout.tensor > 1:
            found["exchange"] += self._exchange("all_gather", numbers * _WIDE)
        return found

    @property
    def _table(self) -> float:
        """Numbers of the embedding, or the output layer, on a rank."""
        return self.model.vocab_size * self.model.hidden_size / self.layout.tensor

    def _head(self) -> Parts:
        """Norm, logits and loss by tiles, and with them their gradients (ops/loss.py)."""
        h, words = self.model.hidden_size, self.model.vocab_size / self.layout.tensor
        tiles = ceil(self.tokens / (self.job.train.loss_chunk or max(128, int(_TILE / _WIDE / words))))
        rows = self.tokens / tiles
        three = (rows, words, h), (rows, h, words), (words, h, rows)
        found = Parts(products=tiles * sum(self._product(*sizes) for sizes in three))
        found["elements"] += self._operator("norm", self.own_tokens * h) + tiles * self._operator("loss", rows * words)
        # Gradients begin as zeros, and each tile's are added.
        found["elements"] += self._operator("copy", self._table) + tiles * self._operator("add", self._table)
        if self.narrow:
            found["elements"] += self._operator("cast", self._table)
        if self.layout.tensor > 1:
            found["exchange"] += self._exchange("all_gather", self.tokens * h * _WIDE)
            found["exchange"] += tiles * self._exchange("all_gather", 2 * rows * _WIDE * self.layout.tensor)
        return found

    def _head_backward(self) -> Parts:
        h = self.model.hidden_size
        found = Parts(elements=self._operator("scale", self._table) + self._operator("scale", self.tokens * h))
        found["elements"] += self._operator("norm.backward", self.own_tokens * h)
        if self.model.tie_word_embeddings and self.layout.pipeline == 1:
            found["elements"] += self._operator("add", self._table)
        if self.layout.tensor > 1:
            found["exchange"] += self._exchange("reduce_scatter", self.tokens * h * _WIDE)
        return found

    def _accumulate(self, stage: int) -> Parts:
        """What a micro-batch does to gradients beyond making them, with fsdp to weights."""
        size, sharers, zero = self._parameters(stage), self.layout.sharers, self.layout.zero
        found, times = Parts(), 1 / self.micro_batches
        if self.micro_batches > 1:
            found["elements"] += (1 - times) * self._operator("add", size / (sharers if zero > 1 else 1))
        if sharers == 1:
            return found
        for group, count_ in self._groups():
            width = 2 if self.narrow and count_ > 1 else _WIDE
            gathers = 2.0 if zero == 3 and count_ > 1 else 1.0 if zero == 3 else times
            scatters = 1.0 if zero > 1 else times
            one = self._exchange("all_gather", group * width) + self._operator("copy", group)
            other = self._exchange("reduce_scatter", group * _WIDE) + self._operator("copy", group)
            found["exchange"] += count_ * (gathers * one + scatters * other)
        return found

    def _groups(self) -> list[tuple[float, int]]:
        """What fully_shard gathers together, in numbers, and how often there is such a group: blocks, and the rest."""
        layers = self.model.num_hidden_layers
        block = sum(n * k for n, k in self._matrices)
        return [(block, layers), (max(0.0, self._parameters(0) - layers * block), 1)]

    def _parameters(self, stage: int) -> float:
        """On a rank, before anything is sharded."""
        o, t, stages = self.model, self.layout.tensor, self.layout.pipeline
        if stages == 1:
            return count(o) / t
        ends = (stage == 0) + (stage == stages - 1)
        return len(self._layers()[stage]) * sum(n * k for n, k in self._matrices) + ends * self._table

    def _once(self, own: float, most: float) -> Parts:
        """Of a step: gradients over replicas, then the update. own: numbers of the rank that computes most; most: of
        the rank that has most, for which all wait."""
        pieces = most / self.layout.sharers
        found = Parts(update=self._operator("update", pieces))
        if self.side.ranks > 1:
            found["exchange"] += 2 * self._exchange("all_reduce", 64)
        if self.layout.replicas > 1:
            size, bucket = own / self.layout.sharers * _WIDE, self.job.sync.bucket_mib * 2**20
            first = min(size, _FIRST, bucket)
            buckets = ceil((size - first) / bucket)
            found["exchange"] += self._exchange("all_reduce", first)
            if buckets:
                found["exchange"] += buckets * self._exchange("all_reduce", (size - first) / buckets)
            found["elements"] += self._operator("copy", own / self.layout.sharers)
        return found
