"""Press-Clip21: Clip21 whose clipped differences are compressed before they are sent.

Khirirat, Gorbunov, Horváth, Islamov, Karray, Richtárik (2023), "Clip21: Error feedback for gradient clipping",
arXiv:2305.18929, Press-Clip21-GD."""

from typing import ClassVar

import numpy as np

from .. import compressors, ops
from . import Method, StepSize, Threshold


class PressClip21(Method):
    """Worker i sends c_i = C(clip_τ(∇f_i(x) − v_i) + z_i), v_i ← v_i + c_i; the server adds these up,
    v ← v + (1/n) Σ c_i, and steps x ← x − γ v. Where C keeps everything it is Clip21-GD, with τ = ∞ it is EF21.

    The noise z_i ~ N(0, σ² I), if any, is added before C: what C keeps of a private vector is as private. Worker and
    server add the same message, so the next difference sees the noise of this one, and corrects it."""

    tau: Threshold                              # τ
    compressor: compressors.Choice              # C
    stepsize: StepSize                          # γ
    contractive: ClassVar[bool] = True          # what C has to be
    sends_gradients: ClassVar[bool] = False
    partial = "sum"

    def bound(self):
        return self.tau

    def init(self, s, workers):
        s.v_i = workers.zeros()
        s.v = np.zeros_like(s.x)
        s.norm_i, s.clipped_i = workers.zeros(()), workers.zeros(())

    def round(self, x, s, workers, aggregate):
        u_i = workers.grad(x)
        if isinstance(self.compressor, compressors.TopK) and not self.sigma:    # the same, in fewer passes
            c_i = self.compressor.clip_step(u_i, s.v_i, self.tau, s.norm_i, workers.ids)
        else:
            u_i -= s.v_i
            ops.clip(u_i, self.tau, out=u_i, norms=s.norm_i)
            c_i = workers.compress(workers.noise(u_i, self.sigma), self.compressor)
            c_i.add_to(s.v_i)
        s.clipped_i[:] = s.norm_i > self.tau
        ops.apply(s.x, s.v, aggregate(c_i), self.stepsize)          # v += (1/n) Σ c_i;  x −= γ v
