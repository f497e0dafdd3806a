"""Other people's data formats to our HDF5 file (data.py). Here a whole set may be held in memory.

libsvm   text, "label index:value …" per line, indices from 1 and ascending; also .gz, .bz2, .xz
csv      numbers separated by commas, with or without a header line; also .gz, .bz2, .xz
npz      NumPy's archive: an array (rows, features) named X, x or data, and its labels y, target or labels
idx      images and labels of MNIST and its like, in a file each, of bytes; also .gz, .bz2, .xz. A file starts with two
         zeros, 8 for bytes and its number of axes: 1 in a file of labels, 3 (rows, height, width) or so of images
cifar    the binary files of CIFAR-10 and CIFAR-100, .bin: for each image a byte for its class, from 0 to 9, or two for
         its coarse class, from 0 to 19, and its class, from 0 to 99, which counts; then 3 × 32 × 32 bytes. Also their
         archives, .tar.gz: as a source of training rows they are data_batch_*.bin or train.bin, as one of test rows
         test_batch.bin or test.bin
text     words or characters of .txt and .tokens files in UTF-8, as text.py says; also .gz, .bz2, .xz
"""

import bz2
import csv
import fnmatch
import gzip
import io
import itertools
import lzma
import math
import os
import re
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpiclip import data, text
from mpiclip.errors import InputError

OPEN: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
IDX_BYTES = b"\0\0\x08"
CIFAR_IMAGE = (3, 32, 32)
CIFAR_CLASSES = (10,), (20, 100)  # how many each label byte of a record tells apart; the last one counts
TEXTS = ("txt", "tokens")
LIBSVM_START = re.compile(rb"(\s*#.*\n)*\s*[-+.\d]\S*\s+\d+:[-+.\d]")
CIFAR_TRAIN, CIFAR_TEST = ("data_batch_*.bin", "train.bin"), ("test_batch.bin", "test.bin")  # in an archive


@dataclass
class Part:
    """The rows of one source, or of one that has images and another that has their labels."""

    source: str
    x: Any                              # (rows, features): an array, or a SciPy CSR matrix
    y: np.ndarray                       # (rows,) float64
    image: tuple[int, ...] | None       # the shape of a row whose features are the bytes of an image


def import_file(sources, dest, format=None, test=(), features=None, label=None, level=None) -> None:
    """Write the rows, or the text, of all `sources`, one after the other, to the data file `dest`, and beside them
    those of `test`.

    `format` is libsvm, csv, npz, idx, cifar or text; if None, each file tells: by its name if that says .csv, .npz,
    .bin (cifar), .tar.gz (cifar), .tokens or .txt (text, unless it begins like libsvm), as idx by its first bytes; else
    it is libsvm. Files of images and of labels pair up in the order in which they stand. `features` forces the number
    of features, for libsvm files whose highest index may lie below it; if None, the highest index of all `sources`
    counts. `label` is the label column of csv files, by name or by number from 1; if None, the last. `level` is what
    the tokens of a text are, word or char; if None, word. InputError names the file, and the line or row where there is
    one."""
    if features is not None and features < 1:
        raise InputError(f"features: found {features}, expected at least 1")
    data.check_destination(dest)
    texts = [_is_text(source, format) for source in [*sources, *test]]
    if any(texts):
        for option, value in (("features", features), ("label", label)):
            if value is not None:
                raise InputError(f"{option}: found {value!r}, but {[*sources, *test][texts.index(True)]} is text")
        if not all(texts):
            raise InputError(f"{[*sources, *test][texts.index(False)]}: found rows, expected text as in "
                             f"{[*sources, *test][texts.index(True)]}")
        _import_text(sources, dest, test, level or "word")
        return
    if level is not None:
        raise InputError(f"level: found {level!r}, but {sources[0]} is not text; expected with format = 'text'")
    train_parts = _read_all(sources, format, label, CIFAR_TRAIN)
    test_parts = _read_all(test, format, label, CIFAR_TEST)
    parts = train_parts + test_parts
    width = features or max(part.x.shape[1] for part in train_parts)
    for part in parts:
        _check_width(part, width, forced=features is not None)
        if part.image != parts[0].image:
            shapes = ["numbers" if image is None else " × ".join(map(str, image)) for image in
                      (part.image, parts[0].image)]
            raise InputError(f"{part.source}: found {shapes[0]}, expected {shapes[1]} as in {parts[0].source}")
    sparse = not all(isinstance(part.x, np.ndarray) for part in parts)
    train = _join(train_parts, width, sparse)
    data.write(dest, [*sources, *test], train, _join(test_parts, width, sparse) if test else None, parts[0].image)


