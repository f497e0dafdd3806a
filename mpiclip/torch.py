"""PyTorch models trained by the methods of this package: gradients by torch's autograd, everything after them ours.

The parameters are views of one flat vector: the server's, where a rank holds all of it, so that a method's step is the
model's. Gradients are computed for each worker and copied once, to where the exchange reads them. Needs PyTorch
(`pip install 'mpiclip[torch]'`), which nothing else in this package imports."""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import attacks, checkpoint, constants
from .aggregation import Aggregation
from .comm import Comm
from .comm import world as started
from .device import Device, host, select, set_threads
from .errors import InputError
from .methods import Method
from .server import Server
from .streams import stream
from .version import __version__
from .workers import Workers

try:
    import torch
    from torch.utils._pytree import tree_map
except ImportError as error:
    raise ImportError("mpiclip.torch needs PyTorch: pip install 'mpiclip[torch]'") from error

Loss = Callable[[Any, Any], Any]        # loss(model, batch) → a number, as a tensor


class Distributed:
    """A model that n workers on all ranks train together, by any method of mpiclip.methods:

        trainer = Distributed(model, methods.CELGC(eta=0.1, gamma=1.0, interval=4))
        batches = iter(loader)                      # of this rank's own data, as for DistributedDataParallel
        for _ in range(rounds):
            loss = trainer.round(lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
                                 lambda worker: next(batches))

    model       on the CPU or a GPU, its parameters float32 or float64, the same modules on every rank. Rank 0's values
                are everybody's from here on. `model` then always holds x^k, the same on every rank. Whoever else
                changes a parameter that is trained, an optimizer say, is told so. Frozen parameters stay as they are
    method      a record of mpiclip.methods, without noise. It may be replaced between rounds by one of the same kind
                with other constants: trainer.method = …
    comm        an mpi4py communicator, or a Comm; default: all ranks that were started
    workers     n, spread over the ranks; default: one a rank. `ids` are the numbers of those of this rank
    rules, f, attack, at
                as in a config's [aggregate]. The last f workers of an attack that is simulated get no batches
    seed        of everything random: what dropout draws is a function of (seed, worker, round), so it depends neither
                on the number of ranks nor on what was drawn before
    together    compute the gradients of a rank's workers in one torch.func.vmap where the model allows it (no
                BatchNorm, nothing random, batches of one shape; the loss a function of model and batch alone); False:
                one after another, which takes less memory, and gives the same bytes on any number of ranks
    threads     of this rank; default: its share of its cores

    `loss(model, batch)` is a scalar, the mean over the batch; what the ranks' mean gradient is then, is what it is in
    DistributedDataParallel. `draw(worker)` is the next batch of that worker, any nest of tensors: it is asked once for
    every gradient, `method.gradients` times a round. p.grad stays empty.

    BatchNorm normalises with the statistics of a worker's own batch, as in DistributedDataParallel. Its running mean
    and variance are no parameters: in a round every worker's go their own ways, from a common start, and at its end
    what they have changed by is aggregated as vectors of the method are: by the mean, or by the rules. (CELGC's code
    leaves them as they are, DistributedDataParallel takes those of rank 0.) A mean of variances lacks the variance
    between the workers' means. Other buffers must not change.

    rounds      how many are done
    s           the method's state, as methods describe it; s.x is the model
    comm        sent: bytes that this rank has sent; seconds: spent in the exchange; total(values): a sum over ranks

    Raises InputError, on all ranks, for what does not fit."""

    def __init__(self, model: Any, method: Method, comm: Any = None, workers: int | None = None,
                 rules: Sequence[Any] = (), f: int = 0, attack: dict[str, Any] | None = None, at: str = "sharded",
                 seed: int = 0, together: bool = True, threads: int | None = None, gpu_aware_mpi: bool = False):
        self.comm = ranks = comm if isinstance(comm, Comm) else Comm(comm) if comm is not None else started()
        self.model, self.method, self.seed, self.rounds = model, method, seed, 0
        n = ranks.size if workers is None else workers
        with ranks.agree():
            if n < ranks.size:
                raise InputError(f"workers = {n}: fewer than the {ranks.size} ranks")
            if at not in ("sharded", "rank0"):
                raise InputError(f"at = {at!r}: expected 'sharded' or 'rank0'")
            parameters = trained(model)
            if method.private:
                raise InputError(f"method.sigma: '{method.name}' with noise is for `mpiclip train`, which accounts for "
                                 "it; expected a method without")
            name = attack.get("name") if attack else None
            if name in attacks.FACTS and attacks.FACTS[name].flips:
                raise InputError(f"attack: '{name}' needs labels, which only `mpiclip train` knows; flip them in what "
                                 "`draw` returns")
            first = next(iter(parameters.values()))
            self.device = Device("cpu") if first.device.type == "cpu" else on_gpu(first.device)
            compressor = getattr(method, "compressor", None)
            d = sum(p.numel() for p in parameters.values())
            if compressor is not None:
                compressor.check(d, getattr(method, "contractive", False))
        self._names = [[name, list(p.shape), str(p.dtype)] for name, p in parameters.items()]
        others = [t for t in (*model.parameters(), *model.buffers()) if not any(t is p for p in parameters.values())]
        shapes = self._names, [list(t.shape) for t in others]
        if any(theirs != shapes for theirs in ranks.all(shapes)):
            raise InputError("model: the ranks have different ones; expected the same modules on every rank",
                             agreed=True)
        set_threads(threads or ranks.threads)
        torch.set_num_threads(threads or ranks.threads)
        x = torch.cat([p.detach().reshape(-1) for p in parameters.values()]).cpu().numpy()
        if ranks.size > 1:
            ranks.mpi.Bcast(x)
            for other in others:
                other.data.copy_(ranks.same(other.detach().cpu() if ranks.rank == 0 else None))
        self._hosted = np.array_split(np.arange(n), ranks.size)
        self.ids = self._hosted[ranks.rank]
        message = 0 if compressor is None else compressor.bytes(d, x.dtype)
        self._server = Server(ranks, d, n, len(self.ids), self.device, x.dtype.name, at,
                              means_only=not rules and not attack, gpu_aware=gpu_aware_mpi, message=message)
        byzantine = np.arange(n) >= n - (f if attack else 0)
        statistics = Statistics(model, self.ids, self.device, ranks, n, rules, f, at, seed, x.dtype)
        self._gradients = Gradients(model, list(parameters.values()), self.ids, statistics, seed, together)
        self._workers = ModelWorkers(self._gradients, None, None, self.ids, d, x.dtype.name, self.device, ranks,
                                     self._server.mine, seed, None, int((~byzantine).sum()), tolerant=bool(rules))
        with ranks.agree():
            self._aggregate = Aggregation(self._server, rules, f, attack, byzantine, self._workers.confirm, seed)
        self.s = SimpleNamespace(x=self.device.put(x[self._server.own].copy()))
        method.init(self.s, self._workers)
        self._aggregate.init(self.s)
        self._started = False               # whether rules for constants are resolved, and the method has begun
        ranks.sent, ranks.seconds = 0, 0.0
        self._show()

    def round(self, loss: Loss, draw: Callable[[int], Any]) -> float:
        """One round of the method. Returns the mean loss of this rank's workers over the gradients that it took, NaN
        if there was none. Raises InputError on all ranks where a gradient is not finite: model and state are then what
        they were, unless rules tolerate such gradients."""
        gradients, workers, k = self._gradients, self._workers, self.rounds
        gradients.check()
        gradients.loss, gradients.draw, gradients.losses = loss, draw, []
        try:
            with torch.enable_grad():
                if not self._started:
                    self._begin()
                workers.begin(k)
                self._aggregate.begin(k)
                self.method.round(self._x, self.s, workers, self._aggregate)
                gradients.statistics.average(k)
        except BaseException:
            gradients.statistics.forget()
            gradients.point(tensor(self._x))
            raise
        self.rounds += 1
        self._show()
        values = [value for each in gradients.losses for value in each.tolist()]
        return sum(values) / len(values) if values else float("nan")

    def random(self, worker: int) -> np.random.Generator:
        """Random numbers for `draw`, to choose the batch that it is being asked for: a function of (seed, worker,
        round, call), so that a run that was stopped goes on with the same batches, on any number of ranks."""
        return self._workers.random(worker)

    def clipped(self) -> float:
        """The share of the last round's steps in which a worker clipped, over all honest workers; NaN for methods that
        do not. To be called by all ranks."""
        if not hasattr(self.s, "clipped_i"):
            return float("nan")
        mine = host(self.s.clipped_i)[self.ids < self._workers.honest]
        return float(self.comm.total(mine.sum())) / self._workers.honest

    # ---- on disk

    def save(self, folder: str | os.PathLike, keep: int = 3) -> None:
        """Write folder/checkpoints/round-….h5, complete or not there, and remove all but the newest `keep`. To be
        called by all ranks. InputError on all of them if one cannot write."""
        header = {"is": self._identity(), "constants": self.method.model_dump(exclude_none=True),
                  "started": self._started, "version": __version__, "bytes": self.comm.highest(self.comm.sent)}
        pieces = {name: checkpoint.piece(name, getattr(s, name), server, self.ids)
                  for name, (s, server) in self._saved().items()}
        checkpoint.save(os.fspath(folder), self.comm, self.rounds, pieces, header, keep)

    def load(self, folder: str | os.PathLike) -> int:
        """Go on from the newest valid checkpoint in the folder, of the same model, method, workers and seed, on any
        number of ranks: the next rounds have the same bytes as if it had never stopped, if `draw` returns the same
        batches. Constants are this method's, but for those that a rule gave. Returns the rounds done."""
        saved = checkpoint.load(os.fspath(folder), self.comm)
        try:
            with self.comm.agree():
                for warning in saved.warnings if self.comm.rank == 0 else []:
                    sys.stderr.write(f"mpiclip: {warning}\n")
                for key, here in self._identity().items():
                    if saved.header.get("is", {}).get(key) != here:
                        there = saved.header.get("is", {}).get(key)
                        raise InputError(f"{folder}: a checkpoint of another run: {key} is {brief(there)}, expected "
                                         f"{brief(here)}")
                state = self._saved()
                if set(saved.names) != set(state):
                    raise InputError(f"{folder}: a checkpoint with the state {', '.join(saved.names)}; expected "
                                     f"{', '.join(sorted(state))}")
                for name, (s, server) in state.items():
                    checkpoint.restore(saved, name, getattr(s, name), server, self.ids)
        finally:
            saved.close()
        rules = {key: value for key, value in saved.header["constants"].items()
                 if key in ("tau", "stepsize") and not isinstance(getattr(self.method, key), float | int)}
        self.method = self.method.model_copy(update=rules)
        self.rounds, self._started = saved.round, saved.header["started"]
        self.comm.sent = saved.header["bytes"]
        self._gradients.statistics.take()
        self._show()
        return self.rounds

    # ---- inside

    def _begin(self) -> None:
        """Before the first round: constants that follow from the first gradients, and what the method does once."""
        self._workers.begin(0, "first batch")
        self._aggregate.begin(0)
        self.method = constants.resolve(self.method, self._x.copy(), self._workers, self._server)
        self.method.start(self._x, self.s, self._workers, self._aggregate)
        self._started = True
        self._gradients.losses.clear()

    def _show(self) -> None:
        """The server's x, whole, becomes the model's parameters."""
        self._x = self._server.join(self.s.x)
        self._gradients.point(tensor(self._x))

    def _identity(self) -> dict[str, Any]:
        """What two runs must have in common for one to go on where the other stopped."""
        return {"model": self._names, "method": self.method.name, "workers": self._server.n, "seed": self.seed}

    def _saved(self) -> dict[str, tuple[Any, Server]]:
        """Where each array of a checkpoint is: (namespace, the server whose columns it has)."""
        saved, statistics = dict.fromkeys(vars(self.s), (self.s, self._server)), self._gradients.statistics
        if statistics.server:
            saved |= dict.fromkeys(vars(statistics.s), (statistics.s, statistics.server))
        return saved


