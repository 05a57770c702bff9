"""Many candidates at once, each a model in a layout on a device: columns of numbers that the cost functions read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Names = npt.NDArray[np.str_]

# What is computed: sizes as in ModelOptions; gated: 1 where the feed-forward is; tied: 1 where the output layer has the
# embedding's weights. experts: of a block, 0 where there are none; chosen: of a token; expert_feed: width of one;
# shared_feed: of all that every token goes through; dense_layers: leading blocks without experts. latent: 1 where
# attention is as in DeepSeek-V2: ranks latent_q (0: queries are not compressed), latent_kv; of a head that carries
# position rope_size, of its values value_size, of its queries and keys head_size.
MODEL = (
    "layers", "hidden", "feed", "heads", "key_heads", "head_size", "vocab", "gated", "sequence", "tied", "experts",
    "chosen", "expert_feed", "shared_feed", "dense_layers", "latent", "latent_q", "latent_kv", "rope_size",
    "value_size",
)  # fmt: skip
# How it is laid out. tensor, pipeline, context, fsdp: ranks of each axis; data: replicas × fsdp. chunks: stages that a
# rank has. zero: 0 where nothing is sharded. shards: 1 where the tensor group shares sequences. recompute: share of
# blocks whose forward is computed again in backward; selective: 1 where attention alone is, operators: 1 where all is
# but attention and every second product. micro_batch, global_batch: sequences. expert: ranks of a stage that share the
# experts, of its fsdp × context × tensor.
LAYOUT = (
    "devices", "per_node", "tensor", "pipeline", "chunks", "context", "data", "fsdp", "zero", "shards",
    "recompute", "selective", "operators", "micro_batch", "global_batch", "low", "expert",
)  # fmt: skip
# low: 1 where products are in fp8. The device: peak of 16-bit products, FLOP/s; measured, measured_low: share of the
# peak (fp8: of twice it) that a large product alone reaches; older: FLOP/s of attention with kernels written for the
# generation before it, infinite where these are its own; memory: bytes; bandwidth, link, nic: bytes/s.
DEVICE = ("peak", "measured", "measured_low", "older", "memory", "bandwidth", "link", "nic", "units")
# Of the software: see `stacks.Stack`.
STACK = (
    "kernels", "flash", "fused", "gradient_bytes", "kept_bytes", "overlaps_data", "overlaps_tensor",
    "overlaps_messages", "reduces_whole", "shares_context", "gathers_once", "adds_whole",
    "tiles",
)  # fmt: skip
# Of what replicas exchange. sent, returned: bytes of a gradient that each step go to whoever adds them up, during
# backward, and that come back. moments: bytes of a weight that the optimizer keeps, with its fp32 copy. synced: bytes
# beside, of each number that a rank exchanges.
SYNC = ("sent", "returned", "moments", "synced")
COLUMNS = (*MODEL, *LAYOUT, *DEVICE, *STACK, *SYNC)


@dataclass(frozen=True)
class Work:
    """columns: by the names in COLUMNS, each (n,) in float64. devices, stacks: (n,) names by which constants are
    chosen."""

    columns: Mapping[str, Array]
    device: Names
    stack: Names

    def __getattr__(self, name: str) -> Array:
        try:
            return self.columns[name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(self.device)

    def take(self, which: npt.NDArray[np.intp] | Flags) -> Work:
        """Those candidates alone."""
        columns = {name: column[which] for name, column in self.columns.items()}
        return Work(columns, self.device[which], self.stack[which])

    @property
    def micro_batches(self) -> Array:
        """Of a replica in a step."""
        return self.global_batch / self.data / self.micro_batch

    @property
    def sharers(self) -> Array:
        """Ranks over which ZeRO spreads, at every stage: FSDP's, and those of the context axis where the stack does so.
        Further replicas reduce beside."""
        return self.fsdp * np.where(self.shares_context > 0, self.context, 1.0)

    @property
    def stage_zero(self) -> Array:
        """ZeRO's stage while a step runs: 2 instead of 3 where the stack gathers a pipeline's stages once a step, 1
        where it adds up their gradients whole, too."""
        most = np.where(self.adds_whole > 0, 1.0, np.where(self.gathers_once > 0, 2.0, 3.0))
        return np.where(self.pipeline > 1, np.minimum(self.zero, most), self.zero)

    @property
    def expert_sharers(self) -> Array:
        """Ranks over which ZeRO spreads what an expert group has: those of a replica's stage with the same experts."""
        return np.maximum(1.0, self.sharers * self.tensor / self.expert)

    @property
    def attention_parameters(self) -> Array:
        """Of a block's attention."""
        plain = 2 * (self.heads + self.key_heads) * self.head_size * self.hidden
        queries = np.where(self.latent_q > 0, self.latent_q, self.hidden) * self.heads * self.head_size
        queries = queries + self.hidden * self.latent_q
        keys = self.hidden * (self.latent_kv + self.rope_size)
        keys = keys + self.latent_kv * self.heads * (self.head_size - self.rope_size + self.value_size)
        out = self.heads * self.value_size * self.hidden
        return np.where(self.latent > 0, queries + keys + out, plain)

    @property
    def block_parameters(self) -> Array:
        """Of a dense block's matrices."""
        return self.attention_parameters + (2 + self.gated) * self.hidden * self.feed

    @property
    def beside_experts(self) -> Array:
        """Of a block with experts, all but these: attention, router, shared experts."""
        return self.attention_parameters + self.hidden * (self.experts + (2 + self.gated) * self.shared_feed)

    @property
    def expert_parameters(self) -> Array:
        """Of one expert."""
        return (2 + self.gated) * self.hidden * self.expert_feed

    @property
    def leading(self) -> Array:
        """Dense blocks before those with experts; 0 in a model without experts."""
        return np.where(self.experts > 0, self.dense_layers, 0.0)

    @property
    def model_flops(self) -> Array:
        """Of a step: 6 for each weight and token of the blocks and the output layer, of experts those that are chosen,
        and attention over the half of the positions that a token may see. What is computed again does not count."""
        routed = np.where(self.experts > 0, self.layers - self.dense_layers, 0.0)
        weights = (self.layers - routed) * self.block_parameters + self.vocab * self.hidden
        weights = weights + routed * (self.beside_experts + self.chosen * self.expert_parameters)
        attention = 6 * self.layers * self.heads * ((self.head_size + self.value_size) / 2) * self.sequence
        return (6 * weights + attention) * self.global_batch * self.sequence


def complete(row: Mapping[str, float]) -> dict[str, float]:
    """A row with what a dense model, not laid out by experts, has in columns that it lacks. Of these, models without a
    gate tie the output layer to the embedding, and most gated ones do not."""
    usual = dict.fromkeys(MODEL[MODEL.index("experts") :], 0.0) | {"expert": 1.0} | dict.fromkeys(STACK[-4:], 0.0)
    usual |= {"operators": 0.0, "older": math.inf}
    usual |= {"sent": row["gradient_bytes"], "returned": row["gradient_bytes"], "moments": 12.0, "synced": 0.0}
    usual |= {"tied": float(row["gated"] == 0), "dense_layers": row["layers"], "value_size": row["head_size"]}
    return {name: row.get(name, usual[name]) if name in usual else row[name] for name in COLUMNS}


def of_rows(rows: Iterable[Mapping[str, float]], devices: Iterable[str], stacks: Iterable[str]) -> Work:
    """rows: for each candidate all of COLUMNS, but for those that `complete` knows."""
    rows = [complete(row) for row in rows]
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in COLUMNS}
    return Work(columns, np.array(list(devices)), np.array(list(stacks)))