def _import_text(sources, dest, test, level) -> None:
    if level not in text.LEVELS:
        raise InputError(f"level: found {level!r}, expected one of {', '.join(text.LEVELS)}")
    tokens, vocabulary, parts = text.encode(sources, level, _opened)
    tested = text.encode_test(test, level, _opened, vocabulary) if test else None
    data.write_text(dest, [*sources, *test], level, vocabulary, tokens, parts, tested)


def _is_text(source, format) -> bool:
    """Whether a file is text: if its name says so, and it does not begin like libsvm."""
    if format is not None or _extension(source) not in TEXTS:
        return format == "text"
    with _opened(source) as file:
        return not LIBSVM_START.match(file.peek(1000))


def _extension(source) -> str:
    """What a file's name ends in, compression apart."""
    stem, suffix = os.path.splitext(source)
    return os.path.splitext(stem if suffix in OPEN else source)[1][1:]


@contextmanager
def _opened(source, members=None) -> Iterator[Any]:
    """The open file, decompressed; of an archive those files whose names match `members`. What cannot be read ends in
    an InputError."""
    suffix = os.path.splitext(source)[1]
    try:
        with _open_archive(source, members) if members else OPEN.get(suffix, open)(source, "rb") as file:
            yield file
    except UNREADABLE as error:
        raise InputError(f"{source}: {getattr(error, 'strerror', None) or error}") from None


def _read_all(sources, format, label, members) -> list[Part]:
    """The rows of these files, checked; of an archive those of the files whose names match `members`. Images that have
    a file of their own come after all other rows."""
    parts: list[Part] = []
    images: list[tuple[str, np.ndarray]] = []
    labels: list[tuple[str, np.ndarray]] = []
    for source in sources:
        found = _read(source, format, label, members)
        if isinstance(found, tuple):
            x, y = _checked(source, *found[:2])
            parts.append(Part(source, x, y, found[2] if len(found) > 2 else None))
        else:
            (labels if found.ndim == 1 else images).append((source, found))
    for pair in itertools.zip_longest(images, labels):
        if None in pair:
            alone, other = ("images", "labels") if pair[1] is None else ("labels", "images")
            source, _ = pair[0] or pair[1]
            raise InputError(f"{source}: {alone} without {other}; expected an idx file of {other} beside it, which "
                             f"starts with the bytes 00 00 08 {'01' if other == 'labels' else '03'}")
        (source, x), (label_source, y) = pair
        if len(x) != len(y):
            raise InputError(f"{label_source}: {len(y)} labels, expected {len(x)}, one for each image of {source}")
        image = x.shape[1:]
        x, y = _checked(source, x.reshape(len(x), math.prod(image)), y.astype(np.float64))
        parts.append(Part(source, x, y, image))
    return parts


def _read(source, format, label, members):
    """(x, y) of one source: x (rows, features) an array or SciPy CSR matrix, y (rows,) float64; and the shape of a row
    that is an image. Of an idx file its one array, of bytes."""
    extension = _extension(source)
    archive = extension in ("tar", "tgz")
    kind = format or ("cifar" if archive or extension == "bin" else extension)
    if kind not in READERS and format is not None:
        raise InputError(f"format: found {format!r}, expected one of {', '.join(READERS)}, text")
    with _opened(source, members if archive else None) as file:
        if kind not in READERS:
            kind = "idx" if file.peek(3)[:3] == IDX_BYTES else "libsvm"
        if label is not None and kind != "csv":
            raise InputError(f"label: found {label!r}, but {source} is {kind}, not csv")
        read, expected = READERS[kind]
        lines = _Lines(file)
        try:
            return read(lines, label)
        except (ValueError, OverflowError) as error:
            where = f"{source} line {lines.number}" if lines.number else source
            raise InputError(f"{where}: {_short(error)}; {kind} expects {expected}") from None


