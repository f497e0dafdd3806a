"""What Byzantine workers send: an attack sees the honest rows of the round and replaces the others.

An attack is a function (rows, byzantine, scene, **constants) → Rows; `byzantine` (n,) bool marks the workers that lie,
`scene` is what an attacker who knows everything sees beside the rows. In all attacks here the liars send the same. A
new one is a function in this file, marked @attack: its name is the config's `attack = { name = … }`, its keyword
arguments are the keys, and their annotations say what is allowed; `memory`, if it has such an argument, is a vector
(columns,) that lasts from round to round, and is 0 at first; updated in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from . import columns
from .device import xp
from .rows import Rows

GIVEN = ("rows", "byzantine", "scene", "memory")
MARGIN = 1e-6       # what a factor has to do more harm by, relatively, to count as worse: rounding decides nothing

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

ATTACKS: dict[str, Callable] = {}       # every attack by its name in a config
FACTS: dict[str, Facts] = {}            # what an aggregation has to know of it


class Scene(Protocol):
    """What an attacker who knows everything sees beside the rows. Vectors are this rank's columns of them."""

    round: int                                  # the number of the round

    def harm(self, rows: Rows) -> float:
        """‖F(rows) − the honest workers' mean‖₂ if these rows are sent, F being the rules in use: the same on every
        rank. Nothing is remembered or counted. A mixture of rows that were tried before costs no new Gram matrix."""

    def normal(self) -> Any:
        """A vector of N(0, 1) numbers, a function of the run's seed and the round."""

    def flipped(self) -> Any:
        """The mean of the honest workers' gradients, of the same minibatches, with the labels c → C − 1 − c."""


@dataclass(frozen=True)
class Facts:
    """Of an attack: which of GIVEN it wants; whether it sends gradients of flipped labels, which fit only methods whose
    messages are gradients, and problems with classes; its condition on n workers of which f are Byzantine, holds(n, f,
    **constants), and the same for people."""

    wants: frozenset[str]
    flips: bool = False
    needs: str = ""
    holds: Callable[..., bool] = lambda n, f, **constants: True


def attack(function: Callable | None = None, **facts: Any) -> Any:
    """Make a function an attack that a config can name; `facts` are those of Facts."""
    if function is None:
        return partial(attack, **facts)
    wants = frozenset(inspect.signature(function).parameters).intersection(GIVEN)
    ATTACKS[function.__name__], FACTS[function.__name__] = function, Facts(wants, **facts)
    return function


@attack
def sign_flip(rows: Rows, byzantine: np.ndarray, scene: Scene) -> Rows:
    """SF: minus the mean of the honest vectors. Li et al. (2020), "Learning to detect malicious clients for robust
    federated learning", arXiv:2002.00211; Allouah et al. (2024), arXiv:2405.14432."""
    return _mixture(rows, byzantine, -honest_mean(byzantine))


@attack(flips=True)
def label_flip(rows: Rows, byzantine: np.ndarray, scene: Scene) -> Rows:
    """LF: the mean of the honest workers' gradients with the labels c → C − 1 − c, as if all data were poisoned.
    Allouah et al. (2023), "Fixing by mixing", arXiv:2302.01772."""
    return _vector(rows, byzantine, scene.flipped())


@attack
def ipm(rows: Rows, byzantine: np.ndarray, scene: Scene, factor: Finite = 2.0) -> Rows:
    """Inner-product manipulation, also called fall of empires (FOE): −factor · mean of the honest vectors.
    Xie, Koyejo and Gupta (2019), "Fall of empires: breaking Byzantine-tolerant SGD by inner product manipulation",
    arXiv:1903.03936."""
    return _mixture(rows, byzantine, -factor * honest_mean(byzantine))


@attack
def alie(rows: Rows, byzantine: np.ndarray, scene: Scene, factor: Finite = 1.5) -> Rows:
    """A little is enough: of each coordinate, mean + factor · standard deviation (that of a sample) of the honest
    values. Baruch, Baruch and Goldberg (2019), "A little is enough: circumventing defenses for distributed learning",
    arXiv:1902.06156."""
    rows, send = _deviating(rows, byzantine)
    return _mixture(rows, byzantine, send(factor))


@attack
def opt_ipm(rows: Rows, byzantine: np.ndarray, scene: Scene) -> Rows:
    """Inner-product manipulation with the factor that does the rules in use the most harm, of those `worst` tries.
    Shejwalkar and Houmansadr (2021), "Manipulating the Byzantine", NDSS; Allouah et al. (2023), arXiv:2302.01772."""
    def sent(factor: float) -> Rows:
        return _mixture(rows, byzantine, -factor * honest_mean(byzantine))
    return sent(worst(lambda factor: scene.harm(sent(factor))))


