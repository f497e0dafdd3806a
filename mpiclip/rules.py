"""Robust aggregation: from n vectors, of which up to f may be anything, to one.

A rule is a function (rows, f, **constants) → Rows (a pre-aggregation: it is followed by another) or → this rank's
columns of the aggregate. A chain is applied from left to right; if Rows remain, their mean is the aggregate. A new rule
is a function in this file, marked @rule or @pre_aggregation: its name is what is written in `rules = [...]`, its
keyword arguments are the constants of `{ name = …, … }`, and their annotations say what is allowed. Two arguments are
the runtime's, not the config's:

    random   a generator, a function of the run's seed and the round: the same on every rank
    memory   a vector (columns,) that lasts from one call to the next, and is 0 at first; updated in place

`needs` states a rule's own condition beside n > 2f, which all have; n is the number of rows that reach it. Where two
rows do as well, the one with the lower index is taken."""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import comb
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from . import columns, records
from .errors import InputError
from .rows import TINY, Rows

GIVEN = ("rows", "f", "random", "memory")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]

RULES: dict[str, Callable] = {}         # every rule by its name in a config
_FACTS: dict[str, Facts] = {}           # what a chain has to know of it


@dataclass(frozen=True)
class Facts:
    """Of a rule: which of GIVEN it wants; its condition, holds(n, f, **constants), and the same for people; the number
    of rows that it makes of n, gives(n, **constants), or None, where it makes one vector; whether it measures inner
    products or distances of all pairs; or else what it looks at first, of all rows, looks(rows, f, **constants), which
    tells whether they are finite, too."""

    wants: frozenset[str]
    needs: str = "n > 2f"
    holds: Callable[..., bool] = lambda n, f, **constants: n > 2 * f
    gives: Callable[..., int] | None = None
    measures: bool = False
    looks: Callable[..., None] | None = None


def rule(function: Callable | None = None, **facts: Any) -> Any:
    """Make a function a rule that a config can name; `facts` are those of Facts."""
    if function is None:
        return partial(rule, **facts)
    wants = frozenset(inspect.signature(function).parameters).intersection(GIVEN)
    RULES[function.__name__], _FACTS[function.__name__] = function, Facts(wants, **facts)
    return function


def pre_aggregation(function: Callable | None = None, *, gives: Callable[..., int] = lambda n, **constants: n,
                    **facts: Any) -> Any:
    """Make a function a rule that stands before another: it makes gives(n, **constants) rows of n."""
    return rule(function, gives=gives, **facts)


# ---- coordinate by coordinate


@rule(looks=lambda rows, f: rows.look())
def mean(rows: Rows, f: int):
    """The mean; robust to nothing."""
    return rows.mean()


@rule
def median(rows: Rows, f: int):
    """Coordinate-wise median (CWMed); of an even number, the mean of the middle two.
    Yin et al. (2018), arXiv:1803.01498."""
    return rows.coordinates(columns.median)


@rule
def trimmed_mean(rows: Rows, f: int):
    """Coordinate-wise trimmed mean (CWTM): of each coordinate, the mean without its f smallest and f largest values.
    Yin et al. (2018), arXiv:1803.01498."""
    return rows.coordinates(columns.trimmed_mean, f)


@rule
def mean_around_median(rows: Rows, f: int):
    """Mean around the median (Meamed): of each coordinate, the mean of the n − f values nearest to its median.
    Xie et al. (2018), arXiv:1802.10116."""
    return rows.coordinates(columns.mean_around_median, f)


# ---- rows made shorter, or mixed


@pre_aggregation
def arc(rows: Rows, f: int) -> Rows:
    """Adaptive robust clipping: the k = ⌊2f(n−f)/n⌋ longest rows are shortened to the next one's length.
    Allouah et al. (2024), arXiv:2405.14432, Algorithm 2."""
    n, norm = rows.n, rows.norms()
    k = 2 * f * (n - f) // n
    return _shorten(rows, norm, np.sort(norm)[n - k - 1])


