"""Compressors: each is what its paper says (tests/reference.py, with the same draws), keeps the constants that it
promises, and travels in as many bytes as it says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import reference
from mpiclip import compressors, config, device, ops, show
from mpiclip.compressors import (
    COMPRESSORS,
    Natural,
    Quantize,
    RandK,
    TopK,
    add_codes,
    add_sparse,
    level_codes,
    pack,
    power_codes,
    unpack,
)
from mpiclip.errors import InputError
from mpiclip.streams import stream

D = 41
ALL = [TopK(k=5), TopK(k=1), TopK(k=0.25), TopK(k=D), RandK(k=5), RandK(k=D), RandK(k=5, unbiased=True),
       RandK(k=0.75, unbiased=True), Natural(), *(Quantize(bits=bits) for bits in range(2, 9)),
       Quantize(bits=3, unbiased=True), Quantize(bits=8, unbiased=True)]
DTYPES = ["float32", "float64"]
every = pytest.mark.parametrize("C", ALL, ids=str)
precisions = pytest.mark.parametrize("dtype", DTYPES)


def rng(seed=0):
    return np.random.default_rng(seed)


def draw(worker, round=0):
    return stream(0, "compress", worker, round)


def compressed(C, u, workers=None, round=0):
    """C(u_i) as vectors, (w, d), and their message."""
    workers = range(len(u)) if workers is None else workers
    message = C.compress(u, workers, lambda worker: draw(worker, round))
    c = np.zeros_like(u)
    message.add_to(c)
    return c, message


VECTORS = {
    "normal": rng(1).standard_normal(D), "ones": np.ones(D), "one": np.eye(D)[3], "small": np.full(D, 3e-20),
    "thirds": 2.0**60 * np.resize([4 / 3, -8 / 3], D), "scales": np.geomspace(1e-9, 1e9, D), "zeros": np.zeros(D)}


vectors = pytest.mark.parametrize("name, dtype", [*((name, "float64") for name in VECTORS),
                                                  ("normal", "float32"), ("scales", "float32")])


# ---- the constants


def samples(C, vector, dtype, count):
    """`count` independent draws of C(vector), (count, D) in float64."""
    u = np.tile(vector.astype(dtype), (count, 1))
    return compressed(C, u)[0].astype(np.float64)


@every
@vectors
def test_contraction(C, dtype, name):
    """E‖C(x) − x‖² ≤ (1 − α) ‖x‖², and ≤ ω ‖x‖² where there is an ω: the mean of 250 draws, but for five standard
    errors."""
    x = VECTORS[name].astype(dtype).astype(np.float64)
    error = ((samples(C, x, dtype, 250) - x) ** 2).sum(1)
    found, doubt = error.mean(), 5 * error.std() / np.sqrt(250)
    rounding = 8 * np.finfo(dtype).eps * (x @ x)
    if C.alpha(D) > 0:
        assert found <= (1 - C.alpha(D)) * (x @ x) + doubt + rounding
    if C.omega(D) is not None:
        assert found <= C.omega(D) * (x @ x) + doubt + rounding


@pytest.mark.parametrize("C", [C for C in ALL if C.omega(D) is not None], ids=str)
@vectors
def test_unbiased(C, dtype, name):
    """The mean of 2000 draws, but for five standard errors."""
    x = VECTORS[name].astype(dtype).astype(np.float64)
    found = samples(C, x, dtype, 2000)
    # of what is drawn too rarely for a standard error, a coordinate well below one level: five times in 2000 draws
    rare = np.where(np.abs(x) < 1e-2 * np.abs(found).max(), 5 / 2000 * np.abs(found).max(), 0)
    doubt = 5 * found.std(0) / np.sqrt(2000) + 1e-6 * np.abs(x) + rare
    assert (np.abs(found.mean(0) - x) <= doubt).all()


@given(arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e100, 1e100)), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_top_k_contracts_every_vector(u, k):
    C = TopK(k=min(k, len(u)))
    c, _ = compressed(C, u[None])
    assert ((c[0] - u) ** 2).sum() <= (1 - C.alpha(len(u))) * (u @ u) * (1 + 1e-12)
    np.testing.assert_array_equal(c[0], reference.top_k(u, C.k))


def test_constants():
    """As the papers have them; worst cases reach them."""
    assert TopK(k=5).alpha(50) == RandK(k=5).alpha(50) == 0.1 and TopK(k=5).omega(50) is RandK(k=5).omega(50) is None
    assert RandK(k=5, unbiased=True).omega(50) == 9 and RandK(k=5, unbiased=True).alpha(50) == 0
    assert RandK(k=40, unbiased=True).alpha(50) == pytest.approx(0.75)
    assert (Natural().omega(10**6), Natural().alpha(10**6)) == (1 / 8, 7 / 8)
    four, eight = Quantize(bits=4, unbiased=True), Quantize(bits=8, unbiased=True)      # s = 7, 127
    assert four.omega(10) == pytest.approx(10 / 49) and four.omega(10_000) == pytest.approx(100 / 7)
    assert eight.omega(10_000) == pytest.approx(10_000 / 127**2) and eight.omega(10**6) == pytest.approx(1000 / 127)
    assert four.alpha(10) == pytest.approx(39 / 49) and four.alpha(10_000) == 0
    assert Quantize(bits=4).alpha(10_000) == pytest.approx(7 / 107) and Quantize(bits=4).omega(10) is None
    error = ((samples(RandK(k=5), np.ones(D), "float64", 5) - 1) ** 2).sum(1)
    np.testing.assert_array_equal(error, D - 5)             # (1 − k/d) ‖x‖²
    error = ((samples(Natural(), np.full(D, -4 / 3), "float64", 2000) / (-4 / 3) - 1) ** 2).mean()
    assert error == pytest.approx(1 / 8, rel=0.02)


# ---- the definitions


def expected(C, u, round=0):
    """From tests/reference.py, with the draws handed in."""
    d, result = u.shape[1], []
    for i, u_i in enumerate(u.astype(np.float64)):
        if C.name == "top_k":
            result.append(reference.top_k(u_i, C.count(d)))
        elif C.name == "rand_k":
            kept = draw(i, round).choice(d, C.count(d), replace=False, shuffle=False)
            result.append(reference.rand_k(u_i, kept, C.unbiased))
        elif C.name == "natural":
            p = 23 if u.dtype == np.float32 else 52         # the bits of the fraction, which are all that count
            r = np.floor(draw(i, round).random(d, u.dtype) * 2.0**p) / 2.0**p
            result.append(reference.natural(u_i, 1 - r))
        else:
            r = draw(i, round).random(d, u.dtype)
            result.append(reference.quantize(u_i, r.astype(np.float64), C.bits, C.unbiased))
    return np.array(result)


@every
@precisions
def test_equals_the_definition(C, dtype):
    for round in range(20):
        u = (rng(round).standard_normal((4, D)) * 10.0 ** rng(round).integers(-3, 4, (4, 1))).astype(dtype)
        before = u.copy()
        c, _ = compressed(C, u, round=round)
        np.testing.assert_allclose(c, expected(C, u, round), rtol=4 * np.finfo(dtype).eps, atol=0)
        np.testing.assert_array_equal(u, before)


def test_natural_gives_powers_of_two_around_each_number():
    for dtype in DTYPES:
        u = (rng(1).standard_normal((50, D)) * 10.0 ** rng(2).uniform(-8, 8, (50, 1))).astype(dtype)
        u[:, 0] = 2.0 ** rng(3).integers(-20, 20, 50)           # powers of two stay
        c, _ = compressed(Natural(), u)
        assert (np.frexp(np.abs(c))[0] == 0.5).all() and (np.sign(c) == np.sign(u)).all()
        assert (np.abs(c) <= 2 * np.abs(u)).all() and (np.abs(c) >= np.abs(u) / 2).all()
        np.testing.assert_array_equal(c[:, 0], u[:, 0])


def test_natural_at_the_ends_of_the_range():
    """Nothing is rounded up to infinity; what float64 can hold, but 9 bits cannot beside the largest, becomes zero."""
    for dtype in DTYPES:
        largest = np.finfo(dtype).max if dtype == "float32" else 1e154
        smallest = np.finfo(dtype).tiny
        u = np.array([[largest, 0, -0.0, 1, -smallest], [smallest, smallest / 8, -smallest, 0, 0]] * 200, dtype)
        c, _ = compressed(Natural(), u)
        assert np.isfinite(c).all()
        np.testing.assert_array_equal(np.unique(np.abs(c[1::2, 1])), [0, smallest])
        assert c[1::2, 1].mean() == pytest.approx(smallest / 8, rel=0.5)
        np.testing.assert_array_equal(c[1::2, [0, 2]], np.tile([smallest, -smallest], (200, 1)))
        assert (c[::2, 4] == (0 if dtype == "float64" else -smallest)).all() and not c[::2, 1:3].any()
    wide, _ = compressed(Natural(), np.array([[1.0, 2.0**-253, 2.0**-255, -(2.0**-300)]]))
    np.testing.assert_array_equal(wide, [[1, 2.0**-253, 0, 0]])


@every
@precisions
def test_what_is_not_finite_stays_so_in_its_own_row(C, dtype):
    u = rng(5).standard_normal((5, D)).astype(dtype)
    clean, _ = compressed(C, u)
    u[1, 7], u[3, 0] = np.nan, -np.inf
    c, message = compressed(C, u)
    assert not np.isfinite(c[[1, 3]]).all(1).any()
    np.testing.assert_array_equal(c[[0, 2, 4]], clean[[0, 2, 4]])
    total = np.zeros(D, dtype)
    message.add_to(total)
    assert not np.isfinite(total).all()


def test_quantize_keeps_a_vector_of_one_coordinate():
    """|x| = ‖x‖ is the highest level; its rounding does not make it a level more."""
    for bits in range(2, 9):
        for x in (*rng(6).standard_normal(50), 0.1, 1e-30, 3e30):
            u = np.array([[x]], np.float32)
            c, _ = compressed(Quantize(bits=bits, unbiased=True), u)
            np.testing.assert_allclose(c, u, rtol=1e-6)


# ---- how messages travel


@every
@precisions
@pytest.mark.parametrize("d", [41, 48, 1003])
def test_sizes(C, dtype, d):
    """What the papers count: k values and indices; bits a coordinate and one number."""
    value, k = np.dtype(dtype).itemsize, C.count(d) if hasattr(C, "k") else 0
    right = {"top_k": k * (value + 4), "rand_k": k * value, "natural": value + -(-9 * d // 8),
             "quantize": value + -(-getattr(C, "bits", 0) * d // 8)}[C.name]
    _, message = compressed(C, rng(1).standard_normal((3, d)).astype(dtype))
    assert message.rows.shape == (3, right) == (3, C.bytes(d, dtype)) and message.rows.dtype == np.uint8


def test_share_of_the_coordinates():
    assert [TopK(k=0.1).count(d) for d in (1, 4, 16, 1000)] == [1, 1, 2, 100]


@every
@precisions
def test_a_message_is_a_function_of_worker_and_round(C, dtype):
    """Whoever else is compressed beside it; and another round is another draw."""
    u = rng(8).standard_normal((5, 300)).astype(dtype)
    if isinstance(C, TopK | RandK) and C.k == D:
        C = C.model_copy(update={"k": 150})
    c, message = compressed(C, u)
    some, part = compressed(C, u[3:], [3, 4])
    np.testing.assert_array_equal(part.rows, message.rows[3:])
    np.testing.assert_array_equal(some, c[3:])
    other, _ = compressed(C, u, round=1)
    assert np.array_equal(other, c) == (C.name == "top_k")
    twins, _ = compressed(C, u[[0, 0]])
    assert np.array_equal(twins[0], twins[1]) == (C.name == "top_k")


@every
@precisions
def test_everybody_adds_up_the_same(C, dtype):
    """From bytes alone: the sum of all messages is the sum of the vectors, in the workers' order."""
    u = rng(9).standard_normal((6, D)).astype(dtype)
    c, message = compressed(C, u)
    mine = C.compress(u[2:4], [2, 3], draw)
    total = np.zeros(D, dtype)
    mine.with_others(message.rows.copy()).add_to(total)
    np.testing.assert_array_equal(total, ops.row_sum(c))


