"""Which rows belong to which worker. Every split is a function of (labels, n, seed) alone, so that each rank computes
all of it and all ranks agree; every worker gets at least one row, and a worker's rows ascend.

iid               a random permutation in equal parts
contiguous        the rows in file order in equal parts
label             sorted by label (stable), in equal parts: the "extreme" heterogeneity
similarity        a fraction s of the rows as iid, the others as label; s = 1 is iid, s = 0 is label
dirichlet         per class, the workers' shares ~ Dir(α·1_n); a partition of the rows, into unequal parts
dirichlet_worker  per worker, the classes' shares ~ Dir(α·1_C) of N//n rows; different workers may have rows in common

Equal means up to one row. dirichlet and similarity are the ByzFL library's "dirichlet_niid" and "gamma_similarity_niid"
(label: its γ = 0); dirichlet_worker is the convention of the code of Allouah et al. (2023), "Fixing by mixing",
arXiv:2302.01772.

The stream of a text is cut into n blocks of equal length (up to n − 1 tokens at its end are left over), block i for
worker i:

rotate, contiguous   the stream as it is; with rotate the blocks go round from worker to worker, a pass each
iid                  its parts (articles, speakers' turns …) in random order
label                its parts sorted by label (stable)
similarity           of each worker's tokens a fraction s as iid; the rest as label, from what then remains
"""

import itertools
from collections.abc import Callable

import numpy as np

from mpiclip.errors import InputError
from mpiclip.streams import stream

Parts = list[np.ndarray]
Pieces = tuple[np.ndarray, np.ndarray]


def split(name: str, labels, n: int, seed: int, alpha: float | None = None, similarity: float | None = None) -> Parts:
    """The rows of each of the n workers, from the labels (N,) of all N >= n rows: n ascending int64 arrays.

    `alpha` > 0 is α of the Dirichlet splits, `similarity` in [0, 1] is s. InputError names the config key."""
    if name not in SPLITS:
        raise InputError(f"data.split: found {name!r}, for rows expected one of {', '.join(SPLITS)}")
    if name in BY_CLASS and (alpha is None or not 0 < alpha < np.inf):
        raise InputError(f"data.alpha: found {alpha}, expected a positive number for split = {name!r}")
    if name == "similarity" and (similarity is None or not 0 <= similarity <= 1):
        raise InputError(f"data.similarity: found {similarity}, expected a number from 0 to 1 for split = {name!r}")
    if n > len(labels):
        raise InputError(f"run.workers: found {n} workers for {len(labels)} rows, expected at least one row per worker")
    parts = SPLITS[name](np.asarray(labels), n, seed, similarity if name == "similarity" else alpha)
    return [np.sort(rows).astype(np.int64, copy=False) for rows in parts]


