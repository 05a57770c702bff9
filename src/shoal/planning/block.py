"""How long one block of the model takes for one micro-batch, forward and backward, on one device of its group."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from shoal.planning import collectives, experts, products
from shoal.planning.constants import CALL, GAP, Constants, Rates
from shoal.planning.work import Array, Work

# Of a fused kernel for attention: head size at which FlashAttention's first version has its full rate, and what
# backward costs of forward (Dao 2023, "FlashAttention-2", section 3).
_HEAD, _BACKWARD = 128.0, 2.5
# Corner of what the device computes and what the host launches.
_CORNER = 4.0


class Cost(NamedTuple):
    """Seconds of a block and a micro-batch, (n,). forward, backward: all of it, what is computed again in backward.
    compute_forward, compute_backward: without communication and launching. tensor, context: communication that shows,
    of both; tensor with what experts exchange. attention: its core, forward."""

    forward: Array
    backward: Array
    compute_forward: Array
    compute_backward: Array
    tensor: Array
    context: Array


def cost(work: Work, constants: Constants, rates: Rates, *, routed: bool = False) -> Cost:
    """routed: of a block with experts, whose shared ones are its dense feed-forward."""
    if routed:
        work = replace(work, columns={**work.columns, "feed": work.shared_feed})
    linear_forward, linear_backward, repeatable = _linear(work, constants, rates)
    core_forward, core_backward = _attention(work, constants, rates)
    forward, backward = linear_forward + core_forward, linear_backward + core_backward
    tensor_forward, tensor_backward = _tensor(work, constants, rates)
    around_forward, around_backward = _context(work, rates, core_forward, core_backward)
    kernels = work.kernels + 2 * work.gated + 6 * work.low
    if routed:
        own_forward, own_backward = experts.computing(work, constants, rates)
        sent = experts.exchanging(work, rates)
        forward, backward = forward + own_forward, backward + own_backward
        tensor_forward, tensor_backward = tensor_forward + sent, tensor_backward + sent
        kernels = kernels + experts.KERNELS
    forward_all = forward + tensor_forward + around_forward
    # What is computed again in backward (Chen et al. 2016; attention alone: Korthikanti et al. 2022, section 5).
    again = work.recompute * forward_all + work.selective * core_forward + work.operators * repeatable
    backward_all = backward + tensor_backward + around_backward + again
    repeated = (work.recompute + work.operators) * kernels
    calls = 2 * (work.tensor > 1)
    return Cost(
        forward=products.corner(forward_all + GAP * kernels, rates.host * (kernels + calls), _CORNER),
        backward=products.corner(
            backward_all + GAP * (2 * kernels + repeated),
            rates.host * (2 * kernels + repeated + calls + work.recompute * calls),
            _CORNER,
        ),
        compute_forward=forward,
        compute_backward=backward
        + work.recompute * forward
        + work.selective * core_forward
        + work.operators * repeatable,
        tensor=tensor_forward * (1 + work.recompute) + tensor_backward,
        context=around_forward * (1 + work.recompute) + around_backward,
    )


def tokens(work: Work) -> Array:
    """Of a micro-batch on a rank."""
    return work.micro_batch * work.sequence / work.context


def _linear(work: Work, constants: Constants, rates: Rates) -> tuple[Array, Array, Array]:
    """All but attention's core, forward and backward: its matrices' products, element-wise operations, and casts to
    fp8; and what of forward is computed again where every second product is kept."""
    t, d = work.tensor, work.head_size
    m_T = tokens(work)
    shared_T = np.where(work.shards > 0, m_T / t, m_T)
    qkv = (work.heads + 2 * work.key_heads) * d / t
    up = work.feed * (1 + work.gated) / t
    shapes = [
        (qkv * (1 - work.latent), work.hidden), (work.hidden, work.heads * work.value_size / t), (up, work.hidden),
        (work.hidden, work.feed / t), *_latent(work),
    ]  # fmt: skip
    odd, align = constants.shared("odd"), constants.shared("align")

    def product(rows: Array, m: Array, n: Array, k: Array) -> Array:
        """0 where a block has none of this shape."""
        some = (m > 0) & (n > 0) & (k > 0)
        m, n, k = (np.where(some, size, 1.0) for size in (m, n, k))
        return np.where(some, products.seconds(work, rates, rows, m, n, k, work.low), 0.0)

    zero = np.zeros(len(work))
    forward, backward, weights = zero, zero, zero
    for n, k in shapes:
        rows = products.aligned(n, k, odd, align)
        forward = forward + product(rows, m_T, n, k)
        backward = backward + product(rows, m_T, k, n) + product(rows, k, n, m_T)
        weights = weights + n * k
    repeatable = forward * repeated_products(work)
    # What enters a product in fp8 is cast and transposed, 4 bytes a value; weights once a step.
    casts = work.low * constants.shared("quant") * 4 / rates.memory
    inner = m_T * (work.heads * d + work.feed) / t
    forward = forward + casts * (2 * shared_T * work.hidden + inner + weights / work.micro_batches)
    backward = backward + casts * (2 * shared_T * work.hidden + m_T * (qkv + up))
    # Bytes of norms, activations, residuals, rotations; twice as many and more backward.
    element = constants.shared("elem") * rates.fuse / rates.memory
    whole, cut = shared_T * work.hidden, m_T / t
    between = element * (24 * whole + cut * (work.feed * (4 + 4 * work.gated) + 8 * work.heads * d))
    forward, repeatable = forward + between, repeatable + between
    backward = backward + element * (36 * whole + cut * (work.feed * (6 + 6 * work.gated) + 10 * work.heads * d))
    return forward, backward, repeatable


def repeated_products(work: Work) -> Array:
    """Share of a block's products (by what they multiply) that are computed again where every second one is kept:
    keys, attention's output and, where the feed-forward has a gate, the one beside it."""
    heads, keys, d = work.heads, work.key_heads, work.head_size
    again = (heads + keys) * d + work.feed
    return again / (2 * (heads + keys) * d + (2 + work.gated) * work.feed)


