"""Launchers of the C kernels: each has the name and the arguments of its NumPy definition (see device.accelerated).

What a kernel does not know (dtype, memory layout) or what is wrong (shapes, a negative tau) it declines before
anything is written; the launcher then returns NotImplemented and the definition answers, with its error messages.
ctypes releases the GIL during a kernel. Importing this module raises OSError where the kernels were not compiled."""

from __future__ import annotations

import ctypes
import sysconfig
from pathlib import Path

import numpy as np

_LIBRARY = ctypes.CDLL(str(Path(__file__).with_name(f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")))
ctypes.c_void_p.in_dll(_LIBRARY, "ndarray").value = id(np.ndarray)
ctypes.c_void_p.in_dll(_LIBRARY, "none").value = id(None)
_TYPES = {"a": ctypes.py_object, "p": ctypes.c_void_p, "n": ctypes.c_ssize_t, "r": ctypes.c_double, "i": ctypes.c_int}


def kernel(name: str, arguments: str, result=ctypes.c_int):
    """A function of the library. Letters of its arguments: a an array (kernels/array.h) or None, p an address,
    n a size, r a real number, i an int."""
    function = getattr(_LIBRARY, name)
    function.argtypes, function.restype = [_TYPES[letter] for letter in arguments], result
    return function


# mpiclip.ops: kernels/ops.c

_norms = kernel("norms", "aa")
_clip = kernel("clip", "aaraa")
_clip_step = kernel("clip_step", "aaaraa")
_normalize_step = kernel("normalize_step", "aaarra")
_momentum_step = kernel("momentum_step", "aaaararra")
_local_step = kernel("local_step", "aaarriraraa")
_apply = kernel("apply", "aaarr")
_row_sum = kernel("row_sum", "aar")


def norms(u, out=None):
    out = np.empty(u.shape[:-1]) if out is None else out
    return NotImplemented if _norms(u, out) else out


def clip(u, tau, out=None, norms=None):
    tau, taus = (tau, None) if type(tau) is float else _thresholds(tau)
    out = np.empty(u.shape, u.dtype) if out is None else out
    return NotImplemented if _clip(u, out, tau, taus, norms) else out


def clip_step(u, v, tau, out=None, norms=None):
    tau, taus = (tau, None) if type(tau) is float else _thresholds(tau)
    out = np.empty(u.shape, u.dtype) if out is None else out
    return NotImplemented if _clip_step(u, v, out, tau, taus, norms) else out


def normalize_step(u, v, alpha, beta, out=None, norms=None):
    out = np.empty(u.shape, u.dtype) if out is None else out
    return NotImplemented if _normalize_step(u, v, out, alpha, beta, norms) else out


def momentum_step(u, m, v, tau, beta, scale=1.0, out=None, norms=None):
    tau, taus = (tau, None) if type(tau) is float else _thresholds(tau)
    out = np.empty(u.shape, u.dtype) if out is None else out
    return NotImplemented if _momentum_step(u, m, v, out, tau, taus, beta, scale, norms) else out


def local_step(x, u, norms, tau, eta, normalize=False, weight_decay=0.0, m=None, momentum=0.0, origin=None, out=None):
    out = x if out is None else out
    if type(tau) is not float and np.ndim(tau):
        return NotImplemented
    return NotImplemented if _local_step(x, u, norms, tau, eta, normalize, weight_decay, m, momentum, origin,
                                         out) else out


def apply(x, v, mean, gamma, scale=1.0):
    return NotImplemented if _apply(x, v, mean, gamma, scale) else None


def row_sum(u, scale=1.0, out=None):
    out = np.empty(u.shape[1:], u.dtype) if out is None else out
    return NotImplemented if _row_sum(u, out, scale) else out


def _thresholds(tau) -> tuple[float, np.ndarray | None]:
    """tau as the kernels take it: a number, or an array of numbers."""
    return (0.0, np.ascontiguousarray(tau, np.float64)) if np.ndim(tau) else (float(tau), None)


if not np.array_equal(norms(np.array([[3.0, 4.0], [5.0, 12.0]])), [5.0, 13.0]):
    raise OSError("this NumPy or Python keeps its arrays in another way than kernels/array.h says")


# mpiclip.ops, the largest k: kernels/select.c

_top_k = kernel("top_k", "anaa")
_clip_step_top_k = kernel("clip_step_top_k", "aanraaaa")


def top_k(u, k):
    if not (results := _places_for(u, k)):
        return NotImplemented
    return NotImplemented if _top_k(u, k, *results) else results


def clip_step_top_k(u, v, tau, k, norms=None):
    if not (results := _places_for(u, k)):
        return NotImplemented
    tau, taus = (tau, None) if type(tau) is float else _thresholds(tau)
    return NotImplemented if _clip_step_top_k(u, v, k, tau, taus, norms, *results) else results


def _places_for(u, k) -> tuple[np.ndarray, np.ndarray] | None:
    """Room for k indices and values of each row, which the kernels trust; None where k is none."""
    if not (isinstance(k, int | np.integer) and u.ndim and 1 <= k <= u.shape[-1]):
        return None
    shape = (*u.shape[:-1], int(k))
    return np.empty(shape, np.int32), np.empty(shape, u.dtype)


# mpiclip.columns: kernels/columns.c

_column_rule = kernel("column_rule", "ianaaa")
_column_distances = kernel("column_distances", "aaaaa")
_column_combine = kernel("column_combine", "aaaa")
_column_gram = kernel("column_gram", "aaaaa")
_column_mixed = kernel("column_mixed", "aaaaa")
_MEDIAN, _TRIMMED_MEAN, _MEAN_AROUND_MEDIAN, _DEVIATION = range(4)


def median(X, E=None, W=None):
    return _each_column(_MEDIAN, X, 0, E, W)


def trimmed_mean(X, f, E=None, W=None):
    return _each_column(_TRIMMED_MEAN, X, f, E, W)


def mean_around_median(X, f, E=None, W=None):
    return _each_column(_MEAN_AROUND_MEDIAN, X, f, E, W)


def deviation(X, E=None, W=None):
    return _each_column(_DEVIATION, X, 0, E, W)


def _each_column(rule, X, f, E, W):
    if not isinstance(f, int | np.integer):
        return NotImplemented
    out = np.empty(X.shape[1:], X.dtype)
    return NotImplemented if _column_rule(rule, X, int(f), E, W, out) else out


def distances(X, v, E=None, W=None):
    out = np.empty(len(W) if W is not None else len(X) + (0 if E is None else len(E)))
    return NotImplemented if _column_distances(X, v, E, W, out) else out


def combine(X, w, E=None):
    out = np.empty(X.shape[1:], X.dtype)
    return NotImplemented if _column_combine(X, np.ascontiguousarray(w, np.float64), E, out) else out


def mixed(X, W, E=None, common=None):
    common = np.zeros(W.shape[-1]) if common is None else np.ascontiguousarray(common, np.float64)
    out = np.empty((len(W), *X.shape[1:]), X.dtype)
    return NotImplemented if _column_mixed(X, W, E, common, out) else out


def gram(X, E=None, scale=None, centre=None):
    b = len(X) + (0 if E is None else len(E))
    s, c = (np.ones(b) if w is None else np.ascontiguousarray(w, np.float64) for w in (scale, centre))
    out = np.empty((b + 1, b + 1))
    return NotImplemented if _column_gram(X, E, s, c, out) else out


# mpiclip.noise: kernels/noise.c

_add_noise = kernel("add_noise", "ara")


def add_noise(u, sigma, keys):
    return NotImplemented if _add_noise(u, sigma, keys) else u


# mpiclip.compressors: kernels/compress.c

_pack = kernel("pack", "aia")
_add_codes = kernel("add_codes", "aaia")
_add_sparse = kernel("add_sparse", "aaa")
_power_codes = kernel("power_codes", "aaaa")
_level_codes = kernel("level_codes", "aaaia")


def power_codes(u, r):
    codes, bases = np.empty(u.shape, np.uint16), np.empty(len(u), np.int32)
    return NotImplemented if _power_codes(u, r, codes, bases) else (codes, bases)


def level_codes(u, r, scales, bits):
    codes = np.empty(u.shape, np.uint16)
    return NotImplemented if _level_codes(u, r, scales, bits, codes) else codes


def pack(codes, bits):
    rows = np.empty((len(codes), (bits * codes.shape[1] + 7) // 8), np.uint8)
    return NotImplemented if _pack(codes, bits, rows) else rows


def add_codes(v, rows, bits, tables):
    return NotImplemented if _add_codes(v, rows, bits, tables) else None


def add_sparse(v, indices, values):
    return NotImplemented if _add_sparse(v, indices, values) else None


# mpiclip.problems.cnn: kernels/images.c

_convolve = kernel("convolve", "aaannaa")
_slopes_of_images = kernel("slopes_of_images", "aaaanna")
_sums_of_patches = kernel("sums_of_patches", "aaaanna")


def convolve(images, W, starts, kernel, pool, out, which, room):
    return NotImplemented if _convolve(images, W, starts, kernel, pool, out, which) else None


def slopes_of_images(slopes, which, W, starts, kernel, pool, out, room):
    return NotImplemented if _slopes_of_images(slopes, which, W, starts, kernel, pool, out) else None


def sums_of_patches(images, slopes, which, starts, kernel, pool, out, room):
    return NotImplemented if _sums_of_patches(images, slopes, which, starts, kernel, pool, out) else None


# mpiclip.problems.resnet: kernels/convolution.c

_convolve_all = kernel("convolve_all", "aaaannnaia")
_slopes_of_all = kernel("slopes_of_all", "aaannnaaa")
_sums_of_all = kernel("sums_of_all", "aaannnaa")


def convolve_all(images, W, bias, starts, kernel, stride, padding, add, positive, out, room):
    return NotImplemented if _convolve_all(images, W, bias, starts, kernel, stride, padding, add, positive,
                                           out) else None


def slopes_of_all(slopes, W, starts, kernel, stride, padding, add, h, out, room):
    return NotImplemented if _slopes_of_all(slopes, W, starts, kernel, stride, padding, add, h, out) else None


def sums_of_all(images, slopes, starts, kernel, stride, padding, out, bias, room):
    return NotImplemented if _sums_of_all(images, slopes, starts, kernel, stride, padding, out, bias) else None


# mpiclip.cells: kernels/lstm.c

_lstm_forward = kernel("lstm_forward", "aaaa")
_lstm_backward = kernel("lstm_backward", "aaaa")
_cross_entropies = kernel("cross_entropies", "aaara")
_add_rows = kernel("add_rows", "aaa")


def lstm_forward(z, W, h, c):
    return NotImplemented if _lstm_forward(z, W, h, c) else None


def lstm_backward(z, W, c, slopes):
    return NotImplemented if _lstm_backward(z, W, c, slopes) else None


def cross_entropies(z, bias, y, share, values):
    return NotImplemented if _cross_entropies(z, bias, y, share, values) else None


def add_rows(out, rows, values):
    return NotImplemented if _add_rows(out, rows, values) else None


# the memory's own limits, for `mpiclip bench kernels`: kernels/limits.c

_limit_read = kernel("limit_read", "aa", ctypes.c_double)
_limit_update = kernel("limit_update", "aa", None)


def limit_read(a, b) -> float:
    """Reads two arrays of floats once. Returns Σ_j a_j b_j."""
    return _limit_read(a, b)


def limit_update(a, b) -> None:
    """Updates two arrays of floats in place once: a = −a, b = −b."""
    _limit_update(a, b)


# mpiclip.problems._linear_model: kernels/glm.c

_linear_model = kernel("linear_model", "aaaaaaaaaaaaaaaaiirrn")
_LINKS = {"linear": 0, "logistic": 1}
_REGULARIZERS = {"none": 0, "l2": 1, "nonconvex": 2}


def linear_model(x, data, problem, batch=None, out=None, loss=True, clip=None):
    link = _LINKS.get(problem.name)
    if link is None:
        return NotImplemented
    a, sparse = data.a, hasattr(data.a, "indptr")
    values, indices, indptr = (None if data.ones else a.data, a.indices, a.indptr) if sparse else (a, None, None)
    rows, offsets, denominators = batch or (None, data.offsets, data.denominators)
    by_column = None if batch else data.by_column
    lengths = None if clip is None else data.lengths
    grad = np.empty((len(data.offsets) - 1, x.shape[-1]), x.dtype) if out is None else out
    losses = np.empty(len(grad)) if loss else None
    failed = _linear_model(values, indices, indptr, *(by_column or (None,) * 4), data.y, lengths, rows, offsets,
                           denominators, data.offsets, x, grad, losses, link, _REGULARIZERS[problem.regularizer],
                           problem.lam, clip or 0.0, data.features)
    return NotImplemented if failed else (losses, grad)
