"""Check, then time: the kernels against the machine's own memory limit, the exchange against a bare all-reduce, robust
rules against other libraries'.

Everything that is compared runs in turn, and medians are compared: machines are noisy, ratios less."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import columns, device, methods, ops
from .aggregation import Aggregation, aggregate
from .comm import Comm, world
from .errors import InputError
from .noise import add_noise, keys
from .peers import PEERS
from .rows import Rows
from .rules import RULES, Chain
from .server import Server
from .streams import stream
from .version import __version__
from .workers import Workers

TO_THE_LIMIT = "milliseconds are medians, ratios are to the limit in the same line"
VERBS = {"kernels": TO_THE_LIMIT, "exchange": TO_THE_LIMIT,
         "rules": "milliseconds are medians; ratio: the fastest other library's time / ours; bandwidth: the share of "
                  "the memory's reading speed; memory: the peak beside the rows / the rows"}


def bench(what: str, as_json: bool = False) -> None:
    """`mpiclip bench kernels|exchange|rules`: print a table, or JSON with machine and versions. InputError where the
    thing to be timed is not here."""
    comm = world()
    device.set_threads(comm.threads)
    timed: dict[str, Callable[[Comm], Iterable[dict]]] = {"kernels": kernels, "exchange": exchange, "rules": rules}
    rows = timed[what](comm)
    if comm.rank:
        return
    if as_json:
        print(json.dumps({"what": what, "machine": platform.platform(), "version": __version__, "numpy": np.__version__,
                          "ranks": comm.size, "threads": comm.threads, "rows": list(rows)}, indent=1))
    else:
        print(f"{comm.size} rank{'s' * (comm.size > 1)}, {comm.threads} thread{'s' * (comm.threads > 1)} each; "
              f"{VERBS[what]}")
        for row in rows:
            print("  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{value}"
                            for name, value in row.items()), flush=True)


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
    in shared memory; a whole Clip21 round but for the gradient; what a round of CELGC, on the board and through MPI,
    takes beyond its local steps; and robust aggregation of one vector a rank, by three ranks or more: milliseconds, and
    the ratio to a bare MPI_Allreduce of the same bytes."""
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
    chosen.mine[:] = g_i
    through = {"board": chosen, "MPI": servers["mean, MPI exchange"]}
    result = race({"MPI_Allreduce": lambda: comm.mpi.Allreduce(g_i[0], total),
                   **{name: partial(lambda s: s.join(s.mean(s.mine)), server) for name, server in servers.items()},
                   "Clip21 round": _round(chosen, methods.Clip21(tau=1.0, stepsize=0.1)),
                   **{f"{steps} {name}": _round(server, methods.CELGC(eta=1.0, gamma=1.0, interval=steps))
                      for name, server in through.items() for steps in (1, STEPS)},
                   **_robust_rounds(servers)}, comm)
    for name in through:                    # without the time of a step, of which there were one, and STEPS
        one, many = result.pop(f"1 {name}"), result.pop(f"{STEPS} {name}")
        result[f"CELGC overhead, {name}"] = one - (many - one) / (STEPS - 1)
    return _lines(d, result, dict.fromkeys(result, result["MPI_Allreduce"]))


ROBUST = ["arc", "nnm", "trimmed_mean"]
STEPS = 5


