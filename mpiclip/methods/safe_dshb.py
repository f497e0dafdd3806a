"""Safe-DSHB: momentum of clipped and noised gradients, aggregated robustly: private, and safe from Byzantine workers.

Allouah, Guerraoui, Gupta, Pinot, Stephan (2023), "On the privacy-robustness-utility trilemma in distributed learning",
arXiv:2302.04787, Algorithm 1; with whole workers private, as the baseline of Byz-Clip21-SGD2M, arXiv:2603.23472."""

from math import inf

from pydantic import Field

from .. import ops
from . import Method, StepSize, Threshold


class SafeDSHB(Method):
    """m_i ← (1 − β) m_i + β (clip_τ(∇f_i(x)) + z_i) with z_i ~ N(0, σ² I), from m_i = 0;  x ← x − γ F(m_1, …, m_n),
    where F are the rules of [aggregate]. With β = 1 nothing is kept: Byz-Clip-SGD, which clip_gd with rules is, too.

    The workers keep their momentum, and send it: it is made of vectors that are private already. The paper of 2023
    protects rows instead: that is robust_dshb with privacy.level = "example"."""

    tau: Threshold                          # τ
    stepsize: StepSize                      # γ
    beta: float = Field(gt=0, le=1)         # β, the weight of the new gradient

    def bound(self):
        return self.tau

    def init(self, s, workers):
        if self.beta < 1:
            s.m_i = workers.zeros()
        s.norm_i, s.clipped_i = workers.zeros(()), workers.zeros(())

    def round(self, x, s, workers, aggregate):
        g_i = workers.grad(x)
        c_i = workers.noise(ops.clip(g_i, self.tau, out=g_i, norms=s.norm_i), self.sigma)   # clip_τ(∇f_i(x)) + z_i
        s.clipped_i[:] = s.norm_i > self.tau
        if self.beta < 1:       # m_i ← (1 − β) m_i + β c_i, and a copy of it
            c_i = ops.momentum_step(c_i, s.m_i, None, inf, self.beta, out=c_i)
        s.x -= self.stepsize * aggregate(c_i)
