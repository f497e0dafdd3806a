"""NaiveParallelGC: the mean of the gradients is clipped, every iteration communicates. The baseline of CELGC.

Liu, Zhuang, Lei, Liao (2022), arXiv:2205.05040, section 5."""

from . import Method, Positive


class NaiveParallelGC(Method):
    """x ← x − min(η, γ/‖ḡ‖) ḡ with ḡ = (1/n) Σ g_i"""

    eta: Positive           # η, the step size
    gamma: Positive         # γ, the longest step: ḡ is clipped at norm γ/η

    def init(self, s, workers):
        s.clipped_i = workers.zeros(())

    def round(self, x, s, workers, aggregate):
        g = aggregate(workers.grad(x))
        norm = aggregate.norm(g)
        s.clipped_i[:] = norm > self.gamma / self.eta
        s.x -= min(self.eta, self.gamma / norm if norm > 0 else self.eta) * g
