"""Many candidates at once, each a model in a layout on a device: columns of numbers that the cost functions read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Names = npt.NDArray[np.str_]

# What is computed: sizes as in ModelOptions; gated: 1 where the feed-forward is.
MODEL = ("layers", "hidden", "feed", "heads", "key_heads", "head_size", "vocab", "gated", "sequence")
# How it is laid out. tensor, pipeline, context, fsdp: ranks of each axis; data: replicas × fsdp. chunks: stages that a
# rank has. zero: 0 where nothing is sharded. shards: 1 where the tensor group shares sequences. recompute,
# selective: 1 where a block's forward, or its attention alone, is computed again in backward. micro_batch,
# global_batch: sequences.
LAYOUT = (
    "devices", "per_node", "tensor", "pipeline", "chunks", "context", "data", "fsdp", "zero", "shards",
    "recompute", "selective", "micro_batch", "global_batch", "low",
)  # fmt: skip
# low: 1 where products are in fp8. The device: peak of 16-bit products, FLOP/s; measured, measured_low: share of the
# peak (fp8: of twice it) that a large product alone reaches; memory: bytes; bandwidth, link, nic: bytes/s.
DEVICE = ("peak", "measured", "measured_low", "memory", "bandwidth", "link", "nic", "units")
# Of the software: see `stacks.Stack`.
STACK = (
    "kernels", "flash", "fused", "gradient_bytes", "kept_bytes", "overlaps_data", "overlaps_tensor",
    "overlaps_messages", "reduces_whole",
)  # fmt: skip
COLUMNS = (*MODEL, *LAYOUT, *DEVICE, *STACK)


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
    def block_parameters(self) -> Array:
        """Of a dense block's matrices."""
        attention = 2 * (self.heads + self.key_heads) * self.head_size * self.hidden
        return attention + (2 + self.gated) * self.hidden * self.feed

    @property
    def model_flops(self) -> Array:
        """Of a step: 6 for each weight and token of the blocks and the output layer, and attention over the half of
        the positions that a token may see. What is computed again does not count."""
        weights = self.layers * self.block_parameters + self.vocab * self.hidden
        attention = 6 * self.layers * self.heads * self.head_size * self.sequence
        return (6 * weights + attention) * self.global_batch * self.sequence


def of_rows(rows: Iterable[Mapping[str, float]], devices: Iterable[str], stacks: Iterable[str]) -> Work:
    """rows: for each candidate all of COLUMNS."""
    rows = list(rows)
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in COLUMNS}
    return Work(columns, np.array(list(devices)), np.array(list(stacks)))
