"""What a private run must never lose: the key of its noise, and how many rounds have been released."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from . import disk
from .errors import InputError

RELEASED = "released"


class Ledger:
    """The book of a private run, kept by rank 0 in its folder: DIR/noise.key, which only its owner may read, and
    DIR/released, which is written before a round's messages leave their workers.

    A run that was killed repeats the rounds since its newest checkpoint. What it then sends may differ from what it
    sent before in the last digits: with the same noise the difference would show what the noise hides. So repeated
    rounds get noise of their own, and count twice.

    Checkpoints hold the workers' own state, without noise: their folder becomes one that only its owner may enter.

    secret    the key of this attempt's noise
    repeated  how many rounds were released more than once"""

    def __init__(self, dir: Path | None, start: int | None = None):
        """dir: None keeps nothing. start: the number of rounds of the checkpoint from which a run goes on; None: a new
        run. Raises InputError if the folder cannot be written, or if the book of a run is not there."""
        self.repeated, self._fd = 0, -1
        if dir is None:
            self.secret = secrets.token_bytes(32)
            return
        key, checkpoints = dir / "noise.key", dir / "checkpoints"
        try:
            checkpoints.mkdir(exist_ok=True)
            checkpoints.chmod(0o700)
            if start is None:
                root = secrets.token_bytes(32)
                disk.write_at(fd := os.open(key, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), root, 0)
                os.fsync(fd)
                os.close(fd)
            else:
                root = key.read_bytes()
                done, repeated = _read(dir)
                self.repeated = repeated + max(0, done - start)
                if len(root) != 32:
                    raise ValueError(f"{len(root)} bytes")
            self._fd = os.open(dir / RELEASED, os.O_WRONLY | os.O_CREAT, 0o600)
            self.release(start or 0)
        except (OSError, ValueError) as error:
            reason = disk.reason(error) if isinstance(error, OSError) else f"damaged: {error}"
            raise InputError(f"{dir}: noise.key and released, which hold a private run's key and how many rounds it "
                             f"has released, cannot be used: {reason}") from None
        self.secret = root + self.repeated.to_bytes(8, "little") if self.repeated else root

    def release(self, rounds: int) -> None:
        """So many rounds have been released once this is written. Raises InputError where it cannot be."""
        if self._fd < 0:
            return
        try:
            disk.write_at(self._fd, f"{rounds:20d} {self.repeated:20d}\n".encode(), 0)
        except OSError as error:
            raise InputError(f"the number of released rounds cannot be written: {disk.reason(error)}") from None

    def close(self) -> None:
        """No round will be released any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def released(dir: Path) -> int | None:
    """How many rounds the private run in `dir` has released so far, those that were repeated counted again; None where
    there is no book of it, or it cannot be read."""
    try:
        return sum(_read(dir))
    except (OSError, ValueError):
        return None


def _read(dir: Path) -> tuple[int, int]:
    """(rounds, how many of them were repeated). ValueError where the book is damaged."""
    rounds, repeated = map(int, (dir / RELEASED).read_text().split())
    return rounds, repeated
