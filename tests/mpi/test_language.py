"""A language model is the same on any number of ranks, whatever is dropped, and goes on where it was interrupted."""

from itertools import product

import numpy as np
import pytest

import mpiclip
from mpiclip.comm import Comm
from mpiclip.importers import import_file

WORDS = ["the", "one", "a", "no"], ["cat", "dog", "sun"], ["ran", "sat", "fell"]
LINES = list(map(" ".join, product(*WORDS)))


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory):
    """A folder, the same on all ranks, with a text: 144 words and line ends, and 48 of a test."""
    path = ranks.same(tmp_path_factory.mktemp("text") if ranks.rank == 0 else None)
    if ranks.rank == 0:
        (path / "train.txt").write_text("\n".join(LINES))
        (path / "test.txt").write_text("\n".join(LINES[::3]))
        import_file([str(path / "train.txt")], path / "text.h5", test=[str(path / "test.txt")])
    ranks.barrier()
    return path


def job(folder, rounds, split="rotate", **run):
    return {"data": {"file": str(folder / "text.h5"), "split": split},
            "problem": {"name": "lstm", "layers": 2, "hidden": 6, "sequence": 3, "dropout": 0.2, "dropout_hidden": 0.2,
                        "weight_drop": 0.3, "dropout_embedding": 0.1},
            "method": {"name": "celgc", "eta": 2.0, "gamma": 1.0, "interval": 2},
            "run": {"workers": 4, "rounds": rounds, "batch": 2, "seed": 3, "dtype": "float64", **run}}


@pytest.mark.parametrize("split, participation", [("rotate", None), ("contiguous", 3)])
def test_trajectories(ranks, folder, split, participation):
    """6 rounds of 2 minibatches: streams of 18 tokens have 5 of them a pass."""
    told = {} if participation is None else {"participation": participation}
    run = mpiclip.train(job(folder, 6, split, **told), ranks)
    alone = mpiclip.train(job(folder, 6, split, **told), Comm()) if ranks.rank == 0 else None
    x, metrics = ranks.same(None if alone is None else (alone.x, alone.metrics))
    np.testing.assert_allclose(run.x, x, rtol=1e-9, atol=1e-12)
    for metric in ("loss", "perplexity"):
        np.testing.assert_allclose(run.metrics[metric], metrics[metric], rtol=1e-10)
    assert run.metrics["perplexity"][-1] < run.metrics["perplexity"][0]


def test_resume(ranks, folder):
    whole = mpiclip.train(job(folder, 7, participation=3), ranks)
    out = folder / f"run{ranks.size}"
    mpiclip.train(job(folder, 4, participation=3), ranks, out)
    resumed = mpiclip.resume(out, ["run.rounds=7"], ranks)
    assert resumed.x.tobytes() == whole.x.tobytes()
    for metric in ("loss", "perplexity"):
        np.testing.assert_array_equal(resumed.metrics[metric], whole.metrics[metric])
