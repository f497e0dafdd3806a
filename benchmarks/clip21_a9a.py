"""How many rounds of Clip21 a second on a9a with 20 workers, full batch, against a plain Python loop over the workers
that calls scipy.sparse products? One process, then two ranks; one thread each.

    python benchmarks/clip21_a9a.py a9a.h5                       # mpiclip against the loop, in turn
    mpirun -n 2 python benchmarks/clip21_a9a.py a9a.h5           # the same rounds on two ranks"""

import json
import sys
from statistics import median
from time import perf_counter

import numpy as np

from mpiclip import config
from mpiclip.comm import world
from mpiclip.data import read_train
from mpiclip.train import Training

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
        "run": {"workers": N, "rounds": 0, "dtype": dtype, "threads": 1}}), comm, None)

    def rounds():
        for _ in range(ROUNDS):
            training.workers.begin(training.workers.round + 1)
            training._round(training._whole_x())
        return training._whole_x()
    return rounds


def main():
    comm, results = world(), []
    for dtype in ("float64", "float32"):
        rounds, loop = ours(sys.argv[1], dtype, comm), the_loop(sys.argv[1], dtype)
        times: dict[str, list[float]] = {"mpiclip": [], "loop": []}
        for _ in range(7):
            comm.barrier()
            start = perf_counter()
            x = rounds()
            times["mpiclip"].append((perf_counter() - start) / ROUNDS)
            if comm.size == 1:
                start = perf_counter()
                for _ in range(ROUNDS):
                    reference = next(loop)
                times["loop"].append((perf_counter() - start) / ROUNDS)
                np.testing.assert_allclose(x, reference, rtol=1e-8 if dtype == "float64" else 1e-3, atol=1e-6)
        line = {"dtype": dtype, "ranks": comm.size, "mpiclip_ms": 1e3 * median(times["mpiclip"])}
        if comm.size == 1:
            line |= {"loop_ms": 1e3 * median(times["loop"]),
                     "ratio": median(b / a for a, b in zip(times["mpiclip"], times["loop"], strict=True))}
        results.append(line)
    if comm.rank == 0:
        print("\n".join(map(json.dumps, results)))


main()
