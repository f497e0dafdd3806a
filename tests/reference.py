"""The papers' algorithms, written plainly over i = 1 … n in one process, in float64. Imports nothing of mpiclip.

`grads` is the list of the workers' gradient functions ∇f_1 … ∇f_n; every function returns the trajectory x⁰ … x^K.
`noise`, where there is any, is what worker i adds to its message in round k: noise[k][i]. `F` is what the server makes
of the workers' messages (n, d): their mean, unless rules and an attack are handed in."""

from itertools import combinations

import numpy as np


def clip(u, tau):
    """clip_τ(u) = min(1, τ/‖u‖) u"""
    norm = np.linalg.norm(u)
    return u if norm <= tau else u * (tau / norm)


def average(X):
    return sum(X) / len(X)


def gd(grads, x, K, stepsize, F=average):
    xs = [x]
    for _ in range(K):
        x = x - stepsize * F(np.array([g(x) for g in grads]))
        xs.append(x)
    return np.array(xs)


def sgd(grads, x, K, stepsize, beta, F=average):
    xs, m = [x], np.zeros_like(x)
    for _ in range(K):
        m = beta * m + F(np.array([g(x) for g in grads]))
        x = x - stepsize * m
        xs.append(x)
    return np.array(xs)


def silence(K, n):
    return [[0.0] * n for _ in range(K)]


def clip_gd(grads, x, K, tau, stepsize, beta=1.0, noise=None, F=average):
    n, noise = len(grads), noise or silence(K, len(grads))
    xs, v = [x], [np.zeros_like(x) for _ in grads]
    for k in range(K):
        s = []
        for i in range(n):
            v[i] = (1 - beta) * v[i] + beta * grads[i](x)
            s.append(clip(v[i], tau) + noise[k][i])
        x = x - stepsize * F(np.array(s))
        xs.append(x)
    return np.array(xs)


def clip21(grads, x, K, tau, stepsize, noise=None, noisy_state=False, F=average):
    n, noise = len(grads), noise or silence(K, len(grads))
    xs, v, v_i = [x], np.zeros_like(x), [np.zeros_like(x) for _ in grads]
    for k in range(K):
        s = []
        for i in range(n):
            c_i = clip(grads[i](x) - v_i[i], tau)
            s.append(c_i + noise[k][i])
            v_i[i] = v_i[i] + (s[i] if noisy_state else c_i)
        v = v + F(np.array(s))
        x = x - stepsize * v
        xs.append(x)
    return np.array(xs)


def double_momentum_messages(grads, x, v_i, g_i, tau, beta, beta_server, noise):
    """What the workers of clip21_sgd2m send, (n, d); the lists v_i and g_i are updated."""
    c = []
    for i, grad in enumerate(grads):
        v_i[i] = (1 - beta) * v_i[i] + beta * grad(x)
        q_i = clip(v_i[i] - g_i[i], tau)
        c.append(q_i + noise[i])
        g_i[i] = g_i[i] + beta_server * q_i
    return np.array(c)


def clip21_sgd2m(grads, x, T, tau, stepsize, beta, beta_server, noise=None, F=average):
    """The paper's round begins with the server's step, which is null in the first one: x⁰ = x¹. noise[0][i] is added in
    that round, in which ∇f_i(x¹) is computed. Returns x¹ … x^{T+1}."""
    noise = noise or silence(T + 1, len(grads))
    g = np.zeros_like(x)
    v_i, g_i = [np.zeros_like(x) for _ in grads], [np.zeros_like(x) for _ in grads]
    xs = [x]
    for t in range(T + 1):
        x = x - stepsize * g
        xs.append(x)
        if t == T:
            break
        g = g + beta_server * F(double_momentum_messages(grads, x, v_i, g_i, tau, beta, beta_server, noise[t]))
    return np.array(xs[1:])


