"""A multilayer perceptron for classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ..device import host, xp
from ..streams import stream
from . import Problem
from ._linear_model import Rows, blocks, contiguous, is_sparse, matrix, no_data, per_row, shrinkage, squares, sums
from .softmax import classes, cross_entropy

PART = 2048         # rows that go through the layers together: what they leave there stays in the cache


@dataclass(frozen=True)
class Inputs(Rows):
    """The rows of w workers, and where what the layers make of them is written, again in every call."""

    sizes: tuple[int, ...] = ()                             # inputs, hidden sizes, classes
    buffers: dict[Any, Any] = field(default_factory=dict)

    def buffer(self, name, m: int, n: int, like):
        """(m, n) numbers of the kind of `like`, uninitialised; the same memory in the next call of this name."""
        flat = self.buffers.get(name)
        if flat is None or flat.size < m * n:
            flat = self.buffers[name] = xp(like).empty(m * n, like.dtype)
        return flat[:m * n].reshape(m, n)

    @cached_property
    def whole(self):
        """a (m, p), as a matrix of NumPy, CuPy or SciPy."""
        return matrix(self.a, np.array([0, len(self.y)]))


class MLP(Problem):
    """f_i(x) = (1/m_i) Σ_r (log Σ_c exp(z_rc) − z_{r, b_r}) + λ r(x), over worker i's m_i rows: softmax regression on
    the last hidden layer. h_0 = a_r, h_l = σ(W_l h_{l−1} + β_l), z_r = W_L h_{L−1} + β_L, of the sizes p, hidden…, C.

    x = (W_1, β_1, …, W_L, β_L), each W_l (outputs, inputs) by rows, as PyTorch's `parameters_to_vector` has it. The
    biases β are not regularised. x⁰: every number of layer l is drawn from U(−1/√inputs, 1/√inputs), PyTorch's default,
    layer after layer and W before β: a function of the seed alone."""

    hidden: list[Annotated[int, Field(ge=1)]] = Field(default=[256], min_length=1)
    activation: Literal["tanh", "relu"] = "tanh"
    classifier = True

    @model_validator(mode="after")
    def _check(self):
        if self.start:
            raise ValueError(f"start: found {self.start:g}, but 'mlp' draws x⁰ from the seed; leave it out")
        return self

    def prepare(self, shard, ids, n, seed, dtype):
        if shard is None:
            raise no_data(self)
        y, outputs = classes(shard, self)
        return Inputs(contiguous(shard.x, dtype), y.astype(dtype), np.asarray(shard.offsets, np.int64), shard.features,
                      outputs, False, (shard.features, *self.hidden, outputs))

    def x0(self, data, seed, dtype):
        random = stream(seed, "start")
        return np.concatenate([random.uniform(-1, 1, (inputs + 1) * outputs) / np.sqrt(inputs)
                               for inputs, outputs in pairwise(data.sizes)]).astype(dtype)

    def loss_grad(self, x, data, batch=None, out=None, loss=True, clip=None):
        clip = None if clip == inf else clip
        rows, offsets, denominators = batch or (None, data.bounds, data.denominators)
        offsets, denominators = host(offsets), host(denominators)
        w = len(data.bounds) - 1
        grad = xp(x).empty((w, x.shape[-1]), x.dtype) if out is None else out
        layers, gradients = list(split(x, data.sizes)), list(split(grad, data.sizes))
        losses = xp(x).zeros(w) if loss else None
        for workers, begin, ends in pieces(offsets):
            own = [(of(W, 3, workers), of(bias, 2, workers)) for W, bias in layers]
            places, spans = slice(begin, begin + int(ends[-1])), spans_of(data.whole, ends)
            places = places if rows is None else xp(x).asarray(rows[places])
            *h, z = self._forward(own, data, places, spans)
            values, slopes = cross_entropy(z, data.y[places])
            share = per_row(1 / denominators[workers], ends, z)
            slopes *= share
            δ = self._back(own, data, h, slopes, spans)
            if clip is not None:
                shrink(h, δ, data.lengths[places], clip * share[:, 0])
            for (W, bias), below, slopes in zip(gradients, h, δ, strict=True):
                outer_sums(below, slopes, spans, W[workers], bias[workers], add=begin > offsets[workers.start])
            if losses is not None:
                losses[workers] += sums(values, ends)
        if losses is not None:
            losses /= xp(x).asarray(np.where(np.diff(offsets), denominators, 1))
        owners = np.diff(data.bounds) > 0
        for (W, _), (slope, _) in zip(layers, gradients, strict=True):
            self.regularize(W.reshape(-1, *W.shape[-2:]), slope, losses, owners)
        return losses, grad

    def accuracy(self, x, data) -> tuple[int, int]:
        """(rows whose class has the highest score, rows)"""
        layers, right = list(split(x, data.sizes)), 0
        for _, begin, ends in pieces(np.array([0, len(data.y)])):
            rows = slice(begin, begin + int(ends[-1]))
            z = self._forward(layers, data, rows, spans_of(data.whole, ends))[-1]
            right += (z.argmax(1) == data.y[rows]).sum()
        return int(host(right)), len(data.y)

    def _forward(self, layers, data, rows, spans) -> list:
        """[h_0, …, h_{L−1}, z] of these rows of the data"""
        h = [take(data, rows)]
        for layer, (W, bias) in enumerate(layers):
            z = data.buffer(("h", layer), h[0].shape[0], W.shape[-2], bias)
            times(h[-1], W.swapaxes(-1, -2), spans, z)
            add_bias(z, bias, spans)
            if layer + 1 < len(layers):
                xp(z).tanh(z, out=z) if self.activation == "tanh" else xp(z).maximum(z, 0, out=z)
            h.append(z)
        return h

    def _back(self, layers, data, h, slopes, spans) -> list:
        """[δ_1, …, δ_L], the losses' slopes in what enters σ, of which `slopes` is the last:
        δ_l = (δ_{l+1} W_{l+1}) σ'(z_l)"""
        δ = [slopes]
        for layer in range(len(layers) - 1, 0, -1):
            below = data.buffer(("δ", layer), *h[layer].shape, slopes)
            times(δ[0], layers[layer][0], spans, below)
            if self.activation == "tanh":               # σ' = 1 − σ²
                part = xp(below).multiply(h[layer], h[layer], out=data.buffer("part", *below.shape, below))
                part *= below
                below -= part
            else:
                below *= h[layer] > 0
            δ.insert(0, below)
        return δ


