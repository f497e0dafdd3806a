"""How many rounds of Clip21 a second on a9a with 20 workers, full batch, against a plain Python loop over the workers
that calls scipy.sparse products? And how many more on several ranks than on one? In turn, medians of ratios.

    mpirun -n 2 python benchmarks/clip21_a9a.py a9a.h5 [THREADS]"""

import json
import sys
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np

from mpiclip import config
from mpiclip.comm import Comm, world
from mpiclip.data import read_train
from mpiclip.training import Training

THREADS = int(sys.argv[2]) if len(sys.argv) > 2 else 1          # of each rank
N, TAU, STEPSIZE, LAM, ROUNDS = 20, 0.1, 0.5, 0.1, 200


def the_loop(file: str, dtype: str):
    """Rounds of Clip21 as a researcher writes them: a generator of x."""
    from scipy.sparse import csr_array
    shard = read_train(file, "contiguous", N, np.arange(N), 0, dtype)
    A = csr_array((shard.x.data, shard.x.indices, shard.x.indptr), shape=shard.x.shape)
    b = np.where(shard.y == shard.classes[0], -1, 1).astype(dtype)
    parts = [(A[i:j], A[i:j].T.tocsr(), b[i:j]) for i, j in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)]
    x, v = np.zeros(A.shape[1], dtype), np.zeros(A.shape[1], dtype)
    v_i = [np.zeros_like(x) for _ in parts]
    while True:
        total = np.zeros_like(x)
        for i, (A_i, At_i, b_i) in enumerate(parts):
            coefficient = -b_i / (1 + np.exp(b_i * (A_i @ x))) / len(b_i)
            g = At_i @ coefficient + LAM * 2 * x / (1 + x * x) ** 2
            c = g - v_i[i]
            norm = np.linalg.norm(c)
            if norm > TAU:
                c *= TAU / norm
            v_i[i] += c
            total += c
        v += total / N
        x = x - STEPSIZE * v
        yield x


def ours(file: str, dtype: str, comm):
    """The same rounds, by mpiclip: a function that does ROUNDS of them."""
    training = Training(config.load({
        "data": {"file": file, "split": "contiguous"},
        "problem": {"name": "logistic", "regularizer": "nonconvex", "lam": LAM},
        "method": {"name": "clip21", "tau": TAU, "stepsize": STEPSIZE},
        "run": {"workers": N, "rounds": 0, "dtype": dtype, "threads": THREADS}}), comm, None)

    def rounds():
        for _ in range(ROUNDS):
            training.workers.begin(training.workers.round + 1)
            training._round(training._whole_x())
        return training._whole_x()
    return rounds


def last_of(rounds):
    """The next ROUNDS rounds of the loop; the last x."""
    for _ in range(ROUNDS):
        x = next(rounds)
    return x


def timed(call) -> tuple[float, np.ndarray]:
    """Milliseconds a round, and the model."""
    start = perf_counter()
    x = call()
    return 1e3 * (perf_counter() - start) / ROUNDS, x.copy()


def main():
    comm = world()
    for dtype in ("float64", "float32"):
        together = ours(sys.argv[1], dtype, comm)
        if comm.rank == 0:                      # the other ranks wait meanwhile
            alone, loop = ours(sys.argv[1], dtype, Comm()), partial(last_of, the_loop(sys.argv[1], dtype))
        times: dict[str, list[float]] = {"loop": [], "one rank": [], f"{comm.size} ranks": []}
        for _ in range(9):
            comm.barrier()
            if comm.rank == 0:
                spent, reference = timed(loop)
                times["loop"].append(spent)
                spent, x = timed(alone)
                times["one rank"].append(spent)
                np.testing.assert_allclose(x, reference, rtol=1e-8 if dtype == "float64" else 1e-3, atol=1e-6)
            comm.barrier()
            spent, x = timed(together)
            times[f"{comm.size} ranks"].append(spent)
        if comm.rank == 0:
            one = times["one rank"]
            print(json.dumps({
                "dtype": dtype, "threads": THREADS,
                "ms": {name: round(median(spent), 3) for name, spent in times.items()},
                "loop / one rank": round(median(a / b for a, b in zip(times["loop"], one, strict=True)), 2),
                f"one rank / {comm.size} ranks": round(median(
                    a / b for a, b in zip(one, times[f"{comm.size} ranks"], strict=True)), 2)}), flush=True)


main()