def _latent(work: Work) -> list[tuple[Array, Array]]:
    """Of latent attention's products (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1) columns and depth, 0 elsewhere.
    Those into latents are whole on each rank of a tensor group."""
    if not (work.latent > 0).any():
        return []
    d, t, some = work.head_size, work.tensor, work.latent
    compressed = work.latent_q > 0
    spread = work.heads * (d - work.rope_size + work.value_size) / t
    return [
        (some * work.latent_q, work.hidden),
        (some * work.heads * d / t, np.where(compressed, work.latent_q, work.hidden)),
        (some * (work.latent_kv + work.rope_size), work.hidden), (some * spread, work.latent_kv),
    ]  # fmt: skip


def _attention(work: Work, constants: Constants, rates: Rates) -> tuple[Array, Array]:
    """Attention's core. Unfused: over all pairs, and their scores go through memory. Fused: the causal half."""
    d, own = work.head_size, work.sequence / work.context
    flops = 4 * work.micro_batch * own * work.sequence * ((d + work.value_size) / 2) * work.heads / work.tensor
    power = products.power_of_two(d)
    # Without rows of whole 16 bytes there are no tensor cores for batched products: a sixteenth of the peak, against
    # what is reached of it (0.7).
    rows = np.where(power < 8, 1 / 16 / 0.7, (power / 64) ** constants.shared("align"))
    rate = rates.product * rows * d / (d + 64)
    pairs = work.micro_batch * work.heads / work.tensor * own * work.sequence * constants.shared("score") / rates.memory
    newer = work.flash >= 2
    flash = np.where(newer, constants.shared("flash2"), constants.shared("flash1") * (_HEAD / d) ** 0.25)
    # FlashAttention-2 is written for A100 (Shah et al. 2024, "FlashAttention-3").
    most = np.where(work.flash == 2, work.older * constants.shared("sustained"), np.inf)
    fused = flops / 2 / np.minimum(rates.product * flash, most)
    unfused = work.flash == 0
    return (
        np.where(unfused, flops / rate + 11 * pairs, fused),
        np.where(unfused, 2 * flops / rate + 13 * pairs, _BACKWARD * fused),
    )


def _tensor(work: Work, constants: Constants, rates: Rates) -> tuple[Array, Array]:
    """Two sums of the group forward, as an all-reduce or as its halves; a gather more backward where it shares
    sequences (Korthikanti et al. 2022, section 4.2). fp8: gathered as bytes, scattered in 16 bits."""
    size = tokens(work) * work.hidden * 2 * np.where(work.low > 0, 0.75, 1.0)
    ring = collectives.bus(rates, work.tensor <= work.per_node, np.ones(len(work)))
    both = 2 * collectives.scatter(size, work.tensor, ring, np.zeros(len(work)))
    both = both * np.where(work.overlaps_tensor > 0, constants.shared("expose"), 1.0)
    return 2 * both, np.where(work.shards > 0, 3.0, 2.0) * both


def _context(work: Work, rates: Rates, core_forward: Array, core_backward: Array) -> tuple[Array, Array]:
    """Keys and values once around the ring, under attention; their gradients too, backward (Liu et al. 2023)."""
    others = work.context - 1
    size = 2 * tokens(work) * work.key_heads * work.head_size / work.tensor * 2 * others
    ring = collectives.bus(rates, work.tensor * work.context <= work.per_node, np.ones(len(work)))
    forward = np.maximum(0.0, size / ring - core_forward) + CALL * others
    backward = np.maximum(0.0, 2 * size / ring - core_backward) + CALL * others
    return np.where(others > 0, forward, 0.0), np.where(others > 0, backward, 0.0)
