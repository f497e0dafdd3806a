"""Softmax (multinomial logistic) regression."""

import numpy as np

from ..device import host, xp
from ..errors import InputError
from ._linear_model import LinearModel, scores


class Softmax(LinearModel):
    """f_i(x) = (1/m_i) Σ_r (log Σ_c exp(z_rc) − z_{r, b_r}) + λ r(x), over worker i's m_i rows: the cross entropy of
    the classes' probabilities exp(z_rc) / Σ_c exp(z_rc), where z_r = x a_r and x is a (C, p) matrix, flattened. The
    data set's labels are integers; the C different ones, sorted, are the classes."""

    classifier = True

    def labels(self, shard):
        return classes(shard, self)

    def link(self, z, y):
        return cross_entropy(z, y)

    def curvature(self, z):
        """With probabilities π: diag(π) − π πᵀ ≤ ½ (I − 1 1ᵀ/C). Böhning (1992), "Multinomial logistic regression
        algorithm"."""
        return (z - z.mean(1, keepdims=True)) / 2

    def accuracy(self, x, data) -> tuple[int, int]:
        """(rows whose class has the highest score, rows)"""
        z = scores(data.matrix, x.reshape(data.outputs, -1), data.bounds)
        return int(host((z.argmax(1) == data.y).sum())), len(data.y)


def classes(shard, problem) -> tuple[np.ndarray, int]:
    """(each row's class, from 0 (m,), C). Raises InputError where the data set's labels are not classes."""
    if shard.classes is None or len(shard.classes) < 2:
        raise InputError(f"data.file: the labels are not classes; problem.name = '{problem.name}' expected integers, "
                         "from 2 to 1000 different ones (linear takes any numbers)")
    return np.searchsorted(shard.classes, shard.y), len(shard.classes)


def cross_entropy(z, y):
    """(log Σ_c exp(z_rc) − z_{r, y_r} (m,), its slopes in z (m, C)) of scores z (m, C) and classes y (m,)"""
    z = z - z.max(1, keepdims=True)
    slopes = np.exp(z)
    total = slopes.sum(1, keepdims=True)
    right = xp(z).arange(len(y)), y.astype(np.int64)
    values = np.log(total[:, 0]) - z[right]
    slopes /= total
    slopes[right] -= 1
    return values, slopes
