"""Checkpoints: DIR/checkpoints/round-00000100.h5, one HDF5 file for all ranks, complete or not there.

Rank 0 lays the file out once, with contiguous data sets; then every rank writes its parts at their places with plain
system calls, as fast as parallel HDF5 and with any build of it. What a rank wrote is one or more segments of at most
4 MiB, each with its CRC-32 taken in memory; before the file gets its name, and before it is believed at a resume, the
ranks share the segments and read them all. The file:

    /arrays/NAME    the arrays
    /segments       which bytes of which array (in the order of the names) have which CRC-32; they cover all arrays
    /seal           CRC-32 of the header, the arrays' names, shapes and types, and /segments; written last
    header          attribute: JSON
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from . import disk
from .comm import Comm
from .device import host
from .errors import InputError
from .server import Server

FORMAT = ("v110", "v110")        # HDF5's own structures carry checksums; any HDF5 since 1.10 reads it
ROOM = 1 << 16                   # bytes: more than the structures of an empty file
BLOCK = 1 << 22                  # bytes: the longest segment
SEAL = np.dtype("<u4")
SEGMENT = np.dtype([("array", "<u4"), ("crc32", "<u4"), ("start", "<u8"), ("bytes", "<u8")])


@dataclass(frozen=True)
class Piece:
    """What this rank holds of an array of the run.

    shape, dtype    of the whole array, the same on every rank
    parts           (offset, part): the flat part is array.ravel()[offset : offset + part.size]; the ranks' parts cover
                    the array once"""

    shape: tuple[int, ...]
    dtype: Any
    parts: Sequence[tuple[int, np.ndarray]]


def piece(name: str, array: Any, server: Server, ids: np.ndarray) -> Piece:
    """What this rank holds of the state called `name`: the rows of its workers `ids` where it ends in `_i`, or the
    columns that it serves."""
    array = np.ascontiguousarray(host(array))
    if name.endswith("_i"):
        width = math.prod(array.shape[1:])
        return Piece((server.n, *array.shape[1:]), array.dtype, [(int(ids[0]) * width, array)])
    shape = (*array.shape[:-1], server.d)
    mine = server.at != "replicated" or server.comm.rank == 0
    return Piece(shape, array.dtype, [(row * server.d + server.own.start, part)
                                      for row, part in enumerate(_vectors(array))] if mine else [])


def restore(saved: Checkpoint, name: str, array: Any, server: Server, ids: np.ndarray) -> None:
    """Fill the array called `name` with what a checkpoint has of this rank's piece. InputError where shapes differ."""
    here = piece(name, array, server, ids)
    if saved.shape(name) != here.shape:
        raise InputError(f"{saved.path}: state {name}: shape {saved.shape(name)}, expected {here.shape}")
    if name.endswith("_i"):
        (offset, part), = here.parts
        array[...] = server.device.put(saved.read(name, offset, part.size).reshape(part.shape))
    else:
        d, own = server.d, server.own
        for row, part in enumerate(_vectors(array)):
            part[:] = server.device.put(saved.read(name, row * d + own.start, own.stop - own.start))


def _vectors(array: Any) -> Any:
    """A server array (…, columns) as (vectors, columns), also where this rank serves no columns."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


@dataclass(frozen=True)
class Layout:
    """Where the arrays are in a file: name → (shape, dtype, byte offset), in the order of the names."""

    arrays: dict[str, tuple[tuple[int, ...], np.dtype, int]]
    segments: int           # byte offset of /segments
    seal: int               # byte offset of /seal

    def sizes(self) -> list[int]:
        """The arrays' bytes."""
        return [math.prod(shape) * dtype.itemsize for shape, dtype, _ in self.arrays.values()]

    def places(self, segments: np.ndarray) -> np.ndarray:
        """The segments' byte offsets in the file."""
        offsets = np.array([offset for *_, offset in self.arrays.values()], np.uint64)
        return offsets[segments["array"]] + segments["start"]

    def seal_of(self, header: str, segments: np.ndarray) -> int:
        names = repr([(name, shape, dtype.str) for name, (shape, dtype, _) in self.arrays.items()])
        return zlib.crc32(segments.tobytes(), zlib.crc32(names.encode(), zlib.crc32(header.encode())))


