"""A training run: put the parts together, then the loop."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import sys
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np

from . import checkpoint, constants, data, privacy, record
from . import config as configs
from .aggregation import COUNTS, Aggregation, Tally
from .comm import Comm, world
from .config import Config
from .device import host, select, set_threads
from .errors import InputError
from .ledger import Ledger
from .rules import Chain
from .server import Server
from .streams import stream
from .version import __version__
from .workers import CHECKPOINT, GO, NOT_FINITE, STOP, Examples, Workers

PATIENCE = 600.0            # seconds between two checkpoints, unless run.checkpoint_every says how many rounds
PARTS = ("grad", "clip", "comm", "rules", "eval")
TIMES = (*PARTS, "hidden")  # and the time in which exchanges travelled behind any of these
MAY_CHANGE = {"run.rounds", "run.eval_every", "run.checkpoint_every", "run.keep", "run.device", "run.threads",
              "run.gpu_aware_mpi", "data.file"}     # on resume; everything else would make it another run


@dataclass
class Run:
    """What a training run leaves.

    x        the model, (d,), the same on every rank
    config   what ran
    metrics  name → float64 array with one entry for each evaluated round (on every rank); suspicion has n
    stopped  whether a signal ended it before all rounds were done"""

    x: np.ndarray
    config: Config
    metrics: dict[str, np.ndarray]
    stopped: bool

    def summary(self) -> dict[str, Any]:
        """The last value of each metric."""
        return {name: values[-1].tolist() for name, values in self.metrics.items()}


def train(config: str | os.PathLike | dict, comm: Any = None, out: str | os.PathLike | None = None,
          settings: Sequence[str] = (), progress: bool = False) -> Run:
    """Run an experiment, on this rank and all the others.

    config: a TOML file's path, or its tables as a dict. comm: an mpi4py communicator, or a Comm; default: all ranks
    that mpirun or srun started, or this process alone. out: the folder for run.h5 and checkpoints/; None writes
    nothing. settings: "table.key=value" strings that override the config. progress: say on stderr how it goes. Raises
    InputError, on all ranks, for bad input.

    >>> run = train({"problem": {"name": "quadratic", "curvature": [[1], [2]], "centre": [[-3], [3]]},
    ...              "method": {"name": "clip21", "tau": 1, "stepsize": 0.1},
    ...              "run": {"workers": 2, "rounds": 200, "dtype": "float64"}})
    >>> run.x
    array([1.])
    """
    ranks = ranks_of(comm)
    with ranks.agree():
        checked = configs.load(config, settings)
    return Training(checked, ranks, out, progress).run()


def resume(out: str | os.PathLike, settings: Sequence[str] = (), comm: Any = None, progress: bool = False) -> Run:
    """Go on with the run in `out` from its newest valid checkpoint, on any number of ranks: the same bytes as if it had
    never stopped. settings: "run.rounds=2000" …, only what does not change the run (MAY_CHANGE); the rest as train."""
    ranks = ranks_of(comm)
    with ranks.agree():
        header, lines = record.read(Path(out))
        before = record.config(header)
        tables = json.loads(json.dumps(before))
        for setting in settings:
            configs.override(tables, setting)
        for table, values in tables.items():
            for key, value in values.items():
                old = before.get(table, {}).get(key)
                if value != old and f"{table}.{key}" not in MAY_CHANGE:
                    raise InputError(f"{table}.{key} = {value!r}: {out} was started with {old!r}; a resumed run may "
                                     f"change only {', '.join(sorted(MAY_CHANGE))}")
        now = configs.load(tables)
    return Training(now, ranks, out, progress, lines).run()


def ranks_of(comm: Any) -> Comm:
    """The ranks to run on: a Comm, that of an mpi4py communicator, or by default all that were started."""
    return comm if isinstance(comm, Comm) else Comm(comm) if comm is not None else world()


@contextmanager
def stop_signals(ask: Callable[[], None]) -> Iterator[None]:
    """SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 ask for an end, after this round and a checkpoint. Launchers and schedulers
    may send them twice; a person who presses Ctrl-C again, seconds later, is obeyed at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = inf

    def stop(number, frame):
        nonlocal asked
        if number == signal.SIGINT and perf_counter() - asked > 2:
            raise KeyboardInterrupt
        asked = min(asked, perf_counter())
        ask()

    before = {sig: signal.signal(sig, stop) for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


class Training:
    """The parts of one run, on this rank. `before`: the lines of metrics of a run that is resumed."""

    def __init__(self, config: Config, comm: Comm, out: str | os.PathLike | None, progress: bool = False,
                 before: np.ndarray | None = None):
        n = config.run.workers or comm.size
        run, agg = config.run.model_copy(update={"workers": n}), config.aggregate   # as many when it is resumed
        self.config, self.comm = config.model_copy(update={"run": run}), comm
        self.out = None if out is None else Path(out)
        self.taking_part = run.participation or n
        byzantine = np.arange(n) >= n - (agg.f if agg.attack else 0)        # the last f workers
        honest = int((~byzantine).sum())
        with comm.agree():
            if n < comm.size:
                raise InputError(f"run.workers = {n}: fewer than the {comm.size} ranks; start at most {n}")
            if self.taking_part > n:
                raise InputError(f"run.participation = {self.taking_part}: expected at most run.workers = {n}")
            Chain(agg.rules, agg.f, n)          # refused before the honest workers are given data
            self.device = select(run.device, comm.local_rank)
            set_threads(run.threads or comm.threads)
            self.hosted = np.array_split(np.arange(n), comm.size)       # the workers of each rank
            ids = self.hosted[comm.rank]
            shard, tested, self.fingerprint = self._read(honest, ids)
            problem = config.problem
            inputs = problem.prepare(shard, ids, honest, run.seed, run.dtype)
            self.test = None if tested is None else self.device.put_all(
                problem.prepare(tested, tested.ids, tested.n, run.seed, run.dtype))
        x = problem.x0(inputs, run.seed, run.dtype)
        compressor = getattr(config.method, "compressor", None)
        with comm.agree():
            if compressor is not None:
                compressor.check(len(x), getattr(config.method, "contractive", False))
        self.server = Server(comm, len(x), n, len(ids), self.device, run.dtype, agg.at,
                             means_only=not agg.rules and not agg.attack, gpu_aware=run.gpu_aware_mpi,
                             message=0 if compressor is None else compressor.bytes(len(x), run.dtype))
        offsets = inputs.bounds if problem.language else None if shard is None else shard.offsets
        self.workers = Workers(problem, self.device.put_all(inputs), offsets, ids,
                               len(x), run.dtype, self.device, comm, self.server.mine, run.seed,
                               None if run.batch == "full" else run.batch, honest, tolerant=bool(agg.rules),
                               eval_rows=None if run.eval_rows == "all" else run.eval_rows)
        with comm.agree():
            self.aggregate = Aggregation(self.server, agg.rules, agg.f, agg.attack, byzantine, self.workers.confirm,
                                         run.seed, self.workers.flipped, agg.suspect)
        comm.sent, comm.seconds, comm.hidden = 0, 0.0, 0.0      # of this run alone
        self.start, self.stop_asked, self.repeated = 0, False, 0
        self._lock: TextIO | None = None
        self.began, self.seconds = perf_counter(), dict.fromkeys(TIMES, 0.0)
        self.saved, self.saved_round = self.began, -1           # the newest checkpoint: when, and after which round
        self.s = SimpleNamespace(x=self.device.put(x[self.server.own].copy()))
        config.method.init(self.s, self.workers)
        rows = sum(comm.all(0 if offsets is None else int(offsets[-1])))
        self.epochs = config.method.gradients * self.taking_part * (        # passes over all rows, in a round
            1 / honest if run.batch == "full" else run.batch / max(rows, 1))
        self.of_method = list(vars(self.s))                     # what a round works on
        self.workers.init(self.s)
        self.aggregate.init(self.s)
        self.lines: list[dict[str, Any]] = []
        self._looked: Iterator[None] = iter(())                 # the evaluation whose gradients are still to be sent
        if before is None:
            self.method = constants.resolve(config.method, self._whole_x().copy(), self.workers, self.server)
        else:
            self._load()
            names = before.dtype.names or ()
            self.lines = [{name: line[name] for name in names} for line in before if line["round"] < self.start]
        self.mechanism = self._calibrate() if self.method.private else None
        self.record, self.ledger = self._open_files(before is not None)
        self.rounds = self._affordable(run.rounds, self.method.epsilon)
        self.progress = record.Progress(self.rounds, self.start) if progress and comm.rank == 0 else None
        if self.progress:
            sys.stderr.write(self._what_runs())

    # ---- the loop

    def run(self) -> Run:
        """All rounds that are left; ends early, after a checkpoint, when a signal asks for it."""
        config, workers, k = self.config, self.workers, self.start
        x = self._whole_x()
        stopped = False
        with stop_signals(self.stop):
            if k == 0 and k < self.rounds:
                workers.begin(k, "first batch")
                self.aggregate.begin(k)
                self.method.start(x, self.s, workers, self.aggregate)
            while k < self.rounds and not stopped:
                if k % config.run.eval_every == 0:
                    self._evaluate(k, x)
                workers.begin(k)
                self.aggregate.begin(k)
                workers.wish = STOP if self.stop_asked else self._checkpoint_due(k)
                if self.ledger:
                    self.ledger.release(k + 1)
                try:
                    self._round(x)
                except InputError as error:
                    if error.agreed:
                        self._finish_lines()
                    if workers.agreed == NOT_FINITE:      # nothing of this round has happened yet
                        self._save(k)
                    raise
                k += 1
                stopped = workers.agreed == STOP
                if workers.agreed >= CHECKPOINT:
                    self.server.meanwhile(partial(self._save, k))
                x = self._whole_x()
                self._send_gradients()
                if self.progress and self.lines and k < self.rounds:
                    self.progress.update(k, self.lines[-1])
            self._finish_lines()
            if not stopped:
                self._save(k)               # before the tally goes into a line that a longer run would not have
                self._evaluate(k, x)
                self._finish_lines()
                if self.progress:
                    self.progress.update(k, self.lines[-1])
        return self._finish(x, stopped)

    def stop(self) -> None:
        """Ask for an end after this round and a checkpoint."""
        self.stop_asked = True

    def _round(self, x) -> None:
        """One round of the method; what is neither gradient nor exchange nor rules is the method's own: clipping."""
        parts: tuple[Any, ...] = (self.workers, self.comm, self.aggregate)
        start, before = perf_counter() - self.server.worked, [part.seconds for part in parts]
        with self._those_who_take_part() as s:
            self.method.round(x, s, self.workers, self.aggregate)
        spent = [part.seconds - b for part, b in zip(parts, before, strict=True)]
        for name, seconds in zip(("grad", "comm", "rules"), spent, strict=True):
            self.seconds[name] += seconds
        self.seconds["clip"] += perf_counter() - self.server.worked - start - sum(spent)
        self.server.catch_up()

    @contextmanager
    def _those_who_take_part(self) -> Iterator[SimpleNamespace]:
        """The state as this round sees it: of what belongs to workers, the rows of those that take part."""
        if self.taking_part == self.server.n:
            yield self.s
            return
        part = self._part(self.workers.round)
        hosted = np.array([np.isin(ids, part).sum() for ids in self.hosted])
        divisor = self.taking_part if self.method.partial == "mean" else self.server.n
        here = np.flatnonzero(np.isin(self.workers.ids, part))
        s = SimpleNamespace(**{name: getattr(self.s, name)[here] if name.endswith("_i") else getattr(self.s, name)
                               for name in self.of_method})
        with self.server.only(hosted, divisor), self.workers.only(here, self.taking_part, self.server.mine):
            yield s
        for name in self.of_method:
            if name.endswith("_i"):
                getattr(self.s, name)[here] = getattr(s, name)
            else:
                setattr(self.s, name, getattr(s, name))

    def _part(self, round: int) -> np.ndarray:
        """The workers that take part in a round: a function of (seed, round)."""
        n, random = self.server.n, stream(self.config.run.seed, "participation", round=round)
        return np.sort(random.permutation(n)[:self.taking_part])

    def _whole_x(self):
        """x^k as every worker receives it."""
        before = self.comm.seconds
        x = self.server.join(self.s.x)
        self.seconds["comm"] += self.comm.seconds - before
        self.server.catch_up()
        return x

    # ---- metrics

    def _columns(self) -> list[str]:
        """The metrics' names."""
        return ["round", "seconds", *(["epochs"] if self.workers.offsets is not None else []), "loss", "grad_norm",
                *(["accuracy"] if self._accuracy_of is not None else []),
                *(["perplexity"] if self._measures_perplexity else []),
                *(["clipped"] if hasattr(self.s, "clipped_i") else []),
                *(COUNTS if self.config.aggregate.rules else []),
                *(["suspicion"] if self.config.aggregate.suspect else []),
                *(["epsilon"] if self.mechanism else []),
                "bytes", *(f"seconds_{name}" for name in TIMES)]

    def _evaluate(self, k: int, x) -> None:
        """Begin the line of metrics of x^k. Where exchanges take their time it does not wait for them: what this rank
        computes, it computes while the messages of round k are under way; its gradients travel while round k + 1
        computes its own, and what became of them is written when the messages of that are under way."""
        evaluation = self._evaluation(k, x)
        next(evaluation)
        if not self.server.overlaps:
            deque(evaluation, 0)
            return
        self._looked = evaluation
        if self.workers.keeps:          # these gradients are those of round k
            next(evaluation)
            self._send_gradients()
        else:
            self.server.meanwhile(partial(next, evaluation))

    def _send_gradients(self) -> None:
        """Nothing else is under way now: those of an evaluation may go."""
        if next(self._looked, self) is None:
            self.server.meanwhile(partial(deque, self._looked, 0))
        self._looked = iter(())

    def _finish_lines(self) -> None:
        """Wait for all lines that were begun."""
        self.server.catch_up()
        deque(self._looked, 0)
        self._looked = iter(())

    def _evaluation(self, k: int, x) -> Iterator[None]:
        """Metrics of x^k, in the steps that _evaluate tells of. The share of workers that clipped is that of the round
        that made x^k; what happened to rows is a mean over the rounds since the line before."""
        comm, workers = self.comm, self.workers
        line: dict[str, Any] = {"round": k}                     # first whatever round k will change
        if workers.offsets is not None:
            line["epochs"] = k * self.epochs
        if hasattr(self.s, "clipped_i") and k:
            took_part = np.isin(workers.ids, self._part(k - 1)) & (workers.ids < workers.honest)
            clipped = host(self.s.clipped_i)[took_part].sum(), took_part.sum()
        if self.config.aggregate.rules:
            line |= self.aggregate.tally.means(self.server.n if self.config.aggregate.suspect else 0)
            self.aggregate.tally = Tally()
        sent = comm.sent
        if self.server.overlaps and x is self.s.x:
            x = x.copy()
        yield
        with self._evaluating():
            line["loss"], g_i = workers.look(x, aside=self.server.overlaps)
            if self._accuracy_of is not None:
                correct, rows = comm.total(self.config.problem.accuracy(x, self._accuracy_of))
                line["accuracy"] = correct / rows
            if self._measures_perplexity:
                surprise, tokens = comm.total(self.config.problem.perplexity(x, self.test))
                line["perplexity"] = float(np.exp(surprise / tokens))
            if hasattr(self.s, "clipped_i") and k:
                shares, count = comm.total(clipped)
                line["clipped"] = shares / count
            if self.mechanism:
                spent = privacy.epsilon(self.mechanism, self.releases(k)) if comm.rank == 0 else 0.0
                line["epsilon"] = comm.same(spent)
            line["bytes"] = comm.highest(sent)
        line["seconds"] = perf_counter() - self.began
        line |= {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}
        yield
        with self._evaluating():
            mean = self.server.mean_to_come(g_i)
        yield
        with self._evaluating():
            line["grad_norm"] = self.server.norm(mean()) * workers.n / workers.honest
            self.lines.append(line)
            if self.record:
                self.record.append(line)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Time and exchanges of an evaluation are the evaluation's, not the method's; but gradients are gradients."""
        comm, workers = self.comm, self.workers
        start, gradients, exchange = perf_counter(), workers.seconds, (comm.seconds, comm.sent)
        yield
        grad = workers.seconds - gradients
        self.seconds["grad"] += grad
        self.seconds["eval"] += perf_counter() - start - grad
        self.seconds["hidden"] = comm.hidden
        workers.seconds, (comm.seconds, comm.sent) = gradients, exchange

    # ---- privacy

    def _calibrate(self) -> privacy.Mechanism:
        """What the accountant has to know of one release; and σ, where the config gives ε."""
        method, table, run, rows = self.method, self.config.privacy, self.config.run, self.workers.offsets
        counts = [] if rows is None else np.concatenate(self.comm.all(np.diff(rows)))[:self.workers.honest].tolist()
        with self.comm.agree():
            mechanism = privacy.mechanism_of(method, table, self.server.n, counts, run.batch)
            if method.sigma is None and method.epsilon is not None and self.comm.rank == 0:
                sigma = (privacy.paper_scaling(mechanism.bound, method.epsilon, mechanism.delta, run.rounds)
                         if table.scaling == "paper" else
                         privacy.sigma_for(method.epsilon, self.releases(run.rounds), mechanism))
                mechanism = dataclasses.replace(mechanism, sigma=sigma)
            numbers = np.finfo(run.dtype)
            if mechanism.sigma and not float(numbers.tiny) <= mechanism.sigma <= float(numbers.max):
                raise InputError(f"method.sigma = {mechanism.sigma:g}: expected 0, or what run.dtype = "
                                 f"'{run.dtype}' can hold, {numbers.tiny:g} to {numbers.max:g}")
            if self.comm.rank == 0:     # what cannot be accounted for is refused now, not at an evaluation
                privacy.epsilon(mechanism, self.releases(run.rounds))
        mechanism = self.comm.same(mechanism)
        self.method = method.model_copy(update={"sigma": mechanism.sigma})
        if table.clip is not None:
            self.workers.examples = Examples(table.clip, mechanism.sigma)
        return mechanism

    def releases(self, rounds: int) -> int:
        """How often the data have been used after so many rounds."""
        if self.config.privacy.level == "worker":
            return rounds + self.repeated
        return (rounds + self.repeated) * self.method.gradients + self.method.first_gradients

    def _affordable(self, rounds: int, budget: float | None) -> int:
        """The rounds that this run may do: all, unless some had to be repeated, or were added later, and would exceed
        the ε that was asked for."""
        mechanism = self.mechanism
        if mechanism is None or budget is None or self.config.privacy.scaling == "paper":
            return rounds
        affordable, most = rounds, budget * (1 + 1e-6)
        if self.comm.rank == 0 and privacy.epsilon(mechanism, self.releases(rounds)) > most:
            affordable = bisect_right(range(self.start, rounds), most, key=lambda k: privacy.epsilon(
                mechanism, self.releases(k))) + self.start - 1
            affordable = max(self.start, affordable)
            sys.stderr.write(f"mpiclip: round {affordable} will be the last one, instead of round {rounds}: then ε = "
                             f"{budget:g} is spent ({self.repeated} rounds had to be repeated)\n")
        return self.comm.same(affordable)

    # ---- on disk

    def _open_files(self, resumed: bool) -> tuple[record.Record | None, Ledger | None]:
        """On rank 0: run.h5 and, of a private run, its book. Every rank gets the key of the noise, and learns how many
        rounds have been repeated."""
        opened = book = None
        secret = f"reproducible {self.config.run.seed}".encode() if self.mechanism else b""
        keeps_book = self.mechanism is not None and self.config.privacy.noise == "secret"
        with self.comm.agree():
            if self.comm.rank == 0:
                self._lock = record.lock(self.out) if self.out else None
                if resumed and keeps_book:
                    book = Ledger(self.out, self.start)
                    self.repeated = book.repeated
                if self.out:
                    columns = [(name, self.server.n) if name == "suspicion" else name for name in self._columns()]
                    opened = (record.Record.resume(self.out, self.start - 1, self._header(), columns) if resumed else
                              record.Record.create(self.out, self._header(), columns))
                if not resumed and keeps_book:
                    book = Ledger(self.out)
        self.workers.secret, self.repeated = self.comm.same((book.secret if book else secret, self.repeated))
        return opened, book

    def _header(self) -> dict[str, Any]:
        """What run.h5 says of the run as a whole."""
        header = {"config": json.dumps(self.config.as_dict()), "version": __version__, "workers": self.server.n,
                  "ranks": self.comm.size, "dimension": self.server.d,
                  "constants": self.method.model_dump(exclude_none=True),
                  "data": self.fingerprint, "device": self.device.name, "host": platform.node()}
        if self.mechanism:
            header["privacy"] = {"mechanism": dataclasses.asdict(self.mechanism), "repeated": self.repeated,
                                 "releases_per_round": self.releases(1) - self.releases(0)}
        return header

    def _checkpoint_due(self, k: int) -> int:
        every = self.config.run.checkpoint_every
        due = (k + 1) % every == 0 if every else perf_counter() - self.saved > PATIENCE
        return CHECKPOINT if due and self.out else GO

    def _save(self, k: int) -> None:
        """A checkpoint of the state after k rounds."""
        if self.out is None or k == self.saved_round:
            return
        self._finish_lines()
        if self.record:
            self.record.sync()
        header = {"config": self.config.as_dict(), "constants": self.method.model_dump(exclude_none=True),
                  "data": self.fingerprint, "version": __version__, "bytes": self.comm.highest(self.comm.sent),
                  "seconds": {"all": perf_counter() - self.began, **self.seconds, "hidden": self.comm.hidden},
                  "tally": dataclasses.asdict(self.aggregate.tally)}
        checkpoint.save(self.out, self.comm, k, {name: self._piece(name) for name in vars(self.s)}, header,
                        self.config.run.keep)
        self.saved, self.saved_round = perf_counter(), k

    def _piece(self, name: str) -> checkpoint.Piece:
        """What this rank holds of s.name."""
        return checkpoint.piece(name, getattr(self.s, name), self.server, self.workers.ids)

    def _load(self) -> None:
        """The state of the newest valid checkpoint."""
        assert self.out is not None
        saved = checkpoint.load(self.out, self.comm)
        with self.comm.agree():
            for warning in saved.warnings if self.comm.rank == 0 else []:
                sys.stderr.write(f"mpiclip: {warning}\n")
            if saved.header["data"] != self.fingerprint:
                raise InputError(f"{self.config.data and self.config.data.file}: not the data that {self.out} was "
                                 f"started with (fingerprint {self.fingerprint}, expected {saved.header['data']})")
            if self.config.run.rounds < saved.round:
                raise InputError(f"run.rounds = {self.config.run.rounds}: {self.out} has done {saved.round} rounds")
            for name in vars(self.s):
                checkpoint.restore(saved, name, getattr(self.s, name), self.server, self.workers.ids)
        saved.close()
        self.start = self.saved_round = saved.round
        self.method = type(self.config.method)(**saved.header["constants"])
        self.comm.sent = saved.header["bytes"]
        self.aggregate.tally = Tally(**saved.header["tally"])
        self.began -= saved.header["seconds"].pop("all")
        self.seconds |= saved.header["seconds"]
        self.comm.hidden = self.seconds["hidden"]

    def _read(self, honest: int, ids: np.ndarray):
        """This rank's training rows, its share of the test rows, and the data set's fingerprint."""
        table, dtype = self.config.data, self.config.run.dtype
        if table is None:
            return None, None, ""
        standard = data.moments(table.file) if table.standardize else None
        shard = data.read_train(table.file, table.split, honest, ids, self.config.run.seed, dtype, table.alpha,
                                table.similarity, standard)
        if isinstance(shard, data.Text) != self.config.problem.language:
            found, wanted = ("text", "rows") if isinstance(shard, data.Text) else ("rows", "text")
            raise InputError(f"{table.file}: holds {found}, but problem.name = '{self.config.problem.name}' learns "
                             f"from {wanted}; see mpiclip data import --format")
        test = data.read_test(table.file, self.comm.rank, self.comm.size, dtype, standard)
        return shard, test, data.fingerprint(table.file)

    # ---- beginning and end

    def _what_runs(self) -> str:
        """What is computed where: for the person who started it."""
        config, comm = self.config, self.comm
        constants = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else
                              f"{key} {' '.join(map(str, value.values()))}" if isinstance(value, dict) else
                              f"{key} {value}" for key, value in self.method.model_dump(exclude_none=True).items())
        protected = ""
        if self.mechanism:
            table, releases = config.privacy, self.releases(self.rounds)
            spent = privacy.epsilon(self.mechanism, releases)
            protected = privacy.statement(self.mechanism, releases, spent, table.noise, table.scaling) + "\n"
        aggregate = " ∘ ".join(reversed([link.name for link in self.aggregate.chain.links])) or "mean"
        return (f"{config.method.name} ({constants}) on {config.problem.name}, d = {self.server.d}\n"
                f"{self.server.n} workers on {comm.size} rank{'s' * (comm.size > 1)}, {self.device.name}, "
                f"{config.run.threads or comm.threads} thread{'s' * (comm.threads > 1)} each; {aggregate} of what the "
                f"workers send, {self.server.at}\n"
                f"{protected}{'from round ' + str(self.start) + ', ' if self.start else ''}writing {self.out}\n")

    @property
    def _measures_perplexity(self) -> bool:
        return self.config.problem.language and self.test is not None

    @property
    def _accuracy_of(self):
        """What accuracy is measured on: test rows, else training rows; None if the problem has no classes."""
        if not self.config.problem.classifier:
            return None
        return self.test if self.test is not None else self.workers.data

    def close(self) -> None:
        """Let go of the run's files."""
        for file in (self.record, self.ledger, self._lock):
            if file:
                file.close()

    def _finish(self, x, stopped: bool) -> Run:
        if self.progress:
            self.progress.close()
            if stopped:
                sys.stderr.write(f"stopped after round {self.saved_round}; to go on: mpiclip resume {self.out}\n")
        self.close()
        names = self._columns()
        metrics = {name: np.array([line.get(name, np.nan) for line in self.lines], np.float64) for name in names}
        return Run(host(x).copy(), self.config, metrics, stopped)
