"""EF21: error feedback that compresses differences of gradients.

Richtárik, Sokolov, Fatkhullin (2021), "EF21: A new, simpler, theoretically better, and practically faster error
feedback", arXiv:2106.05203, Algorithm 2."""

from typing import ClassVar

import numpy as np

from .. import compressors, ops
from . import Method, StepSize


class EF21(Method):
    """Worker i sends what the compressor leaves of the difference to what it has sent so far, c_i = C(∇f_i(x) − g_i),
    g_i ← g_i + c_i; the server adds these up, g ← g + (1/n) Σ c_i, and steps x ← x − γ g.

    The paper's g_i^t is our g_i after round t. It starts with g_i^0 = C(∇f_i(x^0)), which is what round 0 makes of
    g_i = 0; then x^{t+1} = x^t − γ g^t and g_i^{t+1} = g_i^t + C(∇f_i(x^{t+1}) − g_i^t)."""

    compressor: compressors.Choice              # C
    stepsize: StepSize                          # γ
    contractive: ClassVar[bool] = True          # what C has to be
    sends_gradients: ClassVar[bool] = False
    partial = "sum"

    def init(self, s, workers):
        s.g_i = workers.zeros()
        s.g = np.zeros_like(s.x)

    def round(self, x, s, workers, aggregate):
        u_i = workers.grad(x)
        u_i -= s.g_i
        c_i = workers.compress(u_i, self.compressor)                # c_i = C(∇f_i(x) − g_i)
        c_i.add_to(s.g_i)                                           # g_i += c_i
        ops.apply(s.x, s.g, aggregate(c_i), self.stepsize)          # g += (1/n) Σ c_i;  x −= γ g
