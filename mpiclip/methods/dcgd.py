"""DCGD: distributed compressed gradient descent, the baseline without memory.

Khirirat, Feyzmahdavian, Johansson (2018), "Distributed learning with compressed gradients", arXiv:1806.06573."""

from .. import compressors
from . import Method, StepSize


class DCGD(Method):
    """x ← x − γ (1/n) Σ C(∇f_i(x)). An unbiased C brings it to a neighbourhood of the minimum whose size the ‖∇f_i‖
    there decide; a biased one may lead it astray."""

    compressor: compressors.Choice              # C
    stepsize: StepSize                          # γ

    def round(self, x, s, workers, aggregate):
        s.x -= self.stepsize * aggregate(workers.compress(workers.grad(x), self.compressor))
