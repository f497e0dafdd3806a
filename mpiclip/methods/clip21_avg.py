"""Clip21-Avg: the exact mean of n fixed vectors, from messages no longer than τ.

Khirirat et al. (2023), "Clip21: Error feedback for gradient clipping", arXiv:2305.18929, Algorithm 1."""

from .. import ops
from . import Method, Threshold


class Clip21Avg(Method):
    """c_i = clip_τ(a_i − v_i);  v_i ← v_i + c_i;  x ← x + (1/n) Σ c_i, for the problem f_i(x) = ½‖x − a_i‖²
    (quadratic, with a data file), whose gradient at v_i is v_i − a_i.

    ‖a_i − v_i‖ falls by τ a round, so x is the mean of the a_i after ⌈max_i ‖a_i‖/τ⌉ rounds. It must start at 0."""

    tau: Threshold              # τ
    partial = "sum"

    def init(self, s, workers):
        s.v_i = workers.zeros()
        s.norm_i, s.clipped_i = workers.zeros(()), workers.zeros(())

    def round(self, x, s, workers, aggregate):
        g_i = workers.grad(s.v_i)
        c_i = ops.clip(g_i, self.tau, out=g_i, norms=s.norm_i)      # −clip_τ(a_i − v_i)
        s.clipped_i[:] = s.norm_i > self.tau
        s.v_i -= c_i
        s.x -= aggregate(c_i)
