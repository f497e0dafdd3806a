"""The papers' algorithms, written plainly over i = 1 … n in one process, in float64. Imports nothing of mpiclip.

`grads` is the list of the workers' gradient functions ∇f_1 … ∇f_n; every function returns the trajectory x⁰ … x^K.
`noise`, where there is any, is what worker i adds to its message in round k: noise[k][i]."""

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


def silence(K, n):
    return [[0.0] * n for _ in range(K)]


def clip_gd(grads, x, K, tau, stepsize, beta=1.0, noise=None):
    n, noise = len(grads), noise or silence(K, len(grads))
    xs, v = [x], [np.zeros_like(x) for _ in grads]
    for k in range(K):
        s = []
        for i in range(n):
            v[i] = (1 - beta) * v[i] + beta * grads[i](x)
            s.append(clip(v[i], tau) + noise[k][i])
        x = x - stepsize * sum(s) / n
        xs.append(x)
    return np.array(xs)


def clip21(grads, x, K, tau, stepsize, noise=None, noisy_state=False):
    n, noise = len(grads), noise or silence(K, len(grads))
    xs, v, v_i = [x], np.zeros_like(x), [np.zeros_like(x) for _ in grads]
    for k in range(K):
        s = []
        for i in range(n):
            c_i = clip(grads[i](x) - v_i[i], tau)
            s.append(c_i + noise[k][i])
            v_i[i] = v_i[i] + (s[i] if noisy_state else c_i)
        v = v + sum(s) / n
        x = x - stepsize * v
        xs.append(x)
    return np.array(xs)


def clip21_sgd2m(grads, x, T, tau, stepsize, beta, beta_server, noise=None):
    """The paper's round begins with the server's step, which is null in the first one: x⁰ = x¹. noise[0][i] is added in
    that round, in which ∇f_i(x¹) is computed. Returns x¹ … x^{T+1}."""
    n, noise = len(grads), noise or silence(T + 1, len(grads))
    g = np.zeros_like(x)
    v_i, g_i = [np.zeros_like(x) for _ in grads], [np.zeros_like(x) for _ in grads]
    xs = [x]
    for t in range(T + 1):
        x = x - stepsize * g
        xs.append(x)
        if t == T:
            break
        c = []
        for i in range(n):
            v_i[i] = (1 - beta) * v_i[i] + beta * grads[i](x)
            q_i = clip(v_i[i] - g_i[i], tau)
            c.append(q_i + noise[t][i])
            g_i[i] = g_i[i] + beta_server * q_i
        g = g + beta_server / n * sum(c)
    return np.array(xs[1:])


def alpha_normec(grads, x, K, alpha, beta, stepsize, normalized=False, noise=None):
    n, noise = len(grads), noise or silence(K, len(grads))
    xs, g, g_i = [x], np.zeros_like(x), [np.zeros_like(x) for _ in grads]
    for k in range(K):
        s = []
        for i in range(n):
            e_i = grads[i](x) - g_i[i]
            c_i = beta * e_i / (alpha + np.linalg.norm(e_i))
            g_i[i] = g_i[i] + c_i
            s.append(c_i + noise[k][i])
        g = g + sum(s) / n
        x = x - stepsize * (g / np.linalg.norm(g) if normalized else g)
        xs.append(x)
    return np.array(xs)


def damped_tracking(grads, x, K, stepsize, share):
    """EF21-like, without a compressor: g_i += share · (∇f_i(x) − g_i);  x −= γ (1/n) Σ g_i"""
    n = len(grads)
    xs, g_i = [x], [np.zeros_like(x) for _ in grads]
    for _ in range(K):
        for i in range(n):
            g_i[i] = g_i[i] + share * (grads[i](x) - g_i[i])
        x = x - stepsize * sum(g_i) / n
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


def dcgd(grads, x, K, stepsize, C):
    """C(u, i, k): what the compressor makes of worker i's vector u in round k; here and in the two loops below."""
    xs = [x]
    for k in range(K):
        x = x - stepsize * sum(C(g(x), i, k) for i, g in enumerate(grads)) / len(grads)
        xs.append(x)
    return np.array(xs)


def ef21(grads, x, K, stepsize, C):
    """As in the paper: g_i^0 = C(∇f_i(x^0)); then x^{t+1} = x^t − γ g^t, and g_i^{t+1} is g_i^t +
    C(∇f_i(x^{t+1}) − g_i^t)."""
    n, xs = len(grads), [x]
    g_i = [C(grads[i](x), i, 0) for i in range(n)]
    for t in range(K):
        x = x - stepsize * sum(g_i) / n
        xs.append(x)
        for i in range(n):
            g_i[i] = g_i[i] + C(grads[i](x) - g_i[i], i, t + 1)
    return np.array(xs)


def press_clip21(grads, x, K, tau, stepsize, C, noise=None):
    """Worker and server both add the message, of which the noise is a part."""
    n, noise = len(grads), noise or silence(K, len(grads))
    xs, v, v_i = [x], np.zeros_like(x), [np.zeros_like(x) for _ in grads]
    for k in range(K):
        c = [C(clip(grads[i](x) - v_i[i], tau) + noise[k][i], i, k) for i in range(n)]
        for i in range(n):
            v_i[i] = v_i[i] + c[i]
        v = v + sum(c) / n
        x = x - stepsize * v
        xs.append(x)
    return np.array(xs)


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


# ---- compressors, from their definitions; random draws are handed in


def top_k(u, k):
    """The k elements of largest magnitude; of equal ones the first."""
    kept = sorted(range(len(u)), key=lambda j: (-abs(u[j]), j))[:k]
    return np.array([u[j] if j in kept else 0.0 for j in range(len(u))])


def rand_k(u, kept, unbiased):
    return np.array([u[j] * (len(u) / len(kept) if unbiased else 1) if j in kept else 0.0 for j in range(len(u))])


def natural(u, r):
    """|u_j| lies in [2^e, 2^(e+1)] and becomes the upper one if r_j, uniform in (0, 1], is at most |u_j|/2^e − 1."""
    c = []
    for x, r_j in zip(u, r, strict=True):
        if x == 0:
            c.append(0.0)
            continue
        e = int(np.floor(np.log2(abs(x))))
        c.append(np.sign(x) * 2.0 ** (e + (r_j <= abs(x) / 2.0 ** e - 1)))
    return np.array(c)


def quantize(u, r, bits, unbiased):
    """|u_j| s/‖u‖ lies in [l, l + 1] and becomes l + 1 if r_j, uniform in [0, 1), is below what it exceeds l by."""
    s, norm = 2 ** (bits - 1) - 1, np.linalg.norm(u)
    omega = min(len(u) / s ** 2, np.sqrt(len(u)) / s)
    c = []
    for x, r_j in zip(u, r, strict=True):
        level = abs(x) / norm * s if norm > 0 else 0.0
        below = np.floor(level)
        c.append(norm * np.sign(x) * (below + (r_j < level - below)) / s)
    return np.array(c) / (1 if unbiased else 1 + omega)


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