@pytest.mark.parametrize("C", [TopK(k=5), RandK(k=5)], ids=str)
def test_sparse_messages_touch_only_their_places(C):
    u = rng(10).standard_normal((3, D))
    v = np.full((3, D), np.nan)
    c, message = compressed(C, u)
    kept = message.indices
    np.put_along_axis(v, kept.astype(int), 1.0, 1)
    message.add_to(v)
    assert (np.isnan(v).sum(1) == D - 5).all()
    np.testing.assert_array_equal(np.nan_to_num(v), np.where(np.isnan(v), 0, 1 + c))


def test_rand_k_draws_every_set_alike():
    message = RandK(k=2).compress(np.ones((6000, 5)), range(6000), draw)
    kept = np.sort(message.indices, 1)
    sets, counts = np.unique(kept @ [10, 1], return_counts=True)
    assert len(sets) == 10 and (np.abs(counts - 600) < 5 * np.sqrt(600)).all()


def test_fused_clip_and_top_k():
    """clip_step is compress and add_to of the clipped difference."""
    C = TopK(k=5)
    for dtype in DTYPES:
        for tau in (0.1, 2.0, np.inf):
            g, v = rng(11).standard_normal((2, 4, D)).astype(dtype)
            u, plain, norms = g - v, v.copy(), np.empty(4)
            right = C.compress(ops.clip(u, tau), range(4), draw)
            right.add_to(plain)
            message = C.clip_step(g, v, tau, norms, range(4))
            np.testing.assert_array_equal(message.rows, right.rows)
            np.testing.assert_array_equal(v, plain)
            np.testing.assert_allclose(norms, ops.norms(u), rtol=1e-12)


