"""Files that are whole or not there: full writes at an offset, atomic replacement, errors in a person's words."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import numpy as np


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at a file offset; OSError when the disk is full."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def read_at(fd: int, count: int, offset: int) -> np.ndarray:
    """`count` bytes from a file offset, as (count,) uint8; OSError where the file is shorter."""
    data = np.empty(count, np.uint8)
    view = data.data
    while view:
        done = os.preadv(fd, [view], offset)
        if done == 0:
            raise OSError(f"the file ends at byte {offset}, {len(view)} bytes too early")
        view, offset = view[done:], offset + done
    return data


def replace(temporary: Path, path: Path) -> None:
    """Give the (synchronised) temporary file its final name, atomically and durably."""
    os.replace(temporary, path)
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        path.unlink()


def reason(error: BaseException) -> str:
    """Why a file operation failed, in a few words: the system's own, also from inside HDF5's long messages."""
    text = str(getattr(error, "strerror", None) or (error.args or [error])[0])
    found = re.search(r"error message = '([^']+)'", text)
    return found[1].capitalize() if found else text.partition("\n")[0]
