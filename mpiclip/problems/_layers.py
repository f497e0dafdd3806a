"""What a perceptron and a convolutional network have in common: layers, each linear and with biases, an activation
between them, and the cross entropy of classes. All of a rank's workers at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from math import inf
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from ..device import host, xp
from ..streams import stream
from . import Problem
from ._linear_model import Rows, blocks, contiguous, is_sparse, matrix, no_data, per_row, shrinkage, squares, sums
from .softmax import classes, cross_entropy

PART = 2048         # rows that go through the layers together: what they leave there stays in the cache


@dataclass(frozen=True)
class Inputs(Rows):
    """The rows of w workers, and where what the layers make of them is written, again in every call."""

    layers: tuple[Any, ...] = ()
    buffers: dict[Any, Any] = field(default_factory=dict)

    def buffer(self, layer: int | None, name: str, shape: tuple[int, ...], like, dtype=None):
        """An array of this shape and, unless a dtype is given, of the kind of `like`, uninitialised; the same memory in
        the next call of this name."""
        flat, n = self.buffers.get((layer, name)), int(np.prod(shape))
        if flat is None or flat.size < n:
            flat = self.buffers[layer, name] = xp(like).empty(n, dtype or like.dtype)
        return flat[:n].reshape(shape)

    @cached_property
    def whole(self):
        """a (m, p), as a matrix of NumPy, CuPy or SciPy."""
        return matrix(self.a, np.array([0, len(self.y)]))


class Network(Problem):
    """f_i(x) = (1/m_i) Σ_r (log Σ_c exp(z_rc) − z_{r, b_r}) + λ r(x), over worker i's m_i rows: h_0 = a_r,
    h_l = σ(layer_l(h_{l−1})), z_r = layer_L(h_{L−1}).

    x = (W_1, β_1, …, W_L, β_L), each W_l (outputs, inputs) by rows, as PyTorch's `parameters_to_vector` has it. The
    biases β are not regularised. x⁰: every number of layer l is drawn from U(−1/√inputs, 1/√inputs), PyTorch's default,
    layer after layer and W before β: a function of the seed alone."""

    activation: Literal["tanh", "relu"] = "tanh"
    classifier = True

    @model_validator(mode="after")
    def _check(self):
        if self.start:
            raise ValueError(f"start: found {self.start:g}, but '{self.name}' draws x⁰ from the seed; leave it out")
        return self

    def layers(self, shard, outputs: int) -> tuple[Any, ...]:
        """The layers from these rows to so many scores. InputError where the rows do not fit."""
        raise NotImplementedError

    def prepare(self, shard, ids, n, seed, dtype):
        if shard is None:
            raise no_data(self)
        y, outputs = classes(shard, self)
        layers = self.layers(shard, outputs)
        return Inputs(contiguous(shard.x, dtype), y.astype(dtype), np.asarray(shard.offsets, np.int64), shard.features,
                      outputs, False, layers)

    def x0(self, data, seed, dtype):
        random = stream(seed, "start")
        return np.concatenate([random.uniform(-1, 1, (layer.inputs + 1) * layer.outputs) / np.sqrt(layer.inputs)
                               for layer in data.layers]).astype(dtype)

    def loss_grad(self, x, data, batch=None, out=None, loss=True, clip=None):
        clip = None if clip == inf else clip
        rows, offsets, denominators = batch or (None, data.bounds, data.denominators)
        offsets, denominators = host(offsets), host(denominators)
        w = len(data.bounds) - 1
        grad = xp(x).empty((w, x.shape[-1]), x.dtype) if out is None else out
        parameters, gradients = list(split(x, data.layers)), list(split(grad, data.layers))
        losses = xp(x).zeros(w) if loss else None
        for workers, begin, ends in pieces(offsets, self.together(data)):
            own = [(of(W, 3, workers), of(bias, 2, workers)) for W, bias in parameters]
            places, spans = slice(begin, begin + int(ends[-1])), spans_of(data.whole, ends)
            h, places = self.picked(data, places if rows is None else xp(x).asarray(rows[places]))
            *h, z = self._forward(own, data, h, spans)
            values, slopes = cross_entropy(z, data.y[places])
            share = per_row(1 / denominators[workers], ends, z)
            slopes *= share
            δ = self._back(own, data, h, slopes, spans)
            if clip is not None:
                lengths = data.lengths[places] if isinstance(data.layers[0], Full) else None
                shrink(data, h, δ, lengths, clip * share[:, 0])
            for k, (W, bias) in enumerate(gradients):
                data.layers[k].sums(h[k], δ[k], spans, W[workers], bias[workers], begin > offsets[workers.start],
                                    partial(data.buffer, k))
            if losses is not None:
                losses[workers] += sums(values, ends)
        if losses is not None:
            losses /= xp(x).asarray(np.where(np.diff(offsets), denominators, 1))
        owners = np.diff(data.bounds) > 0
        for (W, _), (slope, _) in zip(parameters, gradients, strict=True):
            self.regularize(W.reshape(-1, *W.shape[-2:]), slope, losses, owners)
        return losses, grad

    def accuracy(self, x, data) -> tuple[int, int]:
        """(rows whose class has the highest score, rows)"""
        parameters, right = list(split(x, data.layers)), 0
        for _, begin, ends in pieces(np.array([0, len(data.y)]), self.together(data)):
            h, rows = self.picked(data, slice(begin, begin + int(ends[-1])))
            z = self._forward(parameters, data, h, spans_of(data.whole, ends))[-1]
            right += (z.argmax(1) == data.y[rows]).sum()
        return int(host(right)), len(data.y)

    def together(self, data) -> int:
        """Rows that go through the layers together."""
        return PART

    def picked(self, data, places) -> tuple[Any, Any]:
        """(h_0 of a minibatch's rows, the numbers of these rows); places: a slice, or (m,)."""
        return take(data, places), places

    def _forward(self, parameters, data, first, spans) -> list:
        """[what each layer sees, …, z], the former h_0 = first, …, h_{L−1} where layers follow each other"""
        h = [first]
        for k, (layer, (W, bias)) in enumerate(zip(data.layers, parameters, strict=True)):
            z = layer.apply(h[-1], W, bias, spans, partial(data.buffer, k))
            if k + 1 < len(parameters):
                xp(z).tanh(z, out=z) if self.activation == "tanh" else xp(z).maximum(z, 0, out=z)
            h.append(z)
        return h

    def _back(self, parameters, data, h, slopes, spans) -> list:
        """[δ_1, …, δ_L], the losses' slopes in what enters σ, of which `slopes` is the last:
        δ_l = (the slopes in h_l) σ'"""
        δ = [slopes]
        for k in range(len(parameters) - 1, 0, -1):
            below = data.layers[k].slopes(δ[0], parameters[k][0], spans, partial(data.buffer, k))
            if self.activation == "tanh":               # σ' = 1 − σ²
                part = xp(below).multiply(h[k], h[k], out=data.buffer(None, "part", below.shape, below))
                part *= below
                below -= part
            else:
                below *= h[k] > 0
            δ.insert(0, below)
        return δ


@dataclass(frozen=True)
class Full:
    """z_r = W h_r + β, of numbers to numbers."""

    inputs: int
    outputs: int

    def apply(self, h, W, bias, spans, room):
        """z (m, outputs) of h (m, inputs), dense or sparse. W: (outputs, inputs), bias: (outputs,), or one for each
        worker, as `spans_of` has them. room(name, shape, like): a buffer."""
        z = room("z", (h.shape[0], self.outputs), bias)
        times(h, W.swapaxes(-1, -2), spans, z)
        add_bias(z, bias, spans)
        return z

    def slopes(self, δ, W, spans, room):
        """The slopes in h (m, inputs), of those in z."""
        below = room("slopes", (len(δ), self.inputs), δ)
        times(δ, W, spans, below)
        return below

    def sums(self, h, δ, spans, W, bias, add: bool, room) -> None:
        """W_i = Σ_r δ_r h_rᵀ, β_i = Σ_r δ_r over the rows r of worker i, or added to what is there. W: (w, outputs,
        inputs), bias: (w, outputs)."""
        outer_sums(h, δ, spans, W, bias, add)

    def squares(self, h, δ, room, lengths=None):
        """‖δ_r h_rᵀ‖² + ‖δ_r‖² (m,), of each row's own gradient. lengths: ‖h_r‖ (m,), if known."""
        return squares(δ) * ((squares(h) if lengths is None else lengths * lengths) + 1)


def split(x, layers) -> Iterator[tuple[Any, Any]]:
    """Views of x (…, d): (W_l (…, outputs, inputs), β_l (…, outputs)) of each layer."""
    at = 0
    for layer in layers:
        end = at + layer.inputs * layer.outputs
        W = x[..., at:end].reshape(*x.shape[:-1], layer.outputs, layer.inputs)
        yield W, x[..., end:end + layer.outputs]
        at = end + layer.outputs


def of(array, axes: int, workers: slice):
    """These workers' part of an array that has one entry, of axes − 1 axes, for each; or is one for all."""
    return array[workers] if array.ndim == axes else array


def pieces(offsets, most: int) -> Iterator[tuple[slice, int, np.ndarray]]:
    """Rows that go through the layers together, at most so many: those of several workers, or a part of one's. (the
    workers; the first row; where each one's rows end, counted from there and with a 0 before)"""
    i, w = 0, len(offsets) - 1
    while i < w:
        j = min(int(np.searchsorted(offsets, offsets[i] + most, side="right")) - 1, w)
        if j > i:
            yield slice(i, j), int(offsets[i]), offsets[i:j + 1] - offsets[i]
        else:
            j = i + 1
            for begin in range(int(offsets[i]), int(offsets[j]), most):
                yield slice(i, j), begin, np.array([0, min(most, offsets[j] - begin)])
        i = j


def take(data: Inputs, rows):
    """These rows of the features, (m, p)."""
    a = data.whole
    if isinstance(rows, slice) or is_sparse(a) or xp(a) is not np:
        return a[rows]
    out = data.buffer(None, "rows", (len(rows), a.shape[1]), a)
    return np.take(a, rows, 0, out=out, mode="clip")            # "raise" makes a copy


def spans_of(a, offsets) -> list[tuple[slice, slice, tuple[int, int]]]:
    """The workers that one product serves, as `blocks` says it: with sparse rows each is alone."""
    if not is_sparse(a):
        return list(blocks(offsets))
    return [(slice(i, i + 1), slice(begin, end), (1, end - begin)) for i, (begin, end) in
            enumerate(pairwise(offsets.tolist()))]


def times(h, M, spans, out) -> None:
    """out_r = h_r M_i for the rows r of worker i. h: (m, n) dense or sparse; M: (n, k), or (w, n, k); out: (m, k)."""
    n, k = M.shape[-2:]
    if M.ndim == 2:
        if is_sparse(h):
            out[:] = h @ M
        else:
            xp(M).matmul(h, M, out=out)
        return
    for workers, rows, shape in spans:
        if is_sparse(h):
            out[rows] = h[rows] @ M[workers][0]
        else:
            xp(M).matmul(h[rows].reshape(*shape, n), M[workers], out=out[rows].reshape(*shape, k))


def add_bias(z, bias, spans) -> None:
    """z_r += β_i for the rows r of worker i, z (m, …, k). bias: (k,), or (w, k)."""
    if bias.ndim == 1:
        z += bias
        return
    for workers, rows, shape in spans:
        β = bias[workers].reshape(shape[0], *(1,) * (z.ndim - 1), -1)
        z[rows].reshape(*shape, *z.shape[1:])[:] += β


def outer_sums(h, δ, spans, W, bias, add: bool) -> None:
    """W_i = Σ_r δ_r h_rᵀ, β_i = Σ_r δ_r over the rows r of worker i, or added to what is there. W: (w, k, n), bias:
    (w, k)."""
    k, n = W.shape[-2:]
    for workers, rows, shape in spans:
        slopes = δ[rows].reshape(*shape, k)
        if is_sparse(h):
            product = (h[rows].T @ δ[rows]).T
        elif add:
            product = slopes.swapaxes(1, 2) @ h[rows].reshape(*shape, n)
        else:
            product = xp(W).matmul(slopes.swapaxes(1, 2), h[rows].reshape(*shape, n), out=W[workers])
        if add:
            W[workers] += product
            bias[workers] += slopes.sum(1)
        else:
            if is_sparse(h):
                W[workers] = product
            slopes.sum(1, out=bias[workers])


def shrink(data, h, δ, lengths, most) -> None:
    """δ_r *= min(1, most_r / norm_r) in all layers, where norm_r is that of row r's gradient, in all layers together.
    lengths: ‖h_{0,r}‖ (m,), if known; most: (m,)."""
    total = data.layers[0].squares(h[0], δ[0], partial(data.buffer, 0), lengths)
    for k in range(1, len(δ)):
        total = total + data.layers[k].squares(h[k], δ[k], partial(data.buffer, k))
    factors = shrinkage(xp(total).sqrt(total), most)[:, None]
    for slopes in {id(slopes): slopes for slopes in δ}.values():        # two layers may have the same ones
        slopes *= factors
