"""AWD-LSTM on text, trained by CELGC through mpiclip.torch: the paper's language model (η = 30, γ = 7.5, 3 layers).

    sh data.sh FOLDER                                                   # wikitext.h5, shakespeare.h5
    mpirun -n 8 python awd_lstm.py wikitext.h5 --interval 16            # on a CPU: --embedding 64 --hidden 128

Sequences are of about 70 tokens, 35 in one of twenty rounds, and η and γ of a round are scaled by its length over 70:
the threshold γ/η stays. The text is cut into n blocks, each into `batch` streams; worker i reads block (i + e) mod n in
its e-th pass, and carries its state from sequence to sequence. Merity, Keskar, Socher (2018), "Regularizing and
optimizing LSTM language models", arXiv:1708.02182; without their averaging of iterates at the end."""

import argparse
from itertools import pairwise
from math import exp

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout, embedding

from mpiclip import data, methods
from mpiclip.comm import world
from mpiclip.streams import stream
from mpiclip.torch import Distributed


class WeightDropLSTM(nn.LSTM):
    """One layer, whose recurrent weights lose a share of themselves for a whole sequence."""

    drop = 0.5

    def forward(self, x, state):
        recurrent = dropout(self.weight_hh_l0, self.drop, self.training)
        out, *state = torch.lstm(x, state, [self.weight_ih_l0, recurrent, self.bias_ih_l0, self.bias_hh_l0],
                                 True, 1, 0.0, self.training, False, False)
        return out, tuple(state)


class AWDLSTM(nn.Module):
    def __init__(self, words: int, width: int, hidden: int, layers: int = 3):
        super().__init__()
        sizes = [width, *[hidden] * (layers - 1), width]        # the last layer is as wide as the words: they are tied
        self.words = nn.Parameter(torch.empty(words, width).uniform_(-0.1, 0.1))
        self.bias = nn.Parameter(torch.zeros(words))
        self.lstm = nn.ModuleList(WeightDropLSTM(a, b) for a, b in pairwise(sizes))

    def locked(self, x, p: float):
        """Dropout of the same places in all steps of a sequence, x (steps, batch, width)."""
        return x * dropout(torch.ones_like(x[:1]), p, self.training)

    def forward(self, tokens, state):
        """(scores (steps, batch, words), the last layer's output as it is and with dropout, state)"""
        words = self.words * dropout(torch.ones_like(self.words[:, :1]), 0.1, self.training)
        h, after = self.locked(embedding(tokens, words), 0.4), []
        for k, layer in enumerate(self.lstm):
            raw, own = layer(h, state[k])
            after.append(own)
            h = self.locked(raw, 0.4 if k == len(self.lstm) - 1 else 0.2)
        return h @ self.words.T + self.bias, raw, h, after

    def zeros(self, batch: int):
        return [(torch.zeros(1, batch, layer.hidden_size),) * 2 for layer in self.lstm]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("file")
    options.add_argument("--workers", type=int, help="default: one a rank")
    options.add_argument("--interval", type=int, default=2, help="I, local steps between two averages")
    options.add_argument("--batch", type=int, default=10, help="streams a worker")
    options.add_argument("--rounds", type=int, default=10_000)
    options.add_argument("--report", type=int, default=100, help="rounds between two lines")
    options.add_argument("--embedding", type=int, default=400)
    options.add_argument("--hidden", type=int, default=1150)
    options.add_argument("--seed", type=int, default=0)
    asked, ranks = options.parse_args(), world()

    n = asked.workers or ranks.size
    ids = np.array_split(np.arange(n), ranks.size)[ranks.rank]
    text = data.read_train(asked.file, "rotate", n, ids, asked.seed, "float32")
    held_out = data.read_test(asked.file, ranks.rank, ranks.size, "float32").tokens

    torch.manual_seed(asked.seed)
    model = AWDLSTM(len(text.vocabulary), asked.embedding, asked.hidden)
    method = methods.CELGC(eta=30.0, gamma=7.5, interval=asked.interval, weight_decay=1.2e-6)
    trainer = Distributed(model, method, ranks, n, seed=asked.seed, together=False)     # a state is carried
    carried = {worker: model.zeros(asked.batch) for worker in ids}
    place, passes = dict.fromkeys(ids, 0), dict.fromkeys(ids, 0)

    def length(round):
        random = stream(asked.seed, "length", round=round)
        return max(5, int(np.rint(random.normal(70 if random.random() < 0.95 else 35, 5))))

    def draw(worker):
        """The next sequence of each of the worker's streams: tokens, and their successors."""
        block = (worker + passes[worker]) % n
        streams = text.tokens[text.blocks[block]:text.blocks[block + 1]]
        streams = streams[:len(streams) // asked.batch * asked.batch].reshape(asked.batch, -1).T
        begin = place[worker]
        tokens = torch.from_numpy(streams[begin:begin + length(trainer.rounds) + 1].astype(np.int64))
        place[worker] += len(tokens) - 1
        if place[worker] > len(streams) - 6:                # what is left would be too short
            place[worker], passes[worker] = 0, passes[worker] + 1
        return worker, tokens[:-1], tokens[1:], begin == 0

    def loss(model, batch):
        worker, tokens, following, begins = batch
        scores, raw, h, after = model(tokens, model.zeros(asked.batch) if begins else carried[worker])
        carried[worker] = [tuple(part.detach() for part in own) for own in after]
        value = cross_entropy(scores.flatten(0, 1), following.flatten())
        likelihood.append(float(value.detach()))
        return value + 2 * h.square().mean() + (raw[1:] - raw[:-1]).square().mean()    # AR, and TAR

    while trainer.rounds < asked.rounds:
        model.train()
        likelihood: list[float] = []
        for _ in range(asked.report):
            scale = length(trainer.rounds) / 70
            trainer.method = method.model_copy(update={"eta": method.eta * scale, "gamma": method.gamma * scale})
            trainer.round(loss, draw)
        model.eval()
        tokens, state, surprise = torch.from_numpy(held_out.astype(np.int64))[:, None], model.zeros(1), 0.0
        with torch.no_grad():
            for begin in range(0, len(tokens) - 1, 70):
                following = tokens[begin + 1:begin + 71, 0]
                scores, _, _, state = model(tokens[begin:begin + len(following)], state)
                surprise += float(cross_entropy(scores[:, 0], following, reduction="sum"))
        surprise, count, mine = ranks.total([surprise, len(tokens) - 1, np.mean(likelihood)])
        clipped = trainer.clipped()
        if ranks.rank == 0:
            print(f"round {trainer.rounds}  perplexity {exp(mine / ranks.size):.2f}, held out "
                  f"{exp(surprise / count):.2f}  clipped {clipped:.2f}  sent {ranks.sent / 1e6:.0f} MB", flush=True)


main()
