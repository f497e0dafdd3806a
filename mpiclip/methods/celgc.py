"""CELGC: communication-efficient local gradient clipping; with γ = ∞, local SGD.

Liu, Zhuang, Lei, Liao (2022), "A communication-efficient distributed gradient clipping algorithm for training deep
neural networks", NeurIPS, arXiv:2205.05040, Algorithm 1."""

from typing import ClassVar

from pydantic import Field

from .. import ops
from . import Method, Positive


class CELGC(Method):
    """I local steps x_i ← x_i − min(η, γ/‖g_i‖) g_i from the common x, each clipped by the worker's own norm, then one
    average of the models, x ← (1/n) Σ x_i. A round is such a cycle.

    What is sent is how far the worker went, x_i − x: the same for the mean, x ← x + (1/n) Σ (x_i − x), but rules that
    measure how long a vector is see the worker's steps, and not where the model happens to be."""

    eta: Positive                       # η, the step size
    gamma: Positive                     # γ, the longest step: gradients are clipped at norm γ/η
    interval: int = Field(1, ge=1)      # I, local steps between two averages
    sends_gradients: ClassVar[bool] = False

    @property
    def gradients(self):
        return self.interval

    def init(self, s, workers):
        s.norm_i, s.clipped_i = workers.zeros(()), workers.zeros(())

    def round(self, x, s, workers, aggregate):
        x_i = workers.copies(x)
        s.clipped_i[:] = 0
        for _ in range(self.interval):
            g_i = workers.grad(x_i)
            x_i -= self.eta * ops.clip(g_i, self.gamma / self.eta, out=g_i, norms=s.norm_i)
            s.clipped_i += (s.norm_i > self.gamma / self.eta) / self.interval
        x_i -= x
        s.x += aggregate(x_i)