def split(x, sizes) -> Iterator[tuple[Any, Any]]:
    """Views of x (…, d): (W_l (…, outputs, inputs), β_l (…, outputs)) of each layer."""
    at = 0
    for inputs, outputs in pairwise(sizes):
        end = at + inputs * outputs
        yield x[..., at:end].reshape(*x.shape[:-1], outputs, inputs), x[..., end:end + outputs]
        at = end + outputs


def of(array, axes: int, workers: slice):
    """These workers' part of an array that has one entry, of axes − 1 axes, for each; or is one for all."""
    return array[workers] if array.ndim == axes else array


def pieces(offsets) -> Iterator[tuple[slice, int, np.ndarray]]:
    """Rows that go through the layers together, at most PART: those of several workers, or a part of one's. (the
    workers; the first row; where each one's rows end, counted from there and with a 0 before)"""
    i, w = 0, len(offsets) - 1
    while i < w:
        j = min(int(np.searchsorted(offsets, offsets[i] + PART, side="right")) - 1, w)
        if j > i:
            yield slice(i, j), int(offsets[i]), offsets[i:j + 1] - offsets[i]
        else:
            j = i + 1
            for begin in range(int(offsets[i]), int(offsets[j]), PART):
                yield slice(i, j), begin, np.array([0, min(PART, offsets[j] - begin)])
        i = j


def take(data: Inputs, rows):
    """These rows of the features, (m, p)."""
    a = data.whole
    if isinstance(rows, slice) or is_sparse(a) or xp(a) is not np:
        return a[rows]
    return np.take(a, rows, 0, out=data.buffer("rows", len(rows), a.shape[1], a), mode="clip")   # "raise" makes a copy


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
    """z_r += β_i for the rows r of worker i. bias: (k,), or (w, k)."""
    if bias.ndim == 1:
        z += bias
        return
    for workers, rows, shape in spans:
        z[rows].reshape(*shape, z.shape[1])[:] += bias[workers][:, None]


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


def shrink(h, δ, lengths, most) -> None:
    """δ_r *= min(1, most_r / norm_r) in all layers, where norm_r² = Σ_l ‖δ_{l,r}‖² (‖h_{l−1,r}‖² + 1) is that of row
    r's gradient: of the matrices δ_l h_{l−1}ᵀ and the vectors δ_l. lengths: ‖h_{0,r}‖ (m,); most: (m,)."""
    total = squares(δ[0]) * (lengths * lengths + 1)
    for below, slopes in zip(h[1:], δ[1:], strict=True):
        total += squares(slopes) * (squares(below) + 1)
    factors = shrinkage(xp(total).sqrt(total), most)[:, None]
    for slopes in δ:
        slopes *= factors
