"""How long a round will take on a network, before it is run there: `mpiclip plan`.

The method's own code runs on this machine as rank 0 of N that are not there: what computes is timed, what would be sent
is noted, and the α–β model says how long that takes between N hosts. docs/planning.md has the formulas, and how far off
they were."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, floor, isfinite, log2
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from . import config as configs
from . import device
from .comm import Comm, world
from .device import host
from .errors import InputError
from .server import Server
from .show import finite
from .training import Training

EAGER = 64 * 1024       # bytes; a longer message is announced and asked for before it is sent: three latencies
OVERHEAD = 5e-6         # seconds of processor time for each message over TCP, on either side
SHARE = 0.1             # of a round: what communication may take where an interval is recommended
INTERVALS = [2**k for k in range(11)]
SHOWN = 32              # intervals up to this are in the table in any case
STEPS = (1, 4)          # intervals whose rounds are timed: what a local step takes is in their difference
WARM_UP, TURNS, ENOUGH = 2, 9, 6.0      # rounds that do not count; rounds that do, fewer after so many seconds
PROBE = 2**20           # float32 numbers of the vector that measures the bandwidth


@dataclass(frozen=True)
class Call:
    """A collective call as rank 0 makes it. bytes: of the whole vector, or of all ranks' messages together."""

    what: str
    bytes: int

    def seconds(self, ranks: int, latency: float, bandwidth: float) -> float:
        """How long it takes, one rank a host. latency: seconds, one way. bandwidth: bit/s of a rank's link, which sends
        and receives at the same time. The algorithms are those of Open MPI at the sizes that a Server sends:

            small all-reduce             recursive doubling: ⌊log₂ N⌋ steps, 2 more where N is no power of two
            all-to-all, all-gather       all messages at once
            broadcast                    a pipeline through a tree of depth ⌈log₂ N⌉
            of Python objects            ⌈log₂ N⌉ steps, for their size and for themselves"""
        n, depth, moved = ranks, ceil(log2(ranks)), 8 * self.bytes / bandwidth

        def delay(size: float) -> float:
            return (1 if size <= EAGER else 3) * latency + OVERHEAD

        if self.what == "Allreduce":
            return (floor(log2(n)) + 2 * (n & (n - 1) > 0)) * (delay(self.bytes) + moved)
        if self.what in ("Ialltoallv", "Ialltoallw", "Iallgatherv"):
            return delay(self.bytes / n) + (n - 2) * OVERHEAD + (n - 1) / n * moved
        if self.what == "Ibcast":
            return depth * delay(min(self.bytes, EAGER)) + moved
        return 2 * depth * delay(self.bytes) + moved


class Stage:
    """An mpi4py communicator of `ranks` ranks of which only rank 0 is there. calls: what it was asked for; seconds: how
    long it pretended. The others send what rank 0 sends; their columns of the model stay as they are in `model`."""

    def __init__(self, ranks: int):
        self.rank, self.size = 0, ranks
        self.calls: list[Call] = []
        self.seconds = 0.0
        self.model: Any = 0

    def note(self, what: str, bytes: int) -> None:
        """Rank 0 asks for this."""
        self.calls.append(Call(what, bytes))

    def allgather(self, item: Any) -> list:
        """Every rank's item."""
        self.note("allgather", self.size * len(pickle.dumps(item)))
        return [item] * self.size

    gather = allgather

    def bcast(self, item: Any) -> Any:
        """Rank 0's item."""
        self.note("bcast", len(pickle.dumps(item)))
        return item

    def Barrier(self) -> None:
        """Wait for nobody."""
        self.note("Barrier", 0)

    def Ibcast(self, buffer: np.ndarray) -> Done:
        """Rank 0's vector."""
        self.note("Ibcast", buffer.nbytes)
        return Done()

    def __getattr__(self, what: str):
        """The exchanges of vectors that a Server may ask for."""
        if what not in ("Allreduce", "Ialltoallv", "Ialltoallw", "Iallgatherv"):
            raise AttributeError(what)

        def call(send: Any, receive: Any) -> Done:
            start = perf_counter()
            sent, received = (spec[0] if isinstance(spec, list | tuple) else spec for spec in (send, receive))
            self.note(what, max(sent.nbytes, received.nbytes))
            if "reduce" in what:
                np.multiply(sent, self.size, out=received)
            elif received.ndim == 1:                                # the model, of which we have our columns
                received[:] = self.model
                received[:sent.size] = sent
            else:                                                   # rows, of which we keep our columns
                received[:] = np.resize(sent.reshape(-1, sent.shape[-1])[:, :received.shape[1]], received.shape)
            self.seconds += perf_counter() - start
            return Done()
        return call


