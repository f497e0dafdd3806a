"""What does it cost to clip every example's gradient? A step of stochastic gradients of the MLP 784-256-10 (tanh) whose
rows are clipped (no row's gradient is ever there), against a plain step; and against Opacus and plain PyTorch, where
they are installed. The same rows, from the same point, must give all of them the same next point. In turn, medians of
ratios; no noise is added, by nobody.

    python benchmarks/example_level.py [THREADS]"""

import json
import sys
import warnings
from statistics import median
from time import perf_counter

import numpy as np

from mpiclip import problems
from mpiclip.data import Shard
from mpiclip.device import set_threads

THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
ROWS, STEPSIZE, CLIP = 10_000, 0.1, 0.05        # at this C about every row is clipped
ROUNDS, SLICE = 25, 0.02                        # in a round each takes steps for about so many seconds

RATIOS = [("clipped", "plain"), ("opacus ghost", "torch plain"), ("opacus hooks", "torch plain"),
          ("torch plain", "plain"), ("opacus ghost", "clipped"), ("opacus hooks", "clipped")]


def example(name: str, dtype: str):
    """(problem, data, x⁰) on random images of 10 classes, or of 2"""
    random = np.random.default_rng(0)
    classes = 2 if name == "logistic" else 10
    shard = Shard(random.random((ROWS, 784), np.float32), random.integers(0, classes, ROWS).astype(float),
                  np.array([0, ROWS]), np.arange(1), 1, ROWS, np.arange(classes), 784)
    problem = problems.load(name)()
    data = problem.prepare(shard, shard.ids, 1, 0, dtype)
    return problem, data, problem.x0(data, 0, dtype)


def ours(problem, data, x, clip):
    """step(rows): x −= γ g, in place, where g is the mean of the rows' gradients; and where x is"""
    grad = np.empty((1, len(x)), x.dtype)

    def step(rows):
        batch = rows, np.array([0, len(rows)]), np.array([float(len(rows))])
        problem.loss_grad(x, data, batch, grad, loss=False, clip=clip)
        np.multiply(grad, STEPSIZE, out=grad)
        np.subtract(x, grad[0], out=x)
    return step, lambda: x


def peer(torch, data, x, mode, batch):
    """The same with PyTorch: plain, or by Opacus with the gradients of all rows ("hooks") or without them ("ghost")."""
    model = torch.nn.Sequential(torch.nn.Linear(784, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10))
    torch.nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), model.parameters())
    images, labels = torch.from_numpy(data.a), torch.from_numpy(data.y).long()
    loss = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), STEPSIZE)
    parameters = list(model.parameters())
    if mode != "plain":
        from opacus import PrivacyEngine
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch)
        made = PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0.0, max_grad_norm=CLIP,
            poisson_sampling=False, grad_sample_mode=mode, **({"criterion": loss} if mode == "ghost" else {}))
        model, optimizer = made[0], made[1]
        loss = made[2] if mode == "ghost" else loss

    def step(rows):
        rows = torch.from_numpy(rows)
        optimizer.zero_grad()
        loss(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return step, lambda: torch.nn.utils.parameters_to_vector(parameters).detach().numpy()


def competitors(name: str, batch: int):
    """{name: (step, where x is)}; the first two are ours."""
    problem, data, x = example(name, "float32")
    found = {"plain": ours(problem, data, x.copy(), None), "clipped": ours(problem, data, x.copy(), CLIP)}
    if name != "mlp":
        return found
    try:
        import torch
    except ImportError:
        print("no PyTorch here: no peers", file=sys.stderr)
        return found
    torch.set_num_threads(THREADS)
    found["torch plain"] = peer(torch, data, x, "plain", batch)
    try:
        import opacus  # noqa: F401
    except ImportError:
        print("no Opacus here: PyTorch's plain step only", file=sys.stderr)
        return found
    for mode in ("hooks", "ghost"):
        found[f"opacus {mode}"] = peer(torch, data, x, mode, batch)
    return found


def seconds(step, rows, count: int) -> float:
    """Time of one step, of `count` in a row."""
    start = perf_counter()
    for _ in range(count):
        step(rows)
    return (perf_counter() - start) / count


def main():
    warnings.simplefilter("ignore")
    set_threads(THREADS)
    random = np.random.default_rng(1)
    for name in ("mlp", "softmax", "logistic"):
        for batch in (128, 256):
            steps = competitors(name, batch)
            rows = random.integers(0, ROWS, batch)
            for step, _ in steps.values():
                step(rows)
            for which, (_, x) in steps.items():         # everybody has done the same
                same = steps["plain" if "plain" in which else "clipped"][1]()
                np.testing.assert_allclose(x(), same, rtol=1e-4, atol=1e-6)
            count = {which: max(1, round(SLICE / seconds(step, rows, 3))) for which, (step, _) in steps.items()}
            times: dict[str, list[float]] = {which: [] for which in steps}
            for _ in range(ROUNDS):
                for which, (step, _) in steps.items():
                    times[which].append(1e3 * seconds(step, rows, count[which]))
            line = {"problem": name, "batch": batch, "threads": THREADS,
                    "ms": {which: round(median(spent), 3) for which, spent in times.items()}}
            for a, b in RATIOS:
                if a in times:
                    line[f"{a} / {b}"] = round(median(p / q for p, q in zip(times[a], times[b], strict=True)), 2)
            print(json.dumps(line), flush=True)


main()
