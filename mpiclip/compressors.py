"""Compressors: what becomes of a worker's vector before it travels. `compressor = { name = "top_k", k = 100 }` in a
method's table chooses one; the fields of its record are the keys.

C : R^d → R^d, possibly random, is
    contractive with the constant α ∈ (0, 1]    if E‖C(x) − x‖² ≤ (1 − α) ‖x‖²          (what error feedback needs)
    unbiased with the variance ω                if E C(x) = x and E‖C(x) − x‖² ≤ ω ‖x‖²
for every x. A record says both of itself: `alpha(d)`, 0 where it is not contractive, and `omega(d)`, None where it is
biased. An unbiased C with ω < 1 is contractive with α = 1 − ω, and C/(1 + ω) always is, with α = 1/(1 + ω).

C(x) travels as a row of bytes whose length depends on d and dtype alone, so that ranks can exchange them at known
places. Random draws are a function of (seed, worker, round, call): where everybody can draw them again, they do not
travel. A vector that is not finite becomes one that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError

from . import ops
from .device import accelerated, host, xp
from .errors import InputError, unknown


class Message:
    """C(u_i) of some workers, as it travels.

    rows         (m, bytes) uint8, in host memory: a message for each worker
    workers      (m,), their numbers
    draw         worker → the generator of its random draws for this message
    d, dtype     of the vectors that were compressed"""

    def __init__(self, compressor: Compressor, rows: np.ndarray, workers, draw: Callable, d: int, dtype):
        self.compressor, self.rows, self.workers, self.draw = compressor, rows, workers, draw
        self.d, self.dtype = d, np.dtype(dtype)

    def add_to(self, v) -> None:
        """v_i += C(u_i) for v (m, d); v += Σ_i C(u_i), added up in the workers' order, for v (d,). v: NumPy or CuPy, of
        this dtype; sparse messages touch only their own places."""
        self.compressor.add(self, v)

    def with_others(self, rows: np.ndarray) -> Message:
        """The messages of all workers, 0 … n−1, of which these are some. rows: (n, bytes)."""
        if len(rows) == len(self.rows):
            return self
        return Message(self.compressor, rows, np.arange(len(rows)), self.draw, self.d, self.dtype)

    @cached_property
    def indices(self) -> np.ndarray:
        """The coordinates that a sparse message is about, (m, k) int32."""
        return self.compressor.indices(self)

    def column(self, start: int, count: int, dtype) -> np.ndarray:
        """`count` numbers of every row, from byte `start` on: (m, count)."""
        stop = start + count * np.dtype(dtype).itemsize
        return np.ascontiguousarray(self.rows[:, start:stop]).view(dtype)


class Compressor(BaseModel):
    """The base of all compressors: a frozen record."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: str

    def alpha(self, d: int) -> float:
        """α with E‖C(x) − x‖² ≤ (1 − α) ‖x‖² for all x ∈ R^d; 0: none is known."""
        return max(0.0, 1 - self.omega(d))      # type: ignore[operator]

    def omega(self, d: int) -> float | None:
        """ω with E C(x) = x and E‖C(x) − x‖² ≤ ω ‖x‖² for all x ∈ R^d; None: C is biased."""
        return None

    def bytes(self, d: int, dtype) -> int:
        """The length of a message."""
        raise NotImplementedError

    def compress(self, u, workers, draw: Callable) -> Message:
        """C(u_i). u: (w, d) float32 or float64, NumPy or CuPy, unmodified; workers: (w,), their numbers; draw: worker →
        the generator of its random draws."""
        raise NotImplementedError

    def add(self, message: Message, v) -> None:
        """Message.add_to"""
        raise NotImplementedError

    def indices(self, message: Message) -> np.ndarray:
        """Message.indices"""
        raise NotImplementedError

    def check(self, d: int, contractive: bool) -> None:
        """Raises InputError where it does not fit vectors of d coordinates, or is not contractive but has to be."""
        if contractive and self.alpha(d) == 0:
            hint = "; expected it without unbiased = true" if getattr(self, "unbiased", False) else ""
            raise InputError(f"method.compressor: '{self.name}' is not contractive for d = {d} (it is unbiased with "
                             f"ω = {self.omega(d):.4g}), so error feedback need not converge{hint}")


class Sparse(Compressor):
    """Keeps k coordinates: their values travel."""

    k: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]        # coordinates, or their share of d

    def count(self, d: int) -> int:
        """k as a number of coordinates: of a share at least one."""
        return self.k if isinstance(self.k, int) else max(1, round(self.k * d))

    def check(self, d, contractive):
        if self.count(d) > d:
            raise InputError(f"method.compressor.k = {self.k}: the model has only d = {d} coordinates")
        super().check(d, contractive)

    def add(self, message, v):
        add_sparse(v, message.indices, message.column(0, self.count(message.d), message.dtype))


