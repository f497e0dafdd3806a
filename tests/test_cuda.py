"""The CUDA kernels. Without a GPU: they compile for real ones, and they run on the CPU through their own launchers,
with NumPy dressed as CuPy and every thread a fiber (cuda_on_cpu.h). With a GPU, the same tests run there too."""

import ctypes
import faulthandler
import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mpiclip.kernels import cuda

from mpiclip import cells, columns, device, noise, ops

KERNELS = Path(cuda.__file__).parent
DTYPES = [np.float32, np.float64]
FOLDER = tempfile.TemporaryDirectory(prefix="cuda_on_cpu")          # what g++ makes, for this run of the tests
EPS = {np.float32: 2e-7, np.float64: 1e-13}       # a few roundings; in float64 those of the definition's long sums, too


# --- they compile -----------------------------------------------------------------------------------------------------


def nvrtc():
    """CuPy's binding of the run-time compiler, which needs no GPU, or None."""
    try:
        from cupy.cuda import nvrtc
        nvrtc.getVersion()
        return nvrtc
    except Exception:           # no CuPy, or no libnvrtc
        return None


def compile_for_gpu(source: Path, real: str, architecture: str, folder: Path) -> str:
    """What the assembler says about the kernels, which stand in one file."""
    options = [*cuda.options(real), "-ftz=true", f"-arch={architecture}"]       # the last two are CuPy's, …
    if compiler := nvrtc():
        program = compiler.createProgram(f'#include "{source.name}"', "kernels.cu", [], [])
        try:
            compiler.compileProgram(program, [*options, "-default-device", "--ptxas-options=-v"])       # … as is this
        except compiler.NVRTCError:
            pytest.fail(compiler.getProgramLog(program))
        return compiler.getProgramLog(program)
    if not shutil.which("nvcc"):
        pytest.skip("neither NVRTC (nvidia-cuda-nvrtc with cupy) nor nvcc is installed")
    run = subprocess.run(["nvcc", *options, "-cubin", "-Xptxas", "-v", "-o", folder / "kernels.cubin", source],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("source", sorted(KERNELS.glob("*.cu")), ids=lambda path: path.name)
def test_compiles_for_real_gpus_without_spills(source, real, architecture, tmp_path):
    log = compile_for_gpu(source, real, architecture, tmp_path)
    kernels = re.findall(r"KERNEL (\w+)\(", source.read_text("utf-8"))
    assert kernels and sorted(re.findall(r"entry function '(\w+)'", log)) == sorted(kernels)
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log) == [
        ("0", "0", "0")] * len(re.findall("Function properties", log))


# --- they run ---------------------------------------------------------------------------------------------------------


@functools.cache
def build(code: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """The kernels of a source as functions for the CPU: run_NAME(grid, threads, arguments, kinds, backwards)."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    folder = Path(FOLDER.name) / hashlib.sha256(repr((code, options)).encode()).hexdigest()[:16]
    folder.mkdir()
    included = "".join((KERNELS / name).read_text("utf-8") for name in re.findall(r'#include "(\w+\.cu)"', code))
    names = re.findall(r"KERNEL (\w+)\(", code + included)
    (folder / "kernels.cu").write_text(code)
    (folder / "kernels.cpp").write_text('#include "cuda_on_cpu.h"\n#include "kernels.cu"\n'
                                        + "".join(f"RUNNABLE({name})\n" for name in names))
    # Compilers for GPUs fuse products and sums unless they are told not to; so does this one.
    flags = ["-march=native", "-ffp-contract=fast", *("-ffp-contract=off" if option == "-fmad=false" else option
                                                      for option in options)]
    subprocess.run(["g++", "-O2", "-fno-strict-aliasing", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror",
                    "-Wno-unknown-pragmas", *flags, f"-I{Path(__file__).parent}",
                    "-o", folder / "kernels.so", folder / "kernels.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    for name in names:
        getattr(library, f"run_{name}").restype = ctypes.c_char_p
    return library


@functools.cache
def numpy_as_cupy(backwards: bool) -> ModuleType:
    """NumPy under CuPy's name, with what else kernels/cuda.py takes from it. `backwards`: see cuda_on_cpu.h."""

    class RawModule:
        def __init__(self, code, options):
            self.library = build(code, options)

        def get_function(self, name):
            run = getattr(self.library, f"run_{name}")

            def launch(grid, block, arguments):
                # CuPy's rules: arrays are pointers, a Python int has 64 bits, a float is a double.
                kinds = "".join({int: "i", float: "d"}.get(type(a), "p") for a in arguments)
                boxes = [ctypes.c_int64(a) if kind == "i" else ctypes.c_double(a) if kind == "d"
                         else ctypes.c_void_p(a.ctypes.data) for kind, a in zip(kinds, arguments, strict=True)]
                error = run(*grid, *block, (ctypes.c_void_p * len(boxes))(*map(ctypes.addressof, boxes)),
                            kinds.encode(), backwards)
                assert error is None, f"{name}: {error.decode()}"
            return launch

    fake = ModuleType("cupy")
    fake.__dict__.update(vars(np))
    fake.RawModule = RawModule
    # NaN where a launcher leaves memory to be filled, so that a forgotten place shows; for integers, −1.
    fake.empty = lambda shape, dtype=np.float64: np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -1, dtype)
    fake.empty_like = lambda array: np.full_like(array, np.nan)
    return fake


