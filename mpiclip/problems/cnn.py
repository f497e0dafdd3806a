"""A convolutional network for classes of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ..device import accelerated, xp
from ..errors import InputError
from ._images import ImageNetwork, Patches
from ._layers import Full, add_bias
from ._linear_model import blocks, squares

# Numbers of a layer's patches, or of single rows' gradients, that are there at once: on a CPU they stay in the cache.
CHUNK, GPU_CHUNK = 1 << 17, 1 << 28


class CNN(ImageNetwork):
    """LeNet: h_0 is an image, h_l = σ(pool(W_l ∗ h_{l−1} + β_l)) for the convolutions, of which channels says how many
    channels each makes; then hidden… fully connected layers, and the scores. As PyTorch's Conv2d(·, ·, kernel,
    padding=padding), MaxPool2d(pool) and Linear. On images of 28 × 28 the defaults have 431,080 parameters: LeCun,
    Bottou, Bengio, Haffner (1998), "Gradient-based learning applied to document recognition", as the experiments of
    Allouah et al. (2024), arXiv:2405.14432, have it. f_i, the order of x and x⁰ are Network's, and W_l is
    (channels, channels before, kernel, kernel), so that inputs = channels before · kernel²."""

    channels: list[Annotated[int, Field(ge=1)]] = Field(default=[20, 50], min_length=1)
    kernel: int = Field(5, ge=1)                    # an image's part that one output sees: kernel × kernel
    padding: int = Field(0, ge=0)                   # zeros around an image
    pool: int = Field(2, ge=1, le=16)               # of pool × pool numbers the largest is kept; 1: all are
    hidden: list[Annotated[int, Field(ge=1)]] = Field(default=[500])
    activation: Literal["tanh", "relu"] = "relu"

    def layers(self, shard, outputs):
        before, *size = self.image(shard)
        convolutions: list[Convolution] = []
        for k, channels in enumerate(self.channels):
            layer = Convolution(before, (size[0], size[1]), channels, self.kernel, self.padding, self.pool, k == 0,
                                k + 1 == len(self.channels))
            if min(layer.pooled) < 1:
                raise InputError(f"problem.channels: images of {size[0]} × {size[1]} come to convolution {k + 1}, "
                                 f"expected at least {self.kernel + self.pool - 1 - 2 * self.padding} × "
                                 f"{self.kernel + self.pool - 1 - 2 * self.padding} (kernel + pool − 1 − 2 padding)")
            convolutions.append(layer)
            before, size = channels, list(layer.pooled)
        sizes = pairwise([convolutions[-1].numbers, *self.hidden, outputs])
        return *convolutions, *(Full(*pair) for pair in sizes)


@dataclass(frozen=True)
class Convolution(Patches):
    """pool(W ∗ h + β). Rows h are images (height, width, channels), flattened: what a patch holds of one line is then
    one piece of memory. The first layer's, and what the last one makes, have the channels first, as the data and
    PyTorch's `flatten` have them."""

    padding: int
    pool: int
    first: bool
    last: bool

    @property
    def map(self) -> tuple[int, int]:
        """The places of the kernel in an image: (height, width)"""
        return tuple(n + 2 * self.padding - self.kernel + 1 for n in self.size)     # type: ignore[return-value]

    @property
    def pooled(self) -> tuple[int, int]:
        return tuple(n // self.pool for n in self.map)                              # type: ignore[return-value]

    @property
    def numbers(self) -> int:
        """of a row that it makes"""
        return self.outputs * prod(self.pooled)

    def apply(self, h, W, bias, spans, room):
        """(m, numbers) of h (m, before · size). W: (outputs, inputs), bias: (outputs,), or one for each worker."""
        out = room("out", (len(h), self.numbers), bias)
        maps, which = self._maps(out), self._which(out, room)
        W, starts = self._as_patches(W, spans)
        convolve(self._padded(h, room), W, starts, self.kernel, self.pool, maps, which, room)
        add_bias(maps, bias, spans)
        return out

    def slopes(self, δ, W, spans, room):
        """The slopes in h, of those in what `apply` made of it."""
        p, (height, width) = self.padding, self.size
        below = room("slopes", (len(δ), height + 2 * p, width + 2 * p, self.before), δ)
        W, starts = self._as_patches(W, spans)
        slopes_of_images(self._maps(δ), self._which(δ, room), W, starts, self.kernel, self.pool, below, room)
        return below[:, p:p + height, p:p + width].reshape(len(δ), self.before * height * width)

    def sums(self, h, δ, spans, W, bias, add: bool, room) -> None:
        """W_i = Σ_r ∂/∂W, β_i = Σ_r ∂/∂β over the rows r of worker i, or added to what is there."""
        maps, total = self._maps(δ), room("sums", W.shape, δ)
        sums_of_patches(self._padded(h, room), maps, self._which(δ, room), starts_of(spans), self.kernel, self.pool,
                        total, room)
        if not add:
            W[:], bias[:] = 0, 0
        W.reshape(len(W), self.outputs, self.before, -1)[:] += (
            total.reshape(len(W), self.outputs, -1, self.before).swapaxes(2, 3))
        for workers, rows, shape in spans:
            bias[workers] += maps[rows].sum((1, 2)).reshape(*shape, self.outputs).sum(1)

    def squares(self, h, δ, room, lengths=None):
        """‖∂/∂W‖² + ‖∂/∂β‖² (m,) of each row: of the gradients themselves, a few rows' at a time. (The inner products
        of its patches would sometimes be quicker, but slopes that cancel leave fewer digits of them.)"""
        images, maps, which = self._padded(h, room), self._maps(δ), self._which(δ, room)
        total = squares(maps.sum((1, 2)))
        most = at_once(images, self.inputs * self.outputs)
        for begin in range(0, len(h), most):
            rows = slice(begin, min(begin + most, len(h)))
            own = room("own", (rows.stop - begin, self.outputs, self.inputs), δ)
            sums_of_patches(images[rows], maps[rows], which[rows], np.arange(len(own) + 1), self.kernel, self.pool, own,
                            room)
            total[rows] += squares(own.reshape(len(own), self.outputs * self.inputs))
        return total

    # ---- inside

    def _padded(self, h, room):
        """The images (m, height + 2 padding, width + 2 padding, before), a view of h where it can be."""
        m, p, (height, width) = len(h), self.padding, self.size
        images = h.reshape(m, self.before, height, width).transpose(0, 2, 3, 1) if self.first else h.reshape(
            m, height, width, self.before)
        if not p and (not self.first or self.before == 1):
            return images
        padded = room("padded", (m, height + 2 * p, width + 2 * p, self.before), h)
        if p:
            padded[:, :p], padded[:, -p:], padded[:, :, :p], padded[:, :, -p:] = 0, 0, 0, 0
        padded[:, p:p + height, p:p + width] = images
        return padded

    def _maps(self, z):
        """What `apply` makes, or slopes of it, as (m, height, width, channels): a view."""
        height, width = self.pooled
        if self.last:
            return z.reshape(len(z), self.outputs, height, width).transpose(0, 2, 3, 1)
        return z.reshape(len(z), height, width, self.outputs)

    def _which(self, δ, room):
        """What `apply` has left: which of the pooled numbers was the largest."""
        return room("which", (len(δ), *self.pooled, self.outputs), δ, np.uint8)

    def _as_patches(self, W, spans):
        """(W (…, outputs, inputs) with the inputs in the order of a patch: line, column, channel, and always with a
        leading axis; where the rows of each W_i start and end: (w+1,))"""
        starts = starts_of(spans) if W.ndim == 3 else starts_of(spans)[[0, -1]]
        W = W.reshape(-1, self.outputs, self.before, self.kernel**2).swapaxes(2, 3)
        return xp(W).ascontiguousarray(W).reshape(-1, self.outputs, self.inputs), starts


def starts_of(spans) -> np.ndarray:
    """Worker i's rows are starts[i]:starts[i+1], (w+1,) int64."""
    counts = [np.full(w, each) for _, _, (w, each) in spans]
    return np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64)


