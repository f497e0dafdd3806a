"""Our rules and attacks against ByzFL 0.0.11: against outputs of it that byzfl_record.py wrote down, and against ByzFL
itself, on other inputs, where it is installed. What is not compared, and why, stands in byzfl_record.py. The constants
are ByzFL's; its geometric median is left before it has converged, as ours is if `iterations` says so."""

from types import SimpleNamespace

import numpy as np
import pytest

import byzfl_record
from mpiclip.attacks import ATTACKS
from mpiclip.peers import byzfl
from mpiclip.rows import Rows
from mpiclip.rules import RULES, Chain

FEW_STEPS = {"name": "geometric_median", "iterations": 3, "nu": 0.1}
OURS = {
    "geometric_median": FEW_STEPS,
    "geometric_median, 8 steps": {"name": "geometric_median", "iterations": 8, "nu": 1e-9},
    "geometric_median, converged": "geometric_median",
    "centered_clipping": {"name": "centered_clipping", "iterations": 3, "threshold": 2.0},
    "clipping": {"name": "clipping", "threshold": 2.0},
    "monna": {"name": "monna", "pivot": 1},
}
RECORDED = dict(np.load(byzfl_record.OUTPUTS))


def entries(label: str, n: int) -> list:
    """The chain of a label, as a config would have it."""
    if label in OURS:
        return [OURS[label]]
    ours = OURS | {"bucketing": {"name": "bucketing", "s": n}}
    return [ours.get(name, name) for name in label.split(", ")]


def applied(X, chain: list, f: int, memory=None):
    """What our rules make of the rows: (d,), or (rows, d) where the last one is a pre-aggregation."""
    rows = Rows(X)
    memory = np.zeros_like(X[0]) if memory is None else memory
    for link in Chain(chain, f, len(X)).links:
        rows = link.applied(rows, f, lambda: np.random.default_rng(0), lambda: memory)
    return rows.columns() if isinstance(rows, Rows) else rows


def attacked(X, label: str, f: int):
    """What the last f workers send."""
    name, _, rules = label.partition(": ")
    byzantine = np.arange(len(X)) >= len(X) - f
    scene = SimpleNamespace(harm=lambda rows: harm(rows.columns(), rules, f))
    return ATTACKS[name](Rows(X), byzantine, scene, **({"worker": 2} if name == "mimic" else {})).columns()[-1]


def harm(X, rules: str, f: int) -> float:
    """How far the rules are from the honest workers' mean."""
    return np.linalg.norm(applied(X, entries(rules, len(X)), f) - X[:len(X) - f].mean(0))


def agree(outputs: dict, seed: int, case: str) -> None:
    """Ours as ByzFL's outputs of this case."""
    X, f = byzfl_record.cases(seed)[case]
    n, before = len(X), X.copy()
    seen = 0
    for key, theirs in outputs.items():
        where, label = key.split(": ", 1)
        chain = entries(label.removesuffix(", again"), n)
        # Of nearly equal rows the difference counts: 1e-6 of the rows, and known to 1e-9 of it.
        close = {"rtol": 1e-15 if case == "near" else 1e-9, "atol": 1e-14 if case == "near" else 1e-12, "err_msg": key}
        if where == case:
            if label.endswith("again"):         # the second call goes on from where the first has been
                memory = np.zeros_like(X[0])
                applied(X, chain, f, memory)
                found = applied(2 - X, chain, f, memory)
            else:
                found = applied(X, chain, f)
            np.testing.assert_allclose(found, theirs, **close)
            seen += 1
        elif where == f"{case}, attacked":
            found, rules = attacked(X, label, f), label.partition(": ")[2]
            if rules:       # factors of equal harm are equally good, and rounding chooses
                reached = harm(np.vstack([X[:n - f], *[found] * f]), rules, f)
                aimed = harm(np.vstack([X[:n - f], *[theirs] * f]), rules, f)
                np.testing.assert_allclose(reached, aimed, rtol=1e-6, err_msg=key)
            else:
                np.testing.assert_allclose(found, theirs, **close)
            seen += 1
    np.testing.assert_array_equal(X, before)
    assert seen >= 12


@pytest.mark.parametrize("case", byzfl_record.cases())
def test_as_byzfl_did(case):
    agree(RECORDED, 0, case)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_byzfl_does(seed):
    """Seed 0: and the recorded outputs are what ByzFL gives."""
    library = byzfl()
    if library is None:
        pytest.skip("ByzFL or PyTorch is not installed; its recorded outputs are compared")
    outputs = byzfl_record.outputs(library, seed)
    if seed == 0:
        assert outputs.keys() == RECORDED.keys()
        for key, output in outputs.items():
            np.testing.assert_allclose(output, RECORDED[key], rtol=1e-12, err_msg=key)
    for case in byzfl_record.cases():
        agree(outputs, seed, case)


def test_every_rule_of_byzfl_is_compared():
    compared = {name for key in RECORDED for name in key.split(": ", 1)[1].split(", ")}
    assert set(RULES) - compared == {"caf"}
