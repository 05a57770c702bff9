"""Keys and values of the tokens already seen, so that each new token costs one token's work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.job.model import ModelOptions
from shoal.ops.attention import Attention, masked


class Cache:
    """Room for `capacity` tokens in each of `rows` rows, which grow together. `length`: tokens held."""

    def __init__(
        self,
        options: ModelOptions,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        layers: Sequence[int] | None = None,
        heads: int = 0,
    ):
        """layers: the blocks whose keys are kept, None = all of the model's. heads: key heads of each, 0 = all."""
        self.layers = range(options.num_hidden_layers) if layers is None else layers
        shape = (len(self.layers), rows, capacity, heads or options.num_key_value_heads)
        self.keys_NBSKD = torch.empty(*shape, options.head_size, dtype=dtype, device=device)
        self.values_NBSKV = torch.empty(*shape, options.value_size, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys_NBSKD.shape[2]

    def attend(self, layer: int) -> Attention:
        """For a model's `attend`: stores the new tokens' keys and values and attends to all that are held."""

        layer = self.layers.index(layer)

        def attention(q_BLHD: Tensor, k_BLKD: Tensor, v_BLKV: Tensor) -> Tensor:
            start, stop = self.length, self.length + q_BLHD.shape[1]
            assert stop <= self.capacity, f"{stop} tokens in a cache of {self.capacity}"
            keys_BSKD, values_BSKV = self.keys_NBSKD[layer, :, :stop], self.values_NBSKV[layer, :, :stop]
            keys_BSKD[:, start:] = k_BLKD
            values_BSKV[:, start:] = v_BLKV
            return masked(q_BLHD, keys_BSKD, values_BSKV, self._mask(start, stop))

        return attention

    def _mask(self, start: int, stop: int) -> Tensor | None:
        """A new token sees all before it and itself; a single one sees everything."""
        if stop - start == 1:
            return None
        place = torch.arange(stop, device=self.keys_NBSKD.device)
        return (place[None, :] <= place[start:, None])[None, None]

    def advance(self, tokens: int) -> None:
        """After a forward pass over that many new tokens."""
        self.length += tokens
