"""Clip21-GD: error feedback makes clipped gradient descent converge; with minibatches, Clip21-SGD; with noise,
DP-Clip21-GD.

Khirirat, Gorbunov, Horváth, Islamov, Karray, Richtárik (2023), "Clip21: Error feedback for gradient clipping",
arXiv:2305.18929, Algorithm 2."""

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from .. import ops
from . import Method, Threshold


class Clip21(Method):
    """Worker i sends the clipped difference c_i = clip_τ(∇f_i(x) − v_i) to what it has sent so far, v_i ← v_i + c_i;
    the server adds them up, v ← v + (1/n) Σ c_i, and steps x ← x − γ v.

    With σ it sends c_i + z_i, z_i ~ N(0, σ² I), and keeps the clean c_i in v_i: the noise adds up in v, whose distance
    from the mean of the v_i is a random walk. Where `noisy_state` is true v_i takes in what was sent, v_i ← v_i + c_i +
    z_i: v remains their mean, and the next differences make up for the noise.

    The step size "theory" is γ = min{1/L, τ/(2 L_max V)} with D = max(0, B − τ), B = max_i ‖∇f_i(x⁰)‖, and
    V = √(2 L f(x⁰) + D² + 2D³/(3τ)) + D: then, without noise, no worker clips after ⌈2D/τ⌉ rounds. It is safe and
    small."""

    tau: Threshold                                                                               # τ
    stepsize: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["1/L", "theory"]      # γ
    noisy_state: bool = False
    sends_gradients: ClassVar[bool] = False
    partial = "sum"

    def bound(self):
        return self.tau

    def init(self, s, workers):
        s.v_i = workers.zeros()
        s.v = np.zeros_like(s.x)
        s.norm_i, s.clipped_i = workers.zeros(()), workers.zeros(())

    def round(self, x, s, workers, aggregate):
        g_i = workers.grad(x)
        c_i = ops.clip_step(g_i, s.v_i, self.tau, out=g_i, norms=s.norm_i)     # c_i = clip_τ(∇f_i(x) − v_i); v_i += c_i
        s.clipped_i[:] = s.norm_i > self.tau
        if self.noisy_state:
            z_i = workers.noise(workers.zeros(), self.sigma)
            s.v_i += z_i
            c_i += z_i
        else:
            workers.noise(c_i, self.sigma)                                     # c_i + z_i
        ops.apply(s.x, s.v, aggregate(c_i), self.stepsize)                     # v += (1/n) Σ c_i;  x −= γ v