def _checked(source, x, y):
    """x and y, which have rows, features and finite numbers; else InputError."""
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


def _open_archive(source, members) -> io.BufferedReader:
    """The files of an archive whose names match `members`, one after the other."""
    try:
        with tarfile.open(source) as archive:
            files = {m.name: m for m in archive.getmembers() if m.isfile()}
            names = sorted(name for pattern in members for name in files if fnmatch.fnmatch(Path(name).name, pattern))
            if not names:
                raise InputError(f"{source}: no file in it is called {' or '.join(members)}")
            content = b"".join(archive.extractfile(files[name]).read() for name in names)  # type: ignore[union-attr]
    except tarfile.TarError:
        raise InputError(f"{source}: not an archive that tar can read") from None
    return io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]


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


def _idx(lines, label):
    content = lines.read()
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    if content[:3] != IDX_BYTES or not axes or len(content) < start:
        raise ValueError(f"the first bytes are {content[:4].hex(' ') or 'missing'}")
    shape = np.frombuffer(content, ">u4", axes, 4).tolist()
    if len(content) != start + math.prod(shape):
        raise ValueError(f"found {len(content) - start} bytes for {' × '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar(lines, label):
    content, fits = np.frombuffer(lines.read(), np.uint8), []
    for counts in CIFAR_CLASSES:
        record = len(counts) + math.prod(CIFAR_IMAGE)
        if content.size and content.size % record == 0:
            labels, pixels = np.split(content.reshape(-1, record), [len(counts)], axis=1)
            if (labels < counts).all():
                fits.append((pixels, labels[:, -1].astype(np.float64), CIFAR_IMAGE))
    if len(fits) != 1:
        raise ValueError(f"found {content.size} bytes that are " + ("records of either kind" if fits else "no records"))
    return fits[0]


NPZ_NAMES = ("X", "x", "data"), ("y", "target", "labels")

READERS: dict[str, tuple[Callable, str]] = {
    "libsvm": (_libsvm, "lines of 'label index:value …', indices from 1 and ascending"),
    "csv": (_csv, "lines of numbers, separated by commas, after at most one header line"),
    "npz": (_npz, "numbers X (rows, features) and y (rows,)"),
    "idx": (_idx, "00 00 08, the number of axes, their sizes and a byte for each element"),
    "cifar": (_cifar, "records of a byte for the class, 0 to 9, and 3072 for the image, or of bytes from 0 to 19 and "
                      "from 0 to 99, and 3072"),
}


def _check_width(part, width, forced) -> None:
    source, x, found = part.source, part.x, part.x.shape[1]
    if isinstance(x, np.ndarray):
        if found != width:
            raise InputError(f"{source}: {found} features, expected {width} as {'asked' if forced else 'elsewhere'}")
    elif found > width:
        k = int(np.argmax(x.indices >= width))
        row = np.searchsorted(x.indptr, k, side="right")  # counted from 1
        advice = "as asked" if forced else f"as in the training set; --features {found} gives both that many"
        raise InputError(f"{source}: row {row} has feature {x.indices[k] + 1}, expected at most {width} {advice}")


def _join(parts, width, sparse):
    y = np.concatenate([part.y for part in parts])
    if not sparse:
        return np.concatenate([part.x for part in parts]), y
    from scipy.sparse import csr_matrix, vstack

    blocks = [csr_matrix(part.x) for part in parts]
    for x in blocks:
        x.resize(x.shape[0], width)
    return vstack(blocks, format="csr"), y


def _short(error) -> str:
    return " ".join(str(error).split(" at row ")[0].rstrip(".").split())
