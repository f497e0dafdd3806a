"""How long does a step of a PyTorch model take when mpiclip exchanges and clips its gradients? Against torch's own
DistributedDataParallel over gloo with clip_grad_norm_ and SGD, on the same ranks, which compute the same steps
(checked). They take turns; one thread a rank; the slowest rank's time counts. Ratios: theirs / ours, the median over
the turns.

    mpirun -n 2 python benchmarks/torch_ddp.py [TURNS]"""

import json
import platform
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import numpy as np
import torch
from torch import distributed
from torch.nn import BatchNorm2d, Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential, TransformerEncoderLayer
from torch.nn.functional import cross_entropy

from mpiclip import methods
from mpiclip.comm import world
from mpiclip.torch import Distributed

ETA, GAMMA = 0.05, 0.01
MODELS = {      # name: (the model, the shape of an input, rows of a batch)
    "perceptron, 0.2 million": (lambda: Sequential(Linear(784, 256), ReLU(), Linear(256, 10)), (784,), 128),
    "perceptron, 10 million": (lambda: Sequential(Linear(784, 2816), ReLU(), Linear(2816, 2816), ReLU(),
                                                  Linear(2816, 10)), (784,), 32),
    "convolutions, 0.4 million": (lambda: Sequential(
        Conv2d(1, 32, 5), ReLU(), MaxPool2d(2), Conv2d(32, 64, 5), ReLU(), MaxPool2d(2), Flatten(),
        Linear(1024, 320), ReLU(), Linear(320, 10)), (1, 28, 28), 16),
    "the same with BatchNorm": (lambda: Sequential(
        Conv2d(1, 32, 5), BatchNorm2d(32), ReLU(), MaxPool2d(2), Conv2d(32, 64, 5), BatchNorm2d(64), ReLU(),
        MaxPool2d(2), Flatten(), Linear(1024, 320), ReLU(), Linear(320, 10)), (1, 28, 28), 16),
    "transformer, 4 layers, 0.8 million": (lambda: Sequential(
        *(TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True) for _ in range(4)), Flatten(),
        Linear(128 * 32, 10)), (32, 128), 8),
}


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    ranks = world()
    torch.set_num_threads(1)
    folder = ranks.same(tempfile.mkdtemp() if ranks.rank == 0 else None)
    distributed.init_process_group("gloo", rank=ranks.rank, world_size=ranks.size,
                                   store=distributed.FileStore(str(Path(folder, "store")), ranks.size))
    for name, (make, shape, rows) in MODELS.items():
        torch.manual_seed(ranks.rank)
        ours = make()
        theirs = torch.nn.parallel.DistributedDataParallel(deepcopy(ours), gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(theirs.parameters(), lr=ETA)
        trainer = Distributed(ours, methods.NaiveParallelGC(eta=ETA, gamma=GAMMA), ranks, threads=1)
        batch = torch.randn(rows, *shape), torch.randint(0, 10, (rows,))

        def our_step(trainer=trainer, batch=batch):
            trainer.round(loss, lambda worker: batch)

        def their_step(model=theirs, optimizer=optimizer, batch=batch):
            optimizer.zero_grad()
            loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GAMMA / ETA)
            optimizer.step()

        for _ in range(5):
            our_step()
            their_step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            np.testing.assert_allclose(p.detach(), q.detach(), rtol=1e-3, atol=1e-5, err_msg=name)
        spent: dict = {our_step: [], their_step: []}
        for turn in range(turns):
            for step in (our_step, their_step) if turn % 2 else (their_step, our_step):
                ranks.barrier()
                start = perf_counter()
                step()
                spent[step].append(perf_counter() - start)
        a, b = ([max(turn) for turn in zip(*ranks.all(spent[step]), strict=True)] for step in (our_step, their_step))
        ratios = [theirs / ours for ours, theirs in zip(a, b, strict=True)]
        if ranks.rank == 0:
            d, middle = sum(p.numel() for p in ours.parameters()), [round(q, 3) for q in quantiles(ratios)[::2]]
            print(json.dumps({"model": name, "d": d, "rows": rows, "ranks": ranks.size,
                              "ms": round(1000 * median(a), 3), "DDP ms": round(1000 * median(b), 3),
                              "ratio": round(median(ratios), 3), "middle half": middle, "torch": torch.__version__,
                              "machine": platform.platform()}), flush=True)
    distributed.destroy_process_group()


main()
