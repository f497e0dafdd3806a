"""What Byzantine workers send: an attack sees the honest rows of the round and replaces the others.

An attack is a function (rows, byzantine, **constants) → Rows; `byzantine` (n,) bool marks the workers that lie. A new
one is a function in this file, marked @attack: its name is the config's `attack = { name = … }`, its keyword
arguments are the keys."""

from collections.abc import Callable

import numpy as np

from .rows import Rows

ATTACKS: dict[str, Callable] = {}


def attack(function: Callable) -> Callable:
    """Make a function an attack that a config can name."""
    ATTACKS[function.__name__] = function
    return function


@attack
def sign_flip(rows: Rows, byzantine: np.ndarray) -> Rows:
    """SF: every Byzantine worker sends minus the mean of the honest vectors. Li et al. (2020), "Learning to detect
    malicious clients for robust federated learning", arXiv:2002.00211; Allouah et al. (2024), arXiv:2405.14432."""
    W = np.eye(rows.n)
    W[byzantine] = -honest_mean(byzantine)
    return rows.mix(W)


def honest_mean(byzantine: np.ndarray) -> np.ndarray:
    """The weights of the honest workers' mean, (n,)."""
    honest = ~byzantine
    return honest / honest.sum()