class ModelWorkers(Workers):
    """Workers whose minibatches come from the caller: a batch is a list with one for each of this rank's workers, None
    for those that compute no gradient."""

    problem: Gradients

    def random(self, worker: int) -> np.random.Generator:
        """Random numbers for a worker's next minibatch."""
        return stream(self.seed, self._purpose, worker, self.round, self._step)

    def _gradients(self, x, batch, out, loss: bool = False, clip: float | None = None):
        return super()._gradients(x, self._draw() if batch is None else batch, out, loss, clip)

    def _draw(self) -> list[Any]:
        self.problem.call = self.round, self._step, zlib.crc32(self._purpose.encode())
        part = set(np.arange(len(self.ids))[self._here].tolist())
        try:
            return [self.problem.draw(int(worker)) if j in part and worker < self.honest else None
                    for j, worker in enumerate(self.ids)]
        except StopIteration:
            raise InputError(f"round {self.round}: `draw` has no batch left (StopIteration)") from None


class Gradients:
    """What a problem is elsewhere (mpiclip.problems): ∇f_i by autograd, f_i the caller's loss of worker i's batch.

    loss, draw      the caller's, of this round
    call            which gradient it is: (round, call, of what)
    losses          of this round's gradients, a tensor a call, of the workers that have one
    statistics      BatchNorm's"""

    def __init__(self, model: Any, parameters: list[Any], ids: np.ndarray, statistics: Statistics, seed: int,
                 together: bool):
        self.model, self.parameters, self.ids, self.statistics = model, parameters, ids, statistics
        self.loss: Loss = lambda model, batch: None
        self.draw: Callable[[int], Any] = lambda worker: None
        self.call, self.losses = (0, 0, 0), list[Any]()
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._shapes, self._sizes = [p.shape for p in parameters], [p.numel() for p in parameters]
        self._versions = [p._version for p in parameters]       # autograd counts writes; ours are made behind its back
        self._others = [(name, b, b._version) for name, b in model.named_buffers() if not statistics.has(b)]
        self._addresses: list[int] = []     # where the parameters are now
        self._rows: tuple[int, list[Any]] = (0, [])     # where gradients go: the address, and views of each row
        self._here: list[int] = []          # the workers whose losses were computed last
        self._seed, self._random = seed, [torch.default_generator]
        if parameters[0].is_cuda:
            self._random.append(torch.cuda.default_generators[parameters[0].device.index])
        self._together, self._tried = together and len(ids) > 1 and not statistics.server, False
        modules = list(model.modules())
        self._places = [[(m._parameters, name) for m in modules for name, q in m._parameters.items() if q is p]
                        for p in parameters]        # a parameter may be that of several modules

    def loss_grad(self, x, data=None, batch=None, out=None, loss=True, clip=None) -> tuple[Any, Any]:
        """(f_i(x) (w,) float64 or None, ∇f_i(x) (w, d)): as mpiclip.problems.Problem has it, with the batches that
        ModelWorkers draws. Without `out`, the losses of the call before."""
        if out is None:
            loss_i = np.zeros(len(self.ids))
            loss_i[self._here] = self.losses[-1].double().cpu().numpy()
            return loss_i, None
        self._here = here = [j for j, own in enumerate(batch) if own is not None]
        x, rows = tensor(x), tensor(out)
        values = self._all_at_once(x, rows, here, batch) if self._together and len(here) > 1 else None
        if values is None:
            values = self._one_by_one(x, rows, here, batch)
        for j in set(range(len(batch))).difference(here):
            rows[j].zero_()
        self.losses.append(values)
        return None, out

    def smoothness_product(self, u_i, data) -> Any:
        """There is none."""
        raise InputError("method.stepsize: the smoothness of a PyTorch model is not known; give a number", agreed=True)

    def point(self, flat: Any) -> None:
        """The parameters are views of this tensor (d,) from now on."""
        if not self._addresses or flat.data_ptr() != self._addresses[0]:
            for p, view in zip(self.parameters, self._split(flat), strict=True):
                p.data = view
            self._addresses = [p.data_ptr() for p in self.parameters]

    def check(self) -> None:
        """InputError unless the parameters are those of the beginning, where we left them, as we left them."""
        now = [p for p in self.model.parameters() if p.requires_grad]
        if len(now) != len(self.parameters) or any(p is not q for p, q in zip(now, self.parameters, strict=True)):
            raise InputError("model: a parameter was added, removed, replaced, frozen or thawed after Distributed was "
                             "made; expected the same ones")
        for name, p, version, address in zip(self._names, now, self._versions, self._addresses, strict=True):
            if p._version != version or p.data_ptr() != address:
                raise InputError(f"model: '{name}' was changed since the last round (by an optimizer, load_state_dict, "
                                 "or .to?); Distributed alone steps, and takes values as they are when it is made")
        for name, buffer, version in self._others:
            if buffer._version != version:
                raise InputError(f"model: the buffer '{name}' has changed: its values would differ between the ranks; "
                                 "expected only BatchNorm's statistics to change")

    # ---- inside

    def _one_by_one(self, x, rows, here: list[int], batches: list[Any]) -> Any:
        """The gradients at x, (d,) or (w, d), into rows (w, d), of the workers `here`: (len(here),) losses."""
        values = []
        for j in here:
            self.point(x if x.ndim == 1 else x[j])
            self.statistics.point(j)
            with self._seeded(j):
                value = self.loss(self.model, batches[j])
                if not isinstance(value, torch.Tensor) or value.numel() != 1:
                    found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                    raise InputError(f"loss(model, batch): found {found}; expected a scalar tensor, the batch's mean")
                slopes = torch.autograd.grad(value, self.parameters, allow_unused=True) if value.requires_grad else []
            if all(slope is None for slope in slopes):
                raise InputError("loss(model, batch): the result depends on no parameter of the model that is trained")
            values.append(value.detach().reshape(()))
            self._copy(self._views(rows)[j], slopes)
        return torch.stack(values) if values else x.new_zeros(0)

    def _all_at_once(self, x, rows, here: list[int], batches: list[Any]) -> Any:
        """The same, by one vmap; None where the model or the batches do not allow it, the first time and from then
        on: also where the first worker's gradient is not what it is by itself."""
        every = len(here) == len(batches)
        try:
            batch = tree_map(lambda *parts: torch.stack(parts), *(batches[j] for j in here))
            points = self._split(x if x.ndim == 1 or every else x[here])
            slopes, values = torch.func.vmap(torch.func.grad_and_value(self._pure), (None if x.ndim == 1 else 0, 0))(
                points, batch)
        except Exception:       # whatever is really wrong, the workers one by one will say
            self._together = False
            return None
        if every:
            torch._foreach_copy_(self._split(rows), slopes)
        else:
            for place, j in enumerate(here):
                self._copy(self._views(rows)[j], [slope[place] for slope in slopes])
        if not self._tried:
            first = rows[here[0]].clone()
            self._one_by_one(x, rows, here[:1], batches)
            self._tried = self._together = torch.allclose(first, rows[here[0]], 1e-2, 1e-3 * float(first.abs().max()),
                                                          equal_nan=True)
            rows[here[0]].copy_(first)
        return values.detach() if self._together else None

    def _pure(self, parameters: list[Any], batch) -> Any:
        """The caller's loss as a function of the parameters. (functional_call does not put back what it finds in a
        module that has two names.)"""
        try:
            self._put(parameters)
            return self.loss(self.model, batch)
        finally:
            self._put(self.parameters)

    def _put(self, parameters: list[Any]) -> None:
        """The model computes with these tensors."""
        for p, places in zip(parameters, self._places, strict=True):
            for owner, name in places:
                owner[name] = p

    def _views(self, rows) -> list[list[Any]]:
        """rows (w, d), row by row as the parameters have it."""
        if self._rows[0] != rows.data_ptr():
            self._rows = rows.data_ptr(), [self._split(row) for row in rows]
        return self._rows[1]

    @staticmethod
    def _copy(views: list[Any], slopes: Sequence[Any]) -> None:
        """The one copy of a gradient. A parameter that the loss did not use has the gradient 0."""
        used = [(view, slope) for view, slope in zip(views, slopes, strict=True) if slope is not None]
        if len(used) < len(views):
            for view, slope in zip(views, slopes, strict=True):
                if slope is None:
                    view.zero_()
        torch._foreach_copy_([view for view, _ in used], [
            slope.to_dense() if slope.layout != torch.strided else slope for _, slope in used])

    def _split(self, flat) -> list[Any]:
        """(…, d) → its parts (…, *shape), views, one for each parameter."""
        return [part.view(*flat.shape[:-1], *shape)
                for part, shape in zip(flat.split(self._sizes, -1), self._shapes, strict=True)]

    @contextmanager
    def _seeded(self, j: int) -> Iterator[None]:
        """What torch draws in this block is a function of (seed, worker, round, call); then it goes on as before."""
        key = hashlib.blake2b(struct.pack("<5Q", self._seed, int(self.ids[j]), *self.call), digest_size=8).digest()
        before = [generator.get_state() for generator in self._random]
        for generator in self._random:
            generator.manual_seed(int.from_bytes(key, "little"))
        try:
            yield
        finally:
            for generator, state in zip(self._random, before, strict=True):
                generator.set_state(state)


