"""A recommender of two towers: will this user like that item? Both towers look up tags in one table.

    python examples/two_tower.py
    torchrun --nproc-per-node 2 examples/two_tower.py --layout pipeline=2
    torchrun --nproc-per-node 2 examples/two_tower.py --layout tensor=2

In a pipeline, the towers' stages hand on several tensors, and the table of tags may be in more than one of them: its
gradients are added up. With tensor=2, the hidden layers are shared as PLAN says.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shoal

USERS, ITEMS, TAGS, MICRO_BATCH = 60, 40, 16, 32
PLAN = {"*_tower.0": "columns", "*_tower.2": "rows"}


class TwoTower(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.user, self.item, self.tag = (
            nn.Embedding(USERS, width),
            nn.Embedding(ITEMS, width),
            nn.Embedding(TAGS, width),
        )
        self.user_tower = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.item_tower = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, user: Tensor, liked_tag: Tensor, item: Tensor, item_tag: Tensor) -> Tensor:
        of_user = self.user_tower(self.user(user) + self.tag(liked_tag))
        of_item = self.item_tower(self.item(item) + self.tag(item_tag))
        return (of_user * of_item).sum(-1) * self.scale


def batch(step: int, samples: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """(user, tag that the user likes, item, its tag) and whether the user liked it: the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    user, item = (torch.randint(n, (samples,), generator=generator) for n in (USERS, ITEMS))
    inputs = (user, user % TAGS, item, item * 7 % TAGS)
    return inputs, ((user % TAGS + item * 7 % TAGS) % 3 == 0).float()


def loss(score: Tensor, liked: Tensor) -> Tensor:
    """Summed over the samples: shoal divides by the number of all of them."""
    return F.binary_cross_entropy_with_logits(score, liked.to(score.dtype), reduction="sum")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", default="replicas=1")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    inputs, _ = batch(0, MICRO_BATCH)
    trained = shoal.parallelize(TwoTower(), args.layout, PLAN, example=inputs, loss=loss, lr=1e-2)
    for step in range(args.steps):
        done = trained.step(trained.share(batch(step, 128)))
        if trained.rank == 0 and (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {done.loss:.6f}, gradient norm {done.gradient_norm:.6f}", flush=True)
    held_out = trained.evaluate(trained.share(batch(-1, 256)))
    if trained.rank == 0:
        print(f"held-out loss {held_out:.6f}")
    trained.close()


if __name__ == "__main__":
    main()
