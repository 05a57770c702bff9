"""What a block's routed experts take beside its attention and shared experts, for one micro-batch on one device.

Priors, of which none was fitted: how uneven the load is, kernels that routing launches, bytes that permuting moves.
"""

from __future__ import annotations

import numpy as np

from shoal.planning import collectives, products
from shoal.planning.constants import Constants, Rates
from shoal.planning.work import Array, Work

# Tokens of the fullest rank against the mean; kernels of routing, sorting, permuting there and back.
IMBALANCE, KERNELS = 1.1, 20.0


def rows(work: Work) -> Array:
    """Of all products of a rank's experts together: tokens of a micro-batch, once for each expert that they chose. A
    tensor group shares them: it does not cut experts."""
    tokens = work.micro_batch * work.sequence / work.context / work.tensor
    return tokens * work.chosen * IMBALANCE


def computing(work: Work, constants: Constants, rates: Rates) -> tuple[Array, Array]:
    """Seconds forward and backward of router, permutes and products, those of an expert after those of another."""
    odd, align = constants.shared("odd"), constants.shared("align")
    some = work.experts > 0
    own = np.where(some, work.experts / work.expert, 1.0)
    m_T = rows(work)
    # Rows of an expert are filled up to a whole tile, as grouped products do: how many there are is chance.
    each_T = np.where(some, np.ceil(np.maximum(m_T / own, 1.0) / 64) * 64, 1.0)
    tokens = np.where(some, m_T / IMBALANCE / np.maximum(work.chosen, 1), 1.0)
    up, inner = work.expert_feed * (1 + work.gated), np.where(some, work.expert_feed, 1.0)
    shapes = (
        (tokens, np.maximum(work.experts, 1), work.hidden, np.ones(len(work)), np.zeros(len(work))),
        (each_T, np.where(some, up, 1.0), work.hidden, own, work.low),
        (each_T, work.hidden, inner, own, work.low),
    )
    forward, backward = np.zeros(len(work)), np.zeros(len(work))
    for m, n, k, times, low in shapes:
        even = products.aligned(n, k, odd, align)
        forward = forward + times * products.seconds(work, rates, even, m, n, k, low)
        backward = backward + times * products.seconds(work, rates, even, m, k, n, low)
        backward = backward + times * products.seconds(work, rates, even, k, n, m, low)
    # Read and written on the way there and back, 2 bytes a value; what is between the products, as in a dense block.
    element = constants.shared("elem") * rates.fuse / rates.memory * m_T
    forward = forward + element * (8 * work.hidden + work.expert_feed * (4 + 4 * work.gated))
    backward = backward + element * (12 * work.hidden + work.expert_feed * (6 + 6 * work.gated))
    return np.where(some, forward, 0.0), np.where(some, backward, 0.0)


def exchanging(work: Work, rates: Rates) -> Array:
    """Seconds of dispatch and combine, 16 bits a value: as much forward as backward (Lepikhin et al. 2020)."""
    size = rows(work) * work.hidden * 2
    return 2 * np.where(work.experts > 0, collectives.all_to_all(rates, size, work.expert, work.per_node), 0.0)
