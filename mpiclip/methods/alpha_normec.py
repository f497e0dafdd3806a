"""α-NormEC: error feedback with smoothed normalisation in the place of clipping.

Shulgin, Khirirat, Richtárik (2025), "Smoothed normalization for efficient distributed private optimization",
arXiv:2502.13482; with noise, DP-α-NormEC."""

from typing import ClassVar

import numpy as np
from pydantic import Field

from .. import ops
from . import Method, StepSize


class AlphaNormEC(Method):
    """c_i = β (∇f_i(x) − g_i)/(α + ‖∇f_i(x) − g_i‖);  g_i ← g_i + c_i. Worker i sends c_i + z_i with z_i ~ N(0, σ² I);
    the server steps g ← g + (1/n) Σ (c_i + z_i), then x ← x − γ g, or x ← x − γ g/‖g‖. All start from 0.

    No message is longer than β. Far from its gradient g_i moves by almost β a round, as Clip21's v_i by τ; close to it
    by the share β/α of what is missing."""

    alpha: float = Field(gt=0, allow_inf_nan=False)     # α, the smoothing: how far is far
    beta: float = Field(gt=0, allow_inf_nan=False)      # β, the longest message
    stepsize: StepSize                                  # γ
    normalized: bool = False                            # whether γ is the length of the server's step
    sends_gradients: ClassVar[bool] = False
    partial = "sum"

    def bound(self):
        return self.beta

    def init(self, s, workers):
        s.g_i, s.g = workers.zeros(), np.zeros_like(s.x)

    def round(self, x, s, workers, aggregate):
        u_i = workers.grad(x)
        c_i = ops.normalize_step(u_i, s.g_i, self.alpha, self.beta, out=u_i)    # c_i as above;  g_i += c_i
        workers.noise(c_i, self.sigma)                                          # c_i + z_i
        if self.normalized:
            s.g += aggregate(c_i)
            norm = aggregate.norm(s.g)
            s.x -= float(self.stepsize) / (norm if norm > 0 else 1) * s.g
        else:
            ops.apply(s.x, s.g, aggregate(c_i), self.stepsize)                  # g += (1/n) Σ c_i;  x −= γ g
