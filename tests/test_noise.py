"""mpiclip.noise against published words, the library's logarithm and sine, and the normal distribution; and the C
kernel, as every generation of CPUs runs it, against the definition. (Its CUDA twin: test_cuda.py.)"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from threadpoolctl import threadpool_limits

from mpiclip import device, kernels, noise
from mpiclip.noise import add_noise, keys

DTYPES = [np.float32, np.float64]
real = pytest.mark.parametrize("dtype", DTYPES)
needs_c = pytest.mark.skipif(not device.compiled(), reason="no C kernels")
SECRET = bytes(range(32))
GOLDEN_KEYS = [[7117959279111202178, 2344866342012761354], [5186104252834016181, 6399014748408372196]]
GOLDEN_NUMBERS = ["fea467be0577463f5ec70540", "8406bc5bded7b63f7aa56fda841b02404a5f05a4d1b2e43f"]
# Rows shorter than a tile (64 or 32 numbers), than the words made at a time (1024 or 512), than a thread's share
# (8192); at and beside their ends; more rows than threads.
SHAPES = [(1, 1), (3, 5), (2, 64), (20, 123), (2, 1023), (1, 1024), (2, 8191), (1, 8192), (2, 8193), (3, 40_003)]


def numbers(shape, dtype=np.float32, round=0, step=0, sigma=1.0, way=add_noise):
    return way(np.zeros(shape, dtype), sigma, keys(SECRET, "test", range(shape[0]), round, step))


# words


@pytest.mark.parametrize(("counter", "key", "words"), [         # Random123's known answers
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1")])
def test_known_answers(counter, key, words):
    def parse(text):
        return [np.uint64(int(word, 16)) for word in text.split()]
    assert list(noise.philox(parse(counter), parse(key))) == parse(words)


def philox(block, key, stream):
    """The four words of a block, in whole numbers."""
    x, k = [block % 2**32, block >> 32, stream % 2**32, stream >> 32], [key % 2**32, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b >> 32 ^ x[1] ^ k[0], b % 2**32, a >> 32 ^ x[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def point(u, bits, angle, swap, flip):
    """√(−2 ln U) (cos φ, sin φ), U = (u + ½)/2^bits; φ in the quarter that the two bits choose."""
    minus_log = -math.log((u + 0.5) / 2**bits) if u < 2**(bits - 1) else -math.log1p(-(2**bits - u - 0.5) / 2**bits)
    r = math.sqrt(2 * minus_log)
    x, y = r * math.cos(angle), r * math.sin(angle)
    x = -x if flip else x
    return (y, x) if swap else (x, y)


def point32(p, q):
    turn = (q >> 8) - (2**24 if q >= 2**31 else 0)
    return point(p << 6 | q & 63, 38, math.pi / 4 * (turn + 0.5) / 2**23, q & 64, q & 128)


def point64(p, q, r, s):
    turn = (r << 30 | s >> 2) - (2**62 if r >= 2**31 else 0)
    return point(p << 31 | q >> 1, 63, math.pi / 4 * (turn + 0.5) / 2**61, s & 1, s & 2)


@real
def test_numbers_are_those_of_a_plain_loop(dtype):
    d, (key, stream) = 300, keys(SECRET, "loop", [7], 3)[0].tolist()
    each = 4 if dtype is np.float32 else 2
    z = np.empty(320)
    for block in range(320 // each):
        x = philox(block, key, stream)
        points = [*point32(*x[:2]), *point32(*x[2:])] if dtype is np.float32 else point64(*x)
        tile, place = divmod(block, 16)
        z[tile * each * 16 + place:(tile + 1) * each * 16:16] = points
    got = add_noise.definition(np.zeros((1, d), dtype), 1.0, keys(SECRET, "loop", [7], 3))
    np.testing.assert_allclose(got[0], z[:d], rtol=4 * np.finfo(dtype).eps, atol=0)


@real
def test_blocks_beyond_32_bits(dtype):
    """The counter's second word counts."""
    each, (key, stream) = (4, keys(SECRET, "far", [0], 0)[0].tolist()) if dtype is np.float32 else (2, (5, 2**64 - 1))
    first = 2**33 + 16
    z = noise.normals((key, stream), first * each, 1, dtype)
    x = philox(first, key, stream)
    expected = point32(*x[:2]) if dtype is np.float32 else point64(*x)
    np.testing.assert_allclose(z, expected[:1], rtol=4 * np.finfo(dtype).eps)


