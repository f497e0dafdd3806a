"""CELGC: communication-efficient local gradient clipping; with γ = ∞, local SGD (federated averaging); with η = ∞,
local normalised SGD.

Liu, Zhuang, Lei, Liao (2022), "A communication-efficient distributed gradient clipping algorithm for training deep
neural networks", NeurIPS, arXiv:2205.05040, Algorithm 1. The choice of the norm, weight decay and the decay of both
constants are those of the authors' code."""

from typing import ClassVar, Literal

from pydantic import Field

from .. import ops
from ._steps import ClippedSteps


class CELGC(ClippedSteps):
    """I local steps x_i ← x_i − min(η, γ/ν_i) (g_i + λ x_i) from the common x, then one average of the models,
    x ← (1/n) Σ x_i. A round is such a cycle. What a worker clips by, ν_i, is

    local     ‖g_i‖, the norm of its own gradient: the paper's algorithm;
    global    ‖ḡ‖, the norm of the mean of the first gradients in this round, those at the common x: the average of a
              second vector a round;
    max       the larger of the two.

    With momentum μ each worker keeps m_i ← μ m_i + min(1, γ/(η ν_i)) (g_i + λ x_i), from 0, and steps
    x_i ← x_i − η m_i: by at most γ/(1 − μ) where λ = 0. (Where the authors' code is given a momentum it shortens the
    step, not what goes into m_i: a huge gradient then stays in it at its full length.)

    What is sent is how far the worker went, x_i − x: the same for the mean, x ← x + (1/n) Σ (x_i − x), but rules that
    measure how long a vector is see the worker's steps, and not where the model happens to be."""

    interval: int = Field(1, ge=1)                              # I, local steps between two averages
    threshold: Literal["local", "global", "max"] = "local"      # whose norm is ν_i
    momentum: float = Field(0.0, ge=0, lt=1)                    # μ
    sends_gradients: ClassVar[bool] = False

    @property
    def gradients(self):
        return self.interval

    def init(self, s, workers):
        s.clipped_i = workers.zeros(())
        if self.momentum:
            s.m_i = workers.zeros()

    def round(self, x, s, workers, aggregate):
        constants, bound, xp = self.step(workers.round), self.threshold_on_norm, workers.device.xp
        of_mean = 0.0
        if self.momentum:
            constants |= {"m": s.m_i, "momentum": self.momentum}
        x_i = workers.copies(x)
        s.clipped_i[:] = 0
        for k in range(self.interval):
            g_i = workers.grad(x_i)
            norm_i = workers.norms()                # ν_i
            if self.threshold != "local":
                if k == 0:
                    of_mean = aggregate.norm(aggregate(g_i))
                norm_i = (xp.maximum(norm_i, of_mean) if self.threshold == "max" else
                          xp.where(xp.isfinite(norm_i), of_mean, norm_i))
            if k < self.interval - 1:
                ops.local_step(x_i, g_i, norm_i, **constants)
            else:                                   # the last one leaves x_i − x, in the place of g_i
                ops.local_step(x_i, g_i, norm_i, **constants, origin=x, out=g_i)
            s.clipped_i += (norm_i > bound) / self.interval
        s.x += aggregate(g_i)
