"""A residual network for classes of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ..device import accelerated, xp
from ..errors import InputError
from ..streams import stream
from ._images import ImageNetwork, Patches
from ._layers import PART, Full
from ._linear_model import squares
from .cnn import at_once, chunks, fold, patches, starts_of

# Numbers of the first maps of the rows that go through the layers together: enough that W is not packed too often.
TOGETHER, GPU_TOGETHER = 1 << 20, 1 << 26


class ResNet(ImageNetwork):
    """He, Zhang, Ren, Sun (2016), "Deep residual learning for image recognition", arXiv:1512.03385, without batch
    normalisation, which would make a row's loss depend on the other rows, and has statistics that are not part of x.
    With σ(z) = max(z, 0), a convolution makes channels[0] of the image, h = σ(W ∗ a + β), and for each of the channels
    follow so many blocks:

        h ← σ(W'' ∗ σ(W' ∗ h + β') + β'' + S h)

    W, W', W'' are PyTorch's Conv2d(·, ·, 3, padding=1). S h = h; but in the first block of the second, third … of the
    channels W' has the stride 2, and S is a Conv2d(·, ·, 1, stride=2). At last each channel's mean goes into a Linear.
    x has, block after block, W', β', W'', β'', and S with its biases, each in the order of Network.

    x⁰ is that of Fixup, without its scalars: Zhang, Dauphin, Ma (2019), "Fixup initialization: residual learning
    without normalization", arXiv:1901.09321. W'', the last layer and all biases are 0; W' is drawn from
    U(±√(6/inputs)) / √L, of L blocks in all, and the others from U(±√(6/inputs)) (He et al. 2015, arXiv:1502.01852). So
    blocks begin as S alone, and gradients do not grow with their number."""

    channels: list[Annotated[int, Field(ge=1)]] = Field(default=[16, 32, 64], min_length=1)
    blocks: int = Field(1, ge=1)            # for each of the channels
    activation: Literal["relu"] = "relu"

    def layers(self, shard, outputs):
        before, *size = self.image(shard)
        found = [Filters(before, (size[0], size[1]), self.channels[0], 3, 1, 1.0)]
        for k, channels in enumerate(self.channels):
            for block in range(self.blocks):
                before, (height, width) = found[-1].outputs, found[-1].map
                stride = 2 if k and not block else 1
                if min(height, width) < stride:
                    raise InputError(f"problem.channels: images of {size[0]} × {size[1]} come to the {k + 1}. channels "
                                     f"as {height} × {width}, expected at least 2 × 2, of which a stride leaves a half")
                inner = Filters(before, (height, width), channels, 3, stride,
                                (len(self.channels) * self.blocks)**-0.5)
                outer = Filters(channels, inner.map, channels, 3, 1, 0.0)
                direct = [Filters(before, (height, width), channels, 1, stride, 1.0)] if stride == 2 else []
                found += [inner, outer, *direct]
        return *found, Means(found[-1].outputs, outputs, prod(found[-1].map))

    def x0(self, data, seed, dtype):
        random, found = stream(seed, "start"), []
        for layer in data.layers:
            W = random.uniform(-1, 1, layer.inputs * layer.outputs) * layer.start * np.sqrt(6 / layer.inputs)
            found += [W, np.zeros(layer.outputs)]
        return np.concatenate(found).astype(dtype)

    def together(self, data):
        numbers = TOGETHER if xp(data.y) is np else GPU_TOGETHER
        return min(PART, max(1, numbers // data.layers[0].numbers))

    @property
    def _blocks(self) -> Iterator[tuple[int, bool]]:
        """(the number of W' among the layers, whether S is a layer)"""
        at = 1
        for k in range(len(self.channels)):
            for block in range(self.blocks):
                direct = k > 0 and not block
                yield at, direct
                at += 2 + direct

    def _forward(self, parameters, data, first, spans):
        def layer(k, h, *more):
            return data.layers[k].apply(h, *parameters[k], spans, partial(data.buffer, k), *more)

        channels, *size = data.layers[0].image
        if channels > 1:
            images = data.buffer(0, "images", (len(first), *size, channels), first)
            images[:] = first.reshape(-1, channels, *size).transpose(0, 2, 3, 1)
            first = images.reshape(first.shape)
        seen, h = [first], layer(0, first, None, True)
        for k, direct in self._blocks:
            inner = layer(k, h, None, True)
            seen += [h, inner, *[h] * direct]
            h = layer(k + 1, inner, layer(k + 2, h) if direct else h, True)
        return [*seen, h, layer(len(seen), h)]

    def _back(self, parameters, data, h, slopes, spans):
        def below(k, δ, *more):
            return data.layers[k].slopes(δ, parameters[k][0], spans, partial(data.buffer, k), *more)

        δ, total = [slopes], below(len(h) - 1, slopes)
        total *= h[-1] > 0
        for k, direct in reversed(list(self._blocks)):
            inner = below(k + 1, total, None, h[k + 1])
            δ = [inner, total, *[total] * direct, *δ]
            total = below(k, inner, below(k + 2, total) if direct else total, h[k])
        return [total, *δ]


@dataclass(frozen=True)
class Filters(Patches):
    """W ∗ h + β at every stride-th place, with zeros around h so that a stride of 1 keeps its size. Rows h are images
    (height, width, channels), flattened."""

    stride: int
    start: float                    # how large x⁰ is

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def map(self) -> tuple[int, int]:
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self.size)
        return height, width

    @property
    def numbers(self) -> int:
        """of a row that it makes"""
        return self.outputs * prod(self.map)

    def apply(self, h, W, bias, spans, room, add=None, positive=False):
        """(m, numbers) of h (m, before · size), plus `add` (m, numbers), and of that what is positive. W: (outputs,
        inputs), bias: (outputs,), or one for each worker."""
        out = room("out", (len(h), self.numbers), bias)
        starts, W = self._each(W, spans)
        bias = xp(bias).ascontiguousarray(bias).reshape(-1, self.outputs)
        convolve_all(self._images(h), W, bias, starts, self.kernel, self.stride, self.padding,
                     None if add is None else self._maps(add), positive, self._maps(out), room)
        return out

    def slopes(self, δ, W, spans, room, add=None, h=None):
        """The slopes in h, of those in what `apply` made of it; plus `add`, and where h is given only where it is
        positive."""
        below = room("slopes", (len(δ), self.before * prod(self.size)), δ)
        starts, W = self._each(W, spans)
        slopes_of_all(self._maps(δ), W, starts, self.kernel, self.stride, self.padding,
                      *(None if v is None else self._images(v) for v in (add, h)), self._images(below), room)
        return below

    def sums(self, h, δ, spans, W, bias, add: bool, room) -> None:
        """W_i = Σ_r ∂/∂W, β_i = Σ_r ∂/∂β over the rows r of worker i, or added to what is there."""
        total, biases = room("sums", W.shape, δ), room("biases", bias.shape, δ)
        sums_of_all(self._images(h), self._maps(δ), starts_of(spans), self.kernel, self.stride, self.padding, total,
                    biases, room)
        if add:
            W += total
            bias += biases
        else:
            W[:], bias[:] = total, biases

    def squares(self, h, δ, room, lengths=None):
        """‖∂/∂W‖² + ‖∂/∂β‖² (m,) of each row: of the gradients themselves, a few rows' at a time."""
        images, maps, total = self._images(h), self._maps(δ), xp(δ).empty(len(δ), δ.dtype)
        most = at_once(images, self.inputs * self.outputs)
        for begin in range(0, len(h), most):
            rows = slice(begin, min(begin + most, len(h)))
            n = rows.stop - begin
            own, biases = room("own", (n, self.outputs, self.inputs), δ), room("biases", (n, self.outputs), δ)
            sums_of_all(images[rows], maps[rows], np.arange(n + 1), self.kernel, self.stride, self.padding, own, biases,
                        room)
            total[rows] = squares(own.reshape(n, self.outputs * self.inputs)) + squares(biases)
        return total

    def _images(self, h):
        return h.reshape(len(h), *self.size, self.before)

    def _maps(self, z):
        return z.reshape(len(z), *self.map, self.outputs)

    def _each(self, W, spans):
        """(where the rows of each W_i start and end (w+1,), W (w, outputs, inputs)); one for all: w = 1"""
        starts = starts_of(spans) if W.ndim == 3 else starts_of(spans)[[0, -1]]
        return starts, xp(W).ascontiguousarray(W).reshape(-1, self.outputs, self.inputs)