@pytest.mark.parametrize("bits", range(1, 10))
@pytest.mark.parametrize("d", [1, 2, 7, 8, 9, 63, 64, 65, 5000])
def test_pack_and_unpack(bits, d):
    codes = rng(bits * 1000 + d).integers(0, 2**bits, (3, d)).astype(np.uint16)
    codes[0], codes[1] = 0, 2**bits - 1
    for packed in (pack(codes, bits), pack.definition(codes, bits)):
        assert packed.shape == (3, -(-bits * d // 8)) and packed.dtype == np.uint8
        np.testing.assert_array_equal(unpack(packed, bits, d), codes)
        whole = [int.from_bytes(row.tobytes(), "little") for row in packed]
        assert whole == [sum(int(c) << bits * j for j, c in enumerate(row)) for row in codes]


# ---- by name


def method(**compressor):
    return config.load({"problem": {"name": "quadratic", "curvature": [[1.0]], "centre": [[1.0]]},
                        "method": {"name": "dcgd", "stepsize": 0.1, "compressor": compressor}}).method


def test_by_name():
    assert method(name="top_k", k=3).compressor == TopK(k=3)
    assert method(name="rand_k", k=0.5, unbiased=True).compressor == RandK(k=0.5, unbiased=True)
    assert method(name="natural").compressor == Natural()
    assert method(name="quantize", bits=4).compressor == Quantize(bits=4)
    assert set(COMPRESSORS) == {"top_k", "rand_k", "natural", "quantize"}
    for C in ALL:
        assert compressors.choose(C.model_dump()) == C
        assert method(**C.model_dump()).model_dump()["compressor"] == C.model_dump()


def test_in_words():
    """Of `mpiclip show`."""
    for C, words in ((RandK(k=0.3, unbiased=True), "rand_k, k 0.3, unbiased"), (Natural(), "natural"),
                     (Quantize(bits=4), "quantize, bits 4")):
        assert show._constant("compressor", C.model_dump(), C.model_dump()) == f"compressor = {words}"


@pytest.mark.parametrize("table, told", [
    ({"name": "topk", "k": 3}, "there is no 'topk'; did you mean 'top_k'?"),
    ({"k": 3}, "expected { name = … } with one of top_k, rand_k, natural, quantize"),
    ("top_k", "method.compressor = 'top_k': expected { name = … }"),
    ({"name": "top_k"}, "k is missing"),
    ({"name": "top_k", "k": 0}, "k = 0: a whole number of coordinates, 1 or more, or a share between 0 and 1"),
    ({"name": "rand_k", "k": -3}, "k = -3: a whole number"),
    ({"name": "rand_k", "k": 1.0}, "k = 1.0: a whole number"),
    ({"name": "rand_k", "k": 2.5}, "k = 2.5: a whole number"),
    ({"name": "top_k", "k": True}, "k = True: a whole number"),
    ({"name": "top_k", "k": "3"}, "k = '3': a whole number"),
    ({"name": "top_k", "k": float("nan")}, "k = nan: a whole number"),
    ({"name": "rand_k", "k": 3, "unbiased": 1}, "unbiased = 1: input should be a valid boolean"),
    ({"name": "top_k", "k": 3, "unbiased": True}, "top_k: there is no 'unbiased'; known: k, name"),
    ({"name": "rand_k", "k": 3, "unbias": True}, "there is no 'unbias'; did you mean 'unbiased'?"),
    ({"name": "quantize", "bits": 1}, "bits = 1: input should be greater than or equal to 2"),
    ({"name": "quantize", "bits": 9}, "bits = 9: input should be less than or equal to 8"),
    ({"name": "quantize", "bits": 4.0}, "bits = 4.0: input should be a valid integer"),
    ({"name": "quantize"}, "bits is missing")])
def test_bad_tables(table, told):
    tables = {"problem": {"name": "quadratic", "curvature": [[1.0]], "centre": [[1.0]]},
              "method": {"name": "ef21", "stepsize": 0.1, "compressor": table}}
    with pytest.raises(InputError) as error:
        config.load(tables)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("config: method.compressor = ")


def test_bad_sizes():
    with pytest.raises(InputError, match="^method.compressor.k = 8: the model has only d = 7 coordinates$"):
        TopK(k=8).check(7, contractive=False)
    TopK(k=7).check(7, contractive=True)
    with pytest.raises(InputError, match=r"'rand_k' is not contractive for d = 7 \(it is unbiased with ω = 2.5\), .*"
                                         "expected it without unbiased = true$"):
        RandK(k=2, unbiased=True).check(7, contractive=True)
    RandK(k=2, unbiased=True).check(7, contractive=False)
    RandK(k=4, unbiased=True).check(7, contractive=True)
    for C in (Quantize(bits=2), Natural(), RandK(k=1)):
        C.check(10**6, contractive=True)
    with pytest.raises(InputError, match="'quantize' is not contractive"):
        Quantize(bits=2, unbiased=True).check(10**6, contractive=True)


# ---- the compiled kernels


@pytest.mark.skipif(not device.compiled(), reason="no C kernels")
def test_kernels_take_what_a_message_is_made_of():
    """They do not leave it to their definitions."""
    cpu = pytest.importorskip("mpiclip.kernels.cpu")
    codes, v = np.arange(24, dtype=np.uint16).reshape(2, 12), np.zeros((2, 12), np.float32)
    rows = cpu.pack(codes, 5)
    assert isinstance(rows, np.ndarray)
    strided = np.hstack([np.zeros((2, 4), np.uint8), rows])[:, 4:]
    for target in (v, v[0]):
        assert cpu.add_codes(target, strided, 5, np.ones((2, 32), np.float32)) is None
        assert cpu.add_sparse(target, np.array([[1], [11]], np.int32), np.ones((2, 1), np.float32)) is None
    assert v.sum() == 24 + 2 + 24 + 2
    assert cpu.power_codes(v, v)[0].shape == cpu.level_codes(v, v, np.ones(2), 4).shape == v.shape
    for bad in (codes.astype(np.int16), codes[:, ::2]):
        assert cpu.pack(bad, 5) is NotImplemented
    assert cpu.add_codes(v, rows[:, 1:], 5, np.ones((2, 32), np.float32)) is NotImplemented
    assert cpu.add_codes(v, rows, 5, np.ones((2, 32))) is NotImplemented
    assert cpu.add_sparse(v, np.array([[1], [12]], np.int32), np.ones((2, 1), np.float32)) is NotImplemented


@precisions
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("d", [1, 5, 64, 3001])
def test_kernels_equal_their_definitions(dtype, together, d):
    for bits in range(1, 10):
        u = rng(bits).standard_normal((4, d)).astype(dtype)
        v = rng(99).standard_normal(d if together else (4, d)).astype(dtype)
        codes, tables = rng(d).integers(0, 2**bits, (4, d)), rng(3).standard_normal((4, 2**bits)).astype(dtype)
        rows = np.hstack([rng(1).integers(0, 9, (4, 3)).astype(np.uint8), pack(codes.astype(np.uint16), bits)])[:, 3:]
        plain = v.copy()
        add_codes.definition(plain, rows, bits, tables)
        add_codes(v, rows, bits, tables)
        np.testing.assert_array_equal(v, plain)
    k = max(1, d // 3)
    indices = np.array([rng(i).choice(d, k, replace=False) for i in range(4)], np.int32)
    add_sparse.definition(plain, indices, u[:, :k])
    add_sparse(v, indices, u[:, :k])
    np.testing.assert_array_equal(v, plain)


@precisions
@pytest.mark.parametrize("d", [1, 7, 40, 3001])
def test_random_rounding_equals_its_definition(dtype, d):
    u = (rng(d).standard_normal((5, d)) * 10.0 ** rng(1).integers(-30, 30, (5, d))).astype(dtype)
    u[1], u[2], u[3, ::2] = 0, -np.finfo(dtype).max, np.finfo(dtype).tiny / 3
    if dtype == "float64":
        u[4] *= 10.0 ** rng(2).integers(-250, 250, d)
    r = rng(3).random((5, d)).astype(dtype)
    r[r == 1] = 0
    for got, right in zip(power_codes(u, r), power_codes.definition(u, r), strict=True):
        assert got.dtype == right.dtype
        np.testing.assert_array_equal(got, right)
    u[4] = rng(4).standard_normal(d)
    for bits in range(2, 10):
        scales = (2 ** (bits - 1) - 1) / np.maximum(np.abs(u).max(1).astype(np.float64), 1e-40)
        scales[1] = 0
        got, right = level_codes(u, r, scales, bits), level_codes.definition(u, r, scales, bits)
        assert got.dtype == right.dtype
        np.testing.assert_array_equal(got, right)


def test_a_level_above_the_highest_is_the_highest():
    """‖x‖ and |x_j| s/‖x‖ are rounded."""
    for codes in (level_codes, level_codes.definition):
        for bits in range(2, 9):
            s = 2 ** (bits - 1) - 1
            found = codes(np.array([[1.0, -1.0]]), np.zeros((1, 2)), np.array([np.nextafter(s, 1000)]), bits)
            np.testing.assert_array_equal(found, [[s, s | s + 1]])


def test_an_index_out_of_place_is_refused():
    for v in (np.zeros(5), np.zeros((1, 5))):
        with pytest.raises(IndexError):
            add_sparse(v, np.array([[5]], np.int32), np.ones((1, 1)))
        assert not v.any()
