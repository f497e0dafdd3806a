"""EPISODE++: EPISODE where only some of the workers take part in a round (run.participation).

Crawshaw, Bao, Liu (2023), "Federated learning with client subsampling, data heterogeneity, and unbounded smoothness: a
new algorithm and lower bounds", NeurIPS. Weight decay comes after the norm, as in this package's EPISODE (the authors'
code adds it before)."""

import numpy as np

from .episode import Episode


class EpisodePP(Episode):
    """As in EPISODE, but G_i is the mean of the I gradients of worker i's steps when it last took part, and G is the
    mean of all n of them: of the S workers of a round, with ĝ_i the mean of the gradients of their steps,
    x ← (1/S) Σ x_i,  G ← G + (1/n) Σ (ĝ_i − G_i),  G_i ← ĝ_i. Before round 0 every worker makes its G_i of I gradients
    at x⁰. The mean of two vectors a round."""

    @property
    def gradients(self):
        return self.interval

    @property
    def first_gradients(self):
        return self.interval

    def init(self, s, workers):
        s.G_i, s.G, s.clipped_i = workers.zeros(), np.zeros_like(s.x), workers.zeros(())

    def start(self, x, s, workers, aggregate):
        for _ in range(self.interval):
            s.G_i += workers.grad(x)
        s.G_i /= self.interval
        s.G += aggregate(s.G_i)

    def round(self, x, s, workers, aggregate):
        origin, x_i, sum_i = x.copy(), workers.copies(x), workers.zeros()
        clips = aggregate.norm(s.G) > self.threshold_on_norm
        c_i = aggregate.join(s.G) - s.G_i                                   # x is gone
        moved_i = self.steps(clips, x_i, c_i, origin, workers, sum_i)
        s.clipped_i[:] = clips
        s.x += aggregate(moved_i)
        sum_i /= self.interval
        sum_i -= s.G_i                                                      # ĝ_i − G_i
        s.G_i += sum_i
        s.G += (workers.taking_part / workers.n) * aggregate(sum_i)         # (1/S) Σ is what `aggregate` gives