@pytest.fixture(params=["fibers", "fibers-backwards", pytest.param("gpu", marks=pytest.mark.gpu)])
def xp(request, monkeypatch):
    """CuPy; or NumPy in its place, with few blocks to a launch, so that in short rows, too, every loop goes round."""
    if request.param == "gpu":
        return device.cupy() or pytest.skip("no GPU that CuPy can use")
    module = numpy_as_cupy(request.param == "fibers-backwards")
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(cuda, "BLOCKS", 3)
    return module


def put(xp, array, offset=0):
    """A copy on the device that begins `offset` numbers behind a 16-byte boundary."""
    memory = xp.zeros(array.size + 8, array.dtype)
    start = offset + (-memory.ctypes.data % 16 // array.itemsize if isinstance(memory, np.ndarray) else 0)
    copy = memory[start:start + array.size].reshape(array.shape)
    copy[...] = xp.asarray(array)
    return copy


def random(seed, shape, dtype):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def exact_norms(u) -> np.ndarray:
    return np.array([math.sqrt(math.fsum(float(a) * float(a) for a in u_i)) for u_i in u])


def thresholds(norm) -> np.ndarray:
    """One of each kind: nothing left, clipped, just not clipped, never clipped."""
    return np.resize([0.0, 0.3, 1.0, np.inf], len(norm)) * np.where(norm > 0, norm, 1)


# (w, d), and where the two arrays begin. Rows shorter than a 16-byte load, than a warp, than a block; of more than one
# tile (256 threads · 4 loads · 16 bytes) and more tiles than blocks; at odd places; the last of two arrays that never
# reach a boundary together.
CASES = [((4, 1), 0, 0), ((5, 3), 1, 1), ((4, 7), 0, 0), ((3, 33), 1, 1), ((2, 1024), 0, 0), ((4, 1027), 3, 3),
         ((1, 18000), 0, 0), ((1, 17001), 1, 1), ((2, 5001), 1, 0)]
cases = pytest.mark.parametrize(("shape", "offset", "other"), CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


@cases
@dtypes
def test_norms(xp, shape, offset, other, dtype):
    u = random(1, shape, dtype)
    on_device = put(xp, u, offset)
    norm = device.host(cuda.norms(on_device))
    np.testing.assert_allclose(norm, exact_norms(u), rtol=1e-14)
    np.testing.assert_allclose(norm, ops.norms.definition(u), rtol=1e-12)
    assert device.host(cuda.norms(on_device)).tobytes() == norm.tobytes()
    assert device.host(on_device).tobytes() == u.tobytes()
    out = xp.full(shape[0], np.nan)
    assert cuda.norms(on_device, out=out) is out
    assert device.host(out).tobytes() == norm.tobytes()


@cases
@dtypes
def test_clip(xp, shape, offset, other, dtype):
    u = random(2, shape, dtype)
    norm, rtol = exact_norms(u), EPS[dtype]
    tau = thresholds(norm * (1 + 1e-12))
    on_device, out, norms = put(xp, u, offset), put(xp, np.full_like(u, 7), other), xp.full(shape[0], np.nan)
    assert cuda.clip(on_device, tau, out=out, norms=norms) is out
    c = device.host(out)
    for i in range(shape[0]):
        if norm[i] <= tau[i]:
            assert c[i].tobytes() == u[i].tobytes()
        else:
            np.testing.assert_allclose(c[i], u[i].astype(np.float64) * (tau[i] / norm[i]), rtol=rtol)
    np.testing.assert_allclose(c, ops.clip.definition(u, tau), rtol=rtol)
    np.testing.assert_allclose(device.host(norms), norm, rtol=1e-14)
    assert device.host(on_device).tobytes() == u.tobytes()

    fresh = cuda.clip(on_device, xp.asarray(tau))
    assert cuda.clip(on_device, tau, out=on_device) is on_device
    if (offset or other) == offset:        # where arrays lie decides who adds what; the same place, the same bytes
        assert device.host(on_device).tobytes() == c.tobytes()
    np.testing.assert_allclose(device.host(fresh), c, rtol=rtol)


@cases
@dtypes
def test_clip_step(xp, shape, offset, other, dtype):
    u, v = random(3, shape, dtype), random(4, shape, dtype)
    norm, rtol = exact_norms(u - v), EPS[dtype]
    tau = thresholds(norm * (1 + 1e-12))
    results = []
    for in_place in (False, False, True):
        on_device, v_device = put(xp, u, offset), put(xp, v, other)
        out, norms = on_device if in_place else put(xp, np.full_like(u, 7), offset), xp.full(shape[0], np.nan)
        assert cuda.clip_step(on_device, v_device, tau, out=out, norms=norms) is out
        results.append([device.host(array) for array in (out, v_device, norms)])
        assert in_place or device.host(on_device).tobytes() == u.tobytes()
    assert len({tuple(array.tobytes() for array in result) for result in results}) == 1
    c, v_new, norms = results[0]
    np.testing.assert_allclose(norms, norm, rtol=1e-14)
    for i in range(shape[0]):
        factor = 1 if norm[i] <= tau[i] else tau[i] / norm[i]
        np.testing.assert_allclose(c[i], (u[i] - v[i]).astype(np.float64) * factor, rtol=rtol)
    assert v_new.tobytes() == (v + c).tobytes()
    v_defined = v.copy()
    np.testing.assert_allclose(c, ops.clip_step.definition(u, v_defined, tau), rtol=rtol)
    np.testing.assert_allclose(v_new, v_defined, rtol=rtol, atol=4 * rtol)


@cases
@dtypes
def test_normalize_step(xp, shape, offset, other, dtype):
    u, v = random(3, shape, dtype), random(4, shape, dtype)
    norm, rtol, alpha, beta = exact_norms(u - v), EPS[dtype], math.sqrt(shape[1]), 3.0
    for in_place in (False, True):
        on_device, v_device = put(xp, u, offset), put(xp, v, other)
        out, norms = on_device if in_place else put(xp, np.full_like(u, 7), offset), xp.full(shape[0], np.nan)
        assert cuda.normalize_step(on_device, v_device, alpha, beta, out=out, norms=norms) is out
        c, v_new = device.host(out), device.host(v_device)
        np.testing.assert_allclose(device.host(norms), norm, rtol=1e-14)
        np.testing.assert_allclose(c, (u - v).astype(float) * (beta / (alpha + norm))[:, None], rtol=rtol)
        assert v_new.tobytes() == (v + c).tobytes()
        assert in_place or device.host(on_device).tobytes() == u.tobytes()
    v_defined = v.copy()
    np.testing.assert_allclose(c, ops.normalize_step.definition(u, v_defined, alpha, beta), rtol=rtol)
    np.testing.assert_allclose(v_new, v_defined, rtol=rtol, atol=4 * rtol)


@cases
@dtypes
@pytest.mark.parametrize("with_v", [True, False])
def test_momentum_step(xp, shape, offset, other, dtype, with_v):
    u, m, v = (random(seed, shape, dtype) for seed in (3, 4, 5))
    rtol, beta, scale = EPS[dtype], 0.3, 0.6
    momentum = dtype(1 - beta) * m + dtype(beta) * u
    difference = momentum - v if with_v else momentum
    norm = exact_norms(difference)
    tau = thresholds(norm * (1 + 1e-12))
    for in_place in (False, True):
        on_device, m_device, v_device = put(xp, u, offset), put(xp, m, other), put(xp, v, offset) if with_v else None
        out, norms = on_device if in_place else put(xp, np.full_like(u, 7), offset), xp.full(shape[0], np.nan)
        assert cuda.momentum_step(on_device, m_device, v_device, tau, beta, scale, out=out, norms=norms) is out
        c = device.host(out)
        np.testing.assert_allclose(device.host(norms), norm, rtol=1e-14)
        for i in range(shape[0]):
            factor = 1 if norm[i] <= tau[i] else tau[i] / norm[i]
            np.testing.assert_allclose(c[i], difference[i].astype(float) * factor, rtol=rtol)
        assert device.host(m_device).tobytes() == momentum.tobytes()
        assert not with_v or device.host(v_device).tobytes() == (v + dtype(scale) * c).tobytes()
        assert in_place or device.host(on_device).tobytes() == u.tobytes()
    m_defined, v_defined = m.copy(), v.copy() if with_v else None
    np.testing.assert_allclose(c, ops.momentum_step.definition(u, m_defined, v_defined, tau, beta, scale), rtol=rtol)
    assert m_defined.tobytes() == momentum.tobytes()
    assert not with_v or np.allclose(device.host(v_device), v_defined, rtol=rtol, atol=4 * rtol)


@cases
@dtypes
@pytest.mark.parametrize("options", [(False, 0.0, 0, 0), (False, 0.1, 0, 0), (True, 0.0, 1, 0), (False, 0.1, 1, 1),
                                     (True, 0.1, 0, 1)], ids=str)
def test_local_step(xp, shape, offset, other, dtype, options):
    """As the definition, with and without weight decay, momentum and an origin; in place, and onto u."""
    normalize, decay, m, origin = options
    x, u, momenta = (random(seed, shape, dtype) for seed in (3, 4, 5))
    start = random(6, shape[1], dtype) if origin else None
    norms = np.resize([0.5, 3.0, np.inf, 0.0], shape[0]) * 1.0
    defined_m = momenta.copy() if m else None
    with np.errstate(invalid="ignore"):
        defined = ops.local_step.definition(x, u, norms, 2.0, 0.3, normalize, decay, defined_m, 0.6, start,
                                            out=np.empty_like(x))
    for onto in ("x", "u", "new"):
        x_device, u_device, m_device = put(xp, x, offset), put(xp, u, other), put(xp, momenta, offset) if m else None
        out = {"x": None, "u": u_device, "new": put(xp, np.full_like(x, 7), offset)}[onto]
        result = cuda.local_step(x_device, u_device, put(xp, norms), 2.0, 0.3, normalize, decay, m_device, 0.6,
                                 put(xp, start, other) if origin else None, out)
        assert result is (x_device if out is None else out)
        np.testing.assert_array_equal(device.host(result), defined)
        assert not m or device.host(m_device).tobytes() == defined_m.tobytes()
        assert onto == "x" or device.host(x_device).tobytes() == x.tobytes()
        assert onto == "u" or device.host(u_device).tobytes() == u.tobytes()


@dtypes
def test_other_steps_of_a_row_that_is_not_finite_change_no_state(xp, dtype):
    u, m, v = (random(seed, (3, 45), dtype) for seed in (7, 8, 9))
    u[1, 3] = np.inf
    for call, states in ((lambda *a: cuda.normalize_step(*a, 0.5, 2.0), [v]),
                         (lambda *a: cuda.momentum_step(*a, 1.0, 0.4, 0.3), [m, v]),
                         (lambda a, b: cuda.momentum_step(a, b, None, 1.0, 0.4), [m])):
        changed = [put(xp, state) for state in states]
        c = device.host(call(put(xp, u), *changed))
        assert np.isnan(c[1]).all() and np.isfinite(c[[0, 2]]).all()
        for old, new in zip(states, map(device.host, changed), strict=True):
            assert new[1].tobytes() == old[1].tobytes() and (new[[0, 2]] != old[[0, 2]]).all()


@dtypes
def test_one_vector_and_one_threshold(xp, dtype):
    u, v = random(5, 50, dtype), random(6, 50, dtype)
    norm = cuda.norms(put(xp, u))
    assert norm.shape == () and float(norm) == pytest.approx(float(np.linalg.norm(u.astype(float))), rel=1e-14)
    norms = xp.full((), np.nan)
    for tau in (2.0, 2, np.float32(2), np.array(2.0), xp.asarray(2.0)):
        c = device.host(cuda.clip(put(xp, u), tau, norms=norms))
        assert np.linalg.norm(c.astype(float)) == pytest.approx(2, rel=1e-6) and float(norms) == float(norm)
    c = device.host(cuda.clip_step(put(xp, u), put(xp, v), 2.0))
    np.testing.assert_allclose(c, ops.clip_step.definition(u, v, 2.0), rtol=EPS[dtype])
    three = np.stack([u, v, u])
    np.testing.assert_allclose(device.host(cuda.clip(put(xp, three), 2.0)), ops.clip.definition(three, 2.0),
                               rtol=EPS[dtype])


@dtypes
def test_a_row_that_is_not_finite_becomes_nan_and_no_other_notices(xp, dtype):
    u, v = random(7, (6, 45), dtype), random(8, (6, 45), dtype)
    u[1, 3], u[2, 44], u[4, 0] = np.inf, np.nan, -np.inf
    u[3] *= 1e30 if dtype is np.float32 else 1e150          # its squares do not fit into its dtype, or just do
    if dtype is np.float64:
        u[4] = 1e200                                        # finite, but its sum of squares is not
    for tau in (1.0, np.inf, 0.0):
        v_device, norms = put(xp, v), xp.full(6, 7.0)
        c = device.host(cuda.clip_step(put(xp, u), v_device, tau, norms=norms))
        v_defined, norms_defined = v.copy(), np.empty(6)
        with np.errstate(over="ignore", invalid="ignore"):
            c_defined = ops.clip_step.definition(u, v_defined, tau, norms=norms_defined)
        for i in (1, 2, 4):
            assert np.isnan(c[i]).all() and device.host(v_device)[i].tobytes() == v[i].tobytes()
        np.testing.assert_allclose(c, c_defined, rtol=EPS[dtype])
        np.testing.assert_allclose(device.host(v_device), v_defined, rtol=EPS[dtype], atol=1e-6)
        np.testing.assert_allclose(device.host(norms), norms_defined, rtol=1e-12)
        assert np.isfinite(device.host(norms)[[0, 3, 5]]).all()
        c = device.host(cuda.clip(put(xp, u), tau))
        assert np.isnan(c[[1, 2, 4]]).all() and np.isfinite(c[[0, 3, 5]]).all()


def test_a_threshold_in_device_memory_that_is_none_gives_nan(xp):
    u = random(9, (3, 5), np.float32)
    c = device.host(cuda.clip(put(xp, u), xp.asarray([1.0, -1.0, np.nan])))
    assert np.isfinite(c[0]).all() and np.isnan(c[1:]).all()


def test_a_clipped_float32_row_is_not_longer_than_its_threshold(xp):
    u = np.zeros((60, 3), np.float32)          # one number only, so that nothing but the factor is rounded
    u[:, 1] = np.random.default_rng(10).uniform(1, 100, 60)
    tau = np.random.default_rng(11).uniform(0, 1, 60).astype(np.float32)
    c = device.host(cuda.clip(put(xp, u), tau))
    assert (c[:, 1] <= tau).all() and np.allclose(c[:, 1], tau, rtol=2e-7)


def test_nothing_to_clip_writes_nothing(monkeypatch, tmp_path):
    """In memory that cannot be written, in a child process that would die of it."""
    monkeypatch.setitem(sys.modules, "cupy", numpy_as_cupy(False))
    np.ones(4096, np.float32).tofile(tmp_path / "u")
    u = np.memmap(tmp_path / "u", np.float32, mode="r")

    def status_of_clip(tau):
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            try:
                cuda.clip(u, tau, out=u)
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert status_of_clip(64.0) == 0            # ‖u‖ = 64
    assert status_of_clip(63.9) != 0


@cases
@dtypes
@pytest.mark.parametrize("scale", [(), (0.7,)], ids=["", "scale"])
def test_apply(xp, shape, offset, other, dtype, scale):
    x, v, mean = (random(seed, shape, dtype) for seed in (12, 13, 14))
    arrays = put(xp, x, offset), put(xp, v, other), put(xp, mean, offset)
    assert cuda.apply(*arrays, 0.1, *scale) is None
    v = v + dtype(*scale or (1,)) * mean
    assert device.host(arrays[1]).tobytes() == v.tobytes()
    assert device.host(arrays[0]).tobytes() == (x - dtype(0.1) * v).tobytes()
    assert device.host(arrays[2]).tobytes() == mean.tobytes()


@pytest.mark.parametrize(("shape", "offset"), [((1, 1), 0), ((7, 3), 0), ((6, 1024), 0), ((6, 1024), 1), ((5, 8000), 0),
                                               ((3, 4001), 0)], ids=str)
@dtypes
def test_row_sum(xp, shape, offset, dtype):
    u = random(15, shape, dtype)
    expected = np.zeros(shape[1], dtype)
    for u_i in u:
        expected += u_i
    expected *= dtype(1 / 3)
    out = put(xp, np.full(shape[1], 7, dtype), offset)
    assert cuda.row_sum(put(xp, u), 1 / 3, out=out) is out
    assert device.host(out).tobytes() == expected.tobytes()
    assert device.host(cuda.row_sum(put(xp, u, offset), 1 / 3)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 33), (2, 64), (20, 123), (2, 1027), (1, 18000), (2, 9001)],
                         ids=str)
