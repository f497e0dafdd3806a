"""Random numbers as a function of (seed, purpose, worker, round): no generator state to save or to lose."""

import zlib

import numpy as np


def stream(seed: int, purpose: str, worker: int = 0, round: int = 0, step: int = 0) -> np.random.Generator:
    """The generator of one draw: `step` counts a worker's draws within a round. Counter-based (Philox 4x64, Salmon et
    al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): key = (seed, purpose), counter = (0, step, worker, round),
    so that no two draws overlap and none depends on the number of ranks."""
    key = np.array([seed, zlib.crc32(purpose.encode())], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, step, worker, round], np.uint64)))
