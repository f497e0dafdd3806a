"""Polynomials in one variable whose coefficients are the data: small functions on which methods can be seen to fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..device import host, xp
from ..errors import InputError
from . import Problem
from ._linear_model import is_sparse


@dataclass(frozen=True)
class Coefficients:
    a: Any                  # (m, K): Σ_k a_rk x^k, k = 1 … K, of each row; the rows of w workers, one after the other
    offsets: np.ndarray     # (w+1,) int64: worker i's rows are offsets[i]:offsets[i+1]


class Polynomial(Problem):
    """f_i(x) = (1/m_i) Σ_r Σ_k a_rk x^k, x a number: worker i's rows r hold the coefficients a_r1 … a_rK. What differs
    between workers makes the f_i differ, what differs between the rows of one is the noise of its minibatches."""

    def prepare(self, shard, ids, n, seed, dtype):
        if shard is None:
            raise InputError("data.file: missing; 'polynomial' expects a data set whose rows are coefficients")
        a = np.zeros((len(shard.y), shard.features), dtype)
        if is_sparse(shard.x):
            a[np.repeat(np.arange(len(a)), np.diff(shard.x.indptr)), shard.x.indices] = shard.x.data
        else:
            a[:] = shard.x
        return Coefficients(a, shard.offsets)

    def x0(self, data, seed, dtype):
        return np.full(1, self.start, dtype)

    def loss_grad(self, x, data, batch=None, out=None, loss=True, clip=None):
        module, mine = xp(x), host(data.offsets)
        counts = np.diff(mine)
        rows, offsets, denominators = batch or (slice(None), mine, np.maximum(counts, 1))
        worker = module.asarray(np.repeat(np.arange(len(counts)), np.diff(offsets)))
        of = module.arange(len(counts))[:, None] == worker              # (w, rows of the batch)
        a, k = data.a[rows].astype(np.float64), module.arange(1, data.a.shape[1] + 1)
        x_i = module.broadcast_to(x.astype(np.float64).reshape(-1, 1), (len(counts), 1))
        slopes = (a * (k * x_i ** (k - 1))[worker]).sum(1)
        if clip is not None:
            slopes *= module.minimum(1, clip / module.maximum(abs(slopes), np.finfo(np.float64).tiny))
        divide = module.asarray(denominators)
        out = module.empty((len(counts), 1), x.dtype) if out is None else out
        out[:, 0] = module.where(of, slopes, 0).sum(1) / divide
        losses = module.where(of, (a * (x_i ** k)[worker]).sum(1), 0).sum(1) / divide if loss else None
        self.regularize(x.reshape(-1, 1, 1), out[:, None], losses, module.asarray(counts > 0))
        return losses, out
