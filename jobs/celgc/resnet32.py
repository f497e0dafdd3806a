"""ResNet-32 on images, trained by CELGC through mpiclip.torch: the paper's example (η = 0.1, γ = 1, weight decay 5e-4,
batches of 16 a worker, η and γ ×0.1 after 80 and 120 of 160 epochs).

    sh data.sh FOLDER                                           # cifar.h5, or fashion.h5
    mpirun -n 8 python resnet32.py cifar.h5 --interval 2 --out runs/resnet32

Started again it goes on from its last checkpoint, on any number of ranks. He, Zhang, Ren, Sun (2016), "Deep residual
learning for image recognition", arXiv:1512.03385, section 4.2; shortcuts without parameters (option A)."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from mpiclip import data, methods
from mpiclip.comm import world
from mpiclip.torch import Distributed


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which skips pixels and pads channels with zeros where they change."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.stride, self.more = out // channels, out - channels
        self.residual = nn.Sequential(
            nn.Conv2d(channels, out, 3, self.stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, h):
        shortcut = pad(h[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, 0, self.more))
        return torch.relu(self.residual(h) + shortcut)


def resnet(channels: int, classes: int, blocks: int) -> nn.Module:
    """6·blocks + 2 layers: 5 blocks a stage are ResNet-32."""
    widths = [16] * blocks + [32] * blocks + [64] * blocks
    return nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         *(Block(a, b) for a, b in zip([16, *widths], widths, strict=False)),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def images(shard):
    """A shard's rows as (m, channels, height, width), and their classes."""
    shape = shard.image if len(shard.image) == 3 else (1, *shard.image)
    return torch.from_numpy(shard.x).view(-1, *shape), torch.from_numpy(np.searchsorted(shard.classes, shard.y))


def crop_and_flip(x, random):
    """Each image moved by up to 4 pixels, zeros moving in, and every other one mirrored."""
    size, moved = x.shape[-1], pad(x, (4, 4, 4, 4))
    for r, (down, right, mirrored) in enumerate(random.integers(0, (9, 9, 2), (len(x), 3))):
        x[r] = moved[r, :, down:down + size, right:right + size].flip(-1) if mirrored else (
            moved[r, :, down:down + size, right:right + size])
    return x


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("file")
    options.add_argument("--workers", type=int, help="default: one a rank")
    options.add_argument("--interval", type=int, default=2, help="I, local steps between two averages")
    options.add_argument("--batch", type=int, default=16, help="images a worker and step")
    options.add_argument("--epochs", type=int, default=160, help="passes over the data, of all workers together")
    options.add_argument("--blocks", type=int, default=5)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", default="runs/resnet32")
    asked, ranks = options.parse_args(), world()

    n = asked.workers or ranks.size
    ids = np.array_split(np.arange(n), ranks.size)[ranks.rank]
    standard = data.moments(asked.file)
    shard = data.read_train(asked.file, "iid", n, ids, asked.seed, "float32", standard=standard)
    (x, y), test = images(shard), images(data.read_test(asked.file, ranks.rank, ranks.size, "float32", standard))
    first = dict(zip(ids, shard.offsets, strict=False))
    last = dict(zip(ids, shard.offsets[1:], strict=True))

    torch.manual_seed(asked.seed)
    model = resnet(x.shape[1], len(shard.classes), asked.blocks)
    a_pass = max(1, shard.total // (n * asked.batch * asked.interval))        # rounds
    trainer = Distributed(model, methods.CELGC(
        eta=0.1, gamma=1.0, interval=asked.interval, weight_decay=5e-4, decay=0.1,
        decay_at=[a_pass * asked.epochs // 2, a_pass * asked.epochs * 3 // 4]), ranks, n, seed=asked.seed)
    if Path(asked.out, "checkpoints").exists():
        trainer.load(asked.out)

    def draw(worker):
        random = trainer.random(worker)
        rows = random.integers(first[worker], last[worker], asked.batch)
        return crop_and_flip(x[rows], random), y[rows]

    while trainer.rounds < a_pass * asked.epochs:
        model.train()
        value = np.mean([trainer.round(loss, draw) for _ in range(a_pass)])
        model.eval()
        with torch.no_grad():
            right = sum(int((model(a).argmax(1) == b).sum())
                        for a, b in zip(test[0].split(500), test[1].split(500), strict=True))
        right, rows, value = ranks.total([right, len(test[1]), value])
        clipped = trainer.clipped()
        trainer.save(asked.out)
        if ranks.rank == 0:
            print(f"epoch {trainer.rounds // a_pass}  loss {value / ranks.size:.4f}  test accuracy {right / rows:.4f}  "
                  f"clipped {clipped:.2f}  sent {ranks.sent / 1e6:.0f} MB", flush=True)


main()
