"""Gaussian noise that is a function of a key: the same bytes from NumPy, from C with any number of threads, on any CPU,
and from CUDA, on any number of ranks.

Number j of a row comes from the words that Philox4x32-10 makes of a counter, turned into normal numbers by Box and
Muller's transform (1958). Nothing but +, −, ·, /, √ and bits goes into it, each rounded by itself in the array's dtype,
in the order that is written here; logarithm and sine are this file's own series. The compiled twins do the same.

The largest |z| is 7.353 in float32, √(2 ln 2³⁹), and 9.419 in float64, √(2 ln 2⁶⁴). A true normal number lies beyond it
with probability 1.9e-13 and 4.5e-21, one of 10⁷ with 1.9e-6 and 4.5e-14. Below it, |z| is off by a few roundings of its
dtype.

What a privacy guarantee rests on, as far as this file goes:

- The key is secret. It is a BLAKE2b hash of the run's secret, so that no worker's or round's key tells another's.
- Philox is not a cryptographic generator. It passes the statistical tests, but nobody has shown that its key cannot be
  found, or its next numbers told, from numbers that are known: who sees u + σz and knows u sees z. The guarantee
  assumes that nobody can.
- The theory adds real numbers, this file rounded ones. Which of the many neighbours of a sum can occur, and how often,
  depends on the bits of u, and so tells of it: the attack of Mironov (2012, "On significance of the least significant
  bits for differential privacy") and its successors work on such sums. The guarantee is that of the real-valued
  mechanism, for those who do not look at the last bits. float64 makes such a look harder, not impossible."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from math import inf, log

import numpy as np

from .device import accelerated, xp
from .ops import check

ABREAST = 16                                            # blocks of a tile, see `normals`
LOW = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57                    # of Philox4x32
WEYL = 0x9E3779B9, 0xBB67AE85                           # added to the key in every round


@accelerated
def add_noise(u, sigma, keys):
    """u_i += σ z_i, in place, z_i ~ N(0, I) from keys_i. Returns u.

    u: (w, d), float32 or float64. sigma: a number ≥ 0, rounded to u's dtype; 0 leaves every byte as it is.
    keys: (w, 2) uint64 in host memory, see `keys`. z_ij depends on keys_i, j and the dtype alone.
    Raises ValueError where shapes or dtypes do not fit, or for a sigma that is negative or not finite in u's dtype.

    >>> add_noise(np.zeros((1, 4), np.float32), 1.0, np.array([[0, 0]], np.uint64))
    array([[-1.3316882,  0.1277994, -2.4610672, -0.5496032]], dtype=float32)"""
    check(u)
    if u.ndim != 2 or u.dtype.type not in SERIES:
        raise ValueError(f"u is {u.dtype}, shape {u.shape}; expected float32 or float64, (w, d)")
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint64 or keys.shape != (len(u), 2):
        raise ValueError(f"keys is {getattr(keys, 'dtype', type(keys).__name__)}, shape {np.shape(keys)}; expected "
                         f"uint64 in host memory, shape {(len(u), 2)}")
    with np.errstate(over="ignore"):
        scale = u.dtype.type(sigma)
    if not 0 <= scale < inf:
        raise ValueError(f"sigma is {sigma}; expected a finite number ≥ 0")
    piece = 1 << 16                                     # numbers at a time, for the cache: a whole number of tiles
    for u_i, key in zip(u, keys, strict=True):
        for j in range(0, len(u_i) if scale else 0, piece):
            part = u_i[j:j + piece]
            part += scale * normals(key, j, len(part), u.dtype.type, xp(u))
    return u


def keys(secret: bytes, purpose: str, ids: Iterable[int], round: int, step: int = 0) -> np.ndarray:
    """The keys of the workers `ids` for one draw, (w, 2) uint64: Philox's key, and the stream, the upper half of its
    counter. They are the BLAKE2b hash (RFC 7693), keyed with the secret, of all other arguments.

    secret: 1 to 64 bytes; 16 or more that nobody can guess, for privacy. ids, round, step: numbers ≥ 0, below 2⁶⁴.
    Raises ValueError for a secret of another length."""
    if not 1 <= len(secret) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ValueError(f"the secret has {len(secret)} bytes; expected 1 to {hashlib.blake2b.MAX_KEY_SIZE}")
    draws = [b"".join(int(number).to_bytes(8, "little") for number in (i, round, step)) for i in ids]
    digests = [hashlib.blake2b(draw + purpose.encode(), digest_size=16, key=secret, person=b"mpiclip noise").digest()
               for draw in draws]
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2).astype(np.uint64)


# ---- words


def philox(counter, key):
    """The four words of each block: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011, "Parallel random numbers: as
    easy as 1, 2, 3"). counter: four words or arrays of words; key: two words; words are uint64 below 2³²."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (product1 >> 32) ^ x1 ^ k0, product1 & LOW, (product0 >> 32) ^ x3 ^ k1, product0 & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return x0, x1, x2, x3


