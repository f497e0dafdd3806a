"""Clip-GD: distributed gradient descent with every worker's gradient clipped; with minibatches, clipped SGD; with
noise, DP-Clip-GD; with momentum, what Clip21-SGD2M's authors compare it with as ClipSGDM.

The baseline of Clip21: it stops where the mean of the clipped gradients vanishes, in general not where ∇f does.
Abadi et al. (2016), "Deep learning with differential privacy", arXiv:1607.00133; as the baseline, Khirirat et al.
(2023), arXiv:2305.18929; with momentum, Islamov et al. (2025), arXiv:2502.11682."""

from pydantic import Field

from .. import ops
from . import Method, StepSize, Threshold


class ClipGD(Method):
    """v_i ← (1 − β) v_i + β ∇f_i(x), from v_i = 0;  x ← x − γ (1/n) Σ (clip_τ(v_i) + z_i) with z_i ~ N(0, σ² I).
    With β = 1, v_i is the gradient and nothing is kept; then, with rules in the mean's place, it is Byz-Clip-SGD, a
    baseline of Byz-Clip21-SGD2M (arXiv:2603.23472)."""

    tau: Threshold                              # τ
    stepsize: StepSize                          # γ
    beta: float = Field(1.0, gt=0, le=1)        # β, the weight of the new gradient

    def bound(self):
        return self.tau

    def init(self, s, workers):
        if self.beta < 1:
            s.v_i = workers.zeros()
        s.norm_i, s.clipped_i = workers.zeros(()), workers.zeros(())

    def round(self, x, s, workers, aggregate):
        g_i = workers.grad(x)
        if self.beta < 1:       # v_i ← (1 − β) v_i + β ∇f_i(x);  c_i = clip_τ(v_i)
            c_i = ops.momentum_step(g_i, s.v_i, None, self.tau, self.beta, out=g_i, norms=s.norm_i)
        else:
            c_i = ops.clip(g_i, self.tau, out=g_i, norms=s.norm_i)
        s.clipped_i[:] = s.norm_i > self.tau
        s.x -= self.stepsize * aggregate(workers.noise(c_i, self.sigma))
