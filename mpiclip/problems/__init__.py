"""Problems, one file each: what worker i's f_i is. The file's name is the config's `problem.name`, the record's fields
are its keys.

A problem is a frozen record of constants with functions of `data`, which `prepare` made of this rank's w workers:

    prepare(shard, ids, n, seed, dtype) → data
    x0(data, seed, dtype) → x⁰ (d,)
    loss_grad(x, data, batch=None, out=None, loss=True, clip=None) → (f_i(x) (w,) float64 or None, ∇f_i(x) (w, d))
    smoothness_product(u_i, data) → H_i u_i (w, d)      where H_i bounds the Hessian of f_i from above, for all x
    accuracy(x, data) → (rows that x (d,) classifies correctly, rows)        of classifiers
    flipped(data) → data with the labels c → C − 1 − c, or −b                of classifiers
    views(data) → how many versions of each row minibatches draw from        of images
    carried, follow, perplexity                                              of sequences, which are read in order

x           (d,), a point for all, or (w, d), one for each worker
batch       None: all rows; or (rows (k,) int64, offsets (w+1,) int64, denominators (w,) float64): worker i's are
            rows[offsets[i]:offsets[i+1]], repetitions allowed, and their sum is divided by denominators[i]. Row r in
            its version v has the number r + v·m, m the rows in data. Of sequences: what `follow` made, or windows
out         (w, d), filled with the gradients and returned; None allocates
clip        C > 0: each row's gradient of ℓ_r, over all of x and without the regularizer, counts min(1, C/‖∇ℓ_r‖) times;
            losses are those of the rows as they are. None, or infinity: no row is clipped. The norms are computed from
            what the gradient is a product of (no row's gradient is ever there): exact, up to the dtype's rounding

A worker that owns no rows has f_i = 0, without a regularizer."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..device import xp
from ..errors import InputError, unknown

Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# r(x) = Σ_j ρ(x_j): ρ, ρ' and the largest ρ''
REGULARIZERS: dict[str, tuple[Any, Any, float]] = {
    "l2": (lambda x: x * x / 2, lambda x: x, 1.0),
    "nonconvex": (lambda x: x * x / (1 + x * x), lambda x: 2 * x / (1 + x * x) ** 2, 2.0),
}


class Problem(BaseModel):
    """The base of all problems. f_i has the term λ r(x): r = ½‖x‖² (l2) or Σ_j x_j²/(1 + x_j²) (nonconvex)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    classifier: ClassVar[bool] = False
    language: ClassVar[bool] = False            # learns from text, and has a perplexity
    regularizer: Literal["none", "l2", "nonconvex"] = "none"
    lam: NotNegative = 0.0
    start: Finite = 0.0

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.name = cls.__module__.rpartition(".")[2]

    def prepare(self, shard: Any, ids: np.ndarray, n: int, seed: int, dtype: str) -> Any:
        """The data of this rank's workers `ids`, out of n, of which `shard` (data.Shard) holds the rows; None: there
        is no data set. Raises InputError where the data do not fit the problem."""
        raise NotImplementedError

    def x0(self, data: Any, seed: int, dtype: str) -> np.ndarray:
        """The first point, (d,): start · (1, …, 1)."""
        raise NotImplementedError

    def loss_grad(self, x, data: Any, batch=None, out=None, loss: bool = True, clip=None) -> tuple[Any, Any]:
        """(f_i(x) (w,) float64, or None unless `loss`; ∇f_i(x) (w, d)). InputError for `clip` where f_i has no rows."""
        raise NotImplementedError

    def smoothness_product(self, u_i, data: Any) -> Any:
        """H_i u_i (w, d), where H_i bounds the Hessian of f_i from above, for all x. InputError if none is known."""
        raise InputError(f"method.stepsize: the smoothness of the problem '{self.name}' is not known; give a number",
                         agreed=True)

    def accuracy(self, x, data: Any) -> tuple[int, int]:
        """(rows that x (d,) classifies correctly, rows), if this is a `classifier`"""
        raise NotImplementedError

    def flipped(self, data: Any) -> Any:
        """The same rows with the labels the other way round: of C classes c becomes C − 1 − c, of two −b. The features
        are shared. InputError if this is no `classifier`."""
        if not self.classifier:
            raise InputError(f"aggregate.attack: there are no labels to flip; problem.name = '{self.name}' has no "
                             "classes, expected a problem that has", agreed=True)
        return data.flipped

    def views(self, data: Any) -> int:
        """How many versions of each row a minibatch may hold, version 0 being the row itself."""
        return 1

    def carried(self, data: Any, batch: int | None) -> tuple[int, ...] | None:
        """The shape of what a worker carries from one minibatch of `batch` sequences (None: all rows) to the next; None
        if each is drawn by itself. InputError where a worker's data are too short."""
        return None

    def follow(self, data: Any, batch: int, ids: np.ndarray, taken_i: np.ndarray, carried_i: Any, seed: int) -> Any:
        """The next minibatch, as loss_grad takes it, of workers `ids` (w,) that have had taken_i (w,) int64 so far, −1:
        an empty one. loss_grad puts what they carry on into carried_i (w, *carried)."""
        raise NotImplementedError

    def perplexity(self, x, data: Any) -> tuple[float, int]:
        """(Σ −log p(token), tokens) of the text that `data` holds, if this learns a `language`"""
        raise NotImplementedError

    def regularize(self, x, grad, loss, owners) -> None:
        """∇f_i += λ r'(x_i), and f_i += λ r(x_i) unless `loss` is None, for the workers that are `owners` (w,).
        x: (w, C, p) or (1, C, p); grad: (w, C, p)."""
        if self.regularizer == "none":
            return
        value, slope, _ = REGULARIZERS[self.regularizer]
        owners = xp(x).asarray(owners)
        grad += xp(x).where(owners[:, None, None], x.dtype.type(self.lam) * slope(x), 0)
        if loss is not None:
            loss += xp(x).where(owners, self.lam * value(x.astype(np.float64)).sum((1, 2)), 0)

    @property
    def regularizer_curvature(self) -> float:
        """λ max ρ'': an upper bound of the Hessian of λ r."""
        return 0.0 if self.regularizer == "none" else self.lam * REGULARIZERS[self.regularizer][2]


def names() -> list[str]:
    """The problems there are: the files of this folder."""
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def load(name: str) -> type[Problem]:
    """The record of the problem called `name`. Raises InputError if there is none."""
    if name not in names():
        raise unknown("problem.name", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    return next(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__
                and issubclass(c, Problem))


def __getattr__(name: str) -> type[Problem]:
    """mpiclip.problems.Logistic: the record called so, wherever it lives."""
    for problem in map(load, names()):
        if problem.__name__ == name:
            return problem
    raise AttributeError(name)