class TopK(Sparse):
    """The k coordinates of largest magnitude; of equal ones the first. α = k/d. The message: k values, k indices.

    Stich, Cordonnier, Jaggi (2018), "Sparsified SGD with memory", arXiv:1809.07599."""

    name: Literal["top_k"] = "top_k"

    def alpha(self, d):
        return self.count(d) / d

    def bytes(self, d, dtype):
        return self.count(d) * (np.dtype(dtype).itemsize + 4)

    def compress(self, u, workers, draw):
        return self._message(u, workers, draw, *ops.top_k(u, self.count(u.shape[1])))

    def clip_step(self, u, v, tau, norms, workers) -> Message:
        """c_i = C(clip_τ(u_i − v_i)); v_i += c_i, in two passes. u may be overwritten; norms (w,) is filled with
        ‖u_i − v_i‖."""
        kept = ops.clip_step_top_k(u, v, tau, self.count(u.shape[1]), norms=norms)
        return self._message(u, workers, None, *kept)

    def indices(self, message):
        k = self.count(message.d)
        return message.column(k * message.dtype.itemsize, k, np.int32)

    def _message(self, u, workers, draw, indices, values):
        return Message(self, _rows(host(values), host(indices)), workers, draw, u.shape[1], u.dtype)


class RandK(Sparse):
    """k coordinates, every set of k as likely as another. α = k/d; with `unbiased` their values are multiplied by d/k:
    ω = d/k − 1. The message: k values; the receivers draw the indices again.

    Stich, Cordonnier, Jaggi (2018), arXiv:1809.07599; unbiased: Wangni, Wang, Liu, Zhang (2018), "Gradient
    sparsification for communication-efficient distributed optimization", arXiv:1710.09854."""

    name: Literal["rand_k"] = "rand_k"
    unbiased: bool = False

    def alpha(self, d):
        return super().alpha(d) if self.unbiased else self.count(d) / d

    def omega(self, d):
        return d / self.count(d) - 1 if self.unbiased else None

    def bytes(self, d, dtype):
        return self.count(d) * np.dtype(dtype).itemsize

    def compress(self, u, workers, draw):
        w, d = u.shape
        message = Message(self, np.empty((w, self.bytes(d, u.dtype)), np.uint8), workers, draw, d, u.dtype)
        values = np.array([host(u_i[xp(u).asarray(kept)]) for u_i, kept in zip(u, message.indices, strict=True)])
        if self.unbiased:
            values *= u.dtype.type(d / self.count(d))
        bad = ~np.isfinite(host(ops.norms(u)))
        values[bad] = np.nan                    # also where what is not finite was not drawn
        message.rows[:] = _rows(values)
        return message

    def indices(self, message):
        k = self.count(message.d)
        drawn = [message.draw(int(worker)).choice(message.d, k, replace=False, shuffle=False)
                 for worker in message.workers]
        return np.array(drawn, np.int32)


class Coded(Compressor):
    """Every coordinate travels as a code of a few bits: its sign, and how many of the message's units it is. The
    message: the unit, then the codes, without gaps. Encoding is done in host memory."""

    def width(self) -> int:
        """The bits of a code: the sign above, what it is the sign of below."""
        raise NotImplementedError

    def multiples(self) -> np.ndarray:
        """(2^(width−1),) float64: what the codes stand for, in units."""
        raise NotImplementedError

    def encode(self, u: np.ndarray, workers, draw: Callable) -> tuple[np.ndarray, np.ndarray]:
        """(units (w,) float64, codes (w, d) uint16) of finite vectors"""
        raise NotImplementedError

    def bytes(self, d, dtype):
        return np.dtype(dtype).itemsize + (self.width() * d + 7) // 8

    def compress(self, u, workers, draw):
        u = host(u)
        finite = np.isfinite(ops.norms(u))
        units, codes = self.encode(u if finite.all() else np.where(finite[:, None], u, 0), workers, draw)
        units = np.where(finite, units, np.nan).astype(u.dtype)
        return Message(self, _rows(units[:, None], pack(codes, self.width())), workers, draw, u.shape[1], u.dtype)

    def add(self, message, v):
        size = message.dtype.itemsize
        with np.errstate(over="ignore"):        # of codes that do not occur
            tables = (message.column(0, 1, message.dtype) * self.multiples()).astype(message.dtype)
        tables = np.hstack([tables, -tables])
        if xp(v) is np:
            add_codes(v, message.rows[:, size:], self.width(), tables)
        else:
            part = np.zeros(v.shape, v.dtype)
            add_codes(part, message.rows[:, size:], self.width(), tables)
            v += xp(v).asarray(part)