EDGES = [0, 1, 2, 63, 64, 127, 128, 255, 256, 2**23, 2**24 + 1, 2**30, 2**31 - 257, 2**31 - 1, 2**31, 2**31 + 1,
         2**31 + 2**30, 3037000499, 3037000500, 3037000501, 2**32 - 256, 2**32 - 2, 2**32 - 1]      # about 2³²√½, too


def test_any_two_words_make_two_float32_numbers():
    p, q = (a.ravel() for a in np.meshgrid(np.array(EDGES, np.uint64), np.array(EDGES, np.uint64)))
    z = np.stack(noise.pair32(p, q))
    assert z.dtype == np.float32
    expected = np.transpose([point32(*pair) for pair in zip(p.tolist(), q.tolist(), strict=True)])
    np.testing.assert_allclose(z, expected, rtol=4e-7, atol=0)
    assert 7.352 < abs(z).max() < 7.36 and abs(z).min() > 0


def test_any_four_words_make_two_float64_numbers():
    words = [a.ravel() for a in np.meshgrid(*[np.array(EDGES[::2], np.uint64)] * 4)]
    z = np.stack(noise.pair64(*words))
    expected = np.transpose([point64(*four) for four in np.transpose(words).tolist()])
    np.testing.assert_allclose(z, expected, rtol=1e-15, atol=0)
    assert 9.41 < abs(z).max() < 9.42 and abs(z).min() > 0


# what add_noise does with them


def test_the_same_bytes_come_back():
    """On every machine, for ever: a run with a known secret can be repeated."""
    assert keys(SECRET, "gradient", [0, 41], 7, 2).tolist() == GOLDEN_KEYS
    assert [numbers((1, 3), dtype).tobytes().hex() for dtype in DTYPES] == GOLDEN_NUMBERS


@real
def test_noise_is_scaled_and_added(dtype):
    u, z = np.random.default_rng(1).standard_normal((3, 777)).astype(dtype), numbers((3, 777), dtype)
    for sigma in (0.37, 2, np.float32(0.1), 1e-3):
        noisy = u.copy()
        assert add_noise(noisy, sigma, keys(SECRET, "test", range(3), 0)) is noisy
        assert noisy.tobytes() == (u + dtype(sigma) * z).tobytes()


@real
@pytest.mark.parametrize("way", [add_noise, add_noise.definition], ids=["compiled", "definition"])
def test_no_sigma_no_noise(way, dtype):
    u = np.resize(np.array([1, -0.0, np.nan, np.inf, 5e-324], dtype), (2, 99))
    for sigma in (0, 0.0, 1e-200 if dtype is np.float32 else 0):
        assert way(u.copy(), sigma, keys(SECRET, "test", range(2), 0)).tobytes() == u.tobytes()


@real
def test_a_number_depends_on_its_key_and_its_place_alone(dtype):
    whole = numbers((5, 9000), dtype)
    for w, d in [(1, 9000), (5, 100), (2, 8193)]:
        assert numbers((w, d), dtype).tobytes() == whole[:w, :d].tobytes()
    some = add_noise(np.zeros((2, 9000), dtype), 1.0, keys(SECRET, "test", [4, 1], 0))
    assert some.tobytes() == whole[[4, 1]].tobytes()


@real
def test_no_rows_and_no_numbers(dtype):
    for way in (add_noise, add_noise.definition):
        assert numbers((0, 5), dtype, way=way).shape == (0, 5)
        assert numbers((3, 0), dtype, way=way).shape == (3, 0)


