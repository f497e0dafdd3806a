"""Clip21-GD: error feedback makes clipped gradient descent converge; with minibatches, Clip21-SGD.

Khirirat, Gorbunov, Horváth, Islamov, Karray, Richtárik (2023), "Clip21: Error feedback for gradient clipping",
arXiv:2305.18929, Algorithm 2."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from .. import ops
from . import Method, Threshold


class Clip21(Method):
    """Worker i sends the clipped difference c_i = clip_τ(∇f_i(x) − v_i) to what it has sent so far, v_i ← v_i + c_i;
    the server adds them up, v ← v + (1/n) Σ c_i, and steps x ← x − γ v.

    The step size "theory" is γ = min{1/L, τ/(2 L_max V)} with D = max(0, B − τ), B = max_i ‖∇f_i(x⁰)‖, and
    V = √(2 L f(x⁰) + D² + 2D³/(3τ)) + D: then no worker clips after ⌈2D/τ⌉ rounds. It is safe and small."""

    tau: Threshold                                                                               # τ
    stepsize: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["1/L", "theory"]      # γ

    def init(self, s, workers):
        s.v_i = workers.zeros()
        s.v = np.zeros_like(s.x)
        s.norm_i, s.clipped_i = workers.zeros(()), workers.zeros(())

    def round(self, x, s, workers, aggregate):
        g_i = workers.grad(x)
        c_i = ops.clip_step(g_i, s.v_i, self.tau, out=g_i, norms=s.norm_i)     # c_i = clip_τ(∇f_i(x) − v_i); v_i += c_i
        s.clipped_i[:] = s.norm_i > self.tau
        ops.apply(s.x, s.v, aggregate(c_i), self.stepsize)                     # v += (1/n) Σ c_i;  x −= γ v
