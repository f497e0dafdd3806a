"""EPISODE: local clipped steps that know where the others would go, and whether all of them clip.

Crawshaw, Bao, Liu (2023), "EPISODE: Episodic gradient clipping with periodic resampled corrections for federated
learning with heterogeneous data", ICLR, arXiv:2302.07155, Algorithm 1. Weight decay comes after the norm, as in the
authors' code for texts (their code for images adds it before)."""

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from .. import ops
from ._steps import ClippedSteps


class Episode(ClippedSteps):
    """At the common x worker i draws a gradient G_i, and G = (1/n) Σ G_i says whether this round clips: if ‖G‖ > γ/η.
    Then I local steps along u_i = g_i − G_i + G: x_i ← x_i − γ u_i/‖u_i‖ in a round that clips, however short u_i is,
    otherwise x_i ← x_i − η u_i; and x ← (1/n) Σ x_i. The mean of two vectors a round.

    Where the f_i differ CELGC's steps, clipped one by one, do not add up to a step along the mean; these do. G_i is of
    a minibatch of its own, as large as those of the steps. Weight decay adds min(η, γ/‖u_i‖) λ x_i to the step."""

    eta: Annotated[float, Field(gt=0, allow_inf_nan=False)]     # η, the step size
    interval: int = Field(1, ge=1)                              # I, local steps between two averages
    sends_gradients: ClassVar[bool] = False

    @property
    def gradients(self):
        return self.interval + 1

    def init(self, s, workers):
        s.clipped_i = workers.zeros(())

    def round(self, x, s, workers, aggregate):
        G_i = workers.grad(x)
        origin, x_i = x.copy(), workers.copies(x)
        G = aggregate(G_i)
        clips = aggregate.norm(G) > self.threshold_on_norm
        c_i = aggregate.join(G) - G_i                                       # x is gone
        moved_i = self.steps(clips, x_i, c_i, origin, workers)
        s.clipped_i[:] = clips
        s.x += aggregate(moved_i)

    def steps(self, clips, x_i, c_i, origin, workers, sum_i=None):
        """The local steps along g_i + c_i from x_i = origin, in place. Returns x_i − origin (w, d), in the memory of
        the last gradients; the gradients are added to sum_i."""
        constants = self.step(workers.round)
        if clips:
            constants |= {"normalize": True}
        else:
            constants |= {"tau": np.inf, "normalize": False}
        norm_i = workers.zeros(())
        for k in range(self.interval):
            u_i = workers.grad(x_i)
            if sum_i is not None:
                sum_i += u_i
            u_i += c_i
            if clips:
                ops.norms(u_i, out=norm_i)
            if k < self.interval - 1:
                ops.local_step(x_i, u_i, norm_i, **constants)
            else:
                ops.local_step(x_i, u_i, norm_i, **constants, origin=origin, out=u_i)
        return u_i