def byz_clip21_sgd2m(grads, x, T, tau, stepsize, beta, beta_server, noise=None, attack=lambda X: X, rules=average):
    """As clip21_sgd2m, with a vector m_i on the server for each worker."""
    n, noise = len(grads), noise or silence(T + 1, len(grads))
    g = np.zeros_like(x)
    v_i, g_i, m_i = ([np.zeros_like(x) for _ in grads] for _ in range(3))
    xs = [x]
    for t in range(T + 1):
        x = x - stepsize * g
        xs.append(x)
        if t == T:
            break
        c = attack(double_momentum_messages(grads, x, v_i, g_i, tau, beta, beta_server, noise[t]))
        for i in range(n):
            m_i[i] = m_i[i] + beta_server * c[i]
        g = rules(np.array(m_i))
    return np.array(xs[1:])


def robust_dshb(grads, x, K, stepsize, beta, F=average):
    xs, m_i = [x], [np.zeros_like(x) for _ in grads]
    for _ in range(K):
        m_i = [beta * m + (1 - beta) * g(x) for m, g in zip(m_i, grads, strict=True)]
        x = x - stepsize * F(np.array(m_i))
        xs.append(x)
    return np.array(xs)


def safe_dshb(grads, x, K, tau, stepsize, beta, noise=None, F=average):
    n, noise = len(grads), noise or silence(K, len(grads))
    xs, m_i = [x], [np.zeros_like(x) for _ in grads]
    for k in range(K):
        for i in range(n):
            m_i[i] = (1 - beta) * m_i[i] + beta * (clip(grads[i](x), tau) + noise[k][i])
        x = x - stepsize * F(np.array(m_i))
        xs.append(x)
    return np.array(xs)


def alpha_normec(grads, x, K, alpha, beta, stepsize, normalized=False, noise=None, F=average):
    n, noise = len(grads), noise or silence(K, len(grads))
    xs, g, g_i = [x], np.zeros_like(x), [np.zeros_like(x) for _ in grads]
    for k in range(K):
        s = []
        for i in range(n):
            e_i = grads[i](x) - g_i[i]
            c_i = beta * e_i / (alpha + np.linalg.norm(e_i))
            g_i[i] = g_i[i] + c_i
            s.append(c_i + noise[k][i])
        g = g + F(np.array(s))
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


def rates(eta, gamma, k, decay, decay_at):
    """η and γ in round k."""
    factor = decay ** len([at for at in decay_at if at <= k])
    return factor * eta, factor * gamma


def clipped_step(direction, norm, eta, gamma, x, weight_decay, m, momentum):
    """(the next x, the next m) of a step along `direction` that is clipped as if `norm` were its length. What goes into
    the momentum is shortened, so that all of it goes at the rate η; at the rate 1 where η = ∞."""
    rate = eta if eta < np.inf else 1.0
    shortened = (eta if norm == 0 else min(eta, gamma / norm)) / rate
    m = momentum * m + shortened * (direction + weight_decay * x)
    return x - rate * m, m


def celgc(grads, x, K, eta, gamma, interval, threshold="local", weight_decay=0.0, momentum=0.0, decay=1.0, decay_at=(),
          F=average, clipped=None):
    """Trajectory of the averaged model, one entry a round of `interval` local steps. The workers send x_i − x. The
    share of steps that were clipped in each round is appended to `clipped`."""
    xs, m = [x], [np.zeros_like(x) for _ in grads]
    for k in range(K):
        eta_k, gamma_k = rates(eta, gamma, k, decay, decay_at)
        recorded = np.linalg.norm(F(np.array([g(x) for g in grads])))
        moved, count = [], 0
        for i, g in enumerate(grads):
            x_i = x
            for _ in range(interval):
                g_i = g(x_i)
                own = np.linalg.norm(g_i)
                norm = {"local": own, "global": recorded, "max": max(own, recorded)}[threshold]
                count += norm * eta > gamma
                x_i, m[i] = clipped_step(g_i, norm, eta_k, gamma_k, x_i, weight_decay, m[i], momentum)
            moved.append(x_i - x)
        x = x + F(np.array(moved))
        xs.append(x)
        if clipped is not None:
            clipped.append(count / interval / len(grads))
    return np.array(xs)