@needs_c
@real
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_c_is_the_definition_for_any_number_of_threads(dtype, shape):
    u, k = np.random.default_rng(2).standard_normal(shape).astype(dtype), keys(SECRET, "c", range(shape[0]), 5)
    expected = add_noise.definition(u.copy(), 0.37, k)
    for threads in (1, 2, 3, 5):
        with threadpool_limits(threads):
            assert add_noise(u.copy(), 0.37, k).tobytes() == expected.tobytes()


@real
def test_rows_that_lie_apart(dtype):
    k, columns = keys(SECRET, "test", range(4), 0), np.s_[:, 100:400]
    u = np.zeros((4, 1000), dtype)
    add_noise(u[columns], 1.0, k)
    assert u[columns].tobytes() == numbers((4, 300), dtype).tobytes()
    u[columns] = 0
    assert not u.any()
    u = np.zeros((300, 4), dtype)                   # columns as rows: the definition answers
    add_noise(u.T, 1.0, k)
    assert u.T.tobytes() == numbers((4, 300), dtype).tobytes()


@pytest.mark.parametrize("generation", ["sse2", "avx2", "avx512f"])
def test_every_generation_of_cpus_makes_the_same_bytes(generation, tmp_path):
    """kernels/noise.c, built as if the loader had chosen this generation; and the far numbers of a row, which no test
    has the memory to come to."""
    cpu = Path("/proc/cpuinfo")
    if not (shutil.which("gcc") and cpu.exists() and f" {generation} " in cpu.read_text()):
        pytest.skip(f"no gcc, or a CPU without {generation}")
    (tmp_path / "kernel.c").write_text("""
        #include "noise.c"
        const void *ndarray, *none;
        void far_f32(float *u, uint64_t k, uint64_t s, size j, size n) { add_share_f32(u, 1, (key){k, s}, j, n); }
        void far_f64(double *u, uint64_t k, uint64_t s, size j, size n) { add_share_f64(u, 1, (key){k, s}, j, n); }
    """)
    subprocess.run(["gcc", "-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fPIC",
                    "-Wno-unknown-pragmas", "-shared", f'-Dtarget_clones(...)=target("{generation}")',
                    f'-D__builtin_cpu_supports(name)=!__builtin_strcmp(name, "{generation}")',
                    f"-I{Path(kernels.__file__).parent}", tmp_path / "kernel.c", "-o", tmp_path / "kernel.so", "-lm"],
                   check=True)
    library = ctypes.CDLL(str(tmp_path / "kernel.so"))
    ctypes.c_void_p.in_dll(library, "ndarray").value = id(np.ndarray)
    library.add_noise.argtypes = [ctypes.py_object, ctypes.c_double, ctypes.py_object]
    for dtype, far in zip(DTYPES, (library.far_f32, library.far_f64), strict=True):
        for shape in SHAPES:
            k = keys(SECRET, "c", range(shape[0]), 5)
            u = np.zeros(shape, dtype)
            assert library.add_noise(u, 0.37, k) == 0
            assert u.tobytes() == add_noise.definition(np.zeros(shape, dtype), 0.37, k).tobytes()
        for first in (2**34 - 640, 2**40 + 64):
            u, k = np.zeros(2000, dtype), keys(SECRET, "far", [0], 0)[0].tolist()
            far(ctypes.c_void_p(u.ctypes.data), *map(ctypes.c_uint64, k), *map(ctypes.c_ssize_t, (first, u.size)))
            assert u.tobytes() == noise.normals(k, first, u.size, dtype).tobytes()