@attack
def opt_alie(rows: Rows, byzantine: np.ndarray, scene: Scene) -> Rows:
    """A little is enough with the factor that does the rules in use the most harm, of those `worst` tries. Sources as
    of opt_ipm."""
    more, send = _deviating(rows, byzantine)

    def sent(factor: float) -> Rows:
        return _mixture(more, byzantine, send(factor))
    return sent(worst(lambda factor: scene.harm(sent(factor))))


@attack(needs="the number of an honest worker, which are the first n − f",
        holds=lambda n, f, worker: worker < n - f)
def mimic(rows: Rows, byzantine: np.ndarray, scene: Scene, worker: Annotated[int, Field(ge=0)] = 0) -> Rows:
    """A copy of what this honest worker sends: nothing is wrong with it, but it counts f + 1 times. Karimireddy, He and
    Jaggi (2022), "Byzantine-robust learning on heterogeneous datasets via bucketing", arXiv:2006.09365."""
    return _mixture(rows, byzantine, np.eye(rows.n)[worker])


@attack
def gaussian(rows: Rows, byzantine: np.ndarray, scene: Scene, sigma: Positive = 1.0) -> Rows:
    """Noise: N(0, σ²) numbers, whatever the honest vectors are."""
    vector = scene.normal()
    with np.errstate(over="ignore"):
        vector *= vector.dtype.type(sigma)
    return _vector(rows, byzantine, vector)


@attack
def huge(rows: Rows, byzantine: np.ndarray, scene: Scene, size: Finite = 1e30) -> Rows:
    """The value `size` in every coordinate. What is no finite number of the run's dtype is sent as infinite."""
    return _vector(rows, byzantine, _filled(rows, size))


@attack
def nan(rows: Rows, byzantine: np.ndarray, scene: Scene) -> Rows:
    """Not a number, in every coordinate."""
    return _vector(rows, byzantine, _filled(rows, np.nan))


@attack
def inf(rows: Rows, byzantine: np.ndarray, scene: Scene) -> Rows:
    """Infinity, in every coordinate."""
    return _vector(rows, byzantine, _filled(rows, np.inf))


@attack
def zeros(rows: Rows, byzantine: np.ndarray, scene: Scene) -> Rows:
    """Nothing: zeros, as of a worker that does no work."""
    return _mixture(rows, byzantine, np.zeros(rows.n))


@attack
def stale(rows: Rows, byzantine: np.ndarray, scene: Scene, memory: Any,
          every: Annotated[int, Field(ge=1)] = 10) -> Rows:
    """What the honest vectors' mean was in the last round whose number `every` divides: workers that are behind."""
    if scene.round % every == 0:
        memory[:] = rows.combine(honest_mean(byzantine))
    return _vector(rows, byzantine, memory)


def honest_mean(byzantine: np.ndarray) -> np.ndarray:
    """The weights of the honest workers' mean, (n,)."""
    honest = ~byzantine
    return honest / honest.sum()


def worst(harm: Callable[[float], float], evaluations: int = 20) -> float:
    """The factor ≥ 0 with the most harm that a line search finds: from 0 on, in steps that double while things get
    worse, then in steps that shrink by 0.8. The search of ByzFL (González et al. 2025, arXiv:2505.24802)."""
    factor, most, step, growing = 0.0, harm(0.0), 10.0, True
    for _ in range(evaluations - 1):
        found = harm(factor + step)
        worse = found > most * (1 + MARGIN)
        if worse:
            factor, most = factor + step, found
        growing &= worse
        step *= 2 if growing else 0.8
    return factor


def _deviating(rows: Rows, byzantine: np.ndarray) -> tuple[Rows, Callable[[float], np.ndarray]]:
    """The rows, and after them the standard deviation of the honest ones; and factor → the weights of mean + factor ·
    deviation."""
    honest = rows.mix(np.eye(rows.n)[~byzantine])
    mean, more = honest_mean(byzantine), rows.append(honest.coordinates(columns.deviation))
    return more, lambda factor: np.append(mean, factor)


def _mixture(rows: Rows, byzantine: np.ndarray, weights: np.ndarray) -> Rows:
    """All Byzantine workers send Σ_j weights_j x_j. weights: (n,), and one for each vector appended to the n rows."""
    W = np.eye(len(byzantine), rows.n)
    W[byzantine] = weights
    return rows.mix(W)


def _vector(rows: Rows, byzantine: np.ndarray, vector: Any) -> Rows:
    """All Byzantine workers send this vector, of which this rank has its columns."""
    return _mixture(rows.append(vector), byzantine, np.eye(rows.n + 1)[rows.n])


def _filled(rows: Rows, value: float) -> Any:
    """The vector with this value in every coordinate."""
    with np.errstate(over="ignore"):
        return xp(rows.X).full_like(rows.X[0], rows.X.dtype.type(value))
