"""A language model: LSTM layers that read a text and say how likely each next word or character is."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from ..cells import add_rows, cross_entropies, lstm_backward, lstm_forward
from ..device import host, xp
from ..errors import InputError
from ..streams import stream
from . import Problem
from ._linear_model import no_data

WINDOWS = 128               # that go through the layers together …
SCORES = 1 << 24            # … and numbers of scores, but for one window at least

Share = Annotated[float, Field(ge=0, lt=1)]


class LSTM(Problem):
    """f_i(x) = the mean of −log p(token | the tokens before it) over worker i's text, + λ r(x).

    e_t = E[token_t];  h^1, …, h^L: LSTM layers, cells.lstm_forward with z_t = W_ih h^{l−1}_t + b_ih + b_hh, h^0 = e;
    the scores of the next token are D h^L_t + b.

    x = (E (V, embedding), then W_ih (4 n, inputs), W_hh (4 n, n), b_ih, b_hh of each layer, D (V, n), b (V,)), each by
    rows: PyTorch's Embedding, LSTM and Linear, as `parameters_to_vector` has them, gates in the order i, f, g, o. tied:
    D is E, is not there, and the last layer has n = embedding units. The biases are not regularised. x⁰: E and D from
    U(−0.1, 0.1), b = 0, a layer's numbers from U(−1/√n, 1/√n).

    Minibatches (back-propagation through time that is truncated): run.batch = b cuts a worker's stream of m tokens
    into b of ⌊m/b⌋ and reads `sequence` tokens of each at a time, in order. What the layers hold, h and c, is carried
    to the next ones; no gradient flows back into it. A pass ends before the first minibatch that would not be whole,
    and the next one begins with zeros. Evaluations take windows of `sequence` tokens, each from zeros and none dropped.

    Dropout as in AWD-LSTM (Merity, Keskar, Socher 2017, arXiv:1708.02182), of a minibatch of a worker; what is left is
    divided by 1 − p. `dropout`, of the last layer's outputs, `dropout_hidden`, of those between layers, and
    `dropout_input`, of embeddings, drop units of each stream, the same ones in all steps (Gal, Ghahramani 2016,
    arXiv:1512.05287); `dropout_embedding` drops whole rows of E, as inputs; `weight_drop` elements of W_hh."""

    language = True

    layers: int = Field(1, ge=1, le=3)
    hidden: int = Field(256, ge=1)
    embedding: Annotated[int, Field(ge=1)] | None = None        # None: hidden
    tied: bool = True
    sequence: int = Field(35, ge=1)
    dropout: Share = 0.0
    dropout_hidden: Share = 0.0
    dropout_input: Share = 0.0
    dropout_embedding: Share = 0.0
    weight_drop: Share = 0.0

    @model_validator(mode="after")
    def _check(self):
        if self.start:
            raise ValueError(f"start: found {self.start:g}, but 'lstm' draws x⁰ from the seed; leave it out")
        if self.tied and self.layers == 1 and self.embedding not in (None, self.hidden):
            raise ValueError(f"embedding: found {self.embedding}, but one layer that is tied has as many units: "
                             f"expected hidden = {self.hidden}, or tied = false")
        return self

    @property
    def sizes(self) -> list[int]:
        """(embedding, units of each layer)"""
        embedding = self.embedding or self.hidden
        return [embedding, *[self.hidden] * (self.layers - 1), embedding if self.tied else self.hidden]

    def prepare(self, shard, ids, n, seed, dtype):
        if shard is None:
            raise no_data(self)
        V, offsets = len(shard.vocabulary), np.asarray(shard.offsets)
        if len(shard.tokens) and not 0 <= shard.tokens.min() <= shard.tokens.max() < V:
            raise InputError(f"data.file: found tokens from {shard.tokens.min()} to {shard.tokens.max()}; expected 0 "
                             f"to {V - 1}, the vocabulary's numbers")
        blocks = None if shard.blocks is None else tuple(map(int, shard.blocks))
        windows = np.maximum(np.diff(offsets) - 1, 0) // self.sequence
        return Streams(shard.tokens.astype(np.int64), tuple(map(int, offsets)), tuple(map(int, shard.ids)), blocks,
                       tuple(map(int, np.cumsum([0, *windows]))), V, self._shapes(V))

    def _shapes(self, V: int) -> tuple[tuple[int, ...], ...]:
        """of the parts of x, in order"""
        layers = [((4 * n, inputs), (4 * n, n), (4 * n,), (4 * n,)) for inputs, n in pairwise(self.sizes)]
        decoder = [] if self.tied else [(V, self.sizes[-1])]
        return (V, self.sizes[0]), *(shape for layer in layers for shape in layer), *decoder, (V,)

    def x0(self, data, seed, dtype):
        random, units = stream(seed, "start"), np.repeat(self.sizes[1:], 4)
        bounds = [0.1, *1 / np.sqrt(units), *([] if self.tied else [0.1]), 0.0]
        return np.concatenate([bound * random.uniform(-1, 1, int(np.prod(shape)))
                               for bound, shape in zip(bounds, data.shapes, strict=True)]).astype(dtype)

    # ---- minibatches

    def carried(self, data, batch):
        if batch is None:
            raise InputError("run.batch: found 'full', but 'lstm' reads its text in order; expected a number, of the "
                             "streams that each worker reads side by side")
        for worker, length in zip(data.ids, np.diff(data.offsets).tolist(), strict=True):
            if 0 < length // batch <= self.sequence or 0 < length < batch:
                raise InputError(f"problem.sequence = {self.sequence}: worker {worker} has {length} tokens, in "
                                 f"run.batch = {batch} streams {length // batch} each; expected more than sequence")
        return batch, 2 * sum(self.sizes[1:])

    def follow(self, data, batch, ids, taken_i, carried_i, seed):
        workers, begins, fresh, masks = [], [], [], []
        for i, (worker, taken) in enumerate(zip(ids.tolist(), np.asarray(taken_i, np.int64).tolist(), strict=True)):
            length = (data.offsets[i + 1] - data.offsets[i]) // batch
            if taken < 0 or not length:
                continue
            e, part = divmod(taken, (length - 1) // self.sequence)
            workers.append(i)
            fresh.append(part == 0)
            begins.append(data.begin(i, e) + part * self.sequence + length * np.arange(batch))
            masks.append(self._masks(data, batch, stream(seed, "dropout", worker, taken), carried_i.dtype))
        put = xp(carried_i).asarray
        places = np.array(begins, np.int64).reshape(-1, 1, batch) + np.arange(self.sequence + 1)[:, None]
        return Minibatch(np.array(workers, np.int64), data.tokens[put(places)], np.array(fresh, bool), carried_i,
                         {name: put(np.stack([own[name] for own in masks])) for name in (masks or [{}])[0]})

    def _masks(self, data, batch: int, random, dtype) -> dict[Any, np.ndarray]:
        """What a worker's numbers are multiplied by in a minibatch, by name; what is not there is not dropped."""
        sizes, last = self.sizes, self.layers - 1
        wanted: list[tuple[Any, float, tuple[int, ...]]] = [
            ("embedding", self.dropout_embedding, (data.V,)),
            ("input", self.dropout_input, (batch, sizes[0]))]
        for k, n in enumerate(sizes[1:]):
            wanted += [(("weights", k), self.weight_drop, (4 * n, n)),
                       (("output", k), self.dropout if k == last else self.dropout_hidden, (batch, n))]
        return {name: ((random.random(shape, np.float32) >= p) / (1 - p)).astype(dtype)
                for name, p, shape in wanted if p}

    # ---- f_i

    def loss_grad(self, x, data, batch=None, out=None, loss=True, clip=None):
        if clip is not None and clip < np.inf:
            raise InputError("privacy: 'lstm' has no rows whose gradients could be clipped one by one; expected a "
                             "problem that has, or messages that are private", agreed=True)
        w = len(data.offsets) - 1
        grad = xp(x).empty((w, x.shape[-1]), x.dtype) if out is None else out
        losses, owners = np.zeros(w), np.diff(data.offsets) > 0
        if isinstance(batch, Minibatch):
            self._minibatch(x, data, batch, grad, losses)
            owners = np.isin(np.arange(w), batch.workers)
        else:
            self._windows(x, data, batch or (None, data.bounds, data.denominators), grad, losses)
        found = xp(x).asarray(losses) if loss else None
        for W, slope in zip(split(x, data), split(grad, data), strict=True):
            if W.ndim == 3:
                self.regularize(W, slope, found, owners)
        return found, grad

    def perplexity(self, x, data) -> tuple[float, int]:
        """(Σ −log p(token), tokens) of all streams but each one's first token, read side by side from zeros"""
        b, total = len(data.offsets) - 1, 0.0
        length = data.offsets[1] - data.offsets[0] if b else 0
        state = xp(x).zeros((1, b, 2 * sum(self.sizes[1:])), x.dtype)
        for begin in range(0, (length - 1) * (b > 0), self.sequence):
            end = min(begin + self.sequence, length - 1)
            places = np.array(data.offsets[:-1]) + np.arange(begin, end + 1)[:, None]
            total += self._through(x, data, data.tokens[xp(x).asarray(places)][None], state, {}, 1.0, None)[0]
        return total, b * max(length - 1, 0)

    def _minibatch(self, x, data, batch, grad, losses) -> None:
        """Fills grad and losses, and what the workers carry on; zeros for those with an empty minibatch."""
        if not len(batch.workers):
            grad[:] = 0
            return
        some = len(batch.workers) < len(grad)
        which = batch.workers if some else slice(None)
        state = batch.carried_i[which].copy() if not some else batch.carried_i[which]
        state[xp(x).asarray(batch.fresh)] = 0
        own = xp(x).empty((len(batch.workers), grad.shape[1]), grad.dtype) if some else grad
        _, T, b = batch.tokens.shape
        share = 1 / ((T - 1) * b)
        losses[which] = share * self._through(x if x.ndim == 1 else x[which], data, batch.tokens, state, batch.masks,
                                              share, own)
        batch.carried_i[which] = state
        if some:
            grad[:] = 0
            grad[which] = own

    def _windows(self, x, data, batch, grad, losses) -> None:
        """Fills grad and losses, from windows."""
        rows, offsets, denominators = batch
        bounds, T = data.bounds, self.sequence
        most = max(1, min(WINDOWS, SCORES // (T * data.V)))
        for i in range(len(grad)):
            own = np.arange(offsets[i], offsets[i + 1]) if rows is None else host(rows)[offsets[i]:offsets[i + 1]]
            share, g = 1 / (T * float(denominators[i])), grad[i:i + 1]
            g[:] = 0
            for k in range(0, len(own), most):
                first = data.offsets[i] + (own[k:k + most] - bounds[i]) * T
                tokens = data.tokens[xp(x).asarray(first + np.arange(T + 1)[:, None])][None]
                state = xp(x).zeros((1, len(first), 2 * sum(self.sizes[1:])), x.dtype)
                part = g if k == 0 else xp(x).empty_like(g)
                losses[i] += share * self._through(x if x.ndim == 1 else x[i:i + 1], data, tokens, state, {}, share,
                                                   part)[0]
                if k:
                    g += part

    # ---- through the layers, and back. Arrays (w, T, b, …), of b streams each of w workers.

    def _through(self, x, data, tokens, state, masks, share: float, grad) -> np.ndarray:
        """Σ −log p (w,) float64 of all tokens (w, T + 1, b) but the first ones; state (w, b, ·), what the layers hold,
        is replaced by what they hold after. grad (w, d): filled with `share` times the gradient, or None."""
        E, *layers, b = split(x, data)
        D = E if self.tied else layers.pop()
        W = [layers[k:k + 4] for k in range(0, len(layers), 4)]
        words = [self._words(E[i if len(E) > 1 else 0], i, own, masks) for i, own in enumerate(tokens[:, :-1])]
        z = self._room("z", 0, tokens, data, E)
        for i, (_, table, places, _) in enumerate(words):
            W_ih, _, b_ih, b_hh = (part[i if len(part) > 1 else 0] for part in W[0])
            inputs = table @ W_ih.T
            inputs += b_ih + b_hh
            flat(z)[i] = inputs if places is None else inputs[places]
        kept = [self._layer(0, z, W[0][1], data, state, masks)]
        for k in range(1, self.layers):
            W_ih, W_hh, b_ih, b_hh = W[k]
            z = self._room("z", k, tokens, data, E)
            xp(z).matmul(flat(kept[-1][-1]), W_ih.swapaxes(1, 2), out=flat(z))
            z += (b_ih + b_hh)[:, None, None]
            kept.append(self._layer(k, z, W_hh, data, state, masks))
        h, targets = kept[-1][-1], tokens[:, 1:]
        if grad is None:
            return self._decode(h, targets, D, b, data, share, None)

        dE, *layers, db = split(grad, data)
        dD = dE if self.tied else layers.pop()
        dW = [layers[k:k + 4] for k in range(0, len(layers), 4)]
        slopes = self._room("slopes", self.layers - 1, tokens, data, E)
        total = self._decode(h, targets, D, b, data, share, (slopes, dD, db))
        for k in reversed(range(self.layers)):
            a = self._layer_back(k, slopes, kept[k], dW[k][1], masks)
            if k:
                dW_ih, _, db_ih, db_hh = dW[k]
                xp(a).matmul(a.swapaxes(1, 2), flat(kept[k - 1][-1]), out=dW_ih)
                db_ih[:] = db_hh[:] = a.sum(1)
                slopes = self._room("slopes", k - 1, tokens, data, E)
                xp(a).matmul(a, W[k][0], out=flat(slopes))
        if not self.tied:
            dE[:] = 0
        for i, (own, table, places, factor) in enumerate(words):
            sums = a[i]
            if places is not None:                      # the slopes of a word that comes several times
                sums = xp(a).zeros((len(own), a.shape[2]), a.dtype)
                add_rows(sums, places, a[i])
            dW_ih, _, db_ih, db_hh = (part[i] for part in dW[0])
            xp(a).matmul(sums.T, table, out=dW_ih)
            db_ih[:] = db_hh[:] = sums.sum(0)
            below = sums @ W[0][0][i if len(E) > 1 else 0]
            if factor is not None:
                below *= factor
            add_rows(dE[i], own, below)
        return total

    def _words(self, E, i: int, tokens, masks) -> tuple[Any, ...]:
        """(words (m,), their rows of E after dropout (m, embedding), where each token's row is, the factors that drop
        some) of worker i's tokens (T, b). A word that comes several times has one row: its part of a is computed once.
        Where few do, or units of each stream are dropped, each token has its own row, and the places are None."""
        words, places, factor = tokens.reshape(-1), None, None
        if "input" not in masks:
            found, where = xp(tokens).unique(words, return_inverse=True)
            if len(found) < 0.8 * len(words):
                words, places = found, where
        if "embedding" in masks:
            factor = masks["embedding"][i][words][:, None]
        if "input" in masks:
            own = xp(tokens).tile(masks["input"][i], (len(tokens), 1))
            factor = own if factor is None else own * factor
        table = E[words]
        return words, table if factor is None else table * factor, places, factor

    def _room(self, name: str, k: int, tokens, data, like):
        """Room for layer k's z (w, T, b, 4 n), or for slopes in what it makes (w, T, b, n)"""
        (w, more, b), n = tokens.shape, self.sizes[k + 1]
        return data.buffer((name, k), (w, more - 1, b, 4 * n if name == "z" else n), like)

    def _layer(self, k: int, z, W, data, state, masks) -> tuple[Any, ...]:
        """(z, W_hh as used, c, h, outputs) of layer k, where z is the inputs' part of a; state is replaced by what the
        layer holds after."""
        (w, T, b, width), at = z.shape, 2 * sum(self.sizes[1:k + 1])
        n = width // 4
        h, c = (data.buffer((name, k), (w, T + 1, b, n), z) for name in ("h", "c"))
        held = state[..., at:at + n], state[..., at + n:at + 2 * n]
        h[:, 0], c[:, 0] = held
        if ("weights", k) in masks:
            W = W * masks["weights", k]
        lstm_forward(z, W, h, c)
        held[0][:], held[1][:] = h[:, T], c[:, T]
        outputs = h[:, 1:]
        if ("output", k) in masks:
            outputs = outputs * masks["output", k][:, None]
        return z, W, c, h, outputs

    def _layer_back(self, k: int, slopes, kept, dW, masks):
        """The slopes in a (w, T b, 4 n), of those in the outputs of layer k; fills the gradient of W_hh."""
        z, W, c, h, _ = kept
        if ("output", k) in masks:
            slopes *= masks["output", k][:, None]
        lstm_backward(z, W, c, slopes)
        a = flat(z)
        xp(a).matmul(a.swapaxes(1, 2), flat(h[:, :-1]), out=dW)
        if ("weights", k) in masks:
            dW *= masks["weights", k]
        return a

    def _decode(self, h, targets, D, bias, data, share: float, results) -> np.ndarray:
        """Σ −log p (w,) float64 of targets (w, T, b). results: (slopes in h, in D, in the bias), filled, or None."""
        w, V = len(h), bias.shape[-1]
        h, y, total = flat(h), targets.reshape(w, -1), np.zeros(w)
        m = y.shape[1]
        most = max(1, min(m, SCORES // V))
        for i in range(w):
            own = i if len(D) > 1 else 0
            values = xp(h).empty(m)
            for first in range(0, m, most):
                rows = slice(first, min(first + most, m))
                scores = data.buffer("scores", (rows.stop - first, V), h)
                xp(h).matmul(h[i, rows], D[own].T, out=scores)
                cross_entropies(scores, bias[own], y[i, rows], share, values[rows])
                if results is None:
                    continue
                slopes, dD, db = flat(results[0])[i], results[1][i], results[2][i]
                xp(h).matmul(scores, D[own], out=slopes[rows])
                if first:
                    dD += scores.T @ h[i, rows]
                    db += scores.sum(0)
                else:
                    xp(h).matmul(scores.T, h[i, rows], out=dD)
                    db[:] = scores.sum(0)
            total[i] = float(values.sum())
        return total


@dataclass(frozen=True)
class Streams:
    """The streams of w workers."""

    tokens: Any                             # (m,) int64
    offsets: tuple[int, ...]                # worker i's stream, in its first pass, is tokens[offsets[i]:offsets[i+1]]
    ids: tuple[int, ...]                    # the workers' numbers
    blocks: tuple[int, ...] | None          # in pass e worker i reads tokens[blocks[k]:blocks[k+1]], k = (i + e) mod n
    windows: tuple[int, ...]                # worker i's windows have the numbers windows[i] … windows[i+1] − 1
    V: int                                  # words or characters of the vocabulary
    shapes: tuple[tuple[int, ...], ...]     # of the parts of x
    buffers: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def bounds(self) -> np.ndarray:
        """windows (w+1,) int64, on the host"""
        return np.array(self.windows, np.int64)

    @cached_property
    def denominators(self) -> np.ndarray:
        """(w,) float64: each worker's number of windows, or 1."""
        return np.maximum(np.diff(self.bounds), 1).astype(np.float64)

    def begin(self, i: int, e: int) -> int:
        """Where the i-th worker here begins to read in its pass e."""
        if self.blocks is None:
            return self.offsets[i]
        return self.blocks[(self.ids[i] + e) % (len(self.blocks) - 1)]

    def buffer(self, name, shape: tuple[int, ...], like):
        """An array of this shape and of the kind of `like`, uninitialised; the same memory in the next call of this
        name."""
        kept, n = self.buffers.get(name), int(np.prod(shape))
        if kept is None or kept.size < n:
            kept = self.buffers[name] = xp(like).empty(n, like.dtype)
        return kept[:n].reshape(shape)


@dataclass(frozen=True)
class Minibatch:
    """`sequence` + 1 tokens of b streams of each of g workers."""

    workers: np.ndarray         # (g,) int64: which of this rank's workers
    tokens: Any                 # (g, sequence + 1, b) int64
    fresh: np.ndarray           # (g,) bool: a pass begins, from zeros
    carried_i: Any              # (w, b, ·): what is carried, replaced
    masks: dict[Any, Any]       # name → (g, …)


def flat(a):
    """(w, T, b, n) as (w, T b, n): a view, for the steps follow each other in memory."""
    return a.reshape(len(a), -1, a.shape[-1])


def split(x, data: Streams) -> list:
    """Views of the parts of x, (d,) or (w, d), each with a leading axis of 1 or w."""
    sizes = [int(np.prod(shape)) for shape in data.shapes]
    if x.shape[-1] != sum(sizes):
        raise InputError(f"x has {x.shape[-1]} numbers; for a vocabulary of {data.V} this model expected {sum(sizes)}")
    ends = np.cumsum(sizes).tolist()
    return [x[..., end - size:end].reshape(-1, *shape)
            for size, end, shape in zip(sizes, ends, data.shapes, strict=True)]