def normals(key, first: int, count: int, dtype, xp=np):
    """The numbers z_j, j = first … first + count − 1, of the row with this key and stream; `first` begins a tile.

    Block b has the counter (b, stream), both 64 bits with their lower word first. Its four words give four float32
    numbers or two float64 numbers. The row is made of tiles of ABREAST blocks; a tile holds the first numbers of all
    its blocks, then the second ones, and so on: compilers and GPUs like it that way."""
    each = 4 if dtype is np.float32 else 2              # numbers of a block
    b = xp.arange(first // each, first // each + -(-count // (each * ABREAST)) * ABREAST, dtype=np.uint64)
    (key0, key1), (stream0, stream1) = ((int(half) & LOW, int(half) >> 32) for half in key)
    zero = xp.zeros_like(b)
    x = philox((b & LOW, b >> 32, zero + stream0, zero + stream1), (key0, key1))
    z = [*pair32(x[0], x[1]), *pair32(x[2], x[3])] if dtype is np.float32 else pair64(*x)
    return xp.stack(z).reshape(each, -1, ABREAST).swapaxes(0, 1).reshape(-1)[:count]


# ---- from words to normal numbers


def pair32(p, q):
    """Two float32 numbers from two words: U from p and six bits of q, the angle from the other 26."""
    real = np.float32
    below = (real_of(q & 63, real) + real(0.5)) / 64                    # within a step of p
    return box_muller((signed(p, real) + below) * 2.0**-32, (signed(q, real, 8) + real(0.5)) * 2.0**-23,
                      (q & 64) > 0, (q & 128) > 0)


def pair64(p, q, r, s):
    """Two float64 numbers from four words: U from p and q, the angle from r and s."""
    real = np.float64
    below, within = (real_of(q >> 1, real) + 0.5) * 2.0**-31, (real_of(s >> 2, real) + 0.5) * 2.0**-30
    return box_muller((signed(p, real) + below) * 2.0**-32, (signed(r, real) + within) * 2.0**-31,
                      (s & 1) > 0, (s & 2) > 0)


def real_of(word, real):
    """The words, below 2³¹, as numbers."""
    return word.astype(np.int32).astype(real)


def signed(word, real, shift: int = 0):
    """The words, taken as signed 32-bit numbers, without their lowest bits."""
    return (word.astype(np.uint32).view(np.int32) >> shift).astype(real)


# Series in z, lowest power first: −4 artanh(s)/s in z = s², |s| ≤ (√2 − 1)/(√2 + 1); sin(πt/4)/t and cos(πt/4) in
# z = t², |t| ≤ 1. Minimax in relative error, found by Remez' exchange in 60 digits; −4 and 1 are exact.
SERIES = {
    np.float32: ((-4.0, -1.3333355283, -0.7995507404, -0.59743722584),
                 (0.78539816085, -0.080745432529, 0.0024900010244, -3.595045229e-5),
                 (1.0, -0.30842513489, 0.015854323912, -0.00032593650041, 3.5287616102e-6)),
    np.float64: ((-4.0, -1.333333333333346891, -0.7999999999882868197, -0.5714285748494334316, -0.4444439712744691994,
                  -0.3636712971548059124, -0.3062807199545550071, -0.2959220866843280578),
                 (0.785398163397448307, -0.08074551218828053021, 0.002490394570188736251, -3.657620415845622561e-5,
                  3.13361621662911219e-7, -1.757149293657193549e-9, 6.877100654849404748e-12),
                 (1.0, -0.3084251375340424524, 0.01585434424381541089, -0.0003259918869266875356,
                  3.590860445885782251e-6, -2.461136382632163455e-8, 1.150049702111891894e-10,
                  -3.857761956444445984e-13))}


def box_muller(f, t, swap, flip):
    """√(−2 ln U) (cos φ, sin φ), U uniform in (0, 1) and φ on the circle.

    f: U if f > 0, U − 1 if f < 0, so that f keeps all its digits at both ends of (0, 1). φ = πt/4 with |t| < 1 is an
    angle of the right quarter of the circle; `flip` turns its cosine to the left, `swap` exchanges the two."""
    xp_, real = xp(f), f.dtype.type
    artanh, sin, cos = SERIES[real]
    m, e = xp_.frexp(xp_.where(f < 0, 1 + f, f))         # U = m 2ᵉ, then √½ ≤ m < √2
    small = m < np.sqrt(real(0.5))
    m, e = xp_.where(small, 2 * m, m), (e - small).astype(real)
    h = xp_.where(e == 0, f, m - 1)                     # e = 0: m is U, and f is the better U − 1
    s = h / (2 + h)                                     # ln(1 + h) = 2 artanh(s)
    r = xp_.sqrt(e * real(-2 * log(2)) + s * polynomial(artanh, s * s))
    x, y = r * polynomial(cos, t * t), r * (t * polynomial(sin, t * t))
    x = xp_.where(flip, -x, x)
    return xp_.where(swap, y, x), xp_.where(swap, x, y)


def polynomial(coefficients, z):
    """Σ_k coefficients_k zᵏ, by Horner's rule."""
    *others, p = coefficients
    for c in reversed(others):
        p = c + z * p
    return p
