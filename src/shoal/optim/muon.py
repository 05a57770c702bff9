"""Muon: the momentum of a matrix, made orthogonal, is the step of it.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon); its
size and weight decay: Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2 (arXiv:2502.16982).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.job.optim import OptimOptions
from shoal.mesh import Mesh
from shoal.optim.whole import Wholes
from shoal.shard import Shard

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# A norm that is less than this is taken for it: what has no gradient at all stays where it is.
_LEAST_NORM = 1e-7
# AdamW's steps have a root mean square of 0.2 to 0.4, whatever the shape; an orthogonal N × M matrix has 1/√max(N, M).
_SIZE = 0.2


def is_hidden(shard: Shard) -> bool:
    """Whether it is of a matrix inside a block. Not: embedding, output layer, vectors, and what has a single row."""
    shape = shard.global_shape
    return shard.name.startswith("model.layers.") and len(shape) == 2 and min(shape) > 1


class Muon:
    """The step of every matrix that these shards of a replica's ranks are pieces of, by its canonical name.

    With B the momentum (of gradients G, decay μ), Nesterov's, λ the weight decay, W a matrix of N rows and M columns:

        B ← μ B + G        W ← (1 − lr λ) W − lr · 0.2 √max(N, M) · orthogonal(G + μ B)

    q, k and v, gate and up, and every expert are matrices of their own, however they are stored.
    """

    def __init__(self, shards: list[Shard], options: OptimOptions, like: torch.Tensor, mesh: Mesh | None):
        """like: of the device and dtype of all shards, where there may be none. mesh: as for `Wholes`."""
        self.shards, self.options = shards, options
        self.momentum = [torch.zeros_like(s.local) for s in shards]
        self._dtype = precision(like)
        self._wholes = Wholes(shards, mesh)

    def apply(self, scale: float, lr: float) -> None:
        """One update from the shards' gradients times `scale`. To be called on all ranks of a replica."""
        beta, ahead = self.options.muon_momentum, []
        for shard, momentum in zip(self.shards, self.momentum, strict=True):
            assert shard.grad is not None, f"{shard.name} got no gradient"
            shard.grad.mul_(scale)
            momentum.mul_(beta).add_(shard.grad)
            ahead.append(shard.grad.add(momentum, alpha=beta).to(self._dtype))
        steps = self._wholes.map(ahead, _step, self._dtype)
        for shard, step in zip(self.shards, steps, strict=True):
            shard.local.mul_(1 - lr * self.options.weight_decay).add_(step, alpha=-lr)


def precision(like: Tensor) -> torch.dtype:
    """In which the iteration is computed: bf16 as in the papers, but float32 on CPUs, many of which have no fast bf16
    products, and float64 where weights have it, so that layouts can be compared."""
    if like.dtype == torch.float64:
        return torch.float64
    return torch.float32 if like.is_cpu else torch.bfloat16


def _step(x_NM: Tensor) -> Tensor:
    return orthogonal(x_NM).mul_(_SIZE * max(x_NM.shape) ** 0.5)


def orthogonal(x_NM: Tensor) -> Tensor:
    """Nearly U Vᵀ of the matrix U S Vᵀ: its singular values, over their norm, after 5 times s ← 3.4445 s − 4.7750 s³ +
    2.0315 s⁵, by matrix products alone (a Newton–Schulz iteration whose coefficients make small s grow fast).

    In the matrix's own dtype. Singular values of at least 0.002 of their norm end between 0.68 and 1.21; smaller ones
    between 0 and that. 5 · (4 L² H + 2 L³) operations for sides L ≤ H.
    """
    a, b, c = _COEFFICIENTS
    x_LH = x_NM.mT if x_NM.shape[0] > x_NM.shape[1] else x_NM
    x_LH = x_LH / torch.linalg.matrix_norm(x_LH).clamp(min=_LEAST_NORM)
    for _ in range(_ITERATIONS):
        gram_LL = x_LH @ x_LH.mT
        x_LH = torch.addmm(x_LH, torch.addmm(gram_LL, gram_LL, gram_LL, beta=b, alpha=c), x_LH, beta=a)
    return x_LH.mT if x_NM.shape[0] > x_NM.shape[1] else x_LH