def pieces(name: str, starts, labels, n: int, seed: int, similarity: float | None = None) -> list[Pieces]:
    """What the streams of n workers consist of: (starts (k,), lengths (k,)) int64 of pieces of a text, in the order in
    which they are read. Part p of the text is tokens starts[p]:starts[p+1], and has the label labels[p]."""
    if name not in OF_TEXT:
        raise InputError(f"data.split: found {name!r}, for a text expected one of {', '.join(OF_TEXT)}")
    total, count = int(starts[-1]), len(labels)
    if name in ("rotate", "contiguous"):
        return _streams((np.zeros(1, np.int64), np.full(1, total)), np.arange(n + 1) * (total // n))
    if count < n:
        raise InputError(f"data.split: found {name!r} for a text of {count} parts and {n} workers, expected at least "
                         "one part per worker, or split = 'contiguous'")
    shared = {"iid": 1.0, "label": 0.0, "similarity": similarity}[name]
    if shared is None or not 0 <= shared <= 1:
        raise InputError(f"data.similarity: found {similarity}, expected a number from 0 to 1 for split = {name!r}")
    order = stream(seed, "split").permutation(count)
    shuffled, own = (starts[:-1][order], np.diff(starts)[order]), round(shared * (total // n))
    [(rest, lengths)] = _streams(shuffled, [n * own, total])
    by_label = np.lexsort((rest, labels[np.searchsorted(starts, rest, side="right") - 1]))
    pools = zip(_streams(shuffled, np.arange(n + 1) * own),
                _streams((rest[by_label], lengths[by_label]), np.arange(n + 1) * (total // n - own)), strict=True)
    return [(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])) for a, b in pools]


def iid(labels, n, seed, _=None) -> Parts:
    return np.array_split(stream(seed, "split").permutation(len(labels)), n)


def contiguous(labels, n, seed, _=None) -> Parts:
    return np.array_split(np.arange(len(labels)), n)


def label(labels, n, seed, _=None) -> Parts:
    return np.array_split(np.argsort(labels, kind="stable"), n)


def similarity(labels, n, seed, s) -> Parts:
    rows = stream(seed, "split").permutation(len(labels))
    k = round(s * len(rows))
    rest = np.sort(rows[k:])
    rest = rest[np.argsort(labels[rest], kind="stable")]
    shared = _equal(k, n)
    pools = zip(_cut(rows[:k], shared), _cut(rest, _equal(len(rows), n) - shared), strict=True)
    return [np.concatenate(pair) for pair in pools]


def dirichlet(labels, n, seed, alpha) -> Parts:
    """A worker that the draw leaves without rows (small α, few classes) takes one at random from the largest worker."""
    random = stream(seed, "split")
    slices = []
    for rows in _classes(labels):
        ends = np.cumsum(random.dirichlet(np.full(n, alpha)))[:-1]
        slices.append(np.split(random.permutation(rows), (ends * len(rows)).astype(int)))
    parts = [np.concatenate(worker) for worker in zip(*slices, strict=True)]
    for i in range(n):
        if not len(parts[i]):
            largest = max(range(n), key=lambda j: len(parts[j]))
            k = random.integers(len(parts[largest]))
            parts[i], parts[largest] = parts[largest][[k]], np.delete(parts[largest], k)
    return parts


def dirichlet_worker(labels, n, seed, alpha) -> Parts:
    """Counts are rounded down and at most the class's size, but the largest share gives at least one row."""
    classes = _classes(labels)
    parts = []
    for i in range(n):
        random = stream(seed, "split", worker=i)
        share = random.dirichlet(np.full(len(classes), alpha))
        counts = (share * (len(labels) // n)).astype(int)
        counts[np.argmax(share)] = max(1, counts[np.argmax(share)])
        drawn = [
            random.choice(rows, min(count, len(rows)), replace=False)
            for rows, count in zip(classes, counts, strict=True)
        ]
        parts.append(np.concatenate(drawn))
    return parts


SPLITS: dict[str, Callable[..., Parts]] = {
    "iid": iid,
    "contiguous": contiguous,
    "label": label,
    "dirichlet": dirichlet,
    "dirichlet_worker": dirichlet_worker,
    "similarity": similarity,
}
BY_CLASS = ("dirichlet", "dirichlet_worker")
OF_TEXT = ("rotate", "contiguous", "iid", "label", "similarity")


def _classes(labels) -> Parts:
    """The rows of each class, in the order of the labels."""
    _, counts = np.unique(labels, return_counts=True)
    return _cut(np.argsort(labels, kind="stable"), counts)


def _equal(rows: int, n: int) -> np.ndarray:
    """The sizes of numpy.array_split's n parts."""
    return rows // n + (np.arange(n) < rows % n)


def _cut(rows, sizes) -> Parts:
    return np.split(rows, np.cumsum(sizes)[:-1])


def _streams(pieces: Pieces, bounds) -> list[Pieces]:
    """A stream that consists of these pieces, cut into tokens bounds[0]:bounds[1], bounds[1]:bounds[2] …"""
    starts, lengths = pieces
    ends = np.cumsum(lengths)
    begins, cut = ends - lengths, []
    for low, high in itertools.pairwise(bounds):
        own = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(begins, high))
        skipped = np.maximum(low - begins[own], 0)
        cut.append((starts[own] + skipped, np.minimum(high, ends[own]) - begins[own] - skipped))
    return cut