@dtypes
def test_add_noise(xp, shape, dtype):
    u, keys = random(16, shape, dtype), noise.keys(b"secret", "test", range(shape[0]), 3)
    expected = noise.add_noise.definition(u.copy(), 0.37, keys)
    on_device = put(xp, u, 1)
    assert cuda.add_noise(on_device, 0.37, keys) is on_device
    assert device.host(on_device).tobytes() == expected.tobytes()
    for sigma in (0, 0.0, 1e-200 if dtype is np.float32 else 0):
        zeros = put(xp, np.full(shape, -0.0, dtype))
        assert cuda.add_noise(zeros, sigma, keys) is zeros and np.signbit(device.host(zeros)).all()


def test_add_noise_declines_what_it_does_not_know(xp):
    u, keys = put(xp, random(17, (4, 6), np.float32)), noise.keys(b"secret", "test", range(4), 3)
    before = device.host(u).tobytes()
    for bad in (u[0], u[:, ::2], u[:, 3:], u.astype(np.float16)):
        assert cuda.add_noise(bad, 1.0, keys[:len(bad)]) is NotImplemented
    for bad in (keys[:3], keys.astype(np.int64), keys.ravel(), keys.tolist()):
        assert cuda.add_noise(u, 1.0, bad) is NotImplemented
    for sigma in (-1.0, math.nan, math.inf, 1e39):
        assert cuda.add_noise(u, sigma, keys) is NotImplemented
    assert device.host(u).tobytes() == before


