"""A multilayer perceptron for classes."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from ._layers import Full, Network


class MLP(Network):
    """Softmax regression on the last hidden layer: h_0 = a_r, h_l = σ(W_l h_{l−1} + β_l), z_r = W_L h_{L−1} + β_L, of
    the sizes p, hidden…, C. f_i, the order of x and x⁰ are Network's."""

    hidden: list[Annotated[int, Field(ge=1)]] = Field(default=[256], min_length=1)
    activation: Literal["tanh", "relu"] = "tanh"

    def layers(self, shard, outputs):
        return tuple(Full(*sizes) for sizes in pairwise([shard.features, *self.hidden, outputs]))
