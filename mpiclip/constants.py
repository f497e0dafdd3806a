"""Constants given by a rule: step sizes from the smoothness of the problem, thresholds from the first gradients."""

from __future__ import annotations

import numpy as np

from .device import host
from .errors import InputError
from .methods import Method, Quantile
from .server import Server
from .streams import stream
from .workers import Workers

ITERATIONS, PRECISION = 200, 1e-3       # of the power iterations


def resolve(method: Method, x, workers: Workers, server: Server) -> Method:
    """The method with every constant a number. Raises InputError where the problem has no bound on its Hessian."""
    values = method.model_dump()
    if isinstance(tau := getattr(method, "tau", None), Quantile):
        values["tau"] = float(np.quantile(workers.first_norms(x), tau.quantile))
    if isinstance(rule := getattr(method, "stepsize", None), str):
        L, L_max = smoothness(workers, server)
        values["stepsize"] = 1 / L if rule == "1/L" else clip21_stepsize(values["tau"], L, L_max, x, workers, server)
    return method.model_copy(update=values)


def clip21_stepsize(tau: float, L: float, L_max: float, x, workers: Workers, server: Server) -> float:
    """γ = min{1/L, τ/(2 L_max V)} with D = max(0, B − τ), B = max_i ‖∇f_i(x⁰)‖, S = D² + 2D³/(3τ),
    V = √(2 L F_0 + S) + D. F_0 = f(x⁰) − inf f is bounded by f(x⁰): our losses are not negative.

    It keeps max_i ‖∇f_i(x^k) − v_i^k‖ ≤ max(0, D − kτ/2): the error shrinks by at least τ/2 a round, because
    γ L_max ‖v^k‖ ≤ τ/2 as long as ‖v^k‖ ≤ V."""
    if tau <= 0:
        raise InputError(f"method.tau = {tau}: the step size \"theory\" needs a threshold above 0")
    D = max(0.0, float(workers.first_norms(x).max()) - tau)
    S = D**2 + 2 * D**3 / (3 * tau)
    V = np.sqrt(2 * L * workers.evaluate(x, server)["loss"] + S) + D
    return float(min(1 / L, tau / (2 * L_max * V)) if V > 0 else 1 / L)


def smoothness(workers: Workers, server: Server) -> tuple[float, float]:
    """(L, L_max): upper bounds on the smoothness constants of f = (1/n) Σ f_i, and of the worst f_i.

    Power iteration on the problem's bounds of the Hessians, until the residual is below 1e-3; the residual is added,
    since an eigenvalue is nowhere farther than that."""
    xp, problem, data = workers.device.xp, workers.problem, workers.data
    if not hasattr(problem, "smoothness_product"):
        raise InputError(f"method.stepsize: problem '{problem.name}' has no bound on its smoothness; give a number")
    start = stream(workers.seed, "smoothness").standard_normal(workers.d)

    u = xp.asarray(start / np.linalg.norm(start), workers.dtype)            # of the mean: on all ranks together
    for _ in range(ITERATIONS):
        product = server.mean(problem.smoothness_product(workers.copies(u), data)) * (server.n / workers.honest)
        value = server.dot(u[server.own], product)
        residual = server.norm(product - value * u[server.own])
        length = server.norm(product)
        if residual <= PRECISION * value or length == 0:
            break
        u = server.join(product / length).copy()
    L = value + residual

    u_i = workers.copies(xp.asarray(start, workers.dtype))                  # of each worker: no need of the others
    for _ in range(ITERATIONS):
        u_i /= xp.maximum(xp.linalg.norm(u_i, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        product_i = problem.smoothness_product(u_i, data)
        value_i = (u_i * product_i).sum(1)
        residual_i = xp.linalg.norm(product_i - value_i[:, None] * u_i, axis=1)
        if bool((residual_i <= PRECISION * value_i).all()):
            break
        u_i = product_i
    L_max = max(server.comm.all(float(host((value_i + residual_i).max()))))
    if not 0 < L < np.inf:
        raise InputError(f"method.stepsize: the smoothness of the problem is {L:g}, so 1/L is no step size")
    return L, L_max