class Statistics:
    """The running means and variances of a model's BatchNorms: a vector for each of this rank's w workers, all equal at
    the beginning of a round.

    s           statistics, what is common, this rank's columns of it, and what rules remember of it; batches_i
                (w, layers) int64, how many batches it is of
    server      theirs; None: there are none"""

    def __init__(self, model: Any, ids: np.ndarray, device: Device, comm: Comm, n: int, rules: Sequence[Any], f: int,
                 at: str, seed: int, dtype: np.dtype):
        layers = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), torch.Tensor)]
        self._buffers = [t for m in layers for t in (m.running_mean, m.running_var)]
        self._counters = [m.num_batches_tracked for m in layers]
        self.s, self.server, self._comm, self._at = SimpleNamespace(), None, comm, -1
        if not layers:
            return
        whole = torch.cat([t.reshape(-1) for t in self._buffers]).cpu().numpy()
        self.server = Server(comm, len(whole), n, len(ids), device, dtype.name, at, means_only=not rules)
        self._aggregate = Aggregation(self.server, rules, f, seed=seed)
        self.s.statistics = device.put(whole[self.server.own].astype(dtype))
        self.s.batches_i = device.put(np.tile(np.array([int(t) for t in self._counters]), (len(ids), 1)))
        self._remembered = SimpleNamespace(x=self.s.statistics)
        self._aggregate.init(self._remembered)
        for name, array in vars(self._remembered).items():
            if name != "x":
                setattr(self.s, f"statistics_{name}", array)
        self._own_i = device.xp.empty((len(ids), len(whole)), dtype)
        own_i, batches_i = tensor(self._own_i).split([t.numel() for t in self._buffers], 1), tensor(self.s.batches_i)
        self._views = [[*(part[j].view(t.shape) for part, t in zip(own_i, self._buffers, strict=True)), *batches_i[j]]
                       for j in range(len(ids))]
        self.take()

    def has(self, buffer: Any) -> bool:
        """Whether this is one of theirs."""
        return any(buffer is own for own in (*self._buffers, *self._counters))

    def point(self, j: int) -> None:
        """The model's buffers are those of the j-th worker here from now on."""
        if self.server and j != self._at:
            for buffer, view in zip((*self._buffers, *self._counters), self._views[j], strict=True):
                buffer.data = view
            self._at = j

    def take(self) -> None:
        """Everybody's are the common ones."""
        if self.server:
            self._whole = self.server.join(self.s.statistics)
            self._before = self.s.batches_i.copy()
            self.forget()

    def forget(self) -> None:
        """Everybody's are what they were at the beginning of the round."""
        if self.server:
            self._own_i[:], self.s.batches_i[:] = self._whole, self._before
            self.point(0)

    def average(self, round: int) -> None:
        """What the workers' have changed by in this round is aggregated: the common ones change by that."""
        if self.server:
            self._aggregate.begin(round)
            self._own_i -= self._whole
            self.s.statistics += self._aggregate(self._own_i)
            counts = self._comm.all(host(self.s.batches_i).max(0))      # of workers without a batch it is lower
            self.s.batches_i[:] = self.server.device.put(np.max(counts, 0))
            self.take()


