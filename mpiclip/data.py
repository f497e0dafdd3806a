"""Data sets: one HDF5 file, of which each rank reads the rows, or the text, of its own workers.

    attributes    format, version (2: images, 3: text; else 1), package (that wrote it), sources, digest (SHA-256 of all
                  numbers); of rows: features, rows; of text: level (word or char)
    classes       (C,) the distinct labels; absent if they are not integers or more than 1000
    train, test   groups (test may be absent), each with
        y         (N,) float64, labels as found
        x         (N, p) float32 or float64: a dense set; or (N, p) uint8: images, whose pixels count as v/255, with
                  the attribute image = (height, width) or (channels, height, width), of the product p; or as CSR,
                  attribute shape = (N, p):
        indptr    (N+1,) int64;  indices (nnz,) int32;  data (nnz,) float32 or float64

of a text:
    vocabulary    (V,) strings
    train, test   groups (test may be absent), each with
        tokens    (T,) uint8, uint16 or int32, numbers of words or characters of the vocabulary
    and train, with the attribute kind (articles, turns, paragraphs or lines), its parts:
        parts     (P+1,) int64: part k is tokens[parts[k]:parts[k+1]]
        label     (P,) int32: whose it is, one of names (L,), strings
    and test, with the attribute unknown: how many of its tokens stand for words that are not in the vocabulary

All arrays are contiguous, so that a slice of rows is a slice of the file. Files are opened without HDF5 locks, which
shared file systems often lack; nothing writes to a data file once it has its name.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import h5py
import numpy as np

from mpiclip import splits
from mpiclip.errors import InputError
from mpiclip.version import __version__

FORMAT, VERSIONS = "mpiclip data", (1, 2, 3)
BLOCK = 1 << 21  # numbers held beside a rank's own while reading or writing: 16 MiB of float64
MOST_CLASSES = 1000
TEST_STREAMS, TEST_STREAM = 16, 1000  # most streams, of how many tokens at least, that a test text is read as


@dataclass(frozen=True)
class Csr:
    """A sparse matrix (m, p): row k has data[a:b] in the columns indices[a:b], a, b = indptr[k], indptr[k+1]."""

    indptr: np.ndarray  # (m+1,) int64
    indices: np.ndarray  # (nnz,) int32
    data: np.ndarray  # (nnz,)
    shape: tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a data set, worker after worker; a worker's rows ascend in the file."""

    x: np.ndarray | Csr  # (m, p)
    y: np.ndarray  # (m,) float64, labels as in the file
    offsets: np.ndarray  # (w+1,) int64: worker i's rows are offsets[i]:offsets[i+1]
    ids: np.ndarray  # (w,) int64, the workers' global numbers
    n: int  # workers in all
    total: int  # rows in all, over all workers
    classes: np.ndarray | None  # (C,) distinct labels of the whole set, sorted, if integers and at most 1000
    features: int  # p
    image: tuple[int, ...] | None = None  # a row's shape, of the product p, where rows are images


@dataclass(frozen=True)
class Text:
    """This rank's part of a text: its workers' streams of tokens, one after the other. All n streams are equally long.

    Where `blocks` is given, `tokens` are those of the whole text, block i being tokens[blocks[i]:blocks[i+1]]: in its
    e-th pass (from 0) worker i reads block (i + e) mod n. A test text's streams count as workers."""

    tokens: np.ndarray  # (m,) int32, numbers of words or characters of the vocabulary
    offsets: np.ndarray  # (w+1,) int64: worker i's stream, the first one if they go round, is offsets[i]:offsets[i+1]
    ids: np.ndarray  # (w,) int64, the workers' global numbers
    n: int  # workers in all
    total: int  # tokens in all, over all workers
    vocabulary: tuple[str, ...]
    level: str  # word or char
    blocks: np.ndarray | None = None  # (n+1,) int64


