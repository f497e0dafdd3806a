"""Check, then time: the kernels against the machine's own memory limit, the exchange against a bare all-reduce.

Everything that is compared runs in turn in one process, and medians are compared: machines are noisy, ratios less."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Callable
from functools import partial
from itertools import count
from statistics import median
from time import perf_counter
from types import SimpleNamespace

import numpy as np

from . import device, methods, ops
from .aggregation import Aggregation
from .comm import Comm, world
from .errors import InputError
from .noise import add_noise, keys
from .server import Server
from .streams import stream
from .version import __version__
from .workers import Workers


def bench(what: str, as_json: bool = False) -> None:
    """`mpiclip bench kernels|exchange`: print a table, or JSON with machine and versions. InputError where the thing
    to be timed is not here."""
    comm = world()
    device.set_threads(comm.threads)
    rows = {"kernels": kernels, "exchange": exchange}[what](comm)
    if comm.rank:
        return
    if as_json:
        print(json.dumps({"what": what, "machine": platform.platform(), "version": __version__, "numpy": np.__version__,
                          "ranks": comm.size, "threads": comm.threads, "rows": rows}, indent=1))
    else:
        print(f"{comm.size} rank{'s' * (comm.size > 1)}, {comm.threads} thread{'s' * (comm.threads > 1)} each; "
              "milliseconds are medians, ratios are to the limit in the same line")
        for row in rows:
            print("  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{value}"
                            for name, value in row.items()))


def race(entrants: dict[str, Callable], comm: Comm, seconds: float = 2.0) -> dict[str, float]:
    """Median milliseconds of each entrant; they run in turn, and the slowest rank's time counts."""
    times: dict[str, list[float]] = {name: [] for name in entrants}
    for call in entrants.values():
        call()
    begin, turns = perf_counter(), 0
    while not comm.highest(turns >= 5 and (turns >= 200 or perf_counter() - begin > seconds * len(entrants))):
        for name, call in entrants.items():
            comm.barrier()
            start = perf_counter()
            call()
            times[name].append(perf_counter() - start)
        turns += 1
    return {name: 1000 * median(max(turn) for turn in zip(*comm.all(spent), strict=True))
            for name, spent in times.items()}


# ---- kernels


def kernels(comm: Comm) -> list[dict]:
    """clip_step, clip, apply, row_sum, add_noise, top_k and clip_step_top_k with k = d/100 at d = 10⁷ and 5·10⁷,
    float32: milliseconds, the share of the memory limit, and the ratio to the NumPy definitions; of add_noise, to
    NumPy's own normal numbers; of the largest k, to NumPy's argpartition."""
    gpu = device.cupy()
    if gpu is None and not device.compiled():
        raise InputError("bench kernels: the C kernels are not compiled and there is no GPU: nothing to compare")
    rows = []
    for d in (10**7, 5 * 10**7):
        rows += _cpu_kernels(comm, d) if device.compiled() else []
        rows += _gpu_kernels(comm, gpu, 2 * d) if gpu else []
    return rows