def at_once(like, numbers: int) -> int:
    """Images that are worked on at once, where each takes so many numbers."""
    return max(1, (CHUNK if xp(like) is np else GPU_CHUNK) // numbers)


# What is done to images (m, height, width, channels); W (w, outputs, kernel · kernel · channels), where worker i's rows
# are starts[i]:starts[i+1]. Maps, which and slopes of maps are (m, height, width, outputs), one number for each window.

@accelerated
def convolve(images, W, starts, kernel: int, pool: int, out, which, room) -> None:
    """The largest number of each window of W ∗ images (out), and which it is, line by line (which): the first of
    several equal ones."""
    W = W.swapaxes(1, 2)
    for workers, rows, shape, places in chunks(images, kernel, W.shape[1] + W.shape[2], starts):
        a = patches(images[rows], kernel, room("patches", (*places, W.shape[1]), images))
        z = room("z", (*places, W.shape[2]), images)
        xp(z).matmul(a.reshape(shape[0], -1, W.shape[1]), W[workers], out=z.reshape(shape[0], -1, W.shape[2]))
        largest(z, pool, out[rows], which[rows])


@accelerated
def slopes_of_images(slopes, which, W, starts, kernel: int, pool: int, out, room) -> None:
    """The slopes in the images (out), of those in what `convolve` made of them."""
    for workers, rows, shape, places in chunks(out, kernel, W.shape[1] + W.shape[2], starts):
        z = spread(slopes[rows], which[rows], pool, room("z", (*places, W.shape[1]), out))
        a = room("patches", (*places, W.shape[2]), out)
        xp(z).matmul(z.reshape(shape[0], -1, W.shape[1]), W[workers], out=a.reshape(shape[0], -1, W.shape[2]))
        fold(a, kernel, out[rows])


@accelerated
def sums_of_patches(images, slopes, which, starts, kernel: int, pool: int, out, room) -> None:
    """The slopes in each worker's W (out), of those in what `convolve` made with it."""
    out[:] = 0
    for workers, rows, shape, places in chunks(images, kernel, out.shape[1] + out.shape[2], starts):
        a = patches(images[rows], kernel, room("patches", (*places, out.shape[2]), images))
        z = spread(slopes[rows], which[rows], pool, room("z", (*places, out.shape[1]), images))
        out[workers] += xp(z).matmul(z.reshape(shape[0], -1, out.shape[1]).swapaxes(1, 2),
                                     a.reshape(shape[0], -1, out.shape[2]))


def chunks(images, kernel: int, numbers: int, starts, stride: int = 1) -> Iterator[tuple]:
    """Rows that are worked on at once, where each place of the kernel takes so many numbers: those of several workers,
    or a part of one's. (the workers, the rows, (workers, rows each), (rows, places down, places across))"""
    size = [(n - kernel) // stride + 1 for n in images.shape[1:3]]
    most = at_once(images, prod(size) * numbers)
    for workers, rows, (w, each) in blocks(starts):
        step = most // each if each else w
        for i in range(0, w, max(1, step)):
            n = min(max(1, step), w - i)
            for k in range(0, each, most):
                m, begin = n * min(most, each - k), int(rows.start) + i * each + k
                yield slice(workers.start + i, workers.start + i + n), slice(begin, begin + m), (n, m // n), (m, *size)


def patches(images, kernel: int, out, stride: int = 1):
    """The kernel × kernel parts of all images, at every stride-th place, each as (line, column, channel) flattened; out
    is filled and returned."""
    windows = xp(images).lib.stride_tricks.sliding_window_view(images, (kernel, kernel), (1, 2))[:, ::stride, ::stride]
    out.reshape(*out.shape[:3], kernel, kernel, -1)[:] = windows.transpose(0, 1, 2, 4, 5, 3)
    return out


def fold(a, kernel: int, out, stride: int = 1):
    """The transpose of `patches`: each patch is added to where it was taken; out is filled and returned."""
    m, height, width, _ = a.shape
    a = a.reshape(m, height, width, kernel, kernel, -1)
    out[:] = 0
    for i in range(kernel):
        for j in range(kernel):
            out[:, i:i + height * stride:stride, j:j + width * stride:stride] += a[:, :, :, i, j]
    return out


def _windows(z, pool: int):
    """The first, second, … number of each pool × pool window, line by line; a rest at the border is in none."""
    height, width = (n // pool * pool for n in z.shape[1:3])
    return [z[:, i:height:pool, j:width:pool] for i in range(pool) for j in range(pool)]


def largest(z, pool: int, out, which) -> None:
    """The largest number of each window, and which it is: the first of several equal ones. Fills out and which."""
    first, *others = _windows(z, pool)
    out[:], which[:] = first, 0
    for k, other in enumerate(others, 1):
        which[other > out] = k
        xp(z).maximum(out, other, out=out)


def spread(values, which, pool: int, out):
    """The transpose of `largest`: each value goes to where the largest number was; out is filled and returned."""
    out[:] = 0
    for k, window in enumerate(_windows(out, pool)):
        window[:] = xp(out).where(which == k, values, 0)
    return out
