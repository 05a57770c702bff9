"""How much memory a rank of `shoal train` takes on a CPU: what its process has before, and what training keeps there.

Counted by operators, as autograd saves their inputs (Korthikanti et al. 2022, section 4.1, with other operators, in
other precisions). Of dense models, uncompiled, with AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from shoal.errors import LayoutError
from shoal.job import Job, Layout
from shoal.job.fits import check_layout
from shoal.job.model import ModelOptions
from shoal.models.spec import parameters
from shoal.parallel.stages import layers_of_stages
from shoal.planning import schedules

PARTS = ("process", "weights", "gradients", "optimizer", "activations", "loss", "gathered", "buckets")
"""Of a rank's bytes. process: before anything is built, and what libraries take for themselves in the first step."""
LIBRARIES = 25 * 2**20
"""What torch and its kernels take in a first step, beside tensors: measured, about (benchmarks/local_plan.py)."""
# Bytes of a number: of weights, gradients and hidden states; of either of AdamW's moments.
_WIDE = 4
# Of a tile of logits (ops/loss.py).
_TILE = 16 << 20
# Blocks' worth of what backward makes on its way, which is gone after it.
_PASSING = 2


def predict(job: Job, resident: float) -> dict[str, float]:
    """Bytes of the fullest rank by PARTS. resident: of a rank's process before anything is built.

    The job has its layout, and no `auto` left. LayoutError for what is not counted.
    """
    layout = check_layout(job)
    what = _uncounted(job, layout)
    if what:
        raise LayoutError(f"{what}: memory is predicted without", fix="measure it: shoal train")
    each = [_Rank(replace(job, layout=layout), layout, rank).parts() for rank in range(layout.pipeline)]
    fullest = max(each, key=lambda parts: sum(parts.values()))
    return {"process": resident + LIBRARIES, **fullest}


def _uncounted(job: Job, layout: Layout) -> str:
    model = job.model
    unknown = {
        "a model with experts": bool(model.num_experts),
        "latent attention": bool(model.kv_lora_rank),
        f"layout context={layout.context}": layout.context > 1,
        "layout tensor_by=ring": layout.tensor_by == "ring",
        "layout replica_share": bool(layout.replica_share),
        f"sync.name={job.sync.name}": job.sync.name != "allreduce",
        f"sync.codec={job.sync.codec}": job.sync.codec != "none",
        f"optim.name={job.optim.name}": job.optim.name != "adamw",
        f"train.precision={job.train.precision}": job.train.precision not in ("fp32", "bf16"),
        "train.compile=on": job.train.compile == "on",
        "dropout": bool(job.train.dropout or job.train.attention_dropout),
    }
    return next((name for name, there in unknown.items() if there), "")


def of_block(model: ModelOptions, narrow: bool, tensor: int = 1) -> tuple[float, float]:
    """Bytes of a token that a block keeps for its backward pass: (its input, all else). narrow: products are in 16
    bits, the residual stream and the norms' statistics in 32. tensor: ranks that share heads and features, and each
    of which has a part of the tokens where they do not.

    By operators: of both norms their input, what is normed (before and after its weight); queries, keys and values as
    the product gives them (one tensor, of which values are a part), queries and keys turned, what attention gives, its
    sums; gate and up (one tensor), the gate's activation, their product.
    """
    wide, size = _WIDE, 2 if narrow else _WIDE
    h, feed = model.hidden_size, model.intermediate_size
    queries, keys = model.num_attention_heads * model.head_size, model.num_key_value_heads * model.head_size
    alone = wide * h + 2 * wide * h
    # What enters the products, of all tokens: each rank of a tensor group has gathered it.
    entering = 2 * size * h
    cut = size * (queries + 2 * keys + queries + keys + queries + 4 * feed) + wide * model.num_attention_heads
    return wide * h / tensor, alone / tensor + entering + cut / tensor