def save(dir: str | Path, comm: Comm, round: int, pieces: dict[str, Piece], header: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of `round` and remove all but the newest `keep`. Called by all ranks, with the same names,
    shapes and dtypes; names have no '/'. header: anything that JSON can say, rank 0's counts. Raises InputError on all
    ranks if one cannot write (a full disk); what was there before is then still there."""
    path, text = _path(dir, round), json.dumps(header)
    temporary = path.with_suffix(".tmp")
    blocks = [(array, *block) for array, name in enumerate(sorted(pieces)) for block in _blocks(pieces[name])]
    mine = np.array([(array, zlib.crc32(data), start, len(data)) for array, start, data in blocks], SEGMENT)
    gathered = comm.gather(mine)
    plan = None
    try:
        with comm.agree(), _told(path):
            if gathered is not None:
                segments = np.concatenate(gathered)
                plan = _lay_out(temporary, pieces, text, len(segments)), segments
        layout, segments = comm.same(plan)
        with comm.agree(), _told(path), _open(temporary, os.O_WRONLY) as fd:
            for place, (*_, data) in zip(layout.places(mine), blocks, strict=True):
                disk.write_at(fd, data, int(place))
            if comm.rank == 0:
                disk.write_at(fd, segments.tobytes(), layout.segments)
                disk.write_at(fd, np.array(layout.seal_of(text, segments), SEAL).tobytes(), layout.seal)
            os.fsync(fd)
        with comm.agree():
            _verify(temporary, comm)
        with comm.agree(), _told(path):
            if comm.rank == 0:
                disk.replace(temporary, path)
    except InputError as error:
        if comm.rank == 0:
            disk.remove(temporary)
        older = comm.same(_rounds(dir))
        failed = InputError(f"{error}; " + (f"the newest checkpoint is of round {older[-1]}" if older else
                                            "there is no older checkpoint"))
        failed.agreed = True
        raise failed from None
    if comm.rank == 0:
        # what is called later than this round was found damaged at the resume that led here: it is no successor
        there = _rounds(dir)
        for old in [r for r in there if r > round] + [r for r in there if r <= round][:-keep]:
            disk.remove(_path(dir, old))


class Checkpoint:
    """A checkpoint that was verified, open for reading on this rank.

    path            the file
    round, header   as saved
    names           of the arrays
    warnings        newer checkpoints that were passed over, and why"""

    def __init__(self, path: Path, round: int, layout: Layout, header: dict[str, Any], warnings: list[str]):
        self.path, self.round, self.header, self.warnings = path, round, header, warnings
        self.names = list(layout.arrays)
        self._layout = layout
        self._fd = os.open(path, os.O_RDONLY)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._layout.arrays[name][0]

    def dtype(self, name: str) -> np.dtype:
        return self._layout.arrays[name][1]

    def read(self, name: str, start: int = 0, count: int | None = None) -> np.ndarray:
        """array.ravel()[start : start + count], (count,); count None: all of it."""
        shape, dtype, offset = self._layout.arrays[name]
        count = math.prod(shape) - start if count is None else count
        if start < 0 or count < 0 or start + count > math.prod(shape):
            raise ValueError(f"{name}: elements {start} to {start + count} of an array of shape {shape}")
        return disk.read_at(self._fd, count * dtype.itemsize, offset + start * dtype.itemsize).view(dtype)

    def close(self) -> None:
        os.close(self._fd)


def load(dir: str | Path, comm: Comm) -> Checkpoint:
    """The newest valid checkpoint of a run; damaged ones are passed over with a warning. Called by all ranks, of which
    there may be more or fewer than when it was written. Raises InputError on all ranks if there is none."""
    warnings: list[str] = []
    for round in reversed(comm.same(_rounds(dir))):
        path = _path(dir, round)
        try:
            with comm.agree():
                layout, header = _verify(path, comm)
        except InputError as error:
            warnings.append(str(error))
        else:
            return Checkpoint(path, round, layout, header, warnings)
    none = InputError(f"{dir}: no checkpoint to go on from" + "".join(f"; {text}" for text in warnings))
    none.agreed = True
    raise none


def _path(dir: str | Path, round: int) -> Path:
    return Path(dir, "checkpoints", f"round-{round:08d}.h5")


def _rounds(dir: str | Path) -> list[int]:
    """The rounds of which there are checkpoints, ascending."""
    return sorted(int(path.stem.removeprefix("round-")) for path in Path(dir, "checkpoints").glob("round-*.h5")
                  if path.stem.removeprefix("round-").isdecimal())


def _blocks(piece: Piece) -> Iterator[tuple[int, memoryview]]:
    """This rank's bytes of an array, in blocks: (first byte in the array, bytes)."""
    dtype = np.dtype(piece.dtype)
    for offset, part in piece.parts:
        flat = np.ascontiguousarray(part).astype(dtype, casting="equiv", copy=False).reshape(-1)
        data = flat.view(np.uint8).data
        for start in range(0, len(data), BLOCK):
            yield offset * dtype.itemsize + start, data[start:start + BLOCK]


def _covered(segments: np.ndarray, sizes: list[int]) -> bool:
    """Whether the segments cover every byte of the arrays once."""
    for array, size in enumerate(sizes):
        own = np.sort(segments[segments["array"] == array], order="start")
        ends = np.cumsum(own["bytes"])
        if not np.array_equal(own["start"], ends - own["bytes"]) or own["bytes"].sum() != size:
            return False
    return True


def _lay_out(path: Path, pieces: dict[str, Piece], header: str, segments: int) -> Layout:
    """Create the file, with the places of everything and the contents of nothing but the header. Rank 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob("*.tmp"):
        leftover.unlink()
    with _open(path, os.O_WRONLY | os.O_CREAT) as fd:       # HDF5 does not survive a full disk: is there room for it?
        disk.write_at(fd, bytes(ROOM + 1024 * len(pieces) + len(header)), 0)
        os.fsync(fd)
    with h5py.File(path, "w", libver=FORMAT) as f:
        f.attrs["header"] = np.bytes_(header.encode())
        arrays = f.create_group("arrays")
        return Layout(
            seal=_dataset(f, "seal", (1,), SEAL),
            segments=_dataset(f, "segments", (segments,), SEGMENT),
            arrays={name: (piece.shape, np.dtype(piece.dtype), _dataset(arrays, name, piece.shape, piece.dtype))
                    for name, piece in sorted(pieces.items())})


def _dataset(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any) -> int:
    """Create a contiguous data set that has its place in the file from the start; returns its byte offset."""
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_layout(h5py.h5d.CONTIGUOUS)
    how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    how.set_obj_track_times(False)                          # same run, same bytes
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    return h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple(shape), how).get_offset() or 0


def _verify(path: Path, comm: Comm) -> tuple[Layout, dict[str, Any]]:
    """Read the file's structure and this rank's share of the data. Raises InputError if anything is not as written."""
    try:
        with h5py.File(path, "r") as f:
            header, segments, seal = bytes(f.attrs["header"]).decode(), f["segments"][:], f["seal"][0]
            arrays = {name: f["arrays"][name] for name in list(f["arrays"])}
            layout = Layout({name: (d.shape, d.dtype, d.id.get_offset() or 0) for name, d in arrays.items()},
                            f["segments"].id.get_offset() or 0, f["seal"].id.get_offset())
        if seal != layout.seal_of(header, segments):
            raise ValueError("its table of contents is not the one that was written")
        if not _covered(segments, layout.sizes()):
            raise ValueError("the ranks' parts did not cover the arrays, each byte once")
        share = np.array_split(segments, comm.size)[comm.rank]
        with _open(path, os.O_RDONLY) as fd:
            for segment, place in zip(share, layout.places(share), strict=True):
                if zlib.crc32(disk.read_at(fd, int(segment["bytes"]), int(place)).data) != segment["crc32"]:
                    name = list(layout.arrays)[segment["array"]]
                    raise ValueError(f"checksum of '{name}', bytes {segment['start']} to "
                                     f"{segment['start'] + segment['bytes']}: they are not those that were written")
    except Exception as error:           # damage comes out of HDF5 as OSError, KeyError, RuntimeError, ValueError …
        raise InputError(f"{path}: damaged checkpoint: {disk.reason(error)}") from None
    return layout, json.loads(header)


@contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor, closed in the end."""
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system refuses is told to the person in one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be written: {disk.reason(error)}") from None
