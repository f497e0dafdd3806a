"""Distributed gradient descent; with minibatches, distributed SGD."""

from . import Method, StepSize


class GD(Method):
    """x ← x − γ (1/n) Σ ∇f_i(x)"""

    stepsize: StepSize          # γ

    def round(self, x, s, workers, aggregate):
        s.x -= self.stepsize * aggregate(workers.grad(x))