class Done:
    """An exchange that has arrived."""

    def Wait(self) -> None:
        """There is nothing to wait for."""

    finish = Wait


class Rehearsal(Comm):
    """This process as rank 0 of `ranks`, each on a host of its own, with `workers` on all. threads: that it may use."""

    def __init__(self, ranks: int, workers: int, threads: int):
        super().__init__()
        self._hosted = [workers // ranks + (r < workers % ranks) for r in range(ranks)]
        self.mpi = self.stage = Stage(ranks)
        self.size = self.hosts = ranks
        self.threads = threads

    def all(self, item: Any) -> list:
        """Every rank's item, if all have the same; or, of a number of workers, every rank's own."""
        items = super().all(item)
        return self._hosted if self.size > 1 and type(item) is int else items

    def number(self, dtype: np.dtype) -> Any:
        """A datatype that stands for itself and whatever is made of it."""
        return Datatype()

    def travel(self, request: Any, poked: bool = True) -> Any:
        """What is under way has arrived."""
        return request

    def total(self, values) -> np.ndarray:
        """The sum, if all ranks have the same."""
        values = np.array(values, np.float64)
        self.stage.note("Allreduce", values.nbytes)
        return self.size * values

    def highest(self, code: int) -> int:
        """The highest code, if all ranks have the same."""
        self.stage.note("Allreduce", 8)
        return code


class Datatype:
    """An MPI datatype that is never read."""

    def __getattr__(self, name: str):
        return lambda *shape: self


@dataclass(frozen=True)
class Round:
    """What a round is made of. interval: I, None for methods without. seconds: of computing. calls: in their order."""

    interval: int | None
    seconds: float
    calls: tuple[Call, ...]


def rehearse(config: configs.Config, ranks: int, here: Comm) -> tuple[list[Round], int]:
    """Rounds of an experiment on `ranks` hosts, for every interval there is to try, and d. All ranks of `here` rehearse
    at the same time, since they may share processors, and the slowest counts. Of all workers, those of rank 0, which
    hosts most of them; all take part, as somewhere they do in every round."""
    n = config.run.workers or ranks
    if n < ranks:
        raise InputError(f"run.workers = {n}: fewer than the {ranks} ranks; expected --ranks {n} at most", agreed=True)
    run = config.run.model_copy(update={"participation": None})
    comm = Rehearsal(ranks, n, here.threads)
    training = Training(config.model_copy(update={"run": run}), comm, None)
    comm.stage.model = host(config.problem.x0(training.workers.data, run.seed, run.dtype))
    method, k = training.method, 0
    has_interval = "interval" in type(method).model_fields
    times: dict[int, list[float]] = {interval: [] for interval in (STEPS if has_interval else (1,))}
    calls: dict[int, tuple[Call, ...]] = {}
    x, begin, turn = training._whole_x(), perf_counter(), 0
    while turn < WARM_UP + 1 or not here.highest(turn == WARM_UP + TURNS or perf_counter() - begin > ENOUGH):
        for interval, spent in times.items():
            if has_interval:
                training.method = method.model_copy(update={"interval": interval})
            here.barrier()
            comm.stage.calls, comm.stage.seconds = [], 0.0
            start = perf_counter()
            training.workers.begin(k)
            training.aggregate.begin(k)
            training._round(x)
            x = training._whole_x()
            training.device.synchronize()
            seconds = perf_counter() - start - comm.stage.seconds
            k += 1
            calls[interval] = tuple(comm.stage.calls)
            seconds = max(here.all(seconds))
            if turn >= WARM_UP:
                spent.append(seconds)
        turn += 1
    if not has_interval:
        return [Round(None, median(times[1]), calls[1])], training.server.d
    few, many = STEPS
    differences = [(b - a) / (many - few) for a, b in zip(times[few], times[many], strict=True)]
    step = max(median(differences), 0.0)
    rest = max(median(times[few]) - few * step, 0.0)
    return [Round(i, rest + i * step, calls[few if i == few else many]) for i in INTERVALS], training.server.d


def measure(here: Comm) -> tuple[float, float]:
    """(latency in seconds, bandwidth in bit/s) between the ranks of `here`, as the model means them: of a small
    all-reduce, and of what a long vector takes longer than a shorter one on the way to its columns' servers. Of calls
    that take turns, the lower quartile: what disturbs them only adds."""
    n = here.size
    calls: dict[Call, Callable] = {Call("Allreduce", 8): lambda: here.total(0)}
    for d in (PROBE // 4, PROBE):
        server = Server(here, d, n, 1, device.Device("cpu"), "float32", means_only=False, board=False)
        calls[Call("Ialltoallv", server.mine.nbytes)] = partial(server.mean, server.mine)
    spent: dict[Call, list[float]] = {call: [] for call in calls}
    begin, turn = perf_counter(), 0
    while turn < WARM_UP + 1 or not here.highest(turn == WARM_UP + 3 * TURNS or perf_counter() - begin > ENOUGH):
        for call, make in calls.items():
            here.barrier()
            here.barrier()          # some leave the first one late
            start = perf_counter()
            make()
            seconds = max(here.all(perf_counter() - start))
            if turn >= WARM_UP:
                spent[call].append(seconds)
        turn += 1
    small, short, long = calls
    taken = {call: float(np.quantile(times, 0.25)) for call, times in spent.items()}
    latency = taken[small] / small.seconds(n, 1.0, 1e30)
    longer = taken[long] - taken[short] - (long.seconds(n, latency, 1e30) - short.seconds(n, latency, 1e30))
    bits = long.seconds(n, 0.0, 1.0) - short.seconds(n, 0.0, 1.0)
    return latency, bits / max(longer, taken[long] / 10)        # what is within the noise is not infinite


def table(rounds: Sequence[Round], ranks: int, latency: float, bandwidth: float) -> list[dict[str, Any]]:
    """A line for each round: interval, seconds, computing, communicating, share (of communication in the round),
    iterations (a second) and speed_up (of an iteration, against the first line's)."""
    lines: list[dict[str, Any]] = []
    for round in rounds:
        moving = sum(call.seconds(ranks, latency, bandwidth) for call in round.calls)
        seconds = round.seconds + moving
        lines.append({"interval": round.interval, "seconds": seconds, "computing": round.seconds,
                      "communicating": moving, "share": moving / seconds,
                      "iterations": (round.interval or 1) / seconds})
    return [line | {"speed_up": line["iterations"] / lines[0]["iterations"]} for line in lines]


def recommended(lines: Sequence[dict[str, Any]]) -> int | None:
    """The smallest interval at which communication is at most SHARE of a round; None if there is none."""
    return next((line["interval"] for line in lines if line["interval"] and line["share"] <= SHARE), None)


def plan(source: str | os.PathLike | dict, latency: float | None = None, bandwidth: float | None = None,
         ranks: int | None = None, settings: Sequence[str] = (), here: Comm | None = None) -> dict[str, Any]:
    """What `mpiclip plan` finds, the same on every rank that was started.

    latency: seconds from one rank to another, one way; bandwidth: bit/s of a rank's link; what is None is measured
    between the ranks that were started. ranks: how many there will be, each on a host of its own; None: as many as were
    started. Raises InputError."""
    here = here or world()
    ranks = here.size if ranks is None else ranks
    with here.agree():
        if ranks < 2:
            raise InputError(f"--ranks {ranks}: expected 2 or more; one rank sends nothing")
        for name, value, least in (("latency", latency, "0 or more"), ("bandwidth", bandwidth, "more than 0")):
            if value is None and here.size == 1:
                raise InputError(f"--{name}: missing; expected with one process, or `mpirun -n N mpiclip plan …`, "
                                 "which measures it between N ranks")
            if value is not None and (not isfinite(value) or value < 0 or (value == 0 and name == "bandwidth")):
                raise InputError(f"--{name} {value:g}: expected {'seconds' if name == 'latency' else 'bit/s'}, {least}")
        config = configs.load(source, settings)
    measured = [name for name, value in (("latency", latency), ("bandwidth", bandwidth)) if value is None]
    rounds, d = rehearse(config, ranks, here)
    if measured:
        alpha, beta = here.same(measure(here))
        latency = alpha if latency is None else latency
        bandwidth = beta if bandwidth is None else bandwidth
    assert latency is not None and bandwidth is not None
    lines = table(rounds, ranks, latency, bandwidth)
    best = recommended(lines)
    lines = [line for line in lines if not line["interval"] or line["interval"] <= max(best or INTERVALS[-1], SHOWN)]
    return here.same({
        "method": config.method.name, "problem": config.problem.name, "dimension": d, "dtype": config.run.dtype,
        "ranks": ranks, "workers": config.run.workers or ranks, "latency": latency, "bandwidth": bandwidth,
        "measured": measured,
        "calls": [asdict(call) | {"seconds": call.seconds(ranks, latency, bandwidth)} for call in rounds[-1].calls],
        "rounds": lines, "recommended": best})


def text(found: dict[str, Any]) -> str:
    """What plan found, for a person."""
    def said(name: str, value: str) -> str:
        return f"{name} {value}" + (" (measured)" if name in found["measured"] else "")

    size = found["dimension"] * np.dtype(found["dtype"]).itemsize
    intervals = found["rounds"][0]["interval"] is not None
    lines = [f"{found['method']} on {found['problem']}, d = {found['dimension']} {found['dtype']} "
             f"({size / 1e6:.3g} MB), {found['workers']} workers on {found['ranks']} ranks, each on a host of its own",
             said("latency", f"{1e3 * found['latency']:.3g} ms one way") + ", "
             + said("bandwidth", f"{found['bandwidth'] / 1e6:.4g} Mbit/s"),
             "sent in a round: " + ", ".join(f"{call['what']} of {call['bytes']:,} bytes {1e3 * call['seconds']:.3g} ms"
                                             for call in found["calls"]),
             "",
             ("   I  " if intervals else "") + "ms a round  computing  communicating  share  iterations/s  speed-up"]
    for line in found["rounds"]:
        lines.append((f"{line['interval']:4}  " if intervals else "")
                     + f"{1e3 * line['seconds']:10.4g}  {1e3 * line['computing']:9.4g}  "
                       f"{1e3 * line['communicating']:13.4g}  {100 * line['share']:4.0f} %  "
                       f"{line['iterations']:12.4g}  {line['speed_up']:8.3g}")
    if not intervals:
        return "\n".join(lines)
    best, most = found["recommended"], INTERVALS[-1]
    rule = f"communication at most {SHARE:.0%} of a round"
    lines += ["", f"recommended: method.interval = {best}, the smallest with {rule}" if best else
              f"recommended: a faster network; no interval up to {most} makes {rule}"]
    if best and best > 1:
        lines.append(f"CELGC's theory has I ≤ 1/(2Nε) (arXiv:2205.05040): on {found['workers']} workers for an "
                     f"accuracy ε of at most {1 / (2 * found['workers'] * best):.2g}")
    return "\n".join(lines)


def shown(found: dict[str, Any], as_json: bool) -> str:
    """What plan found, as `mpiclip plan` prints it."""
    return json.dumps(finite(found), indent=2, ensure_ascii=False) if as_json else text(found)