def read_train(file, split, workers, ids, seed, dtype, alpha=None, similarity=None, standard=None) -> Shard | Text:
    """The training rows of the workers `ids` out of n = `workers`, split over them as `splits.split` says; or their
    streams of a text, as `splits.pieces` says.

    Holds only these rows, and the labels of all; of a text whose blocks go round, all of it, and then `ids` are
    consecutive. A worker number of n or more (one that only attacks) has no rows.
    `standard`: what `moments` found, of which the features then get the mean 0 and the standard deviation 1.
    InputError: no usable file, more workers than rows, a number that is not finite in `dtype`, labels unfit for the
    split."""
    with _open(file) as f:
        if "level" in f.attrs:
            return _read_text(file, f, split, workers, np.array(ids, np.int64), seed, similarity)
        labels = _read_labels(file, f["train"])
        classes = _classes(f)
        if workers > len(labels):
            raise InputError(f"{file}: {len(labels)} rows for {workers} workers, expected at least one row per worker")
        if split in splits.BY_CLASS and classes is None:
            raise InputError(
                f"{file}: split = {split!r} needs class labels, expected integers, at most {MOST_CLASSES} distinct ones"
            )
        parts = splits.split(split, labels, workers, seed, alpha, similarity)
        own = [parts[i] if i < workers else np.empty(0, np.int64) for i in ids]
        rows = np.concatenate([np.empty(0, np.int64), *own])
        x = _read_rows(file, f["train"], rows, dtype, standard)
        return Shard(
            x=x,
            y=labels[rows],
            offsets=np.cumsum([0, *map(len, own)], dtype=np.int64),
            ids=np.array(ids, np.int64),
            n=workers,
            total=sum(map(len, parts)),
            classes=classes,
            features=x.shape[1],
            image=_image(f["train"]),
        )


