"""Byz-Clip21-SGD2M: Clip21-SGD2M whose server keeps what each worker has sent, and aggregates that robustly.

Islamov, Malinovsky, Gaponov, Lucchi, Richtárik, Gorbunov (2026), "Byzantine-robust and differentially private federated
optimization under weaker assumptions", arXiv:2603.23472."""

from typing import ClassVar, Literal

import numpy as np

from .clip21_sgd2m import Clip21SGD2M


class ByzClip21SGD2M(Clip21SGD2M):
    """The worker's step is Clip21-SGD2M's: v_i ← (1 − β) v_i + β ∇f_i(x);  c_i = clip_τ(v_i − g_i);  g_i ← g_i + β̂ c_i;
    it sends c_i + z_i. The server keeps a vector for each of the n workers, m_i ← m_i + β̂ (c_i + z_i), and steps
    x ← x − γ F(m_1, …, m_n), where F are the rules of [aggregate]. All start from 0, and m_i is g_i but for the noise.

    Clip21-SGD2M itself applies rules to the messages c_i, and adds the results up: what gets past them once stays in
    its g for ever. Here F sees how far each worker has got in all. Where F is the mean, the two are the same."""

    partial: ClassVar[Literal["mean", "sum"] | None] = None     # the server keeps all workers' vectors

    def init(self, s, workers):
        s.v_i, s.g_i = workers.zeros(), workers.zeros()
        s.m = np.zeros_like(s.x, shape=(workers.n, len(s.x)))
        s.norm_i, s.clipped_i = workers.zeros(()), workers.zeros(())

    def round(self, x, s, workers, aggregate):
        c_i = self.message(x, s, workers)
        s.x -= self.stepsize * aggregate(c_i, onto=s.m, scale=self.beta_server)         # m_i += β̂ (c_i + z_i);  F(m)
