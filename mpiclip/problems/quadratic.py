"""Quadratic functions, whose optimum is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from ..device import xp
from ..errors import InputError
from ..streams import stream
from . import Finite, NotNegative, Problem
from ._linear_model import combine, matrix, per_row


@dataclass(frozen=True)
class Curves:
    a_i: Any                # (w, d) curvature
    c_i: Any                # (w, d) centre
    owners: Any             # (w,) bool: false, and a_i = 0, for a worker that owns no rows of the data set


class Quadratic(Problem):
    """f_i(x) = ½ (x − c_i)ᵀ diag(a_i) (x − c_i) + λ r(x), from one of three sources:

    curvature, centre               a_i and c_i, a list of d numbers for each worker
    dimension, condition, spread    drawn from the seed: a_i is a permutation of d numbers in geometric progression
                                    from 1/condition to 1; c_i is normal with standard deviation `spread`
    neither, but a data set         a_i = 1 and c_i is the mean of worker i's rows, so that the optimum is the mean of
                                    vectors that are spread over the workers"""

    curvature: list[list[NotNegative]] | None = None
    centre: list[list[Finite]] | None = None
    dimension: Annotated[int, Field(ge=1)] | None = None
    condition: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    spread: NotNegative = 1.0

    @model_validator(mode="after")
    def _check(self):
        if (self.curvature is None) != (self.centre is None):
            raise ValueError("curvature and centre go together, found only one of them")
        if self.curvature is not None and self.centre is not None:
            lengths = {len(row) for row in self.curvature + self.centre}
            if len(self.curvature) != len(self.centre) or len(lengths) != 1 or lengths == {0}:
                raise ValueError("curvature and centre: expected equally many numbers for each worker in both")
        return self

    def prepare(self, shard, ids, n, seed, dtype):
        sources = {"problem.curvature": self.curvature, "problem.dimension": self.dimension, "data.file": shard}
        given = [key for key, value in sources.items() if value is not None]
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            raise InputError(f"problem: 'quadratic' found {found}; expected one of {', '.join(sources)}")
        if shard is not None:
            return self._means(shard, dtype)
        ids = np.asarray(ids)
        owners = ids < n                    # a worker beyond the n has no f_i: it only attacks
        if self.curvature is not None and self.centre is not None:
            if len(self.curvature) != n:
                raise InputError(f"problem.curvature: {len(self.curvature)} rows; expected one for each of {n} workers")
            d = len(self.centre[0])
            drawn = [(np.array(self.curvature[i]), np.array(self.centre[i])) for i in ids[owners]]
        else:
            d = self.dimension or 0
            curvature = np.geomspace(1 / self.condition, 1, d)
            drawn = [(stream(seed, "curvature", i).permutation(curvature),
                      self.spread * stream(seed, "centre", i).standard_normal(d)) for i in ids[owners]]
        a_i, c_i = np.zeros((2, len(ids), d), dtype)
        for place, pair in zip(np.flatnonzero(owners), drawn, strict=True):
            a_i[place], c_i[place] = pair
        return Curves(a_i, c_i, owners)

    def _means(self, shard, dtype) -> Curves:
        offsets, counts = shard.offsets, np.diff(shard.offsets)
        c_i = np.empty((len(counts), shard.features), dtype)
        combine(matrix(shard.x, offsets), per_row(1 / np.maximum(counts, 1), offsets, c_i), offsets, c_i[:, None])
        owners = counts > 0
        return Curves(np.repeat(owners[:, None].astype(dtype), shard.features, axis=1), c_i, owners)

    def x0(self, data, seed, dtype):
        return np.full(data.a_i.shape[1], self.start, dtype)

    def loss_grad(self, x, data, batch=None, out=None, loss=True, clip=None):
        if clip is not None:
            raise InputError("privacy.level: problem.name = 'quadratic' has no rows whose gradients could be clipped; "
                             "expected \"worker\"", agreed=True)
        if batch is not None:
            raise InputError("run.batch: problem.name = 'quadratic' has no rows to draw from; expected \"full\"")
        difference = x - data.c_i
        grad = xp(x).multiply(data.a_i, difference, out=out)
        losses = (grad * difference).sum(1, dtype=np.float64) / 2 if loss else None
        self.regularize(x.reshape(-1, 1, x.shape[-1]), grad[:, None], losses, data.owners)
        return losses, grad

    def smoothness_product(self, u_i, data):
        return data.a_i * u_i + xp(u_i).where(data.owners[:, None], u_i.dtype.type(self.regularizer_curvature) * u_i, 0)


def optimum(a_i, c_i):
    """The x (d,) that minimises (1/n) Σ f_i without a regularizer: Σ a_i c_i / Σ a_i. a_i, c_i: (n, d)."""
    return (a_i * c_i).sum(0) / a_i.sum(0)