def read_test(file, part: int, parts: int, dtype, standard=None) -> Shard | Text | None:
    """The part-th of `parts` equal slices of the test rows, as one worker's; None if the file has no test rows. A test
    text is cut into streams in the same way for any `parts`; the slice is a share of these, which may be none of them.
    `standard` as in `read_train`: the training rows' moments."""
    with _open(file) as f:
        if "test" not in f:
            return None
        if "level" in f.attrs:
            count = len(f["test/tokens"])
            n = max(1, min(TEST_STREAMS, count // TEST_STREAM))
            pieces = splits.pieces("contiguous", [0, count], [0], n, 0)
            return _text(f, "test", pieces, np.array_split(np.arange(n), parts)[part], count // n)
        labels = _read_labels(file, f["test"])
        rows = np.array_split(np.arange(len(labels)), parts)[part]
        x = _read_rows(file, f["test"], rows, dtype, standard)
        return Shard(
            x=x,
            y=labels[rows],
            offsets=np.array([0, len(rows)]),
            ids=np.array([part]),
            n=parts,
            total=len(labels),
            classes=_classes(f),
            features=x.shape[1],
            image=_image(f["test"]),
        )


def moments(file) -> tuple[np.ndarray, np.ndarray]:
    """(mean (p,), standard deviation (p,)) of the features, over all training rows: one of each feature, or one of all
    pixels of a channel of images. A constant feature has the standard deviation 1. InputError for sparse rows."""
    with _open(file) as f:
        group = f["train"]
        if "level" in f.attrs:
            raise InputError(f"{file}: is a text, which has no features; expected data.standardize = false")
        if "x" not in group:
            raise InputError(f"{file}: the features are sparse; data.standardize = true expected dense ones, since "
                             "sparse ones would no longer be so")
        rows, p = _shape(group)
        image = _image(group)
        channels = p if image is None else image[0] if len(image) == 3 else 1
        count, mean, squares = 0, np.zeros(channels), np.zeros(channels)
        low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
        step = max(1, BLOCK // p)
        for start in range(0, rows, step):
            x = np.asarray(_read_rows(file, group, np.arange(start, min(start + step, rows)), np.float64))
            x = x.reshape(len(x), channels, -1)
            size, own = len(x) * x.shape[2], x.mean((0, 2))
            low, high = np.minimum(low, x.min((0, 2))), np.maximum(high, x.max((0, 2)))
            with np.errstate(over="ignore", invalid="ignore"):
                squares += np.square(x - own[:, None]).sum((0, 2)) + (own - mean) ** 2 * (count * size / (count + size))
            mean += (own - mean) * (size / (count + size))
            count += size
        deviation = np.where(low < high, np.sqrt(squares / count), 1)
        if not ((deviation > 0) & (deviation < np.inf)).all():
            raise InputError(f"{file}: the squares of a feature are too large or too small for float64; "
                             "data.standardize = true expected features nearer to 1")
        return np.repeat(np.where(low < high, mean, low), p // channels), np.repeat(deviation, p // channels)


def fingerprint(file) -> str:
    """16 hexadecimal digits that change with the data: what the import digested, and the shapes and labels of now."""
    digest = hashlib.sha256()
    with _open(file) as f:
        digest.update(f.attrs["digest"].encode())
        for name in _parts(f):
            if "level" in f.attrs:
                digest.update(f"{name} {f[name]['tokens'].shape}".encode())
            else:
                digest.update(f"{name} {_shape(f[name])}".encode())
                digest.update(f[name]["y"][:].data)
    return digest.hexdigest()[:16]


def info(file) -> str:
    """What is in a data file, for people: a few lines of text."""
    with _open(file) as f:
        lines = [f"{file}: from {', '.join(f.attrs['sources'])}, written by mpiclip {f.attrs['package']}"]
        if "level" in f.attrs:
            return "\n".join([*lines, *_describe_text(f)])
        for name in _parts(f):
            group, (rows, features) = f[name], _shape(f[name])
            values = group["x"] if "x" in group else group["data"]
            kind = "dense" if "x" in group else f"sparse, {values.size} non-zeros ({values.size / rows / features:.2%})"
            if "image" in group.attrs:
                kind = f"images of {' × '.join(map(str, group.attrs['image']))}, scaled to [0, 1] when read"
            lines.append(f"{name:5}  {rows} rows, {features} features, {values.dtype}, {kind}")
            lines.append(f"       {_describe(group['y'][:])}")
    return "\n".join(lines)


def check_destination(dest) -> None:
    """InputError if `dest` cannot be created, or exists and is not a data file that a new import may replace."""
    folder = os.path.dirname(os.path.abspath(dest))
    if not os.path.isdir(folder):
        raise InputError(f"{dest}: no folder {folder} to write to")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{dest}: the folder {folder} is not writable")
    if os.path.lexists(dest):
        try:
            with _open(dest):
                pass
        except InputError:
            raise InputError(f"{dest}: exists and is not an mpiclip data file, so it is not overwritten") from None


def write(dest, sources, train, test=None, image=None) -> None:
    """Write a data file under a temporary name, then rename it: a reader finds the old file or the new one, never half.

    `train` and `test` are (x, y): x an array (N, p), stored dense, or a SciPy CSR matrix, stored dense, too, if at
    least half of the training set's numbers are there; y (N,) float64. x is stored as float32 if that is exact. Where
    `image` is the shape of a row, x is uint8 and is stored so; a reader gets numbers from 0 to 1."""
    x, _ = train
    dense = isinstance(x, np.ndarray) or 2 * x.nnz >= x.shape[0] * x.shape[1]
    parts = {"train": train} if test is None else {"train": train, "test": test}
    classes = np.unique(np.concatenate([y for _, y in parts.values()]))
    with _new(dest, 1 if image is None else 2, sources) as (f, digest):
        for name, (x, y) in parts.items():
            group = f.create_group(name)
            group["y"] = y
            digest.update(y.data)
            if image is not None:
                group.attrs["image"] = image
            (_write_dense if dense else _write_csr)(group, x, digest)
        if len(classes) <= MOST_CLASSES and np.array_equal(classes, np.round(classes)):
            f["classes"] = classes
        f.attrs.update(features=x.shape[1], rows=len(train[1]))


def write_text(dest, sources, level, vocabulary, train, parts, test=None) -> None:
    """Write a data file of a text, as `write` does: the words or characters of its `vocabulary`, the tokens of the
    training text and its text.Parts, and (tokens, unknown) of a test text."""
    with _new(dest, 3, sources) as (f, digest):
        group, strings = f.create_group("train"), h5py.string_dtype()
        f.attrs["level"], group.attrs["kind"] = level, parts.kind
        arrays = {"tokens": train, "parts": parts.starts, "label": parts.labels}
        for name, array in arrays.items():
            group[name] = array
            digest.update(array.data)
        group.create_dataset("names", data=parts.names, dtype=strings)
        f.create_dataset("vocabulary", data=vocabulary, dtype=strings)
        digest.update("\0".join(vocabulary).encode())
        if test is not None:
            f["test/tokens"], f["test"].attrs["unknown"] = test
            digest.update(test[0].data)


def nonfinite(x) -> tuple[int, int, np.floating] | None:
    """Row, column and value of the first NaN or infinity in a dense or CSR matrix; None if there is none."""
    values = x.reshape(-1) if isinstance(x, np.ndarray) else x.data
    for start in range(0, len(values), BLOCK):
        finite = np.isfinite(values[start : start + BLOCK])
        if not finite.all():
            k = start + int(np.argmin(finite))
            if isinstance(x, np.ndarray):
                return *divmod(k, x.shape[1]), values[k]
            return int(np.searchsorted(x.indptr, k, side="right")) - 1, int(x.indices[k]), values[k]
    return None


# Reading --------------------------------------------------------------------------------------------------------------


@contextmanager
def _open(file):
    """The file, read-only; whatever HDF5 finds wrong with it, then or later, ends in one line."""
    try:
        with h5py.File(file, "r", locking=False) as f:
            if f.attrs.get("format") != FORMAT:
                raise InputError(f"{file}: not a data file of mpiclip; make one: mpiclip data import SOURCE DEST.h5")
            if f.attrs["version"] not in VERSIONS:
                known = " or ".join(map(str, VERSIONS))
                raise InputError(f"{file}: layout version {f.attrs['version']}, expected {known}; import it again")
            yield f
    except (OSError, KeyError, RuntimeError) as error:
        if getattr(error, "errno", None):
            raise InputError(f"{file}: {_reason(error)}") from None
        if not h5py.is_hdf5(file):
            raise InputError(f"{file}: not an HDF5 file; make one: mpiclip data import {file} DEST.h5") from None
        raise InputError(f"{file}: truncated or damaged: {_reason(error)}") from None


def _read_text(file, f, split, workers, ids, seed, similarity) -> Text:
    group = f["train"]
    count, starts, labels = len(group["tokens"]), group["parts"][:], group["label"][:]
    if len(labels) != len(starts) - 1 or starts[0] != 0 or starts[-1] != count or np.any(np.diff(starts) <= 0):
        raise OSError("/train/parts makes no sense")
    if count < 2 * workers:
        raise InputError(f"{file}: {count} tokens for {workers} workers, expected at least two tokens per worker")
    pieces = splits.pieces(split, starts, labels, workers, seed, similarity)
    return _text(f, "train", pieces, ids, count // workers, rotate=split == "rotate")


def _text(f, name, pieces, ids, length, rotate=False) -> Text:
    """The streams `ids`, of this length each, of all those whose pieces are given."""
    n, vocabulary = len(pieces), f["vocabulary"].asstr()[:]
    own = pieces if rotate else [pieces[i] for i in ids if i < n]
    none = np.empty(0, np.int64)
    starts, lengths = (np.concatenate(arrays) for arrays in zip((none, none), *own, strict=True))
    tokens = _read_pieces(f[name]["tokens"], starts, lengths)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(vocabulary):
        raise OSError(f"/{name}/tokens has a number outside 0:{len(vocabulary)}")
    begin = length * min(ids[0], n) if rotate and len(ids) else 0
    return Text(
        tokens=tokens,
        offsets=np.cumsum([begin, *(length * (ids < n))], dtype=np.int64),
        ids=ids,
        n=n,
        total=n * length,
        vocabulary=tuple(vocabulary),
        level=f.attrs["level"],
        blocks=length * np.arange(n + 1) if rotate else None,
    )


def _parts(f) -> list[str]:
    return [name for name in ("train", "test") if name in f]


def _shape(group) -> tuple[int, int]:
    rows, features = group["x"].shape if "x" in group else group.attrs["shape"]
    return int(rows), int(features)


def _classes(f):
    return f["classes"][:] if "classes" in f else None


def _image(group) -> tuple[int, ...] | None:
    return tuple(map(int, group.attrs["image"])) if "image" in group.attrs else None


def _read_labels(file, group) -> np.ndarray:
    y = group["y"][:]
    if len(y) != _shape(group)[0]:
        raise InputError(f"{file}: damaged: {len(y)} labels for {_shape(group)[0]} rows of {group.name[1:]}")
    finite = np.isfinite(y)
    if not finite.all():
        row = int(np.argmin(finite))
        raise InputError(f"{file}: the label of {group.name[1:]} row {row + 1} is {y[row]}, expected a finite number")
    return y


def _read_rows(file, group, rows, dtype, standard=None) -> np.ndarray | Csr:
    """x of these rows of the file, in this order and repeats allowed, as new arrays."""
    with np.errstate(over="ignore"):  # a float64 number beyond float32 becomes inf, which is refused below
        x = _read_dense(group, rows, np.dtype(dtype), standard) if "x" in group else _read_csr(group, rows, dtype)
    if found := nonfinite(x):
        row, column, value = found
        raise InputError(
            f"{file}: feature {column + 1} of {group.name[1:]} row {rows[row] + 1} is {value} in {value.dtype}, "
            "expected a finite number"
        )
    return x


def _read_dense(group, rows, dtype, standard):
    source = group["x"]
    count, features = source.shape
    x = np.empty((len(rows), features), dtype)
    for at in _blocks(rows, np.arange(count + 1) * features):
        wanted = rows[at]
        block = source[wanted[0] : wanted[-1] + 1][wanted - wanted[0]]
        if standard is not None:  # in float64, before anything is rounded to the dtype
            mean, deviation = standard
            block = block / 255 if "image" in group.attrs else block.astype(np.float64)
            block -= mean
            block /= deviation
        x[at] = block
    if standard is None and "image" in group.attrs:
        x /= 255
    return x


def _read_csr(group, rows, dtype):
    count, features = _shape(group)
    indptr = group["indptr"][:]
    if len(indptr) != count + 1 or indptr[0] != 0 or indptr[-1] != len(group["data"]) or np.any(np.diff(indptr) < 0):
        raise OSError(f"{group.name}/indptr makes no sense")
    starts, lengths = indptr[rows], indptr[rows + 1] - indptr[rows]
    own = np.concatenate([[0], np.cumsum(lengths)])
    indices, data = np.empty(own[-1], np.int32), np.empty(own[-1], dtype)
    for at in _blocks(rows, indptr):
        low, high = starts[at[0]], starts[at[-1]] + lengths[at[-1]]
        source, target = _ranges(starts[at] - low, lengths[at]), _ranges(own[at], lengths[at])
        indices[target] = group["indices"][low:high][source]
        data[target] = group["data"][low:high][source]
    if len(indices) and not 0 <= indices.min() <= indices.max() < features:
        raise OSError(f"{group.name}/indices has a feature outside 0:{features}")
    place = np.repeat(np.arange(len(rows)) * features, lengths) + indices
    if np.any(np.diff(place) <= 0) and len(np.unique(place)) < len(place):
        raise OSError(f"{group.name}/indices names a feature of a row twice")
    return Csr(own, indices, data, (len(rows), features))


def _blocks(rows, indptr):
    """The positions of `rows`, by ascending row, in pieces whose first and last row lie within BLOCK numbers in the
    file. Neighbours are thus read as one slice, and what lies between scattered rows is read past, not row by row."""
    order = np.argsort(rows, kind="stable")
    for near in _near(indptr[rows[order]], indptr[rows[order] + 1]):
        yield order[near]


def _near(starts, ends):
    """Slices of these intervals, which ascend, that each lie within BLOCK numbers, or are one interval."""
    low = 0
    while low < len(starts):
        high = max(low + 1, int(np.searchsorted(ends, starts[low] + BLOCK, side="right")))
        yield slice(low, high)
        low = high


def _read_pieces(source, starts, lengths) -> np.ndarray:
    """source[start_0 : start_0 + length_0], then the next of these pieces, and so on, as one int32 array. They do not
    overlap."""
    tokens, own, order = np.empty(lengths.sum(), np.int32), np.cumsum(lengths) - lengths, np.argsort(starts)
    for near in _near(starts[order], (starts + lengths)[order]):
        at = order[near]
        low = starts[at[0]]
        block = source[low : starts[at[-1]] + lengths[at[-1]]]
        for target, begin, length in zip(own[at], starts[at] - low, lengths[at], strict=True):
            tokens[target : target + length] = block[begin : begin + length]
    return tokens


def _ranges(starts, lengths):
    """start_0, start_0 + 1, …, start_0 + length_0 − 1, start_1, …"""
    shifts = starts - np.cumsum(lengths) + lengths
    return np.repeat(shifts, lengths) + np.arange(lengths.sum())


def _describe_text(f) -> Iterator[str]:
    parts, unit = f["train"], {"word": "words", "char": "characters"}[f.attrs["level"]]
    kind, count, names = parts.attrs["kind"], len(parts["label"]), len(parts["names"])
    yield f"train  {len(parts['tokens'])} {unit}, {len(f['vocabulary'])} different ones"
    yield f"       {count} {kind}" + (f" of {names} speakers" if kind == "turns" else "")
    if "test" in f:
        test, unknown = f["test"], f["test"].attrs["unknown"]
        yield f"test   {len(test['tokens'])} {unit}" + (f", {unknown} of them read as <unk>" if unknown else "")


def _describe(y) -> str:
    values, counts = np.unique(y, return_counts=True)
    if len(values) > 20:
        return f"labels from {values[0]:g} to {values[-1]:g}, mean {y.mean():g}, {len(values)} distinct"
    return "labels " + ", ".join(f"{value:g}: {count}" for value, count in zip(values, counts, strict=True))


# Writing --------------------------------------------------------------------------------------------------------------


@contextmanager
def _new(dest, version, sources):
    """(a file under a temporary name, the digest of what the caller writes to it), which then takes the place of
    `dest`."""
    temporary = f"{dest}.tmp"
    try:
        with h5py.File(temporary, "w") as f:
            digest = hashlib.sha256()
            yield f, digest
            f.attrs.update(format=FORMAT, version=version, package=__version__, sources=[str(s) for s in sources])
            f.attrs["digest"] = digest.hexdigest()
        _sync(temporary)
        os.replace(temporary, dest)
        _sync(os.path.dirname(os.path.abspath(dest)))
    except OSError as error:
        raise InputError(f"{dest}: cannot be written: {_reason(error)}") from None
    finally:
        if os.path.isfile(temporary):
            os.remove(temporary)


def _write_dense(group, x, digest) -> None:
    numbers = x if isinstance(x, np.ndarray) else x.data
    target = group.create_dataset("x", x.shape, np.uint8 if "image" in group.attrs else _smallest(numbers))
    step = max(1, BLOCK // x.shape[1])
    for start in range(0, x.shape[0], step):
        block = x[start : start + step]
        block = np.ascontiguousarray(block if isinstance(block, np.ndarray) else block.toarray(), target.dtype)
        target[start : start + step] = block
        digest.update(block.data)


def _write_csr(group, x, digest) -> None:
    group.attrs["shape"] = x.shape
    types = {"indptr": np.int64, "indices": np.int32, "data": _smallest(x.data)}
    for name, dtype in types.items():
        array = getattr(x, name).astype(dtype, copy=False)
        group[name] = array
        digest.update(array.data)


def _smallest(values):
    with np.errstate(over="ignore"):
        exact = np.array_equal(values.astype(np.float32), values)
    return np.float32 if exact else np.float64


def _sync(path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error) -> str:
    """The system's or HDF5's words for an error, on one line."""
    return os.strerror(error.errno) if getattr(error, "errno", None) else " ".join(str(error).split())