def naive_parallel(grads, x, K, eta, gamma, weight_decay=0.0, momentum=0.0, decay=1.0, decay_at=(), F=average,
                   clipped=None):
    xs, m = [x], np.zeros_like(x)
    for k in range(K):
        eta_k, gamma_k = rates(eta, gamma, k, decay, decay_at)
        g = F(np.array([g(x) for g in grads]))
        norm = np.linalg.norm(g)
        x, m = clipped_step(g, norm, eta_k, gamma_k, x, weight_decay, m, momentum)
        xs.append(x)
        if clipped is not None:
            clipped.append(float(norm * eta > gamma))
    return np.array(xs)


def episode_step(x_i, u, clips, eta, gamma, weight_decay):
    if not clips:
        return x_i - eta * u - eta * weight_decay * x_i
    rate = gamma / np.linalg.norm(u)
    return x_i - rate * u - min(eta, rate) * weight_decay * x_i


def episode(grads, x, K, eta, gamma, interval, weight_decay=0.0, decay=1.0, decay_at=(), F=average, clipped=None):
    xs = [x]
    for k in range(K):
        eta_k, gamma_k = rates(eta, gamma, k, decay, decay_at)
        G_i = [g(x) for g in grads]
        G = F(np.array(G_i))
        clips = np.linalg.norm(G) > gamma / eta
        moved = []
        for i, g in enumerate(grads):
            x_i = x
            for _ in range(interval):
                x_i = episode_step(x_i, g(x_i) - G_i[i] + G, clips, eta_k, gamma_k, weight_decay)
            moved.append(x_i - x)
        x = x + F(np.array(moved))
        xs.append(x)
        if clipped is not None:
            clipped.append(float(clips))
    return np.array(xs)


def episode_pp(grads, x, K, eta, gamma, interval, weight_decay=0.0, decay=1.0, decay_at=(), F=average, clipped=None,
               parts=None):
    """parts: the workers that take part in each round, all of them by default."""
    n, xs = len(grads), [x]
    G_i = [sum(g(x) for _ in range(interval)) / interval for g in grads]
    G = F(np.array(G_i))
    for k in range(K):
        eta_k, gamma_k = rates(eta, gamma, k, decay, decay_at)
        clips = np.linalg.norm(G) > gamma / eta
        moved, changes, S = [], [], range(n) if parts is None else parts[k]
        for i in S:
            x_i, total = x, 0.0
            for _ in range(interval):
                g_i = grads[i](x_i)
                total = total + g_i
                x_i = episode_step(x_i, g_i - G_i[i] + G, clips, eta_k, gamma_k, weight_decay)
            moved.append(x_i - x)
            changes.append(total / interval - G_i[i])
        x = x + F(np.array(moved))
        xs.append(x)
        G = G + len(S) / n * F(np.array(changes))
        for i, change in zip(S, changes, strict=True):
            G_i[i] = G_i[i] + change
        if clipped is not None:
            clipped.append(float(clips))
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
        near = sorted(range(n), key=lambda j: about(squared(X[i], X[j])))[:n - f]
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


def mean_around_median(X, f):
    n, middle = len(X), median(X, f)
    return np.array([sum(sorted(X[:, j], key=lambda x: (abs(x - middle[j]), x))[:n - f]) / (n - f)
                     for j in range(X.shape[1])])


def clipping(X, f, threshold=2.0):
    return np.array([clip(row, threshold) for row in X])


def bucketing(X, f, s, order):
    """order: the permutation in which rows are dealt out"""
    return np.array([sum(X[i] for i in order[k:k + s]) / len(order[k:k + s]) for k in range(0, len(X), s)])


def squared(x, y):
    return float(np.sum((x - y) ** 2))


def about(x):
    """Without the digits that depend on the order of a sum."""
    return float(f"{x:.9e}")


def krum_scores(X, f):
    n = len(X)
    return [about(sum(sorted(squared(X[i], X[j]) for j in range(n) if j != i)[:n - f - 1])) for i in range(n)]


def krum(X, f):
    scores = krum_scores(X, f)
    return X[scores.index(min(scores))]


def multi_krum(X, f):
    scores = krum_scores(X, f)
    return mean(X[sorted(range(len(X)), key=lambda i: scores[i])[:len(X) - f]], f)


def monna(X, f, pivot=0):
    return mean(X[sorted(range(len(X)), key=lambda i: about(squared(X[i], X[pivot])))[:len(X) - f]], f)