@dataclass(frozen=True)
class Means(Full):
    """W h̄ + β, where h̄ is the mean of h (m, places · inputs) over its places."""

    places: int
    start = 0.0

    def apply(self, h, W, bias, spans, room):
        return super().apply(self._mean(h, room), W, bias, spans, room)

    def slopes(self, δ, W, spans, room):
        each = super().slopes(δ, W, spans, room)
        each /= self.places
        below = room("below", (len(δ), self.places, self.inputs), δ)
        below[:] = each[:, None]
        return below.reshape(len(δ), self.places * self.inputs)

    def sums(self, h, δ, spans, W, bias, add, room):
        super().sums(self._mean(h, room), δ, spans, W, bias, add, room)

    def squares(self, h, δ, room, lengths=None):
        return super().squares(self._mean(h, room), δ, room)

    def _mean(self, h, room):
        return h.reshape(len(h), self.places, self.inputs).mean(1, out=room("means", (len(h), self.inputs), h))


# What is done to images (m, height, width, channels) in a frame of `padding` zeros; W (w, outputs, channels · kernel²),
# as PyTorch has it, where worker i's rows are starts[i]:starts[i+1]. Maps are (m, height, width, outputs), one number
# for every stride-th place of the kernel.

@accelerated
def convolve_all(images, W, bias, starts, kernel: int, stride: int, padding: int, add, positive: bool, out,
                 room) -> None:
    """W ∗ images + bias + add (out), or only what is positive of it. bias: (w, outputs); add: like out, or None."""
    images, W = framed(images, padding, room), by_place(W, kernel).swapaxes(1, 2)
    for workers, rows, (w, _), places in chunks(images, kernel, W.shape[1] + W.shape[2], starts, stride):
        a = patches(images[rows], kernel, room("patches", (*places, W.shape[1]), images), stride)
        z = out[rows].reshape(w, -1, W.shape[2])
        xp(z).matmul(a.reshape(w, -1, W.shape[1]), W[workers], out=z)
        z += bias[workers, None]
    if add is not None:
        out += add
    if positive:
        xp(out).maximum(out, 0, out=out)


