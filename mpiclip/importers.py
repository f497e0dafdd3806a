"""Other people's data formats to our HDF5 file (data.py). Here a whole set may be held in memory.

libsvm   text, "label index:value …" per line, indices from 1 and ascending; also .gz, .bz2, .xz
csv      numbers separated by commas, with or without a header line; also .gz, .bz2, .xz
npz      NumPy's archive: an array (rows, features) named X, x or data, and its labels y, target or labels
"""

import bz2
import csv
import gzip
import itertools
import lzma
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable

import numpy as np

from mpiclip import data
from mpiclip.errors import InputError

OPEN: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def import_file(sources, dest, format=None, test=(), features=None, label=None) -> None:
    """Write the rows of all `sources`, one after the other, to the data file `dest`, and beside them those of `test`.

    `format` is libsvm, csv or npz; if None, each file's name tells (libsvm unless it says .csv or .npz). `features`
    forces the number of features, for libsvm files whose highest index may lie below it; if None, the highest index of
    all `sources` counts. `label` is the label column of csv files, by name or by number from 1; if None, the last.
    InputError names the file, and the line or row where there is one."""
    if features is not None and features < 1:
        raise InputError(f"features: found {features}, expected at least 1")
    data.check_destination(dest)
    train_parts = [(source, *_read(source, format, label)) for source in sources]
    test_parts = [(source, *_read(source, format, label)) for source in test]
    width = features or max(x.shape[1] for _, x, _ in train_parts)
    for source, x, _ in train_parts + test_parts:
        _check_width(source, x, width, forced=features is not None)
    sparse = not all(isinstance(x, np.ndarray) for _, x, _ in train_parts + test_parts)
    train = _join(train_parts, width, sparse)
    data.write(dest, [*sources, *test], train, _join(test_parts, width, sparse) if test else None)


def _read(source, format, label):
    """(x, y) of one source, checked: x (rows, features) an array or SciPy CSR matrix, y (rows,) float64, all finite."""
    stem, suffix = os.path.splitext(source)
    kind = format or os.path.splitext(stem if suffix in OPEN else source)[1][1:]
    if kind not in READERS:
        if format is not None:
            raise InputError(f"format: found {format!r}, expected one of {', '.join(READERS)}")
        kind = "libsvm"
    if label is not None and kind != "csv":
        raise InputError(f"label: found {label!r}, but {source} is {kind}, not csv")
    read, expected = READERS[kind]
    try:
        with OPEN.get(suffix, open)(source, "rb") as file:
            lines = _Lines(file)
            try:
                x, y = read(lines, label)
            except (ValueError, OverflowError) as error:
                where = f"{source} line {lines.number}" if lines.number else source
                raise InputError(f"{where}: {_short(error)}; {kind} expects {expected}") from None
    except UNREADABLE as error:
        raise InputError(f"{source}: {getattr(error, 'strerror', None) or error}") from None
    if 0 in x.shape:
        raise InputError(f"{source}: found {x.shape[0]} rows and {x.shape[1]} features, expected at least one of each")
    if not np.isfinite(y).all():
        row = int(np.argmin(np.isfinite(y)))
        raise InputError(f"{source}: the label of row {row + 1} is {y[row]}, expected a finite number")
    if found := data.nonfinite(x):
        row, column, value = found
        raise InputError(f"{source}: feature {column + 1} of row {row + 1} is {value}, expected a finite number")
    return x, y


class _Lines:
    """The lines of a binary file, counted, so that an error in one can name it."""

    def __init__(self, file):
        self.file = file
        self.number = 0

    def __iter__(self):
        for line in self.file:
            self.number += 1
            yield line

    def read(self, size=-1):  # scikit-learn takes nothing without this method for a file
        return self.file.read(size)


def _libsvm(lines, label):
    from sklearn.datasets import load_svmlight_file

    return load_svmlight_file(lines, zero_based=False)


def _csv(lines, label):
    text: Iterable[str] = (line.decode("utf-8-sig") for line in lines)
    first = next((line for line in text if line.strip()), "")
    names = [name.strip() for name in next(csv.reader([first]), [])]
    column = _label_column(names, label)
    if any(_is_number(name) for name in names):
        text = itertools.chain([first], text)
    with warnings.catch_warnings(action="ignore"):  # "no data", which the caller reports
        table = np.loadtxt(text, delimiter=",", comments=None, quotechar='"', ndmin=2)
    if not table.size:
        raise ValueError("no rows")
    if table.shape[1] != len(names):
        lines.number = 1
        raise ValueError(f"the header names {len(names)} columns, the lines below have {table.shape[1]}")
    return np.delete(table, column, axis=1), table[:, column]


def _label_column(names, label) -> int:
    if label is None:
        return -1
    if label in names:
        return names.index(label)
    if str(label).isdecimal() and 1 <= int(label) <= len(names):
        return int(label) - 1
    raise ValueError(f"no label column {label!r} among the {len(names)} columns")


def _is_number(text) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _npz(lines, label):
    with np.load(lines.file, allow_pickle=False) as archive:
        x, y = (next((archive[name] for name in names if name in archive), None) for names in NPZ_NAMES)
    if x is None or y is None:
        raise ValueError(f"no array named {' or '.join(NPZ_NAMES[0] if x is None else NPZ_NAMES[1])}")
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"the arrays' shapes are {x.shape} and {y.shape}")
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biuf":
        raise ValueError(f"the arrays' types are {x.dtype} and {y.dtype}")
    return x, y.astype(np.float64)


NPZ_NAMES = ("X", "x", "data"), ("y", "target", "labels")

READERS: dict[str, tuple[Callable, str]] = {
    "libsvm": (_libsvm, "lines of 'label index:value …', indices from 1 and ascending"),
    "csv": (_csv, "lines of numbers, separated by commas, after at most one header line"),
    "npz": (_npz, "numbers X (rows, features) and y (rows,)"),
}


def _check_width(source, x, width, forced) -> None:
    found = x.shape[1]
    if isinstance(x, np.ndarray):
        if found != width:
            raise InputError(f"{source}: {found} features, expected {width} as {'asked' if forced else 'elsewhere'}")
    elif found > width:
        k = int(np.argmax(x.indices >= width))
        row = np.searchsorted(x.indptr, k, side="right")  # counted from 1
        advice = "as asked" if forced else f"as in the training set; --features {found} gives both that many"
        raise InputError(f"{source}: row {row} has feature {x.indices[k] + 1}, expected at most {width} {advice}")


def _join(parts, width, sparse):
    y = np.concatenate([y for _, _, y in parts])
    if not sparse:
        return np.concatenate([x for _, x, _ in parts]), y
    from scipy.sparse import csr_matrix, vstack

    blocks = [csr_matrix(x) for _, x, _ in parts]
    for x in blocks:
        x.resize(x.shape[0], width)
    return vstack(blocks, format="csr"), y


def _short(error) -> str:
    return " ".join(str(error).split(" at row ")[0].rstrip(".").split())