@dataclass(frozen=True)
class _Rank:
    """rank: of the pipeline."""

    job: Job
    layout: Layout
    rank: int

    def parts(self) -> Mapping[str, float]:
        own, layout = self._own, self.layout
        sharers, zero = layout.sharers, layout.zero
        weights = own / (sharers if zero == 3 else 1)
        gradients = own / (sharers if zero >= 2 else 1)
        activations, passing = self._activations()
        loss = self._loss()
        # Gradients of this step are not there yet when most activations are; where replicas exchange them, those of
        # the step before are, in buckets.
        buckets = own / sharers * _WIDE if layout.replicas > 1 else 0.0
        return {
            "weights": weights * _WIDE, "gradients": gradients * _WIDE, "optimizer": 2 * own / sharers * _WIDE,
            "activations": activations + passing, "loss": loss, "gathered": self._gathered(), "buckets": buckets,
        }  # fmt: skip

    @property
    def _narrow(self) -> bool:
        return self.job.train.precision == "bf16"

    @property
    def _tokens(self) -> int:
        """Of a micro-batch."""
        sequences = self.job.train.global_batch // self.layout.readers
        return (self.layout.micro_batch or sequences) * self.job.data.sequence_length

    @property
    def _micro_batches(self) -> int:
        return self.job.train.global_batch // self.layout.readers * self.job.data.sequence_length // self._tokens

    @property
    def _stages(self) -> tuple[int, ...]:
        return self.layout.stages_of(self.rank) if self.layout.pipeline > 1 else (0,)

    @property
    def _blocks(self) -> list[int]:
        """Of each of the rank's stages."""
        layers = layers_of_stages(self.job.model, self.layout, self.job.data.sequence_length)
        return [len(layers[stage]) for stage in self._stages]

    @property
    def _ends(self) -> tuple[bool, bool]:
        """Whether it has the embedding, and the output layer."""
        return 0 in self._stages, self.layout.stage_count - 1 in self._stages

    @property
    def _own(self) -> float:
        """Numbers of its weights, before any sharding."""
        o, ends = self.job.model, self._ends
        tables = sum(ends) - (all(ends) and o.tie_word_embeddings)
        blocks = sum(self._blocks) * self._block
        return (blocks + tables * o.vocab_size * o.hidden_size) / self.layout.tensor

    @property
    def _block(self) -> float:
        """Weights of one."""
        return sum(
            prod(s.shape) for name, s in parameters(self.job.model).items() if name.startswith("model.layers.0.")
        )

    def _activations(self) -> tuple[float, float]:
        """Of all micro-batches in flight; and what backward makes on its way."""
        given, rest = of_block(self.job.model, self._narrow, self.layout.tensor)
        layout, blocks = self.layout, self._blocks
        live = 1.0
        if layout.pipeline > 1:
            found = schedules.live(layout.schedule, layout.pipeline, layout.stages_per_rank, self._micro_batches)
            live = found[self.rank] / len(blocks)
        kept = sum(blocks) * live * self._tokens
        passing = _PASSING * (given + rest) * self._tokens
        # Weights as products take them are kept with what they are multiplied by.
        cast = 2 * self._own if self._narrow and layout.sharers == 1 else 0.0
        if layout.recompute == "block":
            return kept * given + (given + rest) * self._tokens, passing + cast
        return kept * (given + rest), passing + cast

    def _loss(self) -> float:
        """Gradients of what enters the output layer and of its weights, made at once; and one tile."""
        if not self._ends[1]:
            return 0.0
        o, words = self.job.model, self.job.model.vocab_size / self.layout.tensor
        tile = min(_TILE, self._tokens * words * _WIDE)
        narrow = 2 * words * o.hidden_size if self._narrow else 0.0
        return _WIDE * o.hidden_size * (self._tokens + words) + tile + narrow

    def _gathered(self) -> float:
        """Of fsdp. Weights that are gathered block by block: of the running one and the next, and gradients of one, as
        they are made and as they are sent; tables are gathered all the time, with their gradients. Else gradients once
        more, as they are sent."""
        if self.layout.sharers == 1:
            return 0.0
        if self.layout.zero < 3:
            return self._own * _WIDE
        o, size = self.job.model, 2 if self._narrow else _WIDE
        tables = sum(self._ends) * o.vocab_size * o.hidden_size
        return (self._block * (2 * size + 2 * _WIDE) + tables * (size + _WIDE)) / self.layout.tensor
