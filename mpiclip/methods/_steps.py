"""What methods that clip steps share: their constants, and how these decay."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from math import inf
from typing import Annotated

from pydantic import Field, model_validator

from . import Method, Positive


class ClippedSteps(Method):
    """Steps x ← x − min(η, γ/ν) g, where ν is the norm of g or of something in its place. The larger of γ = ∞ (never
    clipped) and η = ∞ (each step has the length γ) decides; both at once are refused.

    In round k, η and γ are both multiplied by decay^j, j being how many numbers of decay_at are at most k: gradients
    are clipped at the same norm γ/η all the time.

    Weight decay λ comes after the norm: x ← x − min(η, γ/ν) (g + λ x), a step that may be longer than γ by η λ ‖x‖."""

    eta: Positive                                                                   # η, the step size
    gamma: Positive                                                                 # γ, the longest step
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0          # λ
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None                        # what η and γ are multiplied by …
    decay_at: list[Annotated[int, Field(ge=1)]] = Field([])                         # … from each of these rounds on

    @model_validator(mode="after")
    def _check(self):
        if self.eta == inf and (self.gamma == inf or self.weight_decay):
            raise ValueError("eta = inf: expected with a finite gamma, the length of each step, and no weight_decay")
        if (self.decay is None) != (not self.decay_at):
            found = "decay_at" if self.decay is None else "decay"
            raise ValueError(f"decay and decay_at go together, found only {found}")
        if any(a >= b for a, b in pairwise(self.decay_at)):
            raise ValueError(f"decay_at = {self.decay_at}: expected rounds in ascending order")
        return self

    def step(self, round: int) -> dict:
        """The constants of a step in this round, as ops.local_step takes them."""
        factor = 1.0 if self.decay is None else self.decay ** bisect_right(self.decay_at, round)
        if self.eta == inf:
            return {"tau": self.gamma, "eta": factor, "normalize": True}
        return {"tau": self.threshold_on_norm, "eta": self.eta * factor, "weight_decay": self.weight_decay}

    @property
    def threshold_on_norm(self) -> float:
        """γ/η: longer gradients are clipped."""
        return self.gamma / self.eta