def _cpu_kernels(comm: Comm, d: int) -> list[dict]:
    from .kernels import cpu
    g, v, spare = (stream(0, "bench", i).standard_normal(d, np.float32) for i in range(3))
    x, pair = g.copy(), np.stack([g, v])
    for name, compiled, definition in _checks(g[:99_991], v[:99_991]):
        np.testing.assert_allclose(compiled, definition, rtol=1e-5, atol=1e-6, err_msg=name)
    shorter = (float(ops.norms(spare)) * 0.9999**k for k in count(1))      # every call clips a little more
    key, generator = keys(b"bench", "noise", [0], 0), np.random.Generator(np.random.SFC64(0))
    result = race({
        "read 2 arrays": lambda: cpu.limit_read(g, v),
        "update 2 arrays": lambda: cpu.limit_update(x, spare),
        "clip_step": lambda: ops.clip_step(x, v, 1.0, out=x),
        "clip_step, NumPy": lambda: ops.clip_step.definition(x, v, 1.0, out=x),
        "clip, active": lambda: ops.clip(spare, next(shorter), out=spare),
        "clip, active, NumPy": lambda: ops.clip.definition(spare, next(shorter), out=spare),
        "clip, inactive": lambda: ops.clip(g, 1e30, out=g),
        "clip, inactive, NumPy": lambda: ops.clip.definition(g, 1e30, out=g),
        "apply": lambda: ops.apply(x, v, g, 0.1),
        "apply, NumPy": lambda: ops.apply.definition(x, v, g, 0.1),
        "row_sum of 2": lambda: ops.row_sum(pair, 0.5, out=spare),
        "row_sum of 2, NumPy": lambda: ops.row_sum.definition(pair, 0.5, out=spare),
        "add_noise": lambda: add_noise(x[None], 0.1, key),
        "standard_normal, NumPy": lambda: generator.standard_normal(dtype=np.float32, out=spare),
        "top_k": lambda: ops.top_k(g, d // 100),
        "clip_step_top_k": lambda: ops.clip_step_top_k(g, v, 1.0, d // 100),
        "argpartition, NumPy": lambda: np.argpartition(np.abs(g), d - d // 100),
        **_torch_clip(spare, shorter, "cpu")}, comm)
    limit = result["read 2 arrays"] + result["update 2 arrays"]
    return _lines(d, result, {"clip_step": limit, "clip_step, NumPy": limit,
                              "add_noise": result["standard_normal, NumPy"],
                              **dict.fromkeys(("top_k", "clip_step_top_k"), result["argpartition, NumPy"])})


def _checks(u, v):
    """(name, compiled result, definition's result) of each kernel on a part of the data."""
    for tau in (1.0, 1e9):
        yield "clip", ops.clip(u, tau), ops.clip.definition(u, tau)
        a, b = v.copy(), v.copy()
        yield "clip_step", ops.clip_step(u, a, tau), ops.clip_step.definition(u, b, tau)
        yield "clip_step: v", a, b
        yield from zip(("clip_step_top_k: indices", "clip_step_top_k"), ops.clip_step_top_k(u, v.copy(), tau, 999),
                       ops.clip_step_top_k.definition(u, v.copy(), tau, 999), strict=True)
    yield from zip(("top_k: indices", "top_k"), ops.top_k(u, 999), ops.top_k.definition(u, 999), strict=True)
    key = keys(b"bench", "noise", [0], 0)
    yield "add_noise", add_noise(u.copy()[None], 0.1, key), add_noise.definition(u.copy()[None], 0.1, key)


def _torch_clip(u, shorter, where: str) -> dict[str, Callable]:
    """torch.nn.utils.clip_grad_norm_ on the same memory, if PyTorch is installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch
    torch.set_num_threads(len(device.cores()))
    parameter = torch.nn.Parameter(torch.empty(len(u), device=where))
    parameter.grad = torch.from_dlpack(u)
    clip = torch.nn.utils.clip_grad_norm_
    return {"clip, active, torch": lambda: clip(parameter, next(shorter), foreach=True),
            "clip, inactive, torch": lambda: clip(parameter, 1e30, foreach=True)}


def _gpu_kernels(comm: Comm, cupy, d: int) -> list[dict]:
    """The same on the GPU, against a device-to-device copy of the bytes that clip_step moves: 4 reads, 2 writes."""
    random = cupy.random.default_rng(0)
    g, v, spare = (random.standard_normal(d, dtype=np.float32) for _ in range(3))
    x = g.copy()
    for name, compiled, definition in _checks(g[:99_991], v[:99_991]):
        cupy.testing.assert_allclose(compiled, definition, rtol=1e-5, atol=1e-6, err_msg=name)
    shorter = (float(ops.norms(spare)) * 0.9999**k for k in count(1))
    key = keys(b"bench", "noise", [0], 0)

    def timed(call):
        def run():
            call()
            cupy.cuda.get_current_stream().synchronize()
        return run

    result = race({name: timed(call) for name, call in {
        "copy an array": lambda: cupy.copyto(x, g),
        "clip_step": lambda: ops.clip_step(x, v, 1.0, out=x),
        "clip_step, plain CuPy": lambda: ops.clip_step.definition(x, v, 1.0, out=x),
        "clip, active": lambda: ops.clip(spare, next(shorter), out=spare),
        "clip, inactive": lambda: ops.clip(g, 1e30, out=g),
        "apply": lambda: ops.apply(x, v, g, 0.1),
        "add_noise": lambda: add_noise(x[None], 0.1, key),
        "standard_normal, CuPy": lambda: random.standard_normal(out=spare, dtype=np.float32),
        "top_k": lambda: ops.top_k(g, d // 100),
        "clip_step_top_k": lambda: ops.clip_step_top_k(g, v, 1.0, d // 100),
        "argpartition, CuPy": lambda: cupy.argpartition(cupy.abs(g), d - d // 100),
        **_torch_clip(spare, shorter, "cuda")}.items()}, comm)
    limit = 3 * result["copy an array"]
    return _lines(d, result, {"clip_step": limit, "clip_step, plain CuPy": limit,
                              "add_noise": result["standard_normal, CuPy"],
                              **dict.fromkeys(("top_k", "clip_step_top_k"), result["argpartition, CuPy"])})


def _lines(d: int, result: dict[str, float], limits: dict[str, float]) -> list[dict]:
    return [{"what": f"{name:24}", "d": float(d), "ms": ms, **({"ratio": ms / limits[name]} if name in limits else {})}
            for name, ms in result.items()]


# ---- exchange


def exchange(comm: Comm) -> list[dict]:
    """The mean of a float32 vector from every rank, through MPI as all-reduce and as column exchange, and on the board
    in shared memory; and a whole Clip21 round but for the gradient: milliseconds, and the ratio to a bare MPI_Allreduce
    of the same bytes."""
    if comm.size == 1:
        raise InputError("bench exchange: one rank exchanges nothing; start it with mpirun -n 2 (or more)")
    return [line for d in (123, 10**4, 10**5, 10**6, 10**7) for line in _exchange(comm, d)]


def _exchange(comm: Comm, d: int) -> list[dict]:
    g_i = stream(0, "bench", comm.rank).standard_normal((1, d), np.float32)
    total = np.empty(d, np.float32)
    here = device.Device("cpu")
    new = partial(Server, comm, d, comm.size, 1, here, "float32")
    servers = {"mean, MPI all-reduce": new("replicated", board=False),
               "mean, MPI exchange": new("sharded", means_only=False, board=False),
               "mean, board, replicated": new("replicated"),
               "mean, board, sharded": new("sharded", means_only=False)}
    comm.mpi.Allreduce(g_i[0], total)
    for name, server in servers.items():
        server.mine[:] = g_i
        whole = server.join(server.mean(server.mine))
        np.testing.assert_allclose(whole, total / comm.size, rtol=1e-4, atol=1e-5, err_msg=name)
    chosen = new()
    result = race({"MPI_Allreduce": lambda: comm.mpi.Allreduce(g_i[0], total),
                   **{name: partial(lambda s: s.join(s.mean(s.mine)), server) for name, server in servers.items()},
                   "Clip21 round": _clip21_round(chosen, chosen.mine)}, comm)
    return _lines(d, result, dict.fromkeys(result, result["MPI_Allreduce"]))


def _clip21_round(server: Server, g_i) -> Callable:
    """A round of Clip21 whose gradient costs nothing: what is in g_i. Its norm is checked, and the ranks agree."""
    method = methods.Clip21(tau=1.0, stepsize=0.1)
    free = SimpleNamespace(loss_grad=lambda x, data, batch, out, loss, clip: (None, out))
    comm = server.comm
    workers = Workers(free, None, None, np.array([comm.rank]), server.d, "float32", server.device, comm, g_i, 0, None,
                      comm.size, False)
    s = SimpleNamespace(x=np.zeros(server.own.stop - server.own.start, np.float32))
    method.init(s, workers)
    aggregate = Aggregation(server)

    def round():
        workers.begin(workers.round + 1)
        method.round(None, s, workers, aggregate)
        server.join(s.x)
    return round