def trained(model: Any) -> dict[str, Any]:
    """The model's parameters by name, without those that are frozen. InputError where they do not make one vector."""
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"model: found {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise InputError("model: found a DistributedDataParallel; expected the model in it (.module)")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise InputError("model: it has no parameters to train; expected some with requires_grad")
    statistics = {f"{name}.{kind}": getattr(m, kind) for name, m in model.named_modules()
                  for kind in ("running_mean", "running_var") if isinstance(getattr(m, kind, None), torch.Tensor)}
    known, like = next(iter(parameters.items()))
    for name, p in (parameters | statistics).items():
        if torch.nn.parameter.is_lazy(p):
            raise InputError(f"model: '{name}' has no shape yet; call the model once, on a batch")
        if p.dtype not in (torch.float32, torch.float64) or p.device.type not in ("cpu", "cuda"):
            raise InputError(f"model: '{name}' is {p.dtype} on {p.device}; expected float32 or float64 on cpu or cuda")
        if (p.dtype, p.device) != (like.dtype, like.device):
            raise InputError(f"model: '{name}' is {p.dtype} on {p.device}, but '{known}' is {like.dtype} on "
                             f"{like.device}; expected one dtype and one device")
    return parameters


def on_gpu(where: Any) -> Device:
    """The GPU that torch calls so, for CuPy. InputError where CuPy sees none."""
    select("cuda")
    return Device("cuda", where.index)


def tensor(array: Any) -> Any:
    """The same memory as a torch tensor."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.from_dlpack(array)


def brief(value: Any) -> str:
    """A value in few words."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