def subset(X, f, size):
    """The mean of the n − f rows of the smallest size: the first such set in lexicographic order."""
    sets = [X[list(S)] for S in combinations(range(len(X)), len(X) - f)]
    sizes = [size(S) for S in sets]
    return mean(next(S for S, this in zip(sets, sizes, strict=True) if this <= min(sizes) * (1 + 1e-9)), f)


def mda(X, f):
    return subset(X, f, lambda S: max(squared(x, y) for x in S for y in S))


def smea(X, f):
    return subset(X, f, lambda S: np.linalg.svd(S - mean(S, f), compute_uv=False)[0] ** 2)


def caf(X, f):
    """The direction is that of the largest variance, exactly; the farthest is one of those with a weight."""
    c, best, least = np.ones(len(X)), None, np.inf
    while best is None or sum(c) > len(X) - 2 * f:
        used = [i for i in range(len(X)) if c[i] > 0]
        mu = sum(c[i] * X[i] for i in used) / sum(c)
        _, sizes, directions = np.linalg.svd(np.array([np.sqrt(c[i]) * (X[i] - mu) for i in used]), full_matrices=False)
        variance = sizes[0] ** 2 / sum(c)
        if variance < least:
            best, least = mu, variance
        far = {i: float(directions[0] @ (X[i] - mu)) ** 2 for i in used}
        if max(far.values()) == 0:
            break
        for i in used:
            c[i] *= 1 - far[i] / max(far.values())
    return best


def centered_clipping(X, f, threshold=100.0, iterations=1, v=0.0):
    v = v + np.zeros(X.shape[1])
    for _ in range(iterations):
        v = v + sum(clip(row - v, threshold) for row in X) / len(X)
    return v


def geometric_median(X, f, iterations=0, nu=None):
    """Without a number of iterations: Weiszfeld's until they end; unless a row is it, by the condition that a convex
    function has no descent there."""
    if iterations == 0 and nu is None:
        for x in X:
            others = [y for y in X if (y != x).any()]
            if np.linalg.norm(sum((y - x) / np.linalg.norm(y - x) for y in others)) <= len(X) - len(others):
                return x
    middle = np.median(X, axis=0)
    Y, z = X - middle, -middle              # from there, as the rows may be near to each other and far from 0
    if not iterations:
        z = np.full(len(middle), 1e-3 * np.median(np.linalg.norm(Y, axis=1)))       # on none of them
    for _ in range(iterations or 2000):
        distance = np.sqrt(((Y - z) ** 2).sum(1))
        weights = 1 / np.maximum(distance, nu or 1e-100)
        before, z = z, weights @ Y / weights.sum()
        if not iterations and np.linalg.norm(z - before) <= 1e-15 * np.median(distance):
            break
    return middle + z


# ---- attacks: what the last f of n rows become. F(X, f) are the rules in use


def sent_by_all(X, f, vector):
    X = X.copy()
    X[len(X) - f:] = vector
    return X


def sign_flip(X, f):
    return ipm(X, f, 1.0)


def ipm(X, f, factor=2.0):
    h = len(X) - f
    return sent_by_all(X, f, -factor * sum(X[:h]) / h)


def alie(X, f, factor=1.5):
    h = len(X) - f
    mean = sum(X[:h]) / h
    return sent_by_all(X, f, mean + factor * np.sqrt(sum((x - mean) ** 2 for x in X[:h]) / (h - 1)))


def optimised(attack, X, f, F, evaluations=20):
    """The attack with the factor for which F is farthest from the honest mean: expansion by doubled steps, then
    contraction by 0.8; less than a millionth farther is not farther."""
    def distance(factor):
        return np.linalg.norm(F(attack(X, f, factor), f) - sum(X[:len(X) - f]) / (len(X) - f))
    best, farthest, step, left = 0.0, distance(0.0), 10.0, evaluations - 1
    while left:
        left -= 1
        if distance(best + step) <= farthest * (1 + 1e-6):
            step *= 0.8
            break
        best += step
        farthest = distance(best)
        step *= 2
    while left:
        left -= 1
        if distance(best + step) > farthest * (1 + 1e-6):
            best += step
            farthest = distance(best)
        step *= 0.8
    return attack(X, f, best)
