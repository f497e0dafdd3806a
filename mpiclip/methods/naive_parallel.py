"""NaiveParallelGC: the mean of the gradients is clipped, every iteration communicates. The baseline of CELGC.

Liu, Zhuang, Lei, Liao (2022), arXiv:2205.05040, section 5."""

import numpy as np
from pydantic import Field

from .. import ops
from ._steps import ClippedSteps


class NaiveParallelGC(ClippedSteps):
    """x ← x − min(η, γ/‖ḡ‖) (ḡ + λ x) with ḡ = (1/n) Σ g_i. With momentum μ the server keeps
    m ← μ m + min(1, γ/(η ‖ḡ‖)) (ḡ + λ x), from 0, and steps x ← x − η m, as CELGC's workers do."""

    momentum: float = Field(0.0, ge=0, lt=1)    # μ

    def init(self, s, workers):
        s.clipped_i = workers.zeros(())
        if self.momentum:
            s.m = np.zeros_like(s.x)

    def round(self, x, s, workers, aggregate):
        constants = self.step(workers.round)
        if self.momentum:
            constants |= {"m": s.m, "momentum": self.momentum}
        g = aggregate(workers.grad(x))
        norm = aggregate.norm(g)
        s.clipped_i[:] = norm > self.threshold_on_norm
        ops.local_step(s.x, g, workers.device.xp.full((), norm), **constants)