@pre_aggregation
def clipping(rows: Rows, f: int, *, threshold: Positive = 2.0) -> Rows:
    """Static clipping: longer rows are shortened to the threshold. No rule stays robust behind it: Allouah et al.
    (2024), arXiv:2405.14432, Lemma 3.1."""
    return _shorten(rows, rows.norms(), threshold)


def _shorten(rows: Rows, norm: np.ndarray, C: float) -> Rows:
    """min(1, C/‖x_i‖) x_i"""
    rows.counts["shortened"] += int((norm > C * (1 + 1e-6)).sum())      # not those that are longer by rounding only
    return rows.mix(np.diag(C / np.maximum(norm, max(C, TINY))))


@pre_aggregation(measures=True)
def nnm(rows: Rows, f: int) -> Rows:
    """Nearest-neighbour mixing: every row becomes the mean of the n − f rows nearest to it, itself included.
    Allouah et al. (2023), "Fixing by mixing", arXiv:2302.01772, Algorithm 2."""
    n = rows.n
    near = _lowest(rows.distances(), n - f)
    W = np.zeros((n, n))
    np.put_along_axis(W, near, 1 / (n - f), axis=1)
    return rows.mix(W)


@pre_aggregation(gives=lambda n, s: -(-n // s))
def bucketing(rows: Rows, f: int, *, s: Some = 2, random: np.random.Generator) -> Rows:
    """The rows are dealt into buckets of s, the last perhaps of fewer; of each, the mean. f rows spoil up to f of the
    ⌈n/s⌉ buckets. Karimireddy, He, Jaggi (2022), arXiv:2006.09365, Algorithm 1."""
    bucket = np.empty(rows.n, int)
    bucket[random.permutation(rows.n)] = np.arange(rows.n) // s
    W = (bucket == np.arange(-(-rows.n // s))[:, None]).astype(float)
    return rows.mix(W / W.sum(1, keepdims=True))


# ---- some of the rows


@rule(measures=True)
def krum(rows: Rows, f: int):
    """The row whose n − f − 1 nearest others are nearest: the smallest sum of squared distances. Blanchard et al.
    (2017), arXiv:1703.02757, who sum over one neighbour less, n − f − 2, and want n > 2f + 2; this is how Allouah et
    al. (2023), arXiv:2302.01772, define it, for n > 2f, and how the ARC paper's experiments have it."""
    return _mean_of(rows, _lowest(_scores(rows, f), 1))


@rule(measures=True)
def multi_krum(rows: Rows, f: int):
    """The mean of the n − f rows with Krum's lowest scores. Blanchard et al. (2017), arXiv:1703.02757, with Krum's
    scores as above."""
    return _mean_of(rows, _lowest(_scores(rows, f), rows.n - f))


@rule(needs="pivot < n", holds=lambda n, f, pivot: pivot < n, looks=lambda rows, f, pivot: rows.look(pivot))
def monna(rows: Rows, f: int, *, pivot: Count = 0):
    """The mean of the n − f rows nearest to row `pivot`, itself included. From decentralised learning, where this is
    one's own row: only as good as that worker. Farhadkhani et al. (2023), arXiv:2209.10931."""
    return _mean_of(rows, _lowest(rows.distances_to(pivot), rows.n - f))    # n of n² distances, so no Gram matrix


def _scores(rows: Rows, f: int) -> np.ndarray:
    """Krum's scores, (n,). A row is the nearest to itself and adds nothing."""
    return np.sort(rows.distances(), axis=1)[:, :rows.n - f].sum(1)


def _lowest(values: np.ndarray, k: int) -> np.ndarray:
    """The indices of the k lowest values of each row. Those that only rounding tells apart are equal, and of equal ones
    the first is the lowest: after NNM, say, many rows are at equal distances, and all ranks ought to choose alike,
    however many they are."""
    digits, exponent = np.frexp(values)
    return np.argsort(np.ldexp(digits.round(10), exponent), axis=-1, kind="stable")[..., :k]


def _mean_of(rows: Rows, kept):
    """The mean of the kept rows, by index. → (columns,)"""
    w = np.zeros(rows.n)
    w[kept] = 1 / len(kept)
    rows.counts["left_out"] += int((w == 0).sum())
    return rows.combine(w)


# _cover has hundreds of branches in practice, 1.47^f at worst
@rule(needs="f ≤ 32", holds=lambda n, f: f <= 32, measures=True)
def mda(rows: Rows, f: int):
    """Minimum-diameter averaging: the mean of the n − f rows whose largest distance is smallest; of several such sets
    the first, in the order of their indices. El Mhamdi et al. (2020), arXiv:1905.03853.

    Exact: n − f rows are no farther apart than t if, in the graph whose edges are the pairs that are, f rows touch
    every edge. To look for these costs little more for many rows than for few."""
    n, D = rows.n, rows.distances()
    D = np.maximum(D, D.T)

    def edges(t: float) -> list[int]:
        return [int.from_bytes(bits.tobytes(), "little") for bits in np.packbits(t < D, axis=1, bitorder="little")]
    alive, left, sizes = (1 << n) - 1, f, np.unique(D)
    t = sizes[bisect_left(sizes, True, key=lambda t: _cover(edges(t), alive, f) is not None)]
    far, kept = edges(t * (1 + 1e-12)), []
    out: Any = _cover(far, alive, f)        # one way to leave rows out; while it does, there is no need to look
    for i in range(n):
        row, lost = 1 << i, alive & far[i]
        if alive & row:
            other = _cover(far, alive & ~row & ~lost, left - lost.bit_count()) if out & row else out & ~lost
            if other is None:               # no such set has row i
                other, lost = out & ~row, row
            else:
                kept.append(i)
            out, alive, left = other, alive & ~row & ~lost, left - lost.bit_count()
    return _mean_of(rows, kept[:n - f])


def _cover(edges: list[int], alive: int, k: int) -> int | None:
    """At most k vertices that touch every edge between vertices that are alive, or None. Sets are bit masks; edges[v]
    is the neighbours of v."""
    cover = 0
    while k >= 0:
        degree = [(near & alive).bit_count() if alive >> v & 1 else 0 for v, near in enumerate(edges)]
        most = max(degree)
        if most == 0:
            return cover
        if sum(degree) > 2 * k * most:      # more than k vertices can touch
            break
        if 1 in degree:                     # the end of a path: its neighbour touches all that it does
            take = edges[degree.index(1)] & alive
        else:
            v = degree.index(most)
            take = 1 << v
            if 2 < most <= k:               # v, or else all its neighbours; of a cycle (2), any vertex will do
                rest = _cover(edges, alive & ~take, k - 1)
                if rest is not None:
                    return cover | take | rest
                take = edges[v] & alive
        cover, alive, k = cover | take, alive & ~take, k - take.bit_count()
    return None


@rule(needs="n choose f ≤ 200000", holds=lambda n, f: comb(n, f) <= 200_000, measures=True)
def smea(rows: Rows, f: int):
    """Smallest maximum eigenvalue averaging: the mean of the n − f rows whose covariance has the smallest largest
    eigenvalue. Allouah et al. (2023), "On the privacy-robustness-utility trilemma", arXiv:2302.04787.

    Exact: a set is taken from the middle of the list, and only those with a smaller eigenvalue stay, until none does.
    Eigenvalues are here those of Σ_{i ∈ S} (x_i − x̄_S)(x_i − x̄_S)ᵀ."""
    D, m = rows.distances(), rows.n - f
    S = np.argsort(D[np.sort(D, axis=1)[:, m - 1].argmin()], kind="stable")[:m]
    top = _largest(D, S)
    # Two rows of a set make an eigenvalue of half their squared distance: whoever has no m rows that near is out.
    A = np.flatnonzero((2 * top * (1 + 1e-9) >= D).sum(1) >= m)
    n = len(A)
    if n == m or top == 0:
        return _mean_of(rows, S)
    D, S = D[np.ix_(A, A)], np.searchsorted(A, S)
    G = _gram(D, np.full(n, 1 / n))
    sets = np.fromiter(combinations(range(n), n - m), (int, n - m))[::-1]       # of rows to leave out

    def below(t: float) -> np.ndarray:
        """The sets that leave no eigenvalue ≥ t: the matrix (1 − G_SS/t, 1; 1ᵀ, 0) has one negative eigenvalue then.
        It has those of all rows' but for those of its inverse at the rows left out (Haynsworth)."""
        K = np.ones((n + 1, n + 1))
        K[:n, :n], K[n, n] = np.eye(n) - G / t, 0
        inverse, of_all = np.linalg.inv(K), (np.linalg.eigvalsh(K) < 0).sum()
        negative = [_negative(inverse[R[:, None], R]) for R in np.array_split(sets.T, 1 + len(sets) // 10_000, axis=1)]
        return sets[np.concatenate(negative) == of_all - 1]
    while len(better := below(top * (1 - 1e-9))):
        middle = np.delete(np.arange(n), better[len(better) // 2])
        if (less := _largest(D, middle)) >= top:        # only where there are no digits left
            break
        sets, S, top = better, middle, less
    for left_out in below(top * (1 + 1e-9))[:1]:        # the first of equals
        S = np.delete(np.arange(n), left_out)
    return _mean_of(rows, A[S])


def _largest(D: np.ndarray, S: np.ndarray) -> float:
    """The largest eigenvalue of Σ_{i ∈ S} (x_i − x̄_S)(x_i − x̄_S)ᵀ."""
    D = D[np.ix_(S, S)]
    return max(np.linalg.eigvalsh(_gram(D, np.full(len(S), 1 / len(S))))[-1], D.max() / 2)


def _gram(D: np.ndarray, w: np.ndarray) -> np.ndarray:
    """⟨x_i − μ, x_j − μ⟩, μ = Σ_i w_i x_i with Σ w_i = 1, from the squared distances."""
    to_mean = D @ w
    return (to_mean[:, None] + to_mean - w @ to_mean - D) / 2


def _negative(A: np.ndarray) -> np.ndarray:
    """How many negative eigenvalues symmetric matrices have: by elimination, or, where a pivot is next to nothing, as
    it is for rows that are tied, by the eigenvalues. A: (k, k, number)"""
    whole, A = A, A.copy()
    count, lost = np.zeros(A.shape[2], int), np.zeros(A.shape[2], bool)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        for j in range(len(A)):
            count += A[j, j] < 0
            lost |= ~(np.abs(A[j, j]) > 1e-7 * np.abs(A[j:, j]).max(0))
            for i in range(j + 1, len(A)):
                A[i:, i] -= A[i, j] / A[j, j] * A[i:, j]
    if lost.any():
        count[lost] = (np.linalg.eigvalsh(np.moveaxis(whole[:, :, lost], 2, 0)) < 0).sum(1)
    return count


# ---- weights for all rows


@rule(measures=True)
def caf(rows: Rows, f: int):
    """Covariance-bound agnostic filter: along the direction of largest variance, rows lose weight as the square of
    their distance from the weighted mean, the farthest all of it, while the weights sum to more than n − 2f; of the
    means on the way, the one with the smallest such variance. Allouah, Guerraoui, Stephan (2025), arXiv:2505.01874.

    The farthest is meant of the rows that have a weight still, so that there are at most n steps."""
    from scipy.linalg import eigh  # half of what a run imports, for this rule alone
    n, D = rows.n, rows.distances()
    c, best, least = np.ones(n), np.ones(n), np.inf
    while True:
        S = np.flatnonzero(c)
        w = c[S] / c[S].sum()
        G, root = _gram(D[np.ix_(S, S)], w), np.sqrt(w)
        variance, u = eigh(root[:, None] * G * root, subset_by_index=[len(S) - 1] * 2)
        if variance < least:
            least, best = variance, c.copy()
        far = np.abs(G @ (root * u[:, 0]))
        if far.max() == 0:
            break
        c[S] *= 1 - (far / far.max()) ** 2
        if c.sum() <= n - 2 * f:
            break
    rows.counts["left_out"] += int((best == 0).sum())
    return rows.combine(best / best.sum())


@rule(looks=lambda rows, f, memory, **constants: rows.look(memory))
def centered_clipping(rows: Rows, f: int, *, threshold: Positive = 100.0, iterations: Some = 1, memory):
    """Centred clipping about the last aggregate v: v becomes v + 1/n Σ_i (x_i − v) min(1, τ/‖x_i − v‖), τ the
    threshold. Karimireddy, He, Jaggi (2021), arXiv:2012.10333."""
    v = memory
    for _ in range(iterations):
        distance = np.sqrt(rows.distances_to(v))
        a = threshold / np.maximum(distance, threshold) / rows.n
        v = float(1 - a.sum()) * v + rows.combine(a)
    rows.counts["shortened"] += int((distance > threshold).sum())
    memory[:] = v
    return v


@rule(measures=True)
def geometric_median(rows: Rows, f: int, *, iterations: Count = 0, nu: Positive | None = None):
    """The point z whose distances to the rows have the smallest sum (GM). Weiszfeld (1937): z becomes the mean with
    the weights 1/‖x_i − z‖; smoothed, as by Pillutla et al. (2022), arXiv:1912.13445, 1/max(ν, ‖x_i − z‖).

    iterations: so many of these steps from z = 0, which is what is often called by this name (3, with nu = 0.1).
    0: to the end; without nu, to the very median."""
    if iterations == 0:
        return rows.combine(_median(rows, nu))
    w = _inverse(rows.norms(), nu)
    for _ in range(iterations - 1):
        w = _inverse(rows.mix(np.eye(rows.n) - w / w.sum()).norms(), nu)
    return rows.combine(w / w.sum())


def _inverse(distance: np.ndarray, nu: float | None) -> np.ndarray:
    """1/max(ν, distance); without ν, next to nothing takes the place of 0."""
    if nu is None:
        nu = 1e-12 * np.median(distance[distance > 0]) if distance.any() else 1.0
    return 1 / np.maximum(distance, nu)


def _median(rows: Rows, nu: float | None) -> np.ndarray:
    """The weights (n,) of the rows in their geometric median."""
    n, D, one = rows.n, rows.distances(), np.eye(rows.n)
    middle = np.sqrt(D[np.median(D, axis=1).argmin()])
    # Row i is a median if the sum of the unit vectors to the others is no longer than the number of those that are
    # equal to it. If several points are, so is the middle between them.
    equal = 1e-13 * np.median(middle) ** 2 >= D
    V = np.where(equal, 0, 1 / np.sqrt(np.where(equal, 1, D)))
    medians = (rows.mix(V - np.diag(V.sum(1))).norms() <= equal.sum(1) * (1 + 1e-9)) / equal.sum(1)
    if medians.any() and nu is None:
        return medians / medians.sum()

    def look(w: np.ndarray):
        """At z = Σ w_i x_i: the ⟨x_i − z, x_j − z⟩, the ‖x_i − z‖, and the weights 1/max(ν, ‖x_i − z‖)."""
        M = rows.mix(one - w).gram()
        distance = np.sqrt(np.maximum(np.diag(M), 0))
        return M, distance, _inverse(distance, nu)

    usual = np.median(middle)
    nu = nu or 1e-12 * usual
    w = _inverse(np.maximum(middle, usual), nu)
    w /= w.sum()
    accuracy = 1e-10 + 1e-15 * np.median(rows.norms()) / max(usual, nu)     # x_i − z has no more digits than that
    M, distance, v = look(w)
    for _ in range(200):
        # A step leads to z + Σ_i b_i (x_i − z). With b = a it is Weiszfeld's, which always helps, but little where the
        # rows are nearly in a line; with Newton's b, or a part of it, if that does a quarter of what it promises.
        a = v / v.sum()
        bent = np.where(v * distance > 1 - 1e-9, a, 0)      # a distance below ν counts by its square
        newton = a * np.linalg.solve(one - (1 - 1e-10) * bent[:, None] * (v[:, None] * M * v), np.ones(n))
        for b in (newton, newton / 4, newton / 16, newton / 64, a):
            there = (1 - b.sum()) * w + b
            new = look(there)
            change = ((b @ M @ b - 2 * M @ b) / (distance + new[1] + TINY)).sum()       # of the sum of distances
            if change <= -0.25 * (v @ M @ b):
                break
        w, (M, distance, v) = there, new
        if (np.abs(v / v.sum() - a) <= accuracy * a).all():
            break
    return v / v.sum()


# ---- chains


@dataclass(frozen=True)
class Link:
    """A rule of a chain, with its constants."""

    name: str
    constants: dict[str, Any]

    def applied(self, rows: Rows, f: int, random: Callable, memory: Callable):
        """What the rule makes of the rows. random() and memory() are called only if it wants them."""
        wants = _FACTS[self.name].wants
        given = {name: call() for name, call in (("random", random), ("memory", memory)) if name in wants}
        return RULES[self.name](rows, f, **self.constants, **given)

    def look(self, rows: Rows, f: int, memory: Callable) -> None:
        """Compute what the rule will look at first."""
        facts = _FACTS[self.name]
        if facts.looks:
            facts.looks(rows, f, **self.constants, **({"memory": memory()} if "memory" in facts.wants else {}))


class Chain:
    """Rules that are applied from left to right to n rows, of which f may be anything.

    entries: names, or { name = …, … } with constants, as in a config. Raises InputError for a rule that does not exist
    or stands in the wrong place, and for an f that is too large for one of them; n None leaves the latter out.

    lasting: the names of the vectors that the rules remember, in the state of a run."""

    def __init__(self, entries: Sequence[Any], f: int = 0, n: int | None = None):
        self.f = f
        self.links = [Link(*records.named(RULES, entry, "aggregate.rules", GIVEN)) for entry in entries]
        for link in self.links[:-1]:
            if _FACTS[link.name].gives is None:
                raise InputError(f"aggregate.rules: '{link.name}' gives one vector, so it can only be the last rule")
        if n is not None:
            self._check(n)
        self.lasting = [f"rule{i}_{link.name}" for i, link in enumerate(self.links)
                        if "memory" in _FACTS[link.name].wants]
        self._measures = any(_FACTS[link.name].measures for link in self.links)

    def look(self, rows: Rows, memory: Callable) -> None:
        """Before anything else: compute of rows as they came, which may be not finite, what the rules will want to know
        first, so that one pass over the data does for that and for the check. memory: as below."""
        if self._measures:
            rows.measure()
        elif self.links:
            self.links[0].look(rows, self.f, partial(memory, f"rule0_{self.links[0].name}"))

    def __call__(self, rows: Rows, random: Callable, memory: Callable):
        """This rank's columns of the aggregate. random() → the generator of this call, memory(name) → a vector that
        lasts."""
        for i, link in enumerate(self.links):
            rows = link.applied(rows, self.f, random, partial(memory, f"rule{i}_{link.name}"))
        return rows.mean() if isinstance(rows, Rows) else rows

    def _check(self, n: int) -> None:
        """InputError if a rule's condition does not hold."""
        f = self.f
        if f < 0 or n <= 2 * f:
            raise InputError(f"aggregate.f: {f} of {n} workers; robust aggregation needs f ≥ 0 and n > 2f")
        for link in self.links:
            facts = _FACTS[link.name]
            if n <= 2 * f or not facts.holds(n, f, **link.constants):
                raise InputError(f"aggregate.f = {f}: '{link.name}' is handed n = {n} rows; it needs "
                                 f"{'n > 2f' if n <= 2 * f else facts.needs}")
            n = facts.gives(n, **link.constants) if facts.gives else 1