@accelerated
def slopes_of_all(slopes, W, starts, kernel: int, stride: int, padding: int, add, h, out, room) -> None:
    """The slopes in the images (out), of those in what `convolve_all` made of them; plus add, and 0 where h ≤ 0. add
    and h: like out, or None."""
    m, height, width, before = out.shape
    below, W = room("framed", (m, height + 2 * padding, width + 2 * padding, before), out), by_place(W, kernel)
    for workers, rows, (w, _), places in chunks(below, kernel, W.shape[1] + W.shape[2], starts, stride):
        a = room("patches", (*places, W.shape[2]), out)
        xp(a).matmul(slopes[rows].reshape(w, -1, W.shape[1]), W[workers], out=a.reshape(w, -1, W.shape[2]))
        fold(a, kernel, below[rows], stride)
    out[:] = below[:, padding:padding + height, padding:padding + width]
    if add is not None:
        out += add
    if h is not None:
        out *= h > 0


@accelerated
def sums_of_all(images, slopes, starts, kernel: int, stride: int, padding: int, out, bias, room) -> None:
    """The slopes in each worker's W (out) and bias, of those in what `convolve_all` made with them."""
    images, (w, outputs, inputs) = framed(images, padding, room), out.shape
    total = room("total", (w, outputs, inputs), out)
    total[:], bias[:] = 0, 0
    for workers, rows, (n, _), places in chunks(images, kernel, outputs + inputs, starts, stride):
        a = patches(images[rows], kernel, room("patches", (*places, inputs), images), stride)
        δ = slopes[rows].reshape(n, -1, outputs)
        total[workers] += δ.swapaxes(1, 2) @ a.reshape(n, -1, inputs)
        bias[workers] += δ.sum(1)
    out.reshape(w, outputs, -1, kernel**2)[:] = total.reshape(w, outputs, kernel**2, -1).swapaxes(2, 3)


def by_place(W, kernel: int):
    """W (w, outputs, channels · kernel²) in the order of a patch: line, column, channel."""
    w, outputs, inputs = W.shape
    return xp(W).ascontiguousarray(W.reshape(w, outputs, -1, kernel**2).swapaxes(2, 3)).reshape(w, outputs, inputs)


def framed(images, padding: int, room):
    """The images in a frame of zeros, (m, height + 2 padding, width + 2 padding, channels)."""
    m, height, width, channels = images.shape
    out = room("framed", (m, height + 2 * padding, width + 2 * padding, channels), images)
    out[:] = 0
    out[:, padding:padding + height, padding:padding + width] = images
    return out
