"""Published methods, one file each. The file's name is the config's `method.name`, the record's fields are its keys.

A method is a frozen record of the paper's constants with two functions:

    init(s, workers)                  declares the state: s.v_i = workers.zeros() …
    round(x, s, workers, aggregate)   one round of the paper's algorithm

x               the model (d,), as every worker has received it; not to be written to, nor to be read once s.x has been
                updated: it may be the same memory
s               the state. s.x is the server's model, which `round` updates in place. Names ending in `_i` belong to the
                workers: one row for each of this rank's w workers. All other names belong to the server: arrays like
                s.x, of the columns that this rank serves. What is in s is checkpointed.
workers         grad(x) → ∇f_i(x) (w, d), yours to overwrite until the next call; x is (d,), or (w, d): a point each
aggregate(u_i)  (w, d) → the mean over all n workers, or what the robust rules make of them: this rank's columns, valid
                until the next call; aggregate.norm(u) is the norm of such a server vector, and aggregate.join(u) all
                of it (d,), on every rank: in the memory of x, which is gone then. aggregate(u_i, onto=s.m,
                scale=β̂) is for a server that keeps a vector for each of the n workers, s.m (n, columns): m_i += β̂ u_i,
                and it is the m_i that are averaged, or that the rules see

A method that clips keeps s.clipped_i: the share of its steps in this round in which a worker clipped.

Where only S of the n workers take part in a round, it is called with those: arrays `_i` have rows for them alone, on
some ranks perhaps none. `partial` says what `aggregate` then divides their sum by: S ("mean": gradients, or models), or
n ("sum": changes of something that the server keeps the mean of, where the others' did not change); None: the method
wants all workers. `start` is called once, before round 0, with all of them.

workers.noise(u_i, σ) adds what makes the messages private, if anything does. A method whose messages it has to protect
says how long they can be, `bound`: what it sends is then at most that long, whatever a worker's data are."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import unknown


class Quantile(BaseModel):
    """τ = the q-quantile of the workers' first gradient norms ‖∇f_i(x⁰)‖."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    quantile: float = Field(ge=0, le=1)


Positive = Annotated[float, Field(gt=0)]
Threshold = Annotated[float, Field(ge=0)] | Quantile
StepSize = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["1/L"]


class Method(BaseModel):
    """The base of all methods: a frozen record of constants.

    sigma     σ, the standard deviation of each coordinate of the noise N(0, σ² I) that makes the run private: of a
              worker's message, or of its gradient where privacy.level = "example"
    epsilon   ε, from which σ is calculated instead, so that all rounds together are (ε, δ)-differentially private
    delta     δ"""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    sends_gradients: ClassVar[bool] = True      # or momenta of gradients, clipped or not; False: changes of something
    partial: ClassVar[Literal["mean", "sum"] | None] = "mean"
    sigma: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None

    @property
    def private(self) -> bool:
        """Whether noise was asked for."""
        return self.sigma is not None or self.epsilon is not None

    @property
    def gradients(self) -> int:
        """How many gradients a worker computes in a round."""
        return 1

    @property
    def first_gradients(self) -> int:
        """How many gradients a worker computes in `start`."""
        return 0

    def bound(self) -> float | None:
        """The length that no worker's message can exceed, before the noise; None: there is none."""
        return None

    def init(self, s: Any, workers: Any) -> None:
        """Declare the state beside s.x."""

    def start(self, x, s: Any, workers: Any, aggregate: Any) -> None:
        """What happens once, before round 0: arguments as of `round`. Its minibatches are its own."""

    def round(self, x, s: Any, workers: Any, aggregate: Any) -> None:
        """One round: updates s.x, and whatever else is in s."""
        raise NotImplementedError


def names() -> list[str]:
    """The methods there are: the files of this folder."""
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def load(name: str) -> type[Method]:
    """The record of the method called `name`. Raises InputError if there is none."""
    if name not in names():
        raise unknown("method.name", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    method = next(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__
                  and issubclass(c, Method))
    method.name = name
    return method


def __getattr__(name: str) -> Any:
    """mpiclip.methods.Clip21: the record called so, wherever it lives."""
    for method in map(load, names()):
        if method.__name__ == name:
            return method
    raise AttributeError(name)
