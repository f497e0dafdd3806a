"""Distributed SGD with heavy-ball momentum on the server.

Polyak (1964), "Some methods of speeding up the convergence of iteration methods"; in the form of Sutskever et al.
(2013), "On the importance of initialization and momentum in deep learning"."""

import numpy as np
from pydantic import Field

from . import Method, StepSize


class SGD(Method):
    """m ← β m + (1/n) Σ ∇f_i(x);  x ← x − γ m"""

    stepsize: StepSize                      # γ
    beta: float = Field(0.0, ge=0, lt=1)    # β, the momentum

    def init(self, s, workers):
        s.m = np.zeros_like(s.x)

    def round(self, x, s, workers, aggregate):
        s.m *= self.beta
        s.m += aggregate(workers.grad(x))
        s.x -= self.stepsize * s.m
