"""Logistic regression of two classes."""

import numpy as np

from ..device import host, xp
from ..errors import InputError
from ._linear_model import LinearModel, decisions


class Logistic(LinearModel):
    """f_i(x) = (1/m_i) Σ_r log(1 + exp(−b_r a_rᵀ x)) + λ r(x), over worker i's m_i rows. The data set has two labels,
    any integers: the lower one is b = −1, the higher one b = +1."""

    classifier = True

    def labels(self, shard):
        classes = shard.classes
        if classes is None or len(classes) != 2:
            found = "are not classes" if classes is None else f"are {', '.join(f'{c:g}' for c in classes[:5])}"
            found += ", …" if classes is not None and len(classes) > 5 else ""
            raise InputError(f"data.file: the labels {found}; problem.name = 'logistic' expected exactly two different "
                             "integers, such as −1 and +1 (softmax takes more classes, linear any numbers)")
        return np.where(shard.y == classes[1], 1, -1), 1

    def link(self, z, y):
        """With t = b z and e = exp(−|t|) ≤ 1 nothing overflows: ℓ = log(1 + e) + max(−t, 0), ℓ' = −b / (1 + exp(t))."""
        t = y * z[:, 0]
        e = np.exp(-abs(t))
        slope = -y * xp(z).where(t > 0, e, 1) / (1 + e)
        return np.log1p(e) + np.maximum(-t, 0), slope[:, None]

    def curvature(self, z):
        return z / 4                # ℓ'' = σ(z) σ(−z) ≤ 1/4

    def accuracy(self, x, data) -> tuple[int, int]:
        """(rows on the right side of a_rᵀ x = 0, rows). A row on it counts as the lower class."""
        z = decisions(data.a, x)
        return int(host(((z > 0) == (data.y > 0)).sum())), len(data.y)
