"""Causal attention, over whole rows or within the documents packed into them.

A model asks `attend(layer)` for the attention function of each layer, so that packed rows, caches and rings
plug in without a change to the model. What is made here is the same function for all layers, and a compiled
block takes another micro-batch's without compiling again: masks are arguments, not constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_BLHD, k_BSKD, v_BSKD) -> out_BLHD; H query heads share K key and value heads in turn (K divides H)."""

Attend = Callable[[int], Attention]
"""Layer index -> the attention function of that layer."""


def causal_attend() -> Attend:
    """Every position sees itself and those before it in its row."""
    return _every_layer(_causal)


def document_attend(document_BL: Tensor) -> Attend:
    """Every position sees itself and those before it in its row that have the same document number.

    document_BL: integers. Build once per micro-batch, outside a compiled function: the mask is (B, 1, L, L)
    bools, and it is left out where each row is one document.
    """
    if bool((document_BL == document_BL[:, :1]).all()):
        return causal_attend()
    same_BLL = document_BL[:, :, None] == document_BL[:, None, :]
    return _every_layer(partial(masked, mask_BHLS=same_BLL.tril()[:, None]))


def masked(q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask_BHLS: Tensor | None) -> Tensor:
    """Attention where `mask_BHLS` is True (dimensions may be 1); None = everywhere."""
    return _attention(q_BLHD, k_BSKD, v_BSKD, mask_BHLS, False)


def _every_layer(attention: Attention) -> Attend:
    return lambda layer: attention


def _causal(q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor) -> Tensor:
    return _attention(q_BLHD, k_BLKD, v_BLKD, None, True)


def _attention(q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v (Vaswani et al. 2017, section 3.2.1; shared keys: Ainslie et al. 2023,
    "GQA")."""
    out_BHLD = F.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q_BLHD.shape[2] != k_BSKD.shape[2],
    )
    return out_BHLD.transpose(1, 2)