@pytest.mark.parametrize("way", [add_noise, add_noise.definition], ids=["compiled", "definition"])
@pytest.mark.parametrize(("u", "sigma", "k", "error"), [
    (np.zeros((2, 3), np.int64), 1, np.zeros((2, 2), np.uint64), "u is int64, shape .*; expected float32 or float64"),
    (np.zeros((2, 3), np.float16), 1, np.zeros((2, 2), np.uint64), "u is float16.*; expected float32 or float64"),
    (np.zeros(3), 1, np.zeros((1, 2), np.uint64), r"u is float64, shape \(3,\); expected .*\(w, d\)"),
    (np.zeros((2, 3)), 1, np.zeros((2, 2), np.int64), r"keys is int64, shape .*; expected uint64 .* shape \(2, 2\)"),
    (np.zeros((2, 3)), 1, np.zeros((3, 2), np.uint64), r"keys is uint64, shape \(3, 2\); expected .* shape \(2, 2\)"),
    (np.zeros((2, 3)), 1, np.zeros((2, 3), np.uint64), r"shape \(2, 3\); expected .* shape \(2, 2\)"),
    (np.zeros((2, 3)), 1, np.zeros(4, np.uint64), r"shape \(4,\); expected .* shape \(2, 2\)"),
    (np.zeros((2, 3)), 1, [[1, 2], [3, 4]], r"keys is list, shape \(2, 2\); expected uint64"),
    (np.zeros((2, 3)), -1.0, np.zeros((2, 2), np.uint64), "sigma is -1.0; expected a finite number ≥ 0"),
    (np.zeros((2, 3)), math.nan, np.zeros((2, 2), np.uint64), "sigma is nan; expected"),
    (np.zeros((2, 3)), math.inf, np.zeros((2, 2), np.uint64), "sigma is inf; expected"),
    (np.zeros((2, 3), np.float32), 1e39, np.zeros((2, 2), np.uint64), "sigma is 1e[+]39; expected")])
def test_what_does_not_fit_is_an_error(way, u, sigma, k, error):
    with pytest.raises(ValueError, match=error):
        way(u, sigma, k)
    assert not u.any()


def test_memory_that_cannot_be_written_is_not():
    u = np.zeros((2, 3), np.float32)
    u.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        add_noise(u, 1.0, np.zeros((2, 2), np.uint64))


# keys


def test_keys_differ_in_each_argument():
    some = [(secret, purpose, worker, round, step) for secret in (SECRET, SECRET[:31], b"\0", b"\0\0")
            for purpose in ("gradient", "message", "", "\0", "grad") for worker in (0, 1, 256, 2**32, 2**63)
            for round in (0, 1, 256, 2**40) for step in (0, 1, 7)]
    values = {tuple(keys(secret, purpose, [worker], round, step)[0].tolist())
              for secret, purpose, worker, round, step in some}
    assert len(values) == len(some)
    key, stream = zip(*values, strict=True)
    assert len(set(key)) == len(set(stream)) == len(some)           # 64 bits each: by chance, they differ as well


def test_keys_of_many_workers_and_rounds_do_not_collide():
    many = np.concatenate([keys(SECRET, "gradient", range(1000), round) for round in range(60)])
    assert many.shape == (60_000, 2) and many.dtype == np.uint64
    assert len(np.unique(many[:, 0])) == len(np.unique(many[:, 1])) == 60_000
    ones = np.unpackbits(many.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(60_000 * 128)


def test_a_key_depends_on_its_worker_alone():
    all_of_them = keys(SECRET, "p", range(9), 4, 1)
    assert np.array_equal(keys(SECRET, "p", np.array([5, 2]), 4, 1), all_of_them[[5, 2]])
    assert keys(SECRET, "p", [], 4, 1).shape == (0, 2)


@pytest.mark.parametrize("secret", [b"", bytes(65)])
def test_a_secret_has_1_to_64_bytes(secret):
    with pytest.raises(ValueError, match=rf"the secret has {len(secret)} bytes; expected 1 to 64"):
        keys(secret, "p", [0], 0)


# the normal distribution. All keys are fixed, so that a test that passes once always does; limits are five standard
# deviations.

MANY = 4_000_000


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "float64"])
def many(request):
    return numbers((1, MANY), request.param)[0]


def test_moments(many):
    z = many.astype(np.float64)
    for power, expected, square in [(1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)]:     # E zᵖ, E z²ᵖ
        deviation = math.sqrt((square - expected**2) / MANY)
        assert abs((z**power).mean() - expected) < 5 * deviation


