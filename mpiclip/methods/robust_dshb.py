"""Robust-DSHB: distributed heavy-ball SGD that survives Byzantine workers; without momentum Robust-DSGD, and with full
gradients (run.batch = "full") Robust-DGD.

Allouah, Guerraoui, Gupta, Jellouli, Rizk, Stephan (2024), "Adaptive gradient clipping for robust federated learning",
arXiv:2405.14432, Algorithm 1; with momentum Farhadkhani, Guerraoui, Gupta, Pinot, Stephan (2022), "Byzantine machine
learning made easy by resilient averaging of momentums", arXiv:2205.12173."""

from math import inf

from pydantic import Field

from .. import ops
from . import Method, StepSize


class RobustDSHB(Method):
    """m_i ← β m_i + (1 − β) ∇f_i(x), from m_i = 0;  x ← x − γ F(m_1, …, m_n), where F are the rules of [aggregate]:
    F ∘ ARC is rules = ["arc", F]. With β = 0, m_i is the gradient and nothing is kept.

    A gradient that is not finite goes into no momentum. β weighs the old momentum here, in clip_gd the new gradient."""

    stepsize: StepSize                      # γ
    beta: float = Field(0.0, ge=0, lt=1)    # β, the weight of the old momentum

    def init(self, s, workers):
        if self.beta > 0:
            s.m_i = workers.zeros()

    def round(self, x, s, workers, aggregate):
        u_i = workers.grad(x)
        if self.beta > 0:       # m_i ← β m_i + (1 − β) ∇f_i(x), and a copy of it
            u_i = ops.momentum_step(u_i, s.m_i, None, inf, 1 - self.beta, out=u_i)
        s.x -= self.stepsize * aggregate(u_i)
