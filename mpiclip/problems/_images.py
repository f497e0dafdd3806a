"""What networks for images have in common: the shape of their rows, and versions of a row, shifted and mirrored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from ..device import xp
from ..errors import InputError
from ._layers import Network


class ImageNetwork(Network):
    """Minibatches draw from versions of each image: shifted by up to `crop` pixels in each direction, zeros coming in
    at the border (the zeros of the rows as they are learned from: a feature's mean where they are standardised), and
    with `flip` in half of the cases mirrored, left for right. All rows, which evaluations look at, are as they are."""

    crop: int = Field(0, ge=0)
    flip: bool = False

    def image(self, shard) -> tuple[int, int, int]:
        """(channels, height, width) of a row. InputError where rows are no images."""
        if shard.image is None or len(shard.image) not in (2, 3) or hasattr(shard.x, "indptr"):
            found = f"{shard.features} numbers" if shard.image is None else " × ".join(map(str, shard.image))
            raise InputError(f"data.file: found rows of {found}; problem.name = '{self.name}' expected images, "
                             "(height, width) or (channels, height, width), as `mpiclip data import` makes them of idx "
                             "or cifar files")
        channels, height, width = shard.image if len(shard.image) == 3 else (1, *shard.image)
        if self.crop >= min(height, width):
            raise InputError(f"problem.crop: found {self.crop} for images of {height} × {width}, expected less than "
                             f"{min(height, width)}: a part of the image must be left")
        return channels, height, width

    def views(self, data) -> int:
        return (2 * self.crop + 1)**2 * (1 + self.flip)

    def picked(self, data, places) -> tuple[Any, Any]:
        if self.views(data) == 1 or isinstance(places, slice):
            return super().picked(data, places)
        rows, versions = places % len(data.y), places // len(data.y)
        out = data.buffer(None, "rows", (len(rows), data.a.shape[1]), data.a)
        channels, height, width = data.layers[0].image
        shift_and_mirror(data.a, rows, versions, self.crop, self.flip, out.reshape(-1, channels, height, width))
        return out, rows


@dataclass(frozen=True)
class Patches:
    """What a layer of convolutions sees of its rows h."""

    before: int                     # channels of h
    size: tuple[int, int]           # height, width of h
    outputs: int                    # channels that it makes
    kernel: int

    @property
    def image(self) -> tuple[int, int, int]:
        return self.before, *self.size

    @property
    def inputs(self) -> int:
        """numbers of a patch"""
        return self.before * self.kernel**2


def shift_and_mirror(a, rows, versions, crop: int, flip: bool, out) -> None:
    """Fills out (m, channels, height, width) with these versions (m,) of these rows (m,) of a. Version 0 is the row
    itself."""
    channels, height, width = out.shape[1:]
    mirrored = versions % (1 + flip)
    places, side = versions // (1 + flip), 2 * crop + 1
    down, across = (places // side + crop) % side - crop, (places % side + crop) % side - crop
    y, x = xp(a).arange(height) + down[:, None], xp(a).arange(width) + across[:, None]
    x = xp(a).where(mirrored[:, None] == 1, width - 1 - x, x)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    at = (y.clip(0, height - 1) * width)[:, :, None] + x.clip(0, width - 1)[:, None]
    at += (rows * a.shape[1])[:, None, None]
    for channel in range(channels):
        out[:, channel] = xp(a).where(inside, a.reshape(-1)[at + channel * height * width], 0)
