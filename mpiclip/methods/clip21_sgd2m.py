"""Clip21-SGD2M: Clip21 with momentum on the workers, against the noise of minibatches, and on the server, against the
noise of differential privacy.

Islamov, Horváth, Lucchi, Richtárik, Gorbunov (2025), "Double momentum and error feedback for clipping with fast rates
and differential privacy", arXiv:2502.11682, Algorithm 1."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from .. import ops
from . import Method, StepSize, Threshold


class Clip21SGD2M(Method):
    """v_i ← (1 − β) v_i + β ∇f_i(x);  c_i = clip_τ(v_i − g_i);  g_i ← g_i + β̂ c_i. Worker i sends c_i + z_i with
    z_i ~ N(0, σ² I); the server steps g ← g + (β̂/n) Σ (c_i + z_i), x ← x − γ g. All start from 0.

    The paper's round begins with the step, by g = 0 in the first one; ours ends with it, so that our x^k is its
    x^{k+1}. With β = β̂ = 1 it is Clip21."""

    tau: Threshold                              # τ
    stepsize: StepSize                          # γ
    beta: float = Field(gt=0, le=1)             # β, the weight of the new gradient in a worker's momentum
    beta_server: float = Field(gt=0, le=1)      # β̂, how much of a message is taken in
    sends_gradients: ClassVar[bool] = False
    partial: ClassVar[Literal["mean", "sum"] | None] = "sum"

    def bound(self):
        return self.tau

    def init(self, s, workers):
        s.v_i, s.g_i = workers.zeros(), workers.zeros()
        s.g = np.zeros_like(s.x)
        s.norm_i, s.clipped_i = workers.zeros(()), workers.zeros(())

    def round(self, x, s, workers, aggregate):
        c_i = self.message(x, s, workers)
        ops.apply(s.x, s.g, aggregate(c_i), self.stepsize, self.beta_server)   # g += (β̂/n) Σ c_i;  x −= γ g

    def message(self, x, s, workers):
        """What the workers send, c_i + z_i (w, d); v_i and g_i take their steps."""
        u_i = workers.grad(x)
        c_i = ops.momentum_step(u_i, s.v_i, s.g_i, self.tau, self.beta, self.beta_server, out=u_i, norms=s.norm_i)
        s.clipped_i[:] = s.norm_i > self.tau
        workers.noise(c_i, self.sigma)
        return c_i
