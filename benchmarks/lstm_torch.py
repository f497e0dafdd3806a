"""How long does a step of an LSTM language model take, here and in PyTorch? A step: the next minibatch, forward,
backward, clip the gradient, update; hidden 256, sequence 35, batch 20, E tied to the decoder, float32. First both take
the same steps from the same point: losses, gradients and points must agree. Then in turn, medians of times and ratios.

    python benchmarks/lstm_torch.py [THREADS]          # beside PyTorch: pip install torch"""

import json
import sys
from statistics import median
from time import perf_counter

import numpy as np
import torch

from mpiclip import ops, problems
from mpiclip.data import Text
from mpiclip.device import set_threads

THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
HIDDEN, SEQUENCE, BATCH, STEPSIZE, CLIP = 256, 35, 20, 1.0, 0.25
CASES = [(65, 1), (65, 3), (10_000, 1), (33_278, 1)]        # vocabulary (characters, Penn Treebank, WikiText-2), layers
STEPS = 8                                                   # minibatches of a pass
ROUNDS, SLICE = 15, 0.15                                    # in a round each takes steps for about so many seconds


def ours(text: Text, layers: int):
    """(step() → loss, its gradient (d,), x (d,)): each step takes the next minibatch"""
    problem = problems.LSTM(layers=layers, hidden=HIDDEN, sequence=SEQUENCE)
    data = problem.prepare(text, text.ids, 1, 0, "float32")
    x = problem.x0(data, 0, "float32")
    carried_i, taken_i = np.zeros((1, *problem.carried(data, BATCH)), np.float32), np.zeros(1)
    grad = np.empty((1, len(x)), np.float32)

    def step():
        batch = problem.follow(data, BATCH, text.ids, taken_i, carried_i, 0)
        taken_i[:] += 1
        losses, _ = problem.loss_grad(x, data, batch, grad)
        ops.clip(grad, CLIP, out=grad)
        np.multiply(grad, STEPSIZE, out=grad)
        np.subtract(x, grad[0], out=x)
        return losses[0]
    return step, grad[0], x


class Model(torch.nn.Module):
    def __init__(self, vocabulary: int, layers: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, HIDDEN)
        self.lstm = torch.nn.LSTM(HIDDEN, HIDDEN, layers)
        self.decoder = torch.nn.Linear(HIDDEN, vocabulary)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens, state):
        h, state = self.lstm(self.embedding(tokens), state)
        return self.decoder(h.view(-1, HIDDEN)), state


def peer(text: Text, layers: int, x):
    """The same with PyTorch; the gradient and x are functions."""
    model = Model(len(text.vocabulary), layers)
    parameters = list(model.parameters())
    torch.nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), parameters)
    optimizer, loss = torch.optim.SGD(parameters, STEPSIZE), torch.nn.CrossEntropyLoss()
    tokens = torch.from_numpy(text.tokens.reshape(BATCH, -1).T.astype(np.int64)).contiguous()
    zeros = torch.zeros(layers, BATCH, HIDDEN)
    place, state = 0, (zeros, zeros)

    def step():
        nonlocal place, state
        if place == STEPS:
            place, state = 0, (zeros, zeros)
        rows = tokens[place * SEQUENCE:(place + 1) * SEQUENCE + 1]
        optimizer.zero_grad()
        scores, after = model(rows[:-1], state)
        value = loss(scores, rows[1:].reshape(-1))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        place, state = place + 1, tuple(s.detach() for s in after)
        return value.item()

    def flat(arrays):
        return torch.cat([a.reshape(-1) for a in arrays]).detach().numpy()
    return step, lambda: flat([p.grad for p in parameters]), lambda: flat(parameters)


def seconds(step, count: int) -> float:
    """Time of one step, of `count` in a row."""
    start = perf_counter()
    for _ in range(count):
        step()
    return (perf_counter() - start) / count


def main():
    set_threads(THREADS)
    torch.set_num_threads(THREADS)
    for vocabulary, layers in CASES:
        often = 1 / np.arange(1, vocabulary + 1)                        # as in a language: Zipf's law
        tokens = np.random.default_rng(0).choice(vocabulary, BATCH * (STEPS * SEQUENCE + 1), p=often / often.sum())
        text = Text(tokens.astype(np.int32), np.array([0, len(tokens)]), np.arange(1), 1, len(tokens),
                    tuple(map(str, range(vocabulary))), "word")
        step, grad, x = ours(text, layers)
        torch_step, torch_grad, torch_x = peer(text, layers, x)
        for _ in range(STEPS + 2):                                      # into the next pass
            np.testing.assert_allclose(step(), torch_step(), rtol=1e-5)
            norm = np.linalg.norm(grad)                                 # both are clipped
            np.testing.assert_allclose(grad / norm, torch_grad() / np.linalg.norm(torch_grad()), atol=2e-5)
        np.testing.assert_allclose(x, torch_x(), atol=1e-4)
        steps = {"ours": step, "torch": torch_step}
        count = {name: max(1, round(SLICE / seconds(step, 3))) for name, step in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                times[name].append(1e3 * seconds(step, count[name]))
        ratio = median(b / a for a, b in zip(*times.values(), strict=True))
        print(json.dumps({"vocabulary": vocabulary, "layers": layers, "threads": THREADS, "parameters": len(x),
                          "ms": {name: round(median(spent), 2) for name, spent in times.items()},
                          "torch / ours": round(ratio, 2)}), flush=True)


main()
