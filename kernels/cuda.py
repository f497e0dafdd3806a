"""Launchers of the CUDA kernels: each has the name and the arguments of its NumPy definition (see device.accelerated).

A launcher only looks: what its kernel does not know (dtype, memory layout) or what is wrong (shapes, a negative tau) it
declines with NotImplemented, before anything is written, and the definition answers, with its error messages. Kernels
are compiled at first use (CuPy keeps them on disk) and run on CuPy's current stream; no launcher waits for the device.
So a tau in device memory is not looked at: a row whose tau is negative or NaN becomes NaN. And CuPy compiles all
kernels such that float32 numbers below 1.2e-38 count as zero."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import numpy as np

from .. import device

THREADS = 256         # of a block
PACKS = 4             # 16-byte loads of one array that a thread has in flight
BLOCKS = 1024         # of a launch on long rows: about 8 for each multiprocessor of a large GPU
SAMPLE = 4096         # numbers drawn from a row, to know about where its k-th largest lies, …
SPARSENESS = 32       # … but no more than one in so many

_FOLDER = Path(__file__).parent
_REAL = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}
_SOURCES = {"add_noise": "noise.cu", **dict.fromkeys(     # of the kernels that are not in ops.cu
    ("sample", "collect", "count_digit", "count_taken", "place"), "select.cu"),
    **dict.fromkeys(("cell_forward", "cell_backward", "cross_entropies", "add_rows"), "lstm.cu")}
_NULL = 0             # CuPy passes a Python int as 64 bits, a Python float as a double


def options(real: str) -> tuple[str, ...]:
    """The compiler's options for kernels of `float` or `double`."""
    # Products and sums are rounded one by one, as in NumPy: these kernels wait for memory, not for arithmetic.
    # CuPy's cache on disk knows the code and the options, but not what the code includes: hence the checksum.
    checksum = zlib.crc32(b"".join(path.read_bytes() for path in sorted(_FOLDER.glob("*.cu*"))))
    return ("-std=c++17", "-fmad=false", f"-I{_FOLDER}", f"-DREAL={real}", f"-DTHREADS={THREADS}", f"-DPACKS={PACKS}",
            f"-DCHECKSUM={checksum}")


@functools.cache
def _kernel(xp, name: str, dtype):
    return _module(xp, _SOURCES.get(name, "ops.cu"), dtype).get_function(name)


@functools.cache
def _module(xp, source: str, dtype):
    # CuPy writes the code to a file in the locale's encoding, which may not know our Greek: ASCII only.
    return xp.RawModule(code=f'#include "{source}"', options=options(_REAL[dtype]))


def _launch(u, name: str, blocks: int, *arguments) -> None:
    _kernel(device.xp(u), name, u.dtype)((blocks,), (THREADS,), arguments)


