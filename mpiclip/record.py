"""The record of a run, DIR/run.h5: what ran, and a line of metrics for every evaluated round; rank 0's progress line.

HDF5 lays the file out, with room for more lines than there are; a line is then written to its place with a plain system
call. So the file is an ordinary HDF5 file at every moment, while the run goes on and after it was killed: nothing is
locked, no line before the last is ever lost, and a full disk is an error like another (HDF5's own appending, SWMR, ends
in a crash of the process there). Lines that are not written yet have a NaN for their round.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import h5py
import numpy as np

from . import disk
from .errors import InputError

FORMAT = ("v110", "v110")        # HDF5's own structures carry checksums; any HDF5 since 1.10 reads it
LINES = 256                      # for which there is room at first


class Record:
    """The open run.h5 of a run that is going on; rank 0 holds it.

        record = Record.create("out", {"config": json.dumps(tables), "workers": 20}, ["round", "loss"])
        record.append({"round": 0, "loss": 0.69})
    """

    def __init__(self, path: Path, header: dict[str, Any], lines: np.ndarray):
        self.path, self.columns = path, lines.dtype.names or ()
        self._header, self._dtype = header, lines.dtype
        self._fd = -1
        self._write(lines, max(LINES, 2 * len(lines)))

    @classmethod
    def create(cls, dir: str | Path, header: dict[str, Any], columns: Sequence[str | tuple[str, int]]) -> Record:
        """Start DIR/run.h5. header: what was run (str, int, float; anything else is kept as JSON); columns: the names
        of the metrics, "round" among them, or (name, how many numbers) where a line has several. Raises InputError if
        DIR holds a run or cannot be written."""
        path = Path(dir, "run.h5")
        if path.exists() or any(path.parent.glob("checkpoints/*.h5")):
            raise InputError(f"{dir}: holds a run already; expected a new folder (or use `mpiclip resume {dir}`)")
        return cls(path, header, np.empty(0, _fields(columns)))

    @classmethod
    def resume(cls, dir: str | Path, round: int, header: dict[str, Any] | None = None,
               columns: Sequence[str | tuple[str, int]] = ()) -> Record:
        """Go on with DIR/run.h5 after `round`: later lines are dropped (they will come again), header items given here
        replace the old ones. Columns that it lacks, because an older version began it, are NaN in the lines so far. The
        old file is valid until the new one takes its place. InputError as in `read`."""
        old, before = read(dir)
        before = before[before["round"] <= round]
        there = before.dtype.names or ()
        new = [field for field in _fields(columns) if field[0] not in there]
        lines = np.full(len(before), math.nan, before.dtype.descr + new)
        for name in there:
            lines[name] = before[name]
        return cls(Path(dir, "run.h5"), old | (header or {}), lines)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line: metric → number, or numbers; a metric that is not given is NaN. Raises InputError on a full disk,
        with the lines before it safe."""
        unknown = line.keys() - set(self.columns)
        if unknown:
            raise KeyError(f"no column {sorted(unknown)} in {self.path}")
        if self._count == self._capacity:
            self._write(self._lines(), 2 * self._capacity)
        row = np.array([tuple(line.get(name, math.nan) for name in self.columns)], self._dtype)
        round, within = row["round"].tobytes(), self._dtype.fields["round"][1]   # type: ignore[index]
        row["round"] = math.nan
        place = self._start + self._count * self._dtype.itemsize
        try:
            disk.write_at(self._fd, row.tobytes(), place)
            disk.write_at(self._fd, round, place + within)         # last: what makes it a line
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {disk.reason(error)}; "
                             f"its {self._count} lines are kept") from None
        self._count += 1

    def sync(self) -> None:
        """Put the lines on the disk itself: after this not even a power cut loses them. Before a checkpoint, say."""
        os.fsync(self._fd)

    def close(self) -> None:
        """End the record, and cut off what room is left (not if the disk is full: it does no harm)."""
        with contextlib.suppress(InputError):
            self._write(self._lines(), self._count)
        os.close(self._fd)

    def _lines(self) -> np.ndarray:
        return disk.read_at(self._fd, self._count * self._dtype.itemsize, self._start).view(self._dtype)

    def _write(self, lines: np.ndarray, capacity: int) -> None:
        """Write the whole file anew, with room for `capacity` lines on the disk for certain, and put it in the place of
        the old one. Raises InputError where that cannot be; the old one is then as it was."""
        rows = np.empty(capacity, self._dtype)
        rows.view(np.float64)[:] = math.nan
        rows[:len(lines)] = lines
        image, start = _image(self._header, rows)
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                disk.write_at(fd, image, 0)
                os.fsync(fd)
                disk.replace(temporary, self.path)                 # an open file keeps its contents under a new name
            except OSError:
                os.close(fd)
                disk.remove(temporary)
                raise
        except OSError as error:
            kept = f"; its {len(lines)} lines are kept" if self._fd >= 0 else ""
            raise InputError(f"{self.path}: cannot be written: {disk.reason(error)}{kept}") from None
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._start, self._count, self._capacity = fd, start, len(lines), capacity


