"""Constants given by a rule: step sizes from the smoothness of the problem, thresholds from the first gradients."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log, sqrt
from typing import Any

import numpy as np

from .device import host, xp
from .errors import InputError
from .methods import Method, Quantile
from .server import Server
from .streams import stream
from .workers import Workers

PRECISION, DOUBT = 0.005, 1e-6      # ε, and the probability that the estimate is farther off


def resolve(method: Method, x, workers: Workers, server: Server) -> Method:
    """The method with every constant a number. Raises InputError where the problem has no bound on its Hessian."""
    values: dict[str, float] = {}
    tau: Any = getattr(method, "tau", None)
    if isinstance(tau, Quantile):
        tau = values["tau"] = float(np.quantile(workers.first_norms(x), tau.quantile))
    if isinstance(rule := getattr(method, "stepsize", None), str):
        L, L_max = smoothness(workers, server)
        values["stepsize"] = 1 / L if rule == "1/L" else clip21_stepsize(tau, L, L_max, x, workers, server)
    return method.model_copy(update=values)


def clip21_stepsize(tau: float, L: float, L_max: float, x, workers: Workers, server: Server) -> float:
    """γ = min{1/L, τ/(2 L_max V)} with D = max(0, B − τ), B = max_i ‖∇f_i(x⁰)‖, S = D² + 2D³/(3τ),
    V = √(2 L F_0 + S) + D. F_0 = f(x⁰) − inf f is bounded by f(x⁰): our losses are not negative.

    It keeps max_i ‖∇f_i(x^k) − v_i^k‖ ≤ max(0, D − kτ/2): the error shrinks by at least τ/2 a round, because
    γ L_max ‖v^k‖ ≤ τ/2 as long as ‖v^k‖ ≤ V."""
    if tau <= 0:
        raise InputError(f"method.tau = {tau}: the step size \"theory\" needs a threshold above 0",
                         agreed=True)
    D = max(0.0, float(workers.first_norms(x).max()) - tau)
    S = D**2 + 2 * D**3 / (3 * tau)
    V = np.sqrt(2 * L * workers.evaluate(x, server)["loss"] + S) + D
    return float(min(1 / L, tau / (2 * L_max * V)) if V > 0 else 1 / L)


def smoothness(workers: Workers, server: Server) -> tuple[float, float]:
    """(L, L_max): upper bounds on the smoothness constants of f = (1/n) Σ f_i, and of the worst f_i: the largest
    eigenvalues of the problem's bounds of the Hessians, and at most 0.5 % more."""
    problem, data = workers.problem, workers.data
    start = workers.device.put(stream(workers.seed, "smoothness").standard_normal(workers.d).astype(workers.dtype))

    def mean_product(part):             # of the mean: all ranks together, each its columns
        u_i = workers.copies(server.join(part))
        return server.mean(problem.smoothness_product(u_i, data)) * (server.n / workers.honest)

    def each_dot(u_i, v_i):             # of each worker: no need of the others
        return host(xp(u_i).einsum("ij,ij->i", u_i, v_i, dtype=np.float64))

    L = float(largest_eigenvalue(mean_product, lambda u, v: np.array(server.dot(u, v)), start[server.own], workers.d))
    L_i = largest_eigenvalue(lambda u_i: problem.smoothness_product(u_i, data), each_dot, workers.copies(start),
                             workers.d)
    L_max = max(server.comm.all(float(L_i.max())))
    if not 0 < L < np.inf:
        raise InputError(f"method.stepsize: the smoothness of the problem is {L:g}, so 1/L is none", agreed=True)
    return L, L_max


def largest_eigenvalue(product: Callable, dot: Callable, start, d: int) -> np.ndarray:
    """The largest eigenvalue of symmetric, positive semi-definite d × d matrices, from above, by the Lanczos method.

    product(u) applies the matrices to vectors, (…, columns), dot(u, v) → (…) float64 is their inner product, start is
    random and normal. The number k of steps depends on d alone, so all ranks and any number of them do the same. With
    λ the result before it is enlarged, λ_max (1 − ε) ≤ λ ≤ λ_max fails with a probability of at most
    1.648 √d exp(−√ε (2k − 1)), however the eigenvalues lie: Kuczyński, Woźniakowski (1992), "Estimating the largest
    eigenvalue by the power and Lanczos algorithms with a random start", Theorem 4.2."""
    k = min(d, ceil((log(1.648 * sqrt(d) / DOUBT) / sqrt(PRECISION) + 1) / 2))
    diagonal: list[np.ndarray] = []
    beside: list[np.ndarray] = []
    length = np.sqrt(dot(start, start))
    u, before = _divided(start, length), start * 0
    for _ in range(k):
        v = product(u) - _times(before, beside[-1] if beside else np.zeros_like(length))
        diagonal.append(dot(u, v))
        v = v - _times(u, diagonal[-1])
        beside.append(np.sqrt(dot(v, v)))
        u, before = _divided(v, beside[-1]), u
    T = np.zeros((*length.shape, k, k))
    for j in range(k):
        T[..., j, j] = diagonal[j]
        if j:
            T[..., j, j - 1] = T[..., j - 1, j] = beside[j - 1]
    return np.linalg.eigvalsh(T)[..., -1] / (1 - PRECISION)


def _times(u, factor: np.ndarray):
    """u, (…, columns), each vector times its factor (…)."""
    return u * xp(u).asarray(factor, u.dtype)[..., None]


def _divided(u, length: np.ndarray):
    """u, (…, columns), each vector divided by its length (…); zeros stay zeros."""
    return _times(u, 1 / np.where(length > 0, length, np.inf))