class Natural(Coded):
    """Every coordinate becomes one of the two powers of two around it, at random so that the mean is right: ω = 1/8,
    α = 7/8. The message: 9 bits a coordinate, sign and exponent; the exponents count from the message's unit, and what
    is 2^254 times smaller than the largest coordinate becomes 0. (Below the normal range, 1.2e-38 in float32, the two
    neighbours are 0 and the smallest normal number: unbiased still. Nothing is rounded up to infinity.)

    Horváth, Ho, Horváth, Sahu, Canini, Richtárik (2019), "Natural compression for distributed deep learning",
    arXiv:1905.10988."""

    name: Literal["natural"] = "natural"

    def omega(self, d):
        return 1 / 8

    def width(self):
        return 9

    def multiples(self):
        return np.concatenate([[0], np.exp2(np.arange(255.0))])     # 0: zero; c: 2^(c−1) units

    def encode(self, u, workers, draw):
        codes, bases = power_codes(u, _uniform(u, workers, draw))
        return np.ldexp(1.0, bases + (2 - 2**7 if u.dtype == np.float32 else 2 - 2**10)), codes


class Quantize(Coded):
    """Every coordinate becomes one of the s + 1 levels 0, ‖x‖/s, …, ‖x‖ with its sign, s = 2^(bits−1) − 1: one of the
    two around it, at random so that the mean is right: ω = min(d/s², √d/s). That is `unbiased`; else the result is
    divided by 1 + ω: α = 1/(1 + ω). The message: ‖x‖/s, and a code of `bits` bits for each coordinate.

    QSGD: Alistarh, Grubic, Li, Tomioka, Vojnović (2017), arXiv:1610.02132, Lemma 3.1."""

    name: Literal["quantize"] = "quantize"
    bits: int = Field(ge=2, le=8)           # a coordinate, sign included
    unbiased: bool = False

    def alpha(self, d):
        return super().alpha(d) if self.unbiased else 1 / (1 + self._omega(d))

    def omega(self, d):
        return self._omega(d) if self.unbiased else None

    def _omega(self, d: int) -> float:
        s = 2**(self.bits - 1) - 1
        return min(d / s**2, d**0.5 / s)

    def width(self):
        return self.bits

    def multiples(self):
        return np.arange(2.0**(self.bits - 1))

    def encode(self, u, workers, draw):
        s = 2**(self.bits - 1) - 1
        norm = ops.norms(u)
        scales = s / np.where(norm > 0, norm, np.inf)
        codes = level_codes(u, _uniform(u, workers, draw), scales, self.bits)
        return norm / s / (1 if self.unbiased else 1 + self._omega(u.shape[1])), codes


# ---- by name

COMPRESSORS: dict[str, type[Compressor]] = {
    record.model_fields["name"].default: record for record in (TopK, RandK, Natural, Quantize)}


def choose(table: Any) -> Compressor:
    """The compressor that { name = …, … } describes. Raises PydanticCustomError, of one line, if there is none."""
    if isinstance(table, Compressor):
        return table
    name = table.get("name") if isinstance(table, dict) else None
    if not isinstance(name, str):
        raise _wrong(f"expected {{ name = … }} with one of {', '.join(COMPRESSORS)}")
    if name not in COMPRESSORS:
        raise _wrong(str(unknown("name", name, COMPRESSORS)))
    record = COMPRESSORS[name]
    for key in table:
        if key not in record.model_fields:
            raise _wrong(str(unknown(name, key, record.model_fields)))
    try:
        return record(**table)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        expected = "a whole number of coordinates, 1 or more, or a share between 0 and 1" if key == "k" else \
            "; or ".join(e["msg"][0].lower() + e["msg"][1:] for e in error.errors() if e["loc"][0] == key)
        raise _wrong(f"{key} = {table[key]!r}: {expected}" if key in table else f"{key} is missing: expected {expected}"
                     if key == "k" else f"{key} is missing") from None


def _wrong(text: str) -> PydanticCustomError:
    return PydanticCustomError("compressor", "{text}", {"text": text})


# The type of a method's field `compressor`.
Choice = Annotated[SerializeAsAny[Compressor], BeforeValidator(choose)]


# ---- random rounding


def _uniform(u: np.ndarray, workers, draw: Callable) -> np.ndarray:
    """Uniform in [0, 1), one number for each of u's."""
    r = np.empty_like(u)
    for r_i, worker in zip(r, workers, strict=True):
        draw(int(worker)).random(dtype=u.dtype, out=r_i)
    return r