@pytest.mark.gpu
@dtypes
def test_the_definition_of_add_noise_on_a_gpu(dtype):
    """With CuPy's arithmetic instead of NumPy's."""
    xp = device.cupy() or pytest.skip("no GPU that CuPy can use")
    keys = noise.keys(b"secret", "test", range(2), 3)
    u = noise.add_noise.definition(xp.zeros((2, 999), dtype), 1.0, keys)
    expected = noise.add_noise.definition(np.zeros((2, 999), dtype), 1.0, keys)
    np.testing.assert_allclose(device.host(u), expected, rtol=8 * np.finfo(dtype).eps)


def row_of(kind, d, dtype):
    random = np.random.default_rng(18)
    g, place = random.standard_normal(d), np.arange(d)
    if kind == "misleading":                    # the places that are drawn hold the largest numbers
        n = min(cuda.SAMPLE, d // cuda.SPARSENESS)
        i = np.arange(n)
        g[i * (d // n) + (i * 2654435769 % 2**32 * (d // n) >> 32)] += 100
    return {"misleading": g, "gaussian": g, "tied": random.integers(-3, 4, d), "ascending": place,
            "mostly equal": np.where(random.random(d) < 0.01, 2 * g, -1),
            "denormal": np.finfo(dtype).smallest_subnormal * float(3) * (place % 7)}[kind].astype(dtype)


def some_k(d):
    return sorted({k for k in (1, d // 100, d // 2, d) if k})


@pytest.mark.parametrize("kind", ["gaussian", "tied", "mostly equal", "ascending", "misleading", "denormal"])
@pytest.mark.parametrize(("shape", "offset"), [((4, 1), 0), ((3, 33), 1), ((2, 1027), 1), ((1, 25001), 0)], ids=str)
@dtypes
def test_top_k(xp, shape, offset, kind, dtype):
    u = (row_of(kind, max(shape[1], 32), dtype)[:shape[1]] * 2.0 ** np.arange(shape[0])[:, None]).astype(dtype)
    on_device = put(xp, u, offset)
    for k in some_k(shape[1]) if shape[1] < 9999 else (1, 250, 2000):
        for got, defined in zip(cuda.top_k(on_device, k), ops.top_k.definition(u, k), strict=True):
            assert device.host(got).dtype == defined.dtype and device.host(got).tobytes() == defined.tobytes()
    assert device.host(on_device).tobytes() == u.tobytes()


@pytest.mark.parametrize(("shape", "offset", "other"), [((4, 1), 0, 0), ((3, 33), 1, 0), ((4, 1027), 3, 3),
                                                        ((1, 25001), 1, 1)], ids=str)
@dtypes
def test_clip_step_top_k(xp, shape, offset, other, dtype):
    u, v = random(19, shape, dtype), random(20, shape, dtype)
    v[:, ::3] = u[:, ::3]                       # ties: zeros
    norm = exact_norms(u - v)
    tau = thresholds(norm * (1 + 1e-12))
    for k in some_k(shape[1]) if shape[1] < 9999 else (250, 2000):
        on_device, v_device, norms = put(xp, u, offset), put(xp, v, other), xp.full(shape[0], np.nan)
        indices, values = map(device.host, cuda.clip_step_top_k(on_device, v_device, tau, k, norms=norms))
        v_defined = v.copy()
        indices_defined, values_defined = ops.clip_step_top_k.definition(u, v_defined, tau, k)
        assert indices.tobytes() == indices_defined.tobytes()
        np.testing.assert_allclose(values, values_defined, rtol=EPS[dtype])
        np.testing.assert_allclose(device.host(norms), norm, rtol=1e-14)
        new = v.copy()
        np.put_along_axis(new, indices, np.take_along_axis(v, indices, 1) + values, 1)
        assert device.host(v_device).tobytes() == new.tobytes() and device.host(on_device).tobytes() == u.tobytes()
    one = put(xp, v[0], other)
    assert device.host(cuda.clip_step_top_k(on_device[0], one, xp.asarray(tau[0]), k)[1]).tobytes() == values[
        0].tobytes()


@dtypes
def test_top_k_of_rows_that_are_not_finite(xp, dtype):
    u, v = random(7, (6, 45), dtype), random(8, (6, 45), dtype)
    u[1, 3], u[2, 44], u[4, 0] = np.inf, np.nan, -np.inf
    for k in (1, 7, 45):
        indices, values = map(device.host, cuda.top_k(put(xp, u), k))
        assert np.isnan(values[[1, 2, 4]]).all() and (indices[[1, 2, 4]] == np.arange(k)).all()
        assert indices.tobytes() == ops.top_k.definition(u, k)[0].tobytes()
        v_device = put(xp, v)
        tau = xp.asarray([1.0, 1.0, 1.0, 1.0, 1.0, -1.0])      # a threshold in device memory that is none: NaN, too
        indices, values = map(device.host, cuda.clip_step_top_k(put(xp, u), v_device, tau, k))
        bad = [1, 2, 4, 5]
        assert np.isnan(values[bad]).all() and (indices[bad] == np.arange(k)).all()
        assert device.host(v_device)[bad].tobytes() == v[bad].tobytes() and np.isfinite(values[[0, 3]]).all()
        assert (device.host(v_device)[[0, 3]] != v[[0, 3]]).sum() == 2 * k
    if dtype is np.float64:                     # finite, but its sum of squares is not: no matter to top_k
        u[1:] = u[0] * 1e200
        assert np.isfinite(device.host(cuda.top_k(put(xp, u), 3)[1])).all()
        assert np.isnan(device.host(cuda.clip_step_top_k(put(xp, u), put(xp, v), 1.0, 3)[1])[1:]).all()


def test_launchers_decline_what_kernels_do_not_know(xp):
    u, v = (put(xp, random(seed, (4, 6), np.float32)) for seed in (16, 17))
    before = [device.host(array).tobytes() for array in (u, v)]
    norms = xp.empty(4)
    for bad in (u.astype(np.float16), u.astype(np.int32), u.T, u[:, ::2], u[:0], u[:, :0], u[0, 0], u.reshape(2, 2, 6)):
        assert cuda.norms(bad) is NotImplemented
        assert cuda.clip(bad, 1.0) is NotImplemented
        assert cuda.clip_step(bad, bad, 1.0) is NotImplemented
        assert cuda.normalize_step(bad, bad, 1.0, 1.0) is NotImplemented
        assert cuda.momentum_step(bad, bad, None, 1.0, 0.5) is NotImplemented
        assert cuda.local_step(bad, bad, norms, 1.0, 0.5) is NotImplemented
        assert cuda.row_sum(bad) is NotImplemented
    for out in (u[:2], u.astype(np.float64), xp.empty((6, 4), np.float32).T):
        assert cuda.clip(u, 1.0, out=out) is NotImplemented
        assert cuda.clip_step(u, v, 1.0, out=out) is NotImplemented
        assert cuda.clip_step(u, out, 1.0) is NotImplemented
        assert cuda.normalize_step(u, v, 1.0, 1.0, out=out) is NotImplemented
        assert cuda.normalize_step(u, out, 1.0, 1.0) is NotImplemented
        assert cuda.momentum_step(u, v, None, 1.0, 0.5, out=out) is NotImplemented
        assert cuda.momentum_step(u, v, out, 1.0, 0.5) is NotImplemented
        assert cuda.momentum_step(u, out, v, 1.0, 0.5) is NotImplemented
        assert cuda.local_step(u, v, norms, 1.0, 0.5, out=out) is NotImplemented
        assert cuda.local_step(u, v, norms, 1.0, 0.5, m=out) is NotImplemented
        assert cuda.local_step(u, v, norms, 1.0, 0.5, origin=out) is NotImplemented
        assert cuda.apply(u, v, out, 1.0) is NotImplemented
        assert cuda.apply(u, out, v, 1.0) is NotImplemented
    for bad in (norms[:3], norms.astype(np.float32), xp.empty(8)[::2]):
        assert cuda.norms(u, out=bad) is NotImplemented
        assert cuda.clip(u, 1.0, norms=bad) is NotImplemented
        assert cuda.clip_step(u, v, 1.0, norms=bad) is NotImplemented
        assert cuda.normalize_step(u, v, 1.0, 1.0, norms=bad) is NotImplemented
        assert cuda.local_step(u, v, bad, 1.0, 0.5) is NotImplemented
        assert cuda.momentum_step(u, v, None, 1.0, 0.5, norms=bad) is NotImplemented
    for bad in (-1.0, math.nan, [1, 2, 3], [1, 2, 3, -4], [[1, 2, 3, 4]], xp.ones(3)):
        assert cuda.clip(u, bad) is NotImplemented
        assert cuda.clip_step(u, v, bad) is NotImplemented
        assert cuda.momentum_step(u, v, None, bad, 0.5) is NotImplemented
        assert cuda.local_step(u, v, norms, bad, 0.5) is NotImplemented
    for alpha, beta in ((0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, -1.0), (1.0, math.nan)):
        assert cuda.normalize_step(u, v, alpha, beta) is NotImplemented
    assert cuda.normalize_step(u, v, 1.0, 1.0, out=v) is NotImplemented
    assert cuda.momentum_step(u, v, v, 1.0, 0.5) is NotImplemented
    assert cuda.momentum_step(u, v, None, 1.0, 0.5, out=v) is NotImplemented
    assert cuda.local_step(u, v, norms, 1.0, 0.5, m=v) is NotImplemented
    for bad in (-1.0, math.nan, [1, 2, 3, -4], xp.ones(3)):
        assert cuda.clip_step_top_k(u, v, bad, 2) is NotImplemented
    for bad in (0, -1, 7, 1.0, None):
        assert cuda.top_k(u, bad) is NotImplemented
        assert cuda.clip_step_top_k(u, v, 1.0, bad) is NotImplemented
    for bad in (u.T, u[:0], u[:2], u.astype(np.float64)):
        assert cuda.clip_step_top_k(u, bad, 1.0, 2) is NotImplemented
        assert cuda.clip_step_top_k(u, v, 1.0, 2, norms=bad) is NotImplemented
    assert cuda.top_k(u.T, 1) is cuda.top_k(u[:0], 1) is cuda.clip_step_top_k(u, u, 1.0, 1) is NotImplemented
    assert cuda.clip_step(u, v, 1.0, out=v) is NotImplemented
    assert cuda.row_sum(u[0]) is NotImplemented
    assert cuda.row_sum(u, out=u) is NotImplemented
    assert [device.host(array).tobytes() for array in (u, v)] == before


@pytest.mark.parametrize(("rule", "arguments", "dtype"), [
    ("median", (), np.float32), ("trimmed_mean", (2,), np.float32), ("mean_around_median", (1,), np.float64)], ids=str)
def test_column_rules(xp, rule, arguments, dtype):
    u, W = random(18, (7, 1307), dtype), np.random.default_rng(19).dirichlet(np.ones(7), 6)
    W[:, [1, 6]], u[1] = 0, np.nan                                      # a row that is not read
    kernel, definition = getattr(cuda, rule), getattr(columns, rule).definition
    X, E = put(xp, u, 1)[:5, 3:1300], put(xp, u[5:, 3:1300].copy())
    mixed, W_5 = kernel(X, *arguments, E, W), np.ascontiguousarray(W[:5, :5])
    for result, expected in ((mixed, definition(u[:5, 3:1300], *arguments, u[5:, 3:1300], W)),
                             (kernel(X, *arguments, None, W_5), definition(u[:5, 3:1300], *arguments, None, W_5)),
                             (kernel(put(xp, u[2:], 1), *arguments), definition(u[2:], *arguments)),
                             (kernel(put(xp, u[2:4]), *arguments, put(xp, u[4:])), definition(u[2:], *arguments))):
        np.testing.assert_allclose(device.host(result), expected, rtol=EPS[dtype], atol=4 * EPS[dtype])


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7, 16, 31, 64])
def test_networks_sort(k):
    """… all zeros and ones, and so everything; of many numbers, some."""
    tests = [np.binary_repr(i, k) for i in range(2**k)] if k < 8 else np.random.default_rng(k).integers(0, 9, (99, k))
    numbers = np.array([[int(digit) for digit in test] for test in tests])
    for a, b in cuda._network(k):
        numbers[:, a], numbers[:, b] = np.minimum(*numbers[:, [a, b]].T), np.maximum(*numbers[:, [a, b]].T)
    assert (np.diff(numbers) >= 0).all()


def test_column_rules_decline_what_they_do_not_know():
    X, W = np.zeros((70, 9), np.float32), np.eye(3, 70)
    for call in (lambda: cuda.median(X), lambda: cuda.median(X.T[:3, :5]), lambda: cuda.median(X[:3].astype(int)),
                 lambda: cuda.median(X[:3], X[:2].astype(float)), lambda: cuda.median(X[:3], None, W),
                 lambda: cuda.median(X, None, W.astype(np.float32)), lambda: cuda.trimmed_mean(X[:5], 3),
                 lambda: cuda.trimmed_mean(X[:5], 1.0)):
        assert call() is NotImplemented


def test_parts():
    assert cuda.parts(1, 10**8, 4) == 1024                      # as many blocks as a launch has
    assert cuda.parts(20, 10**8, 4) == 51
    assert cuda.parts(1, 3 * 4096, 4) == 3 and cuda.parts(1, 3 * 4096 + 1, 4) == 4      # as many as the row has tiles
    assert cuda.parts(1, 3 * 4096, 8) == 6
    assert cuda.parts(5000, 10**6, 4) == 1                      # one row, one block at least


@pytest.mark.gpu
def test_more_than_2_31_numbers():
    xp = device.cupy() or pytest.skip("no GPU that CuPy can use")
    d = 2**31 + 5
    if xp.cuda.runtime.memGetInfo()[0] < 8 * d:
        pytest.skip("less than 17 GB free on the GPU")
    u = xp.ones(d, np.float32)
    assert float(cuda.norms(u)) == pytest.approx(math.sqrt(d), rel=1e-14)
    assert float(abs(cuda.clip(u, 1.0, out=u) * math.sqrt(d) - 1).max()) < 1e-6


@pytest.mark.parametrize("shape", [(1, 2, 4, 70), (3, 2, 1, 5)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@dtypes
def test_lstm_cells(xp, shape, shared, dtype):
    w, T, b, n = shape
    z, W = random(20, (w, T, b, 4 * n), dtype), random(21, (1 if shared else w, 4 * n, n), dtype) / dtype(n)
    h, c, slopes = random(22, (w, T + 1, b, n), dtype), random(23, (w, T + 1, b, n), dtype), random(24, shape, dtype)
    there = [put(xp, array) for array in (z, W, h, c, slopes)]
    for twin, state in ((cuda, there), (None, [z, W, h, c, slopes])):
        forward, backward = ((cells.lstm_forward.definition, cells.lstm_backward.definition) if twin is None else
                             (cuda.lstm_forward, cuda.lstm_backward))
        assert forward(*state[:4]) is None and backward(state[0], state[1], state[3], state[4]) is None
    for found, expected in zip(there, (z, W, h, c, slopes), strict=True):
        np.testing.assert_allclose(device.host(found), expected, rtol=0, atol=20 * EPS[dtype])
    assert cuda.lstm_forward(there[0].astype(np.float16), *there[1:4]) is NotImplemented
    assert cuda.lstm_forward(there[0], there[1][:, :4], *there[2:4]) is NotImplemented
    assert cuda.lstm_backward(*there[:2], there[3], there[4][:, 1:]) is NotImplemented


@pytest.mark.parametrize(("m", "V"), [(1, 1), (3, 40), (4, 1027)])
@dtypes
def test_cross_entropies_and_sums_of_rows(xp, m, V, dtype):
    z, bias, y = random(25, (m, V), dtype), random(26, V, dtype), np.random.default_rng(27).integers(0, V, m)
    if m > 1:
        z[1, 5], z[2, 7] = np.nan, -np.inf
    there, values, expected = put(xp, z), xp.empty(m), np.empty(m)
    assert cuda.cross_entropies(there, put(xp, bias), xp.asarray(y), 0.3, values) is None
    cells.cross_entropies.definition(z, bias, y, 0.3, expected)
    np.testing.assert_allclose(device.host(values), expected, rtol=10 * EPS[dtype], atol=10 * EPS[dtype])
    np.testing.assert_allclose(device.host(there), z, rtol=40 * EPS[dtype], atol=EPS[dtype])
    out, rows = random(28, (3, V), dtype), np.random.default_rng(29).integers(0, 3, m)
    sums = put(xp, out)
    assert cuda.add_rows(sums, xp.asarray(rows), there) is None
    cells.add_rows.definition(out, rows, device.host(there))
    assert device.host(sums).tobytes() == out.tobytes()
    assert cuda.add_rows(sums, xp.asarray(rows[:-1]), there) is cuda.add_rows(sums.T, rows, there) is NotImplemented
    assert cuda.cross_entropies(there, put(xp, bias[:-1]), xp.asarray(y), 0.3, values) is NotImplemented


# --- what runs them is right ------------------------------------------------------------------------------------------


TRICKS = """
#include "rows.cuh"
KERNEL exchange_and_vote(int64* out) {
    __shared__ int64 all[64];
    const int64 thread = threadIdx.x;
    int64* const mine = out + 6 * (blockIdx.x * blockDim.x + thread);
    mine[0] = __shfl_sync(~0u, thread, 5);
    mine[1] = __shfl_xor_sync(~0u, thread, 3);
    mine[2] = __shfl_down_sync(~0u, thread, 30);
    mine[3] = __shfl_up_sync(~0u, thread, 1);
    mine[4] = __ballot_sync(~0u, thread % 3 == 0);
    all[thread] = 100 * blockIdx.x + thread;
    __syncwarp();
    __syncthreads();
    mine[5] = all[63 - thread];
}
KERNEL forgotten(float* out) {
    __shared__ float all[64];
    all[threadIdx.x] = 1;
    out[64 * blockIdx.x + threadIdx.x] = all[63 - threadIdx.x];
}
KERNEL returned() { if (threadIdx.x < 40) __syncthreads(); }
KERNEL elsewhere() {
    if (threadIdx.x < 7) __syncthreads();
    else __syncthreads();
}
KERNEL half_a_warp() { if (threadIdx.x % 2) __syncwarp(); }
KERNEL mask() { __shfl_sync(1, 0, 0); }
KERNEL number(int64) {}
"""


def run(kernel, *arguments, backwards=False):
    """Two blocks of 64 threads."""
    module = numpy_as_cupy(backwards).RawModule(TRICKS, cuda.options("float"))
    module.get_function(kernel)((2,), (64,), arguments)


@pytest.mark.parametrize("backwards", [False, True])
def test_fibers_exchange_and_vote(backwards):
    out = np.zeros((2, 64, 6), np.int64)
    run("exchange_and_vote", out, backwards=backwards)
    thread = np.arange(64)
    first, lane = thread - thread % 32, thread % 32
    for block in range(2):
        assert (out[block, :, 0] == first + 5).all()
        assert (out[block, :, 1] == thread ^ 3).all()
        assert (out[block, :, 2] == np.where(lane < 2, thread + 30, thread)).all()
        assert (out[block, :, 3] == np.where(lane > 0, thread - 1, thread)).all()
        assert (out[block, :, 4] == [sum(1 << k for k in range(32) if (f + k) % 3 == 0) for f in first]).all()
        assert (out[block, :, 5] == 100 * block + 63 - thread).all()


@pytest.mark.parametrize(("kernel", "error"), [
    ("returned", r"thread 0 waits at line \d+, thread 40 has returned"),
    ("elsewhere", r"thread 0 waits at line (\d+), thread 7 at line (?!\1)\d+"),
    ("half_a_warp", r"thread 1 waits at line \d+, thread 0 has returned"),
    ("mask", r"line \d+: a mask does not name the whole warp"),
])
def test_a_barrier_that_not_all_threads_reach_is_an_error(kernel, error):
    with pytest.raises(AssertionError, match=error):
        run(kernel)


def test_a_forgotten_barrier_shows():
    for backwards in (False, True):
        out = np.zeros(128, np.float32)
        run("forgotten", out, backwards=backwards)
        assert np.isnan(out).sum() == 64


@pytest.mark.parametrize("arguments", [(), (1, 2), (1.0,), (np.zeros(1),)], ids=str)
def test_arguments_that_are_not_the_kernel_s_are_an_error(arguments):
    with pytest.raises(AssertionError, match=r"the kernel takes \(i\), got"):
        run("number", *arguments)