def test_kolmogorov_and_smirnov(many):
    assert stats.kstest(many[:10**6], "norm").pvalue > 1e-3
    for k in range(slots(many).shape[1]):                       # the first, second … numbers of all blocks
        assert stats.kstest(slots(many)[:8000, k].ravel(), "norm").pvalue > 1e-3


def slots(z):
    """(tiles, numbers of a block, blocks of a tile)"""
    return z.reshape(-1, 4 if z.dtype == np.float32 else 2, 16)


@pytest.mark.parametrize("limit", [0.01, 1, 2, 3, 4, 4.5])
def test_tails(many, limit):
    for tail in (many > limit, many < -limit):
        p = stats.norm.sf(limit)
        assert abs(tail.sum() - MANY * p) < 5 * math.sqrt(MANY * p)


def test_a_chi_square_of_fine_bins(many):
    """1000 bins of equal probability: what the few numbers of the largest error of Kolmogorov's test do not show."""
    counts = np.bincount((1000 * stats.norm.cdf(many.astype(np.float64))).astype(int).clip(0, 999), minlength=1000)
    assert 1e-4 < stats.chisquare(counts).pvalue < 1 - 1e-4


def uncorrelated(a, b):
    """Neither the numbers nor their squares nor their signs."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    limit = 5 / math.sqrt(len(a))
    return all(abs(np.corrcoef(f(a), f(b))[0, 1]) < limit for f in (lambda x: x, np.square, np.sign))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 15, 16, 17, 32, 48, 64, 1024])
def test_neighbours_are_independent(many, lag):
    assert uncorrelated(many[lag:], many[:-lag])


def test_the_numbers_of_a_block_are_independent(many):
    z = slots(many)
    for k in range(z.shape[1]):
        for other in range(k):
            assert uncorrelated(z[:, k], z[:, other])


@real
def test_pairs_are_uniform_on_the_circle(dtype):
    """Box and Muller's two numbers: every angle alike, and the angle tells nothing of the radius."""
    z = slots(numbers((1, 2**20), dtype)[0].astype(dtype)).astype(np.float64)
    angle, r = np.arctan2(z[:, 1], z[:, 0]).ravel() / (2 * math.pi) % 1, np.hypot(z[:, 1], z[:, 0]).ravel()
    assert stats.kstest(angle, "uniform").pvalue > 1e-3
    assert stats.kstest(r, "rayleigh").pvalue > 1e-3
    table = np.histogram2d(angle, r, bins=[16, [0, 0.5, 1, 1.5, 2, 3, 8]])[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


@real
def test_rows_rounds_and_steps_are_independent(dtype):
    shape = (6, 100_000)
    z = numbers(shape, dtype)
    for i in range(6):
        for other in range(i):
            assert uncorrelated(z[i], z[other])
    for round, step in [(1, 0), (0, 1), (1, 1), (2**40, 3)]:
        assert uncorrelated(z, numbers(shape, dtype, round=round, step=step))
    sums = numbers((2000, 400), dtype).astype(np.float64).sum(axis=1) / 20          # of rows with keys of their own
    assert stats.kstest(sums, "norm").pvalue > 1e-3


def test_the_first_numbers_of_many_keys_are_normal():
    """Across keys, not along a row: what n workers add to one coordinate."""
    z = numbers((50_000, 5))
    for j in range(5):
        assert stats.kstest(z[:, j], "norm").pvalue > 1e-3
    assert uncorrelated(z[1:], z[:-1])


def test_float64_has_float64_s_digits():
    """A million numbers in [1, 2), all different: with 24 bits they would not be."""
    z = numbers((1, 8_000_000), np.float64)[0]
    z = z[(z >= 1) & (z < 2)]
    assert len(z) > 10**6 and len(np.unique(z)) == len(z)
    last_bits = np.unpackbits((z.view(np.uint64) & 0xFFFF).astype(np.uint16).view(np.uint8))
    assert abs(last_bits.mean() - 0.5) < 5 * 0.5 / math.sqrt(len(last_bits))
