"""What an LSTM language model does besides large products of matrices. The NumPy bodies are the definitions;
@accelerated sends a call to the compiled twin in kernels/ that knows the arrays.

Of w workers (or one), T steps, b sequences each, n units: z (w, T, b, 4 n), in the order i, f, g, o, as PyTorch's LSTM
has it; h and c (w, T + 1, b, n), of which step 0 is what came before; W (w, 4 n, n), or (1, 4 n, n) for all. Float32 or
float64, one of them in a call. A NaN makes its sequence's numbers from there on NaN, and no other's."""

from __future__ import annotations

import numpy as np

from .device import accelerated, xp


@accelerated
def lstm_forward(z, W, h, c) -> None:
    """With a_t = z_t + W h_{t−1}: i, f, o = σ(a), g = tanh(a), c_t = f c_{t−1} + i g, h_t = o tanh(c_t). z, the inputs'
    part of a, becomes (i, f, g, o); h and c are filled from step 1 on. Hochreiter, Schmidhuber (1997), "Long short-term
    memory", with the forget gates of Gers, Schmidhuber, Cummins (2000)."""
    n = h.shape[-1]
    for t in range(z.shape[1]):
        a = z[:, t]
        a += h[:, t] @ W.swapaxes(1, 2)
        for gate in (slice(0, 2 * n), slice(3 * n, 4 * n)):
            a[..., gate] = 0.5 + 0.5 * xp(a).tanh(0.5 * a[..., gate])
        a[..., 2 * n:3 * n] = xp(a).tanh(a[..., 2 * n:3 * n])
        i, f, g, o = gates(a)
        c[:, t + 1] = f * c[:, t] + i * g
        h[:, t + 1] = o * xp(a).tanh(c[:, t + 1])


@accelerated
def lstm_backward(z, W, c, slopes) -> None:
    """z, which holds (i, f, g, o), becomes the slopes in a. slopes (w, T, b, n) are those in h_1 … h_T of what lies
    above, and are completed by those of the steps after. Nothing comes from behind step T."""
    later = xp(z).zeros_like(slopes[:, 0])                      # the slopes in c_t
    for t in reversed(range(z.shape[1])):
        if t + 1 < z.shape[1]:
            slopes[:, t] += z[:, t + 1] @ W
        (i, f, g, o), slope, tanh_c = gates(z[:, t]), slopes[:, t], xp(z).tanh(c[:, t + 1])
        own = later + slope * o * (1 - tanh_c * tanh_c)
        later = own * f
        z[:, t] = xp(z).concatenate([own * g * i * (1 - i), own * c[:, t] * f * (1 - f), own * i * (1 - g * g),
                                     slope * tanh_c * o * (1 - o)], -1)


def gates(z) -> list:
    """The four quarters of z (…, 4 n)"""
    n = z.shape[-1] // 4
    return [z[..., k * n:(k + 1) * n] for k in range(4)]


@accelerated
def cross_entropies(z, bias, y, share, values) -> None:
    """values_r = log Σ_k exp(s_rk) − s_{r, y_r}, of the scores s = z + bias; z becomes share times its slopes in s.
    z: (m, V), bias: (V,), y: (m,) int64, values: (m,) float64, filled."""
    z += bias
    z -= z.max(1, keepdims=True)
    right = xp(z).arange(len(y)), y
    values[:] = -z[right]
    xp(z).exp(z, out=z)
    total = z.sum(1, dtype=np.float64)
    values += xp(z).log(total)
    z *= (share / total).astype(z.dtype)[:, None]
    z[right] -= z.dtype.type(share)


@accelerated
def add_rows(out, rows, values) -> None:
    """out[rows_r] += values_r, in the order r = 0, 1, …, also where a row comes again. out: (V, n), rows: (m,) int64,
    values: (m, n)."""
    xp(out).add.at(out, rows, values)