def _fields(columns: Sequence[str | tuple[str, int]]) -> list[Any]:
    """The fields of a line."""
    return [(name, np.float64) if isinstance(name, str) else (name[0], np.float64, (name[1],)) for name in columns]


def lock(dir: str | Path) -> TextIO:
    """Hold DIR for this run until the file returned is closed, or the process ends. Raises InputError if another run
    holds it, or if it cannot be written."""
    path = Path(dir, "lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {disk.reason(error)}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{dir}: another mpiclip is running in this folder") from None
    except OSError:
        pass                # a file system without locks
    return file


def _image(header: dict[str, Any], rows: np.ndarray) -> tuple[bytes, int]:
    """A run.h5 in memory, and the byte at which its lines start."""
    with h5py.File("run.h5", "w", driver="core", backing_store=False, libver=FORMAT) as f:
        for key, value in header.items():
            plain = isinstance(value, str | int | float) and not isinstance(value, bool)
            f.attrs[key if plain else key + ".json"] = value if plain else json.dumps(value)
        metrics = f.create_dataset("metrics", data=rows)
        f.flush()
        return f.id.get_file_image(), metrics.id.get_offset() or 0


def read(dir: str | Path) -> tuple[dict[str, Any], np.ndarray]:
    """The record in DIR, also of a run that is going on: (header, lines), lines a structured array (number of lines,)
    with a float64 field for each metric, or several numbers in it. Raises InputError if DIR holds no run or the file is
    damaged."""
    path = Path(dir, "run.h5")
    if not path.exists():
        raise InputError(f"{dir}: no run.h5 there; expected a folder that `mpiclip train --out` wrote")
    try:
        with h5py.File(path, "r") as f:
            lines = f["metrics"][:]
            lines = lines[~np.isnan(lines["round"])]
            header = {key: value.item() if isinstance(value, np.generic) else value for key, value in f.attrs.items()}
    except Exception as error:       # damage comes out of HDF5 as OSError, KeyError, RuntimeError, ValueError …
        raise InputError(f"{path}: not a readable record of a run: {disk.reason(error)}") from None
    return {key.removesuffix(".json"): json.loads(value) if key.endswith(".json") else value
            for key, value in header.items()}, lines


def config(header: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a header, table → key → value: its item `config`, which is JSON text."""
    return json.loads(header.get("config", "{}"))


class Progress:
    """A line on stderr: round, loss, gradient norm, rounds per second, time left. On a terminal one line that is
    rewritten, up to five times a second; elsewhere (mpirun, a batch job's log) a line every ten seconds."""

    def __init__(self, rounds: int, done: int = 0, stream: TextIO | None = None):
        self.rounds, self.first = rounds, done
        self.stream = stream or sys.stderr
        self.rewrite = self.stream.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ
        self.interval = 0.2 if self.rewrite else 10.0
        self.start = time.monotonic()
        self.next = self.start + (0.2 if self.rewrite else 2.0)        # short runs print nothing but their last line
        self.open = False

    def update(self, round: int, metrics: dict[str, float]) -> None:
        """Say that `round` rounds are done; cheap enough for every round. metrics: the newest line of the record."""
        now = time.monotonic()
        if now < self.next and round < self.rounds:
            return
        self.next = now + self.interval
        text = f"round {round}/{self.rounds}"
        for name in ("loss", "grad_norm", "accuracy"):
            if math.isfinite(metrics.get(name, math.nan)):
                text += f"  {name} {metrics[name]:.4g}"
        rate = (round - self.first) / max(now - self.start, 1e-9)
        text += f"  {rate:.3g} rounds/s"
        if rate > 0 and round < self.rounds:
            text += f"  {_duration((self.rounds - round) / rate)} left"
        self.stream.write(f"\r{text}\x1b[K" if self.rewrite else text + "\n")
        self.stream.flush()
        self.open = self.rewrite

    def close(self) -> None:
        """End the line, so that what is printed next starts on its own."""
        if self.open:
            self.stream.write("\n")
            self.open = False


def _duration(seconds: float) -> str:
    """12 s · 3 min · 4.5 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