def _robust_rounds(servers: dict[str, Server]) -> dict[str, Callable]:
    """Robust aggregation of the ranks' vectors with columns split over them, on the board and through MPI; f is 1 of
    three or four ranks, 2 of five."""
    rounds: dict[str, Callable] = {}
    for name, through in (("robust, board, sharded", "mean, board, sharded"), ("robust, MPI", "mean, MPI exchange")):
        server = servers[through]
        if server.n > 2:
            aggregation = Aggregation(server, ROBUST, (server.n - 1) // 2)
            rounds[name] = partial(lambda a: a.server.join(a(a.server.mine)), aggregation)
    return rounds


def _round(server: Server, method: methods.Method) -> Callable:
    """A round whose gradients cost nothing: what is there. Their norm is checked, and the ranks agree."""
    free = SimpleNamespace(loss_grad=lambda x, data, batch, out, loss, clip: (None, out))
    comm = server.comm
    workers = Workers(free, None, None, np.array([comm.rank]), server.d, "float32", server.device, comm, server.mine, 0,
                      None, comm.size, False)
    s = SimpleNamespace(x=np.zeros(server.own.stop - server.own.start, np.float32))
    method.init(s, workers)
    aggregate = Aggregation(server)
    x = server.join(s.x)

    def round():
        workers.begin(workers.round + 1)
        method.round(x, s, workers, aggregate)
        server.join(s.x)
    return round


# ---- rules

MIXED = "nnm, the mixed rows"       # as other libraries give them: a step that a chain of ours does not take
CHAINS: dict[str, list[str]] = {
    "mean": ["mean"], "median": ["median"], "trimmed_mean": ["trimmed_mean"],
    "mean_around_median": ["mean_around_median"], "geometric_median": ["geometric_median"], "krum": ["krum"],
    "multi_krum": ["multi_krum"], "mda": ["mda"], "monna": ["monna"], "centered_clipping": ["centered_clipping"],
    "caf": ["caf"], "smea": ["smea"], MIXED: ["nnm"], "nnm + mean": ["nnm", "mean"],
    "arc + trimmed_mean": ["arc", "trimmed_mean"],
    "nnm + geometric_median": ["nnm", "geometric_median"], "arc + nnm + trimmed_mean": ["arc", "nnm", "trimmed_mean"]}
SIZES = ((20, 4, 10**6), (64, 12, 10**6))       # n rows, of which f may be anything, d coordinates
TURNS, ENOUGH = 9, 4.0              # turns of a match; whoever has run for so many seconds has had enough of them
SLOW, LIMIT = 20.0, 60.0            # seconds of a call: run once only; given up


def rules(comm: Comm) -> Iterator[dict]:
    """Every rule, and chains of rules, on n = 20 and 64 float32 rows with d = 10⁶: milliseconds, the ratio to the
    fastest other library that is installed, the share of the memory's reading speed, peak memory beside the rows."""
    if comm.size > 1:
        raise InputError("bench rules: it takes one process; start it without mpirun", agreed=True)
    gpu = device.cupy()
    _check_rules(np)
    if gpu is not None:
        _check_rules(gpu)
    return (row for size in SIZES for where in (["cpu", "cuda"] if gpu else ["cpu"])
            for row in _matches(where, *size, comm.threads))


def _check_rules(xp) -> None:
    """The compiled kernels in float32 against their definitions, and every chain against itself, in float64."""
    n, f, _ = SIZES[0]
    X = xp.asarray(_vectors(n, f, 4099))
    E, W = X[:2] + 1, stream(0, "bench", 1).standard_normal((n, n + 2)) / n
    exact = (X.astype(np.float64), E.astype(np.float64), W)
    for rule, constants in ((columns.median, ()), (columns.trimmed_mean, (f,)), (columns.mean_around_median, (f,)),
                            (columns.deviation, ())):
        _close(rule.__name__, rule(X, *constants, E=E, W=W),
               rule.definition(exact[0], *constants, E=exact[1], W=W))      # type: ignore[attr-defined]
    _close("combine", columns.combine(X, W[0], E), columns.combine.definition(exact[0], W[0], exact[1]))
    _close("mixed", columns.mixed(X, W, E, W[0]), columns.mixed.definition(exact[0], W, exact[1], W[0]))
    _close("gram", columns.gram(X, E), columns.gram.definition(*exact[:2]))
    for label, names in CHAINS.items():
        _close(label, aggregate(X, names, f), aggregate(exact[0], names, f))


def _close(name: str, found, expected) -> None:
    found, expected = device.host(found), device.host(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * abs(expected).max(), err_msg=name)


def _vectors(n: int, f: int, d: int) -> np.ndarray:
    """(n, d) float32: normal rows of different lengths about one point, the last f of them 3 to 30 times as long"""
    random = stream(0, "bench")
    X = random.standard_normal((n, d), np.float32)
    X += 0.5 * random.standard_normal(d, np.float32)
    X *= np.append(np.ones(n - f), np.linspace(3, 30, f)).astype(np.float32)[:, None]
    X *= random.uniform(0.5, 2, (n, 1)).astype(np.float32)
    return X


def _matches(where: str, n: int, f: int, d: int, threads: int) -> Iterator[dict]:
    """A line for each chain, from a match of ours against the others."""
    us = Player(f"mpiclip, {where}", n, f, d, threads)
    others = [Player(name, n, f, d, threads) for name in (PEERS if where == "cpu" else ())]
    try:
        for label in CHAINS:
            if label in us.labels:
                yield {"what": f"{label:24}", "where": where, "n": float(n), "f": float(f), "d": float(d),
                       **_match(us, others, label)}
    finally:
        for player in (us, *others):
            player.end()


def _match(us: Player, others: list[Player], label: str) -> dict:
    """All that know this chain apply it in turn; the first call of each warms up, and is where memory is measured."""
    players = {"ours": us} | {player.name: player for player in others if label in player.labels}
    times: dict[str, list[float]] = {}
    memory, notes, reading = {}, [], []
    for name, player in players.items():
        seconds, memory[name], failed = player.call(label, memory=True)
        times[name] = [seconds] if seconds > SLOW else []
        notes += [f"{name}: {failed}"] if failed else []
    running = [name for name in players if not times[name]]
    for _ in range(TURNS):
        reading.append(us.call("read")[0])
        for name in running:
            if sum(times[name]) < ENOUGH:
                times[name].append(players[name].call(label)[0])
    ms = {name: 1000 * median(spent) for name, spent in times.items() if np.isfinite(spent).all()}
    if "ours" not in ms:
        return {"note": "; ".join(notes)}
    theirs = {name: value for name, value in ms.items() if name != "ours"}
    return {"ms": ms["ours"], **theirs, **({"ratio": min(theirs.values()) / ms["ours"]} if theirs else {}),
            "bandwidth": 1000 * median(reading) / ms["ours"], "memory": memory["ours"],
            **({"others' memory": min(memory[name] for name in theirs)} if theirs else {}),
            **({"note": "; ".join(notes)} if notes else {})}


class Player:
    """A process in which one library applies rules to the same rows as the others: it can be given up, and its peak
    memory is its own. name: "mpiclip, cpu", "mpiclip, cuda", or one of PEERS."""

    def __init__(self, name: str, n: int, f: int, d: int, threads: int):
        self.name, self._arguments = name, (name, n, f, d, threads)
        self._start()

    def _start(self) -> None:
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = str(self._arguments[-1])     # read when the libraries are loaded
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_play, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()

    @cached_property
    def labels(self) -> list[str]:
        """The chains that it knows; asked for once it is there."""
        return self._pipe.recv()

    def call(self, label: str, memory: bool = False) -> tuple[float, float, str]:
        """(seconds, peak memory beside the rows / the rows' own if that is wanted, ""); (inf, inf, why it failed)."""
        self._pipe.send((label, memory))
        try:
            if self._pipe.poll(LIMIT):
                return self._pipe.recv()
            why = f"given up after {LIMIT:g} s"
        except (EOFError, ConnectionResetError):
            why = "the process was killed"
        self.end()
        self._start()
        self._pipe.recv()
        return np.inf, np.inf, why

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _play(pipe, name: str, n: int, f: int, d: int, threads: int) -> None:
    """The life of a Player's process: chains come by the pipe, seconds and memory go back."""
    device.set_threads(threads)
    X = _vectors(n, f, d)
    if name in PEERS:
        calls, prepare = _their_chains(name, n, f, threads)
    else:
        X, calls = _our_chains(name, X, n, f)
        prepare = lambda X: X       # noqa: E731    ours does not write into what it is handed
    gc.freeze()                     # else a collection takes longer than some rules
    pipe.send(list(calls))
    while True:
        try:
            label, memory = pipe.recv()
        except EOFError:            # the other end is no more
            return
        try:
            pipe.send((*_measured(calls[label], prepare(X), X.nbytes, memory), ""))
        except (MemoryError, RuntimeError) as error:
            pipe.send((np.inf, np.inf, f"{type(error).__name__} {error}".splitlines()[0][:80]))


def _our_chains(name: str, X, n: int, f: int) -> tuple[Any, dict[str, Callable]]:
    """The rows, where we compute, and label → rows → aggregate; and "read", which reads (or copies) as many bytes."""
    calls: dict[str, Callable] = {}
    for label, names in CHAINS.items():
        try:
            Chain(names, f, n)
            calls[label] = lambda X, names=names: aggregate(X, names, f)
        except InputError:          # a rule that is not made for so many rows
            continue
    if MIXED in calls:
        def mixed(X):
            rows = Rows(X)
            rows.measure()
            return RULES["nnm"](rows, f).columns()
        calls[MIXED] = mixed
    gpu = device.cupy() if name == "mpiclip, cuda" else None
    X = X if gpu is None else gpu.asarray(X)
    for call in calls.values():     # loads what is loaded at first use, which is no memory of the rules
        call(X[:, :999])
    if gpu is not None:
        spare = gpu.empty_like(X[:n // 2])
        calls["read"] = lambda X: gpu.copyto(spare, X[:n // 2])
    elif device.compiled():
        from .kernels import cpu
        calls["read"] = lambda X: cpu.limit_read(X[:n // 2].ravel(), X[n // 2:].ravel())
    else:
        calls["read"] = lambda X: X.max()
    return X, calls


def _their_chains(name: str, n: int, f: int, threads: int) -> tuple[dict[str, Callable], Callable]:
    import resource

    import torch
    peer = PEERS[name](n, f)
    torch.set_num_threads(threads)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (free, free))        # who wants more than there is gets an error
    chains = {label: peer.chain(names) for label, names in CHAINS.items()}
    return {label: chain for label, chain in chains.items() if chain is not None}, peer.prepare


def _measured(call: Callable, rows, size: int, memory: bool) -> tuple[float, float]:
    """(seconds, peak memory of the call beside what was there before / size, NaN unless it is asked for). On the GPU,
    of CuPy's pool; else of this process as Linux counts it, arrays of C libraries included; NaN on other systems."""
    gpu: Any = None if isinstance(rows, list) or device.xp(rows) is np else device.xp(rows)
    before = _used(gpu, "VmRSS") if memory else np.nan
    start = perf_counter()
    result = call(rows)
    if gpu is not None:
        gpu.cuda.get_current_stream().synchronize()
    seconds = perf_counter() - start
    del result
    return seconds, ((_used(gpu, "VmHWM") if memory else np.nan) - before) / size


def _used(gpu, which: str) -> float:
    """Bytes that CuPy's pool has, or `resident` ones; for VmRSS what is free is given back before."""
    if gpu is None:
        return resident(which, settle=which == "VmRSS")
    if which == "VmRSS":
        gpu.get_default_memory_pool().free_all_blocks()
    return gpu.get_default_memory_pool().total_bytes()


def resident(which: str, settle: bool = False) -> float:
    """Bytes of this process that are in memory now (VmRSS), or were at most (VmHWM) since it settled, which is to give
    freed memory back."""
    try:
        if settle:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(which))
    except (OSError, AttributeError, StopIteration):
        return np.nan
