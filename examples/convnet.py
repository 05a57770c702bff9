"""A convolutional net that learns to tell stripes from checks and blobs, in any layout.

    python examples/convnet.py
    torchrun --nproc-per-node 2 examples/convnet.py --layout pipeline=2
    torchrun --nproc-per-node 4 examples/convnet.py --layout replicas=2,fsdp=2

Batch norm computes with the statistics of a micro-batch, so its size is the same in each of them: 8 images.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shoal

SIZE, CLASSES, MICRO_BATCH = 12, 3, 8


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    def __init__(self, channels: int = 12, blocks: int = 3):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


def batch(step: int, samples: int) -> tuple[Tensor, Tensor]:
    """Images and what they show: the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    kind = torch.randint(CLASSES, (samples,), generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    pictures = torch.stack(
        [x % 4 < 2, (x % 4 < 2) ^ (y % 4 < 2), (x - SIZE / 2) ** 2 + (y - SIZE / 2) ** 2 < 9]
    ).float()
    noise = torch.randn(samples, 1, SIZE, SIZE, generator=generator)
    return pictures[kind][:, None] + noise, kind


def loss(logits: Tensor, kind: Tensor) -> Tensor:
    """Summed over the images: shoal divides by the number of all of them."""
    return F.cross_entropy(logits, kind, reduction="sum")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", default="replicas=1")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, _ = batch(0, MICRO_BATCH)
    layout = ",".join(filter(None, [args.layout, f"micro_batch={MICRO_BATCH}"]))
    trained = shoal.parallelize(ConvNet(), layout, example=images, loss=loss, lr=1e-2)
    for step in range(args.steps):
        done = trained.step(trained.share(batch(step, 32)))
        if trained.rank == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {done.loss:.6f}, gradient norm {done.gradient_norm:.6f}", flush=True)
    state = trained.state_dict()
    trained.close()
    if trained.rank == 0:
        net = ConvNet()
        net.load_state_dict(state)
        images, kind = batch(-1, 200)
        print(f"held-out accuracy {(net.eval()(images).argmax(1) == kind).float().mean():.3f}")


if __name__ == "__main__":
    main()