@accelerated
def power_codes(u, r):
    """The powers of two that numbers become: |u| = 2^e (1 + m) becomes 2^(e+1) with the probability m, else 2^e. Below
    the normal range it becomes 0, or the smallest normal number with the probability |u| has of it.

    u: (w, d) finite float32 or float64; r: like u, uniform in [0, 1), of which as many bits count as m has. Returns
    codes (w, d) uint16 and bases (w,) int32: the exponent field of 2^e is code + base, the code 0 stands for zero, and
    the sign is the code's bit 8."""
    word: Any
    word, p, q = (np.uint32, 23, 8) if u.dtype == np.float32 else (np.uint64, 52, 11)
    x = np.ascontiguousarray(u).view(word)
    exponent = ((x & word(2**(p + q) - 1)) + (r * u.dtype.type(2**p)).astype(word)) >> word(p)      # m + r carries
    exponent = np.minimum(exponent, word(2**q - 2)).astype(np.int32)                # nothing is rounded up to infinity
    bases = np.maximum(0, exponent.max(1) - 255)
    codes = np.maximum(exponent - bases[:, None], 0).astype(np.uint16)
    return codes | (x >> word(p + q)).astype(np.uint16) << 8, bases


@accelerated
def level_codes(u, r, scales, bits):
    """The levels that numbers become: |u_ij| scales_i = l + m becomes l + 1 with the probability m, else l; at most s =
    2^(bits−1) − 1.

    u: (w, d) finite float32 or float64; r: like u, uniform in [0, 1); scales: (w,) float64, with |u_ij| scales_i ≤ s
    but for rounding. Returns codes (w, d) uint16: the level, and the sign in bit `bits` − 1."""
    level = np.abs(u, dtype=np.float64) * scales[:, None]
    codes = level.astype(np.uint16)
    codes += r < level - codes
    np.minimum(codes, 2**(bits - 1) - 1, out=codes)
    return codes | np.signbit(u).astype(np.uint16) << (bits - 1)


# ---- on bytes


def _rows(*arrays: np.ndarray) -> np.ndarray:
    """Arrays (m, …) side by side, as bytes: (m, bytes) uint8."""
    parts = [np.ascontiguousarray(array).view(np.uint8) for array in arrays]
    return parts[0] if len(parts) == 1 else np.hstack(parts)


@accelerated
def pack(codes, bits):
    """Codes side by side: code j is the bits j · bits … (j+1) · bits − 1, the lowest first, of a row of bytes.

    codes: (m, d) uint16, below 2^bits; bits: 1 to 9. Returns (m, ⌈bits d/8⌉) uint8; what is left of the last byte is 0.

    >>> pack(np.array([[1, 2, 3]], np.uint16), 4)
    array([[33,  3]], dtype=uint8)"""
    single = np.unpackbits(codes.astype("<u2").view(np.uint8).reshape(*codes.shape, 2), 2, bitorder="little")
    return np.packbits(single[:, :, :bits].reshape(len(codes), -1), 1, bitorder="little")


def unpack(rows, bits, d):
    """pack, undone. rows: (m, ⌈bits d/8⌉) uint8. Returns (m, d) uint16."""
    single = np.unpackbits(rows, 1, bits * d, bitorder="little").reshape(len(rows), d, bits)
    two = np.packbits(np.pad(single, ((0, 0), (0, 0), (0, 16 - bits))), 2, bitorder="little")
    return two.view("<u2")[:, :, 0].astype(np.uint16)


@accelerated
def add_codes(v, rows, bits, tables) -> None:
    """v_i[j] += tables_i[code j of rows_i], in place; for v (d,) one row after the other is added to it.

    v: (m, d) or (d,); rows: (m, ⌈bits d/8⌉) uint8, as `pack` makes them; tables: (m, 2^bits), of v's dtype."""
    for i in range(len(rows)):
        own = v[i] if v.ndim == 2 else v
        own += tables[i][unpack(rows[i:i + 1], bits, len(own))[0]]


@accelerated
def add_sparse(v, indices, values) -> None:
    """v_i[indices_i] += values_i, in place; for v (d,) one row after the other is added to it.

    v: (m, d) or (d,), NumPy or CuPy; indices: (m, k) int32, no index twice in a row; values: (m, k), of v's dtype;
    both in host memory."""
    for i in range(len(indices)):
        own = v[i] if v.ndim == 2 else v
        own[xp(v).asarray(indices[i])] += xp(v).asarray(values[i])