def parts(w: int, d: int, itemsize: int) -> int:
    """How many blocks share one of w rows of d numbers. The shape alone decides, and so the order of every sum."""
    tile = THREADS * PACKS * 16 // itemsize
    return max(1, min(-(-d // tile), BLOCKS // w))


def _known(u) -> bool:
    return u.dtype in _REAL and u.ndim in (1, 2) and u.size > 0 and u.flags.c_contiguous


def _like(array, u) -> bool:
    return _on(array, u, u.shape, u.dtype)


def _norms_like(array, u) -> bool:
    return _on(array, u, u.shape[:-1], np.float64)


def _on(array, u, shape, dtype) -> bool:
    """Whether an array lies where u lies, and as a kernel expects it."""
    return (isinstance(array, device.xp(u).ndarray) and array.shape == shape and array.dtype == dtype
            and array.flags.c_contiguous)


def _rows(u) -> tuple[int, int, int]:
    """(w, d, parts)"""
    w, d = u.shape if u.ndim == 2 else (1, u.size)
    return w, d, parts(w, d, u.dtype.itemsize)


def _threshold(tau, u):
    """(an array of w thresholds or null, one threshold), or None"""
    xp, rows = device.xp(u), u.shape[:-1]
    if isinstance(tau, int | float):
        return (_NULL, float(tau)) if tau >= 0 else None
    if not isinstance(tau, xp.ndarray):
        tau = np.asarray(tau, np.float64)
        if not (tau >= 0).all():
            return None
    if tau.shape not in ((), rows):
        return None
    return xp.ascontiguousarray(xp.broadcast_to(xp.asarray(tau, np.float64), rows)), 0.0


def _squares(u, v=_NULL):
    """Σ (u_i − v_i)², a sum for each block: (w · parts,). The memory pool hands the same scratch out every time."""
    w, d, parts = _rows(u)
    sums = device.xp(u).empty(w * parts)
    _launch(u, "squares", w * parts, u, v, sums, d, parts)
    return sums


# --- mpiclip.ops: kernels/ops.cu --------------------------------------------------------------------------------------


def norms(u, out=None):
    if not _known(u) or not (out is None or _norms_like(out, u)):
        return NotImplemented
    w, _, parts = _rows(u)
    out = device.xp(u).empty(u.shape[:-1]) if out is None else out
    _launch(u, "norms", w, _squares(u), out, parts)
    return out


def clip(u, tau, out=None, norms=None):
    if not (_known(u) and (out is None or _like(out, u)) and (norms is None or _norms_like(norms, u))
            and (threshold := _threshold(tau, u))):
        return NotImplemented
    w, d, parts = _rows(u)
    out = device.xp(u).empty_like(u) if out is None else out
    _launch(u, "clip", w * parts, u, _squares(u), *threshold, out, _NULL if norms is None else norms, d, parts)
    return out


def clip_step(u, v, tau, out=None, norms=None):
    if not (_known(u) and _like(v, u) and (out is None or _like(out, u)) and out is not v
            and (norms is None or _norms_like(norms, u)) and (threshold := _threshold(tau, u))):
        return NotImplemented
    w, d, parts = _rows(u)
    out = device.xp(u).empty_like(u) if out is None else out
    _launch(u, "clip_step", w * parts, u, v, _squares(u, v), *threshold, 0.0, out, _NULL if norms is None else norms,
            d, parts)
    return out


def normalize_step(u, v, alpha, beta, out=None, norms=None):
    if not (_known(u) and _like(v, u) and (out is None or _like(out, u)) and out is not v
            and (norms is None or _norms_like(norms, u)) and alpha > 0 and beta >= 0):
        return NotImplemented
    w, d, parts = _rows(u)
    out = device.xp(u).empty_like(u) if out is None else out
    _launch(u, "clip_step", w * parts, u, v, _squares(u, v), _NULL, float(beta), float(alpha), out,
            _NULL if norms is None else norms, d, parts)
    return out


def momentum_step(u, m, v, tau, beta, scale=1.0, out=None, norms=None):
    if not (_known(u) and _like(m, u) and (v is None or _like(v, u)) and (out is None or _like(out, u))
            and m is not v and out is not m and (out is None or out is not v)
            and (norms is None or _norms_like(norms, u)) and (threshold := _threshold(tau, u))):
        return NotImplemented
    w, d, parts = _rows(u)
    out = device.xp(u).empty_like(u) if out is None else out
    v, norms = (_NULL if array is None else array for array in (v, norms))
    sums = device.xp(u).empty(w * parts)
    _launch(u, "squares_of_momentum", w * parts, u, m, v, float(beta), sums, d, parts)
    _launch(u, "momentum_step", w * parts, u, m, v, sums, *threshold, float(beta), float(scale), out, norms, d, parts)
    return out


def local_step(x, u, norms, tau, eta, normalize=False, weight_decay=0.0, m=None, momentum=0.0, origin=None, out=None):
    out = x if out is None else out
    if not (_known(x) and _like(u, x) and _like(out, x) and _norms_like(norms, x)
            and (m is None or (_like(m, x) and m is not x and m is not u and m is not out))
            and (origin is None or _on(origin, x, x.shape[-1:], x.dtype))
            and isinstance(tau, int | float) and tau >= 0):
        return NotImplemented
    w, d, parts = _rows(x)
    m, origin = (_NULL if array is None else array for array in (m, origin))
    _launch(x, "local_step", w * parts, x, u, norms, float(tau), float(eta), int(normalize), float(weight_decay), m,
            float(momentum), origin, out, d, parts)
    return out


def apply(x, v, mean, gamma, scale=1.0):
    if not (x.dtype in _REAL and x.size > 0 and x.flags.c_contiguous and _like(v, x) and _like(mean, x)):
        return NotImplemented
    _launch(x, "apply", parts(1, x.size, x.dtype.itemsize), x, v, mean, float(gamma), float(scale), x.size)
    return None


def row_sum(u, scale=1.0, out=None):
    if not (_known(u) and u.ndim == 2 and (out is None or _on(out, u, u.shape[1:], u.dtype))):
        return NotImplemented
    w, d = u.shape
    out = device.xp(u).empty(d, u.dtype) if out is None else out
    _launch(u, "row_sum", parts(1, d, u.dtype.itemsize), u, float(scale), out, w, d)
    return out


# --- mpiclip.ops, the largest k: kernels/select.cu --------------------------------------------------------------------


def top_k(u, k):
    return _select(u, None, k) if _known(u) and _count_known(u, k) else NotImplemented


def clip_step_top_k(u, v, tau, k, norms=None):
    if not (_known(u) and _count_known(u, k) and _like(v, u) and v is not u
            and (norms is None or _norms_like(norms, u)) and (threshold := _threshold(tau, u))):
        return NotImplemented
    return _select(u, v, k, threshold, norms)


def _count_known(u, k) -> bool:
    return isinstance(k, int | np.integer) and 1 <= k <= u.shape[-1] < 2**31


def _select(u, v, k, threshold=(_NULL, 0.0), norms=None):
    xp, k, (w, d, parts) = device.xp(u), int(k), _rows(u)
    warps, itemsize = w * parts * (THREADS // 32), u.dtype.itemsize
    v, norms = (_NULL if array is None else array for array in (v, norms))

    floors = xp.full(w, -1, f"i{itemsize}")         # of the candidates' keys
    n, room = min(SAMPLE, d // SPARSENESS), 0
    expected = k * n / d
    rank = int(expected + 4 * expected**0.5 + 4)    # k of the row's numbers lie above the floor but for rare bad luck
    if 4 * rank < n:                                # else too many are candidates for lists to be worth it
        _launch(u, "sample", w, u, v, floors, d, n, rank)
        room = 2 * rank * d * w // (n * warps) + 64

    lists = xp.empty(warps * room, np.int32), xp.empty(warps * room, u.dtype)
    found, totals, sums = xp.empty(warps, np.int32), xp.zeros(2 * w, np.int32), xp.empty(w * parts)
    _launch(u, "collect", w * parts, u, v, floors, *lists, found, totals, sums, d, parts, room)
    candidates = (u, v, *lists, found, totals)
    histograms, taken = xp.zeros(itemsize * w * 256, np.int32), xp.empty(2 * warps, np.int32)
    for digit in range(itemsize):
        _launch(u, "count_digit", w * parts, *candidates, histograms, digit, k, w, d, parts, room)
    _launch(u, "count_taken", w * parts, *candidates, histograms, taken, k, w, d, parts, room)
    indices, values = xp.empty((*u.shape[:-1], k), np.int32), xp.empty((*u.shape[:-1], k), u.dtype)
    _launch(u, "place", w * parts, *candidates, histograms, taken, sums, *threshold, norms, indices, values, k, w, d,
            parts, room)
    return indices, values


# --- mpiclip.columns: kernels/columns.cu ------------------------------------------------------------------------------


MOST_ROWS = 64        # whose numbers fit into a thread's registers; the definition sorts more


def median(X, E=None, W=None):
    return _column_rule("MEDIAN", X, 0, E, W)


def trimmed_mean(X, f, E=None, W=None):
    return _column_rule("TRIMMED_MEAN", X, f, E, W)


def mean_around_median(X, f, E=None, W=None):
    return _column_rule("MEAN_AROUND_MEDIAN", X, f, E, W)


def _column_rule(rule, X, f, E, W):
    if not (_are_rows(X, X) and (E is None or (_are_rows(E, X) and E.shape[1] == X.shape[1]))):
        return NotImplemented
    xp, (n, d), b = device.xp(X), X.shape, len(X) + (0 if E is None else len(E))
    if W is not None and not (isinstance(W, np.ndarray) and W.dtype == np.float64 and W.ndim == 2 and W.shape[1] == b):
        return NotImplemented
    k = b if W is None else len(W)
    if not (1 <= k <= MOST_ROWS and d > 0 and isinstance(f, int | np.integer) and 0 <= 2 * f < k):
        return NotImplemented
    out, pitch_e = xp.empty(d, X.dtype), 0 if E is None else E.strides[0] // E.itemsize
    weights, index, read = _NULL, _NULL, 0
    if W is not None:
        used = np.flatnonzero(W.any(0))
        weights, index = xp.asarray(np.ascontiguousarray(W[:, used].T, X.dtype)), xp.asarray(used.astype(np.int64))
        read = len(used)
    _column_kernel(xp, rule, k, int(f), X.dtype)((max(1, min(-(-d // THREADS), 16 * BLOCKS)),), (THREADS,), (
        X, X.strides[0] // X.itemsize, n, _NULL if E is None else E, pitch_e, weights, index, read, out, d))
    return out


def _are_rows(array, like) -> bool:
    return (isinstance(array, device.xp(like).ndarray) and array.ndim == 2 and array.dtype == like.dtype
            and array.dtype in _REAL and array.strides[0] >= 0 and (array.shape[1] < 2
                                                                    or array.strides[1] == array.itemsize))


@functools.cache
def _column_kernel(xp, rule: str, k: int, f: int, dtype):
    comparators = " ".join(f"C({a}, {b})" for a, b in _network(k))
    constants = {"RULE": rule, "ROWS": k, "TRIM": f, "NETWORK": comparators}
    code = "".join(f"#define {name} {value}\n" for name, value in constants.items()) + '#include "columns.cu"'
    return xp.RawModule(code=code, options=options(_REAL[dtype])).get_function("column_rule")


def _network(k: int):
    """The comparators that sort k numbers: Batcher's merge exchange (Knuth, volume 3, algorithm 5.2.2 M)."""
    top = 1 << max(0, (k - 1).bit_length() - 1)
    p = top
    while p and k > 1:
        q, r, by = top, 0, p
        while by:
            yield from ((i, i + by) for i in range(k - by) if i & p == r)
            q, r, by = q // 2, p, q - p
        p //= 2


# --- mpiclip.noise: kernels/noise.cu ----------------------------------------------------------------------------------


def add_noise(u, sigma, keys):
    if not (_known(u) and u.ndim == 2 and isinstance(keys, np.ndarray) and keys.dtype == np.uint64
            and keys.shape == (len(u), 2) and 0 <= sigma <= float(np.finfo(u.dtype).max)):
        return NotImplemented
    if u.dtype.type(sigma) > 0:
        w, d, parts = _rows(u)
        _launch(u, "add_noise", w * parts, u, device.xp(u).asarray(np.ascontiguousarray(keys)), float(sigma), d, parts)
    return u


# --- mpiclip.cells: kernels/lstm.cu -----------------------------------------------------------------------------------


def lstm_forward(z, W, h, c):
    if not (_cells_known(z, W, c) and _on(h, z, c.shape, z.dtype)):
        return NotImplemented
    xp, (w, T, b, _), n = device.xp(z), z.shape, W.shape[2]
    for t in range(T):
        z[:, t] += xp.matmul(h[:, t], W.swapaxes(1, 2))
        _launch(z, "cell_forward", _each(w * b * n), z, h, c, t, w, T, b, n)
    return None


def lstm_backward(z, W, c, slopes):
    if not (_cells_known(z, W, c) and _on(slopes, z, (*z.shape[:3], W.shape[2]), z.dtype)):
        return NotImplemented
    xp, (w, T, b, _), n = device.xp(z), z.shape, W.shape[2]
    later = xp.zeros((w, b, n), z.dtype)
    for t in reversed(range(T)):
        if t + 1 < T:
            slopes[:, t] += xp.matmul(z[:, t + 1], W)
        _launch(z, "cell_backward", _each(w * b * n), z, c, slopes, later, t, w, T, b, n)
    return None


def _cells_known(z, W, c) -> bool:
    w, T, b, width = z.shape if z.ndim == 4 else (0, 0, 0, 0)
    return (z.dtype in _REAL and z.size > 0 and z.flags.c_contiguous and isinstance(W, device.xp(z).ndarray)
            and W.dtype == z.dtype and W.ndim == 3 and W.shape[0] in (1, w) and 4 * W.shape[2] == W.shape[1] == width
            and _on(c, z, (w, T + 1, b, W.shape[2]), z.dtype))


def _each(numbers: int) -> int:
    """Blocks of a launch in which each thread has a number, or several."""
    return max(1, min(-(-numbers // THREADS), 16 * BLOCKS))


def cross_entropies(z, bias, y, share, values):
    if not (z.dtype in _REAL and z.ndim == 2 and z.size > 0 and z.flags.c_contiguous
            and _on(bias, z, z.shape[1:], z.dtype) and _on(y, z, z.shape[:1], np.int64)
            and _on(values, z, z.shape[:1], np.float64)):
        return NotImplemented
    _launch(z, "cross_entropies", len(z), z, bias, y, float(share), values, z.shape[1])
    return None


def add_rows(out, rows, values):
    if not (out.dtype in _REAL and out.ndim == 2 and out.flags.c_contiguous and values.ndim == 2 and values.size > 0
            and _on(values, out, (len(rows), out.shape[1]), out.dtype) and _on(rows, out, (len(values),), np.int64)):
        return NotImplemented
    order = device.xp(out).argsort(rows * len(rows) + device.xp(out).arange(len(rows)))
    _launch(out, "add_rows", len(rows), out, rows, order, values, len(rows), out.shape[1])
    return None
