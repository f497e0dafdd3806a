"""Clip-GD: distributed gradient descent with every worker's gradient clipped; with minibatches, clipped SGD.

The baseline of Clip21: it stops where the mean of the clipped gradients vanishes, in general not where ∇f does.
Abadi et al. (2016), "Deep learning with differential privacy", arXiv:1607.00133; as the baseline, Khirirat et al.
(2023), arXiv:2305.18929."""

from .. import ops
from . import Method, StepSize, Threshold


class ClipGD(Method):
    """x ← x − γ (1/n) Σ clip_τ(∇f_i(x))"""

    tau: Threshold              # τ
    stepsize: StepSize          # γ

    def init(self, s, workers):
        s.norm_i, s.clipped_i = workers.zeros(()), workers.zeros(())

    def round(self, x, s, workers, aggregate):
        g_i = workers.grad(x)
        c_i = ops.clip(g_i, self.tau, out=g_i, norms=s.norm_i)
        s.clipped_i[:] = s.norm_i > self.tau
        s.x -= self.stepsize * aggregate(c_i)
