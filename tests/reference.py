"""The papers' algorithms, written plainly over i = 1 … n in one process, in float64. Imports nothing of mpiclip.

`grads` is the list of the workers' gradient functions ∇f_1 … ∇f_n; every function returns the trajectory x⁰ … x^K."""

import numpy as np


def clip(u, tau):
    """clip_τ(u) = min(1, τ/‖u‖) u"""
    norm = np.linalg.norm(u)
    return u if norm <= tau else u * (tau / norm)


def gd(grads, x, K, stepsize):
    xs = [x]
    for _ in range(K):
        x = x - stepsize * sum(g(x) for g in grads) / len(grads)
        xs.append(x)
    return np.array(xs)


def sgd(grads, x, K, stepsize, beta):
    xs, m = [x], np.zeros_like(x)
    for _ in range(K):
        m = beta * m + sum(g(x) for g in grads) / len(grads)
        x = x - stepsize * m
        xs.append(x)
    return np.array(xs)


def clip_gd(grads, x, K, tau, stepsize):
    xs = [x]
    for _ in range(K):
        x = x - stepsize * sum(clip(g(x), tau) for g in grads) / len(grads)
        xs.append(x)
    return np.array(xs)


def clip21(grads, x, K, tau, stepsize):
    n = len(grads)
    xs, v, v_i = [x], np.zeros_like(x), [np.zeros_like(x) for _ in grads]
    for _ in range(K):
        c = []
        for i in range(n):
            c_i = clip(grads[i](x) - v_i[i], tau)
            v_i[i] = v_i[i] + c_i
            c.append(c_i)
        v = v + sum(c) / n
        x = x - stepsize * v
        xs.append(x)
    return np.array(xs)


def clip21_avg(a, K, tau):
    """The server's estimates of the mean of the rows of a, from 0."""
    n = len(a)
    v, v_i = np.zeros(a.shape[1]), [np.zeros(a.shape[1]) for _ in range(n)]
    vs = [v]
    for _ in range(K):
        c = [clip(a[i] - v_i[i], tau) for i in range(n)]
        for i in range(n):
            v_i[i] = v_i[i] + c[i]
        v = v + sum(c) / n
        vs.append(v)
    return np.array(vs)


def celgc(grads, x, K, eta, gamma, interval):
    """Trajectory of the averaged model, one entry a round of `interval` local steps."""
    xs = [x]
    for _ in range(K):
        models = []
        for g in grads:
            x_i = x
            for _ in range(interval):
                g_i = g(x_i)
                norm = np.linalg.norm(g_i)
                x_i = x_i - (eta if norm == 0 else min(eta, gamma / norm)) * g_i
            models.append(x_i)
        x = sum(models) / len(models)
        xs.append(x)
    return np.array(xs)


def naive_parallel(grads, x, K, eta, gamma):
    xs = [x]
    for _ in range(K):
        g = sum(g(x) for g in grads) / len(grads)
        norm = np.linalg.norm(g)
        x = x - (eta if norm == 0 else min(eta, gamma / norm)) * g
        xs.append(x)
    return np.array(xs)


# ---- robust rules, from their definitions


def arc(X, f):
    X = [np.array(row) for row in X]
    n = len(X)
    k = (2 * f * (n - f)) // n
    order = sorted(range(n), key=lambda i: -np.linalg.norm(X[i]))
    C = np.linalg.norm(X[order[k]])
    return np.array([clip(row, C) for row in X])


def nnm(X, f):
    n = len(X)
    out = []
    for i in range(n):
        near = sorted(range(n), key=lambda j: float(np.sum((X[i] - X[j]) ** 2)))[:n - f]
        out.append(sum(X[j] for j in near) / (n - f))
    return np.array(out)


def trimmed_mean(X, f):
    n, d = X.shape
    return np.array([sum(sorted(X[:, j])[f:n - f]) / (n - 2 * f) for j in range(d)])


def median(X, f):
    def middle(values):
        values, m = sorted(values), len(values) // 2
        return values[m] if len(values) % 2 else (values[m - 1] + values[m]) / 2
    return np.array([middle(X[:, j]) for j in range(X.shape[1])])


def mean(X, f):
    return sum(X) / len(X)


def sign_flip(X, f):
    """The last f of n rows become minus the mean of the others."""
    X = X.copy()
    X[len(X) - f:] = -sum(X[:len(X) - f]) / (len(X) - f)
    return X
