"""Rows and robust rules against float64 references (tests/reference.py), and the invariants that ARC has on paper
(Allouah et al. 2024, arXiv:2405.14432)."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from operator import methodcaller
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import Bounds, LinearConstraint, milp

import mpiclip
import reference
from mpiclip import columns, rules
from mpiclip.attacks import sign_flip
from mpiclip.columns import BLOCK
from mpiclip.rows import Rows
from mpiclip.streams import stream

CHAINS = [["mean"], ["median"], ["trimmed_mean"], ["arc"], ["nnm"], ["arc", "trimmed_mean"], ["arc", "median"],
          ["nnm", "trimmed_mean"], ["arc", "nnm", "median"], ["nnm", "arc", "nnm", "mean"]]
ROBUST = [names for names in CHAINS if names[-1] in ("median", "trimmed_mean")]     # "nnm" alone, say, is not
chains = pytest.mark.parametrize("names", CHAINS, ids="-".join)
many_columns = pytest.mark.parametrize("d", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
examples = settings(max_examples=25, deadline=None)


def rng(seed=0):
    return np.random.default_rng(seed)


def by_definition(X, names, f):
    X = X.astype(float)
    for entry in names:
        constants = dict(entry) if isinstance(entry, dict) else {"name": entry}
        name = constants.pop("name")
        if name == "bucketing":
            constants["order"] = stream(0, "rules").permutation(len(X))
        X = getattr(reference, name)(X, f, **constants)
    return X if X.ndim == 1 else sum(X) / len(X)


def by_two_holders(X, cut, hold):
    """[hold(rows) of the columns before `cut`, of those from there on], at the same time: what each holder has to add
    up over the columns is added up over both."""
    added, met = [None, None], Barrier(2)

    def total(here, part):
        added[here] = part
        met.wait()
        result = added[0] + added[1]
        met.wait()
        return result

    holders = [Rows(half, partial(total, here)) for here, half in enumerate((X[:, :cut], X[:, cut:]))]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(hold, holders))


# Every rule, alone and behind others; what each is equivariant to, and whether f huge rows leave it where it is.
TRANSLATED, SCALED, ROBUST_TO_HUGE = "translation", "scale", "huge"
BOTH = {TRANSLATED, SCALED}
EVERY: dict[str, tuple[list, set[str]]] = {
    "mean": (["mean"], BOTH),
    "median": (["median"], BOTH | {ROBUST_TO_HUGE}),
    "trimmed_mean": (["trimmed_mean"], BOTH | {ROBUST_TO_HUGE}),
    "mean_around_median": (["mean_around_median"], BOTH | {ROBUST_TO_HUGE}),
    "geometric_median": (["geometric_median"], BOTH | {ROBUST_TO_HUGE}),
    "three_steps": ([{"name": "geometric_median", "iterations": 3, "nu": 0.1}], set()),
    "smoothed": ([{"name": "geometric_median", "nu": 2.0}], {TRANSLATED, ROBUST_TO_HUGE}),
    "krum": (["krum"], BOTH | {ROBUST_TO_HUGE}),
    "multi_krum": (["multi_krum"], BOTH | {ROBUST_TO_HUGE}),
    "mda": (["mda"], BOTH | {ROBUST_TO_HUGE}),
    "smea": (["smea"], BOTH | {ROBUST_TO_HUGE}),
    "caf": (["caf"], BOTH | {ROBUST_TO_HUGE}),
    "monna": ([{"name": "monna", "pivot": 1}], BOTH | {ROBUST_TO_HUGE}),
    "centered_clipping": ([{"name": "centered_clipping", "threshold": 3, "iterations": 4}], {ROBUST_TO_HUGE}),
    "arc": (["arc"], {SCALED}),
    "clipping": ([{"name": "clipping", "threshold": 5}], {ROBUST_TO_HUGE}),
    "nnm": (["nnm"], BOTH),
    "bucketing": ([{"name": "bucketing", "s": 2}], BOTH),
    "arc-nnm-trimmed_mean": (["arc", "nnm", "trimmed_mean"], {SCALED, ROBUST_TO_HUGE}),
    "nnm-geometric_median": (["nnm", "geometric_median"], BOTH | {ROBUST_TO_HUGE}),
    "clipping-nnm-multi_krum": (["clipping", "nnm", "multi_krum"], {ROBUST_TO_HUGE}),
    "arc-caf": (["arc", "caf"], {SCALED, ROBUST_TO_HUGE}),
    "nnm-smea": (["nnm", "smea"], BOTH | {ROBUST_TO_HUGE}),
    "arc-centered_clipping": (["arc", "centered_clipping"], {ROBUST_TO_HUGE}),
}
every = pytest.mark.parametrize("names", [names for names, _ in EVERY.values()], ids=EVERY.keys())


def that_are(*kinds):
    chosen = {name: names for name, (names, has) in EVERY.items() if has >= set(kinds)}
    return pytest.mark.parametrize("names", chosen.values(), ids=chosen.keys())


@st.composite
def matrices(draw):
    """(X (n, d), f), n > 2f; small integers now and then, so that there are ties"""
    n = draw(st.integers(1, 9))
    f = draw(st.integers(0, (n - 1) // 2))
    elements = draw(st.sampled_from([st.floats(-100, 100, width=32), st.integers(-2, 2).map(float)]))
    return draw(arrays(np.float64, (n, draw(st.integers(1, 6))), elements=elements)), f


# ---- Rows


@examples
@given(matrices(), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_mixings_are_matrices_one_after_another(case, mixings, seed):
    """norms, gram, distances, columns, mean of W_k … W_1 X, though X is touched only once; W need not be square."""
    X, _ = case
    rows, expected, generator = Rows(X), X, rng(seed)
    for _ in range(mixings):
        W = generator.standard_normal((generator.integers(1, 6), len(expected)))
        rows, expected = rows.mix(W), W @ expected
    assert rows.n == len(expected)
    size = 1e-11 * (1 + np.abs(expected).max()) * max(1, np.abs(X).max())
    np.testing.assert_allclose(rows.columns(), expected, atol=size)
    np.testing.assert_allclose(rows.mean(), expected.mean(0), atol=size)
    np.testing.assert_allclose(rows.norms() ** 2, (expected**2).sum(1), atol=size * 100, rtol=1e-10)
    np.testing.assert_allclose(rows.gram(), expected @ expected.T, atol=size * 100, rtol=1e-10)
    distances = ((expected[:, None] - expected[None]) ** 2).sum(2)
    np.testing.assert_allclose(rows.distances(), distances, atol=size * 100, rtol=1e-10)
    np.testing.assert_allclose(rows.coordinates(columns.median), np.median(expected, axis=0), atol=size)


def test_mixings_are_applied_in_order():
    X = np.array([[1.0, 2.0], [3.0, 4.0]])
    swap, first = np.array([[0.0, 1], [1, 0]]), np.array([[1.0, 0], [0, 0]])
    assert Rows(X).mix(first).mix(swap).columns().tolist() == [[0, 0], [1, 2]]
    assert Rows(X).mix(swap).mix(first).columns().tolist() == [[3, 4], [0, 0]]


@many_columns
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_blocks_of_columns(d, dtype):
    """The last block is shorter, or is not there."""
    X = rng(d).normal(3, 1, (6, d)).astype(dtype)
    exact, rows = X.astype(float), Rows(X)
    W = rng(1).standard_normal((4, 6))
    tolerance = {"rtol": 0, "atol": 2e-5 if dtype == "float32" else 1e-12}
    np.testing.assert_allclose(rows.norms(), np.linalg.norm(exact, axis=1), rtol=1e-12)
    products = 1e-11 if dtype == "float64" else 1e-6       # those of float32 may be taken in float32
    np.testing.assert_allclose(rows.gram(), exact @ exact.T, rtol=products)
    np.testing.assert_allclose(rows.distances(), ((exact[:, None] - exact[None]) ** 2).sum(2), rtol=products, atol=1e-9)
    for names in (["mean"], ["trimmed_mean"], ["arc", "nnm", "median"]):
        found = rules.Chain(names, 2)(Rows(X), lambda: None, lambda name: None)
        assert found.shape == (d,) and found.dtype == dtype
        np.testing.assert_allclose(found, by_definition(X, names, 2), **tolerance)
    np.testing.assert_allclose(rows.mix(W).coordinates(columns.median), np.median(W @ exact, axis=0), **tolerance)


def test_what_most_rows_have_in_common_is_nothing_huge():
    X = rng().normal(size=(9, 40)).astype("float32")
    X[4] *= 1e12
    W = np.full((9, 9), 1 / 9)
    W[0] = np.where(np.arange(9) == 4, 0, 1 / 8)
    rows = Rows(X)
    rows.norms()
    found = rows.mix(W).columns()
    np.testing.assert_allclose(found[0], np.delete(X, 4, 0).mean(0), atol=1e-6)
    np.testing.assert_allclose(found[1:], W[1:] @ X.astype(float), rtol=1e-5)


def test_appended_rows():
    """Vectors that are no mixtures of the rows: a point near the others, a small direction, and a huge one."""
    X = 5 + rng().normal(size=(5, 7))
    before, W = X.copy(), rng(1).normal(size=(5, 5))
    new = [X[0] + 0.1, 1e-3 * X[1], np.full(7, 1e12)]
    for rows, expected in ((Rows(X), X), (Rows(X).mix(W), W @ X)):
        expected = np.vstack([expected, *new])
        rows = rows.append(*new[:2]).append(new[2])
        np.testing.assert_allclose(rows.columns(), expected, rtol=1e-13)
        np.testing.assert_allclose(rows.norms(), np.linalg.norm(expected, axis=1), rtol=1e-10)
        distances = ((expected[:, None] - expected[None]) ** 2).sum(2)
        np.testing.assert_allclose(rows.distances(), distances, rtol=1e-9, atol=1e-9)
        w = rng(2).normal(size=8)
        np.testing.assert_allclose(rows.combine(w), w @ expected, rtol=1e-10)
        np.testing.assert_allclose(rows.distances_to(new[0]), ((expected - new[0]) ** 2).sum(1), rtol=1e-9, atol=1e-20)
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms_and_products_in_one_pass(dtype, monkeypatch):
    X = (3 + rng().normal(size=(6, 500))).astype(dtype)
    rows, exact = Rows(X), X.astype(float)
    rows.measure()
    for spoilt in (0, np.nan, 1e30, 1e200):                 # what takes more than one pass is as right as ever
        bad = X.copy()
        with np.errstate(over="ignore"):
            bad[2] = np.asarray(spoilt).astype(dtype)
        other = Rows(bad)
        other.measure()
        assert other.finite().tolist() == [i != 2 or (np.isfinite(bad[2, 0]) and spoilt < 1e150) for i in range(6)]
        if spoilt in (0, 1e30):
            np.testing.assert_allclose(other.distances()[0, 1], ((exact[0] - exact[1]) ** 2).sum(), rtol=1e-6)
            np.testing.assert_allclose(other.norms(), np.linalg.norm(bad.astype(float), axis=1), rtol=1e-6)
    monkeypatch.setattr("mpiclip.rows.ops.norms", None)     # nobody asks for these any more
    np.testing.assert_allclose(rows.norms(), np.linalg.norm(exact, axis=1), rtol=1e-6 if dtype == "float32" else 1e-12)
    assert rows.finite().all()


def test_long_rows_need_no_second_look(monkeypatch):
    """What would blur is a mean that they draw far away."""
    X = (3 + rng().normal(size=(16, 500))).astype("float32")
    X[[2, 5]] = np.array([[100], [30]]) * rng(1).normal(size=(2, 500))
    rows, exact = Rows(X), X.astype(float)
    rows.measure()
    monkeypatch.setattr("mpiclip.rows.ops.norms", None)
    monkeypatch.setattr("mpiclip.rows.columns.gram", None)
    np.testing.assert_allclose(rows.norms(), np.linalg.norm(exact, axis=1), rtol=1e-6)
    np.testing.assert_allclose(rows.distances(), ((exact[:, None] - exact[None]) ** 2).sum(2), rtol=1e-5)


LOOKS = [["mean"], [{"name": "monna", "pivot": 1}], ["centered_clipping"]]


@pytest.mark.parametrize("names", LOOKS, ids=str)
def test_one_pass_for_the_check_and_what_a_rule_looks_at(names, monkeypatch):
    """Of float32 rows there is no pass of its own for the check, however large they are."""
    X = rng(1).normal(3, 1, (7, 300)).astype("float32")
    X[5], X[6], f = 3e38, -3e38, 0 if names == ["mean"] else 2
    monkeypatch.setattr(Rows, "_lengths", None)
    np.testing.assert_allclose(mpiclip.aggregate(X, names, f), by_definition(X, names, f), rtol=1e-5, atol=2e32)


@pytest.mark.parametrize("names", LOOKS, ids=str)
@pytest.mark.parametrize("bad", [[np.nan, 1], [np.inf, -np.inf], [-np.inf, -np.inf], [0, 1e200]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_that_are_not_finite_when_a_rule_looks_at_them(names, bad, dtype):
    """Also those whose sum is: ∞ − ∞ is no number, and of float64 1e200 − 1e200 must not hide it."""
    X, memory = rng(1).normal(3, 1, (7, 9)).astype(dtype), {}
    with np.errstate(over="ignore"):
        X[4, 3], X[5, 3] = np.array(bad).astype(dtype)
        X[6, 3] = -X[5, 3] if bad[1] == 1e200 else 0
    with pytest.raises(mpiclip.InputError, match="not finite"):
        mpiclip.aggregate(X, names, 0)
    fine = np.where((np.abs(X.astype(float)) < 1e150).all(1, keepdims=True), X, 0)
    for _ in range(2):
        found = mpiclip.aggregate(X, names, 3, memory=memory)
    again = {}
    for _ in range(2):
        expected = mpiclip.aggregate(fine, names, 3, memory=again)
    assert found.tobytes() == expected.tobytes() and np.isfinite(found).all()
    assert all(memory[name].tobytes() == again[name].tobytes() for name in again)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_without_some(value):
    X = rng().normal(size=(5, 7))
    X[1, 3], marked = value, np.array([0, 1, 0, 0, 1], bool)
    W = np.eye(5, 7)
    W[4], W[1] = np.eye(7)[5], np.eye(7)[6]
    for rows in (Rows(X), Rows(X).append(np.full(7, value), np.ones(7)).mix(W)):
        assert not rows.finite()[1 if rows.E is None else 4]
        found = rows.without(marked)
        np.testing.assert_array_equal(found.columns(), np.where(marked[:, None], 0, X))
        np.testing.assert_allclose(found.norms(), np.where(marked, 0, np.linalg.norm(X, axis=1)), atol=1e-12)
        assert found.finite().all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("mixed", [False, True])
def test_finite_rows(value, mixed):
    """1e200: finite, but its square is not, and no rule could measure the row."""
    X = rng().normal(size=(5, BLOCK + 5))
    X[3, BLOCK + 2] = value
    with np.errstate(all="ignore"):
        finite = (Rows(X).mix(np.eye(5)[[0, 3, 1]]) if mixed else Rows(X)).finite()
    if mixed:
        assert not finite[1]
    else:
        assert finite.tolist() == [True, True, True, False, True]


def test_totals_make_columns_of_other_ranks_count():
    """Two holders of columns: what each would add is added up, and both decide alike."""
    X = rng().normal(size=(5, 30)) * np.arange(1, 6)[:, None]
    for attribute in ("norms", "gram", "distances"):
        found = by_two_holders(X, 11, methodcaller(attribute))
        np.testing.assert_array_equal(found[0], found[1])
        np.testing.assert_allclose(found[0], getattr(Rows(X), attribute)(), rtol=1e-10, atol=1e-10)


# ---- rules


@chains
@examples
@given(case=matrices())
def test_every_chain_is_its_definition(names, case):
    """NNM is a choice among rows, which rounding may tip: its ties are in the next test."""
    X, f = case
    if "nnm" in names:
        X = X + rng(3).normal(size=X.shape)
    found, expected = mpiclip.aggregate(X, names, f), by_definition(X, names, f)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_nnm_ties_go_to_the_first_row():
    """The corners of a square: both neighbours of a corner are equally near."""
    X = np.array([[1.0, 1], [1, -1], [-1, -1], [-1, 1]])
    np.testing.assert_allclose(rules.nnm(Rows(X), 2).columns(), [[1, 0], [1, 0], [0, -1], [0, 1]], atol=1e-15)
    np.testing.assert_allclose(rules.nnm(Rows(X), 2).columns(), reference.nnm(X, 2), atol=1e-15)


@pytest.mark.parametrize("names", [c for c in CHAINS if "nnm" not in c] + [["nnm"], ["arc", "nnm", "median"]],
                         ids="-".join)
@settings(max_examples=15, deadline=None)
@given(case=matrices(), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_the_workers_does_not_matter(names, case, seed):
    X, f = case
    if "nnm" in names:
        X = X + rng(3).normal(size=X.shape)
    order = rng(seed).permutation(len(X))
    np.testing.assert_allclose(mpiclip.aggregate(X[order], names, f), mpiclip.aggregate(X, names, f), rtol=1e-9,
                               atol=1e-9)


@pytest.mark.parametrize("names", ROBUST, ids="-".join)
@pytest.mark.parametrize("size", [1e3, 1e12, 1e30])
@pytest.mark.parametrize("n, f", [(3, 1), (5, 2), (8, 3), (9, 4), (20, 6)])
def test_f_huge_rows_cannot_drag_the_result_away(names, size, n, f):
    """All along one direction, opposed, or one each: the result stays within a few spreads of the honest rows."""
    honest = rng(n).normal(5, 1, (n - f, 30))
    for direction in (np.ones((f, 30)), -np.ones((f, 30)), rng(f).normal(size=(f, 30))):
        for dtype in ("float32", "float64"):
            X = np.vstack([size * direction[:f // 2], honest, size * direction[f // 2:]]).astype(dtype)
            before = X.copy()
            result = mpiclip.aggregate(X, names, f)
            np.testing.assert_array_equal(X, before)
            longest = np.linalg.norm(honest, axis=1).max()
            assert np.linalg.norm(result) < 3 * longest
            if "arc" not in names:          # which shortens towards 0; the others stay among the honest rows
                assert np.linalg.norm(result - honest.mean(0)) < 3 * np.sqrt(30)


@pytest.mark.parametrize("names", [["nnm", "trimmed_mean"], ["nnm", "median"], ["arc", "nnm", "trimmed_mean"]],
                         ids="-".join)
@pytest.mark.parametrize("huge, large", [(1e2, 30), (1e6, 30), (1e12, 30), (1e15, 1e6)])
def test_a_huge_row_does_not_blur_the_others_distances(names, huge, large):
    """One liar must not hide another: next to a huge row, NNM has to tell a large one from the honest ones, too."""
    honest = rng(2).normal(1, 1, (7, 50))
    X = np.vstack([honest, large * np.ones((1, 50)), huge * rng(3).normal(size=(1, 50))])
    np.testing.assert_allclose(mpiclip.aggregate(X, names, 2), by_definition(X, names, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("names", [["krum"], ["nnm", "trimmed_mean"], ["mda"], ["caf"], ["geometric_median"]],
                         ids="-".join)
def test_nor_where_most_rows_are_zero(names):
    """The median length says nothing of how long rows usually are."""
    X = np.zeros((13, 50))
    X[0], X[1], X[2:6] = 1e10, 1e30, rng(2).normal(size=(4, 50))
    assert np.linalg.norm(mpiclip.aggregate(X, names, 2)) < 10


@pytest.mark.parametrize("names", [["caf"], ["geometric_median"], ["arc", "krum"]], ids="-".join)
def test_rows_whose_distance_is_no_number_are_not_finite(names):
    X = rng(2).normal(size=(7, 10))
    X[5], X[6] = 1.3e154 / 10**0.5, -1.3e154 / 10**0.5         # their squares are finite, that of their distance is not
    assert np.linalg.norm(mpiclip.aggregate(X, names, 2)) < 10


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9])
def test_medians_of_even_and_odd_numbers(n):
    X = np.array([np.arange(n), -np.arange(n), np.ones(n), rng(n).permutation(n)]).T.astype(float)
    middle = (n - 1) / 2
    np.testing.assert_array_equal(rules.median(Rows(X), 0), [middle, -middle, 1, middle])
    for f in range((n + 1) // 2):           # evenly spaced: every trimmed mean is the middle
        np.testing.assert_allclose(rules.trimmed_mean(Rows(X), f), [middle, -middle, 1, middle], atol=1e-15)


@examples
@given(matrices())
def test_with_the_largest_f_a_trimmed_mean_is_the_median(case):
    X, _ = case
    f = (len(X) - 1) // 2
    np.testing.assert_allclose(rules.trimmed_mean(Rows(X), f), rules.median(Rows(X), f), rtol=1e-14)


@examples
@given(matrices())
def test_coordinate_rules_stay_among_the_values_that_honest_workers_sent(case):
    """Whichever rows are honest: each coordinate is between the (f+1)-th smallest and largest."""
    X, f = case
    ordered, n = np.sort(X, axis=0), len(X)
    for rule in (rules.median, rules.trimmed_mean):
        found = rule(Rows(X), f)
        assert (ordered[f] - 1e-9 <= found).all() and (found <= ordered[n - f - 1] + 1e-9).all()


# ---- every rule


def inputs(kind, n, f, d):
    """(X, spread of the honest rows); row 1 is honest."""
    honest, generator = rng(n + d).normal(3, 1, (n, d)), rng(f)
    lying = np.array([0, 2, 3, 5][:f], int)
    if kind == "random":
        return honest, np.sqrt(d)
    if kind == "tied":              # several equal rows: which of them is chosen makes no difference
        values = rng(d + n).integers(-3, 4, (4, d)).astype(float)
        return values[[1] + [0] * (n - f - 1) + [1, 2, 2, 3][:f]], 1.0
    if kind == "nearly equal":
        return 5 + rng(1).normal(size=d) + 1e-6 * honest, 1e-6 * np.sqrt(d)
    if kind == "huge":
        honest[lying] = 1e30 * generator.normal(size=(f, d))
        return honest, np.sqrt(d)
    if kind == "huge together":     # and of different sizes
        honest[lying] = 10.0 ** np.array([30, 18, 3, 30])[:f, None] * generator.normal(size=d)
        return honest, np.sqrt(d)
    return np.where(np.arange(n)[:, None] % 2, honest, 10 * honest - 5) * 10.0 ** generator.integers(-1, 2, (n, 1)), 9.0


@every
@pytest.mark.parametrize("kind", ["random", "tied", "nearly equal", "huge", "huge together", "heterogeneous"])
def test_every_rule_is_its_definition(names, kind):
    for n, f, d, dtypes in ((3, 1, 4, "d"), (5, 2, 30, "d"), (9, 4, 5, "df"), (8, 2, 30, "d"), (4, 0, 3, "d")):
        X, spread = inputs(kind, n, f, d)
        for dtype in dtypes:
            if kind == "nearly equal":      # of float32, the result has no digits more
                accuracy = 2e-8 if dtype == "d" else 0.5e6
            else:
                accuracy = 1e-9 if dtype == "d" else 1e-5
            X, before = X.astype(dtype), X.astype(dtype)
            found, expected = mpiclip.aggregate(X, names, f), by_definition(X, names, f)
            np.testing.assert_array_equal(X, before)
            assert found.dtype == dtype
            limit = accuracy * (spread + np.abs(expected).max() * (kind != "nearly equal"))
            np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


@every
def test_every_rule_knows_no_order(names):
    """MoNNA's pivot goes where its row goes; bucketing deals rows out by their places."""
    if {"name": "bucketing", "s": 2} in names:
        return
    for n, f in ((5, 2), (12, 3)):
        X, order = rng(n).normal(1, 2, (n, 20)), rng(f).permutation(n)
        if names == EVERY["mda"][0]:        # many sets have the smallest diameter: only two rows decide it
            X[:f] += 10
        moved = [{**e, "pivot": int(np.flatnonzero(order == e["pivot"])[0])}
                 if isinstance(e, dict) and "pivot" in e else e for e in names]
        np.testing.assert_allclose(mpiclip.aggregate(X[order], moved, f), mpiclip.aggregate(X, names, f), rtol=1e-9,
                                   atol=1e-9)


@that_are(SCALED)
def test_every_rule_scales(names):
    X = rng().normal(1, 2, (9, 30))
    for s in (7.0, 1e-12, 1e15):
        np.testing.assert_allclose(mpiclip.aggregate(s * X, names, 3), s * mpiclip.aggregate(X, names, 3), rtol=1e-8,
                                   atol=1e-9 * s)


@that_are(TRANSLATED)
def test_every_rule_moves_along(names):
    X, by = rng().normal(1, 2, (9, 30)), rng(1).normal(0, 100, 30)
    np.testing.assert_allclose(mpiclip.aggregate(X + by, names, 3), mpiclip.aggregate(X, names, 3) + by, rtol=0,
                               atol=1e-9)


@that_are(ROBUST_TO_HUGE)
@pytest.mark.parametrize("n, f", [(3, 1), (9, 4), (12, 3)])
def test_f_huge_rows_cannot_drag_any_rule_away(names, n, f):
    honest = rng(n).normal(2, 1, (n - f, 30))
    longest = np.linalg.norm(honest, axis=1).max()
    for size in (1e3, 1e30):
        for direction in (np.ones((f, 30)), rng(f).normal(size=(f, 30)), 10.0**-np.arange(f)[:, None] * np.ones(30)):
            X = np.vstack([honest[:2], size * direction, honest[2:]])
            assert np.linalg.norm(mpiclip.aggregate(X, names, f)) < 3 * longest


@every
def test_every_rule_keeps_rows_that_are_equal(names):
    """Even where rules without ARC shorten them: then they are shortened alike."""
    x = rng().normal(size=30)
    for n, f in ((2, 0), (7, 3)):
        for X in (np.tile(x, (n, 1)), np.zeros((n, 30))):
            expected = by_definition(X, names, f)
            np.testing.assert_allclose(mpiclip.aggregate(X, names, f), expected, rtol=1e-12, atol=1e-14)
            X = X * (1 + 1e-15 * rng(n).integers(-1, 2, X.shape))          # up to rounding
            np.testing.assert_allclose(mpiclip.aggregate(X, names, f), expected, rtol=1e-12, atol=1e-14)


@every
def test_holders_of_columns_agree(names):
    """Two ranks with half of the columns each take the same decisions, and have the whole's columns."""
    X = rng(4).normal(1, 2, (9, 50))
    chain = rules.Chain(names, 3, 9)

    def hold(rows):
        return chain(rows, lambda: stream(0, "rules"), lambda name: np.zeros(rows.X.shape[1]))

    np.testing.assert_allclose(np.concatenate(by_two_holders(X, 17, hold)), mpiclip.aggregate(X, names, 3), rtol=1e-9,
                               atol=1e-12)


def test_golden_values():
    """Of ByzFL's documentation, all on the same three rows."""
    X = np.arange(1.0, 10).reshape(3, 3)
    means = {"krum": 2, "multi_krum": 3.5, "mda": 3.5, "smea": 3.5, "mean_around_median": 3.5, "caf": 5, "mean": 5,
             "centered_clipping": 5, "median": 5, "trimmed_mean": 5}
    for name, middle in means.items():
        np.testing.assert_allclose(mpiclip.aggregate(X, [name], 1), middle + np.array([-1, 0, 1]), atol=1e-13)
    np.testing.assert_allclose(mpiclip.aggregate(X, [{"name": "monna", "pivot": 1}], 1), [2.5, 3.5, 4.5])
    np.testing.assert_allclose(mpiclip.aggregate(X, [{"name": "geometric_median", "iterations": 3, "nu": 0.1}], 1),
                               [3.78788764, 4.78788764, 5.78788764], atol=5e-9)
    np.testing.assert_allclose(rules.arc(Rows(X), 1).columns()[2], [4.41004009, 5.04004582, 5.67005155], atol=5e-9)
    np.testing.assert_allclose(rules.nnm(Rows(X), 1).columns(), [[2.5, 3.5, 4.5], [2.5, 3.5, 4.5], [5.5, 6.5, 7.5]])
    np.testing.assert_allclose(rules.clipping(Rows(X), 1, threshold=2.0).columns(), [
        [0.5345, 1.0690, 1.6036], [0.9117, 1.1396, 1.3675], [1.0051, 1.1487, 1.2923]], atol=5e-5)


def test_rows_that_rules_shorten_and_leave_out_are_counted():
    X = np.array([[1.0, 0], [2, 0.5], [3, 0], [0, 4.5], [50, 1], [60, 0]])
    counted = {"krum": 5, "multi_krum": 2, "mda": 2, "smea": 2, "monna": 2, "caf": 3}
    for name, left_out in counted.items():
        rows = Rows(X)
        rules.RULES[name](rows, 2)
        assert rows.counts == {"left_out": left_out}, name
    for name, constants, shortened in (("arc", {}, 2), ("clipping", {"threshold": 2.9}, 4),
                                       ("centered_clipping", {"threshold": 40.0, "memory": np.zeros(2)}, 2)):
        rows = Rows(X)
        rules.RULES[name](rows, 2, **constants)
        assert rows.counts == {"shortened": shortened}, name


# ---- one rule or another


@settings(max_examples=40, deadline=None)
@given(matrices(), st.integers(0, 6))
def test_nothing_is_nearer_to_all_rows_than_the_geometric_median(case, zeros):
    """Its condition: the unit vectors to the rows cancel, up to one for each row that it is itself. Also where rows
    are equal or in a line, or the median is one of them."""
    X, f = case
    X = X.copy()
    X[:, 1:][:, :zeros] = 0
    size = np.abs(X - np.median(X, axis=0)).max()
    z = mpiclip.aggregate(X, ["geometric_median"], f)
    there = np.linalg.norm(X - z, axis=1) <= 1e-7 * size + 1e-12
    others = X[~there] - z
    assert np.linalg.norm((others / np.linalg.norm(others, axis=1)[:, None]).sum(0)) <= there.sum() + 1e-4


def test_median_of_rows_in_a_line():
    """Of an even number of points in a line every point between the middle two is nearest to all: the middle one."""
    line = np.array([1.0, 2.0, -2.0])
    for points in ([0.0, 1, 5, 100], [3.0, 0, 0, 7], [2.0, 2, 2, 2], [1e3, 0, 1, 1e3], [5.0, 1, 2], [1.0, 2]):
        X = np.outer(points, line) + 7
        np.testing.assert_allclose(mpiclip.aggregate(X, ["geometric_median"], 0), np.median(X, axis=0), rtol=1e-12)


@pytest.mark.parametrize("n, f, spread", [(64, 12, 1.0), (40, 19, 1.0), (64, 31, 0.0), (60, 25, 0.3)])
def test_minimum_diameter_of_many_rows(n, f, spread):
    """The set is found although nobody could try all; with spread 0, all pairs are about equally far apart."""
    X = rng(n).normal(size=(n, 3)) if spread == 1 else np.eye(n) + spread * 1e-3 * rng(n).normal(size=(n, n))
    w = rules.mda(Recorder(X), f)
    D = ((X[:, None] - X[None]) ** 2).sum(2)
    kept = w > 0
    t = D[np.ix_(kept, kept)].max()
    assert kept.sum() == n - f
    if spread == 1:                         # no set has a smaller one
        assert not independent(t * (1 - 1e-9) <= D, n - f)


def test_few_vertices_that_touch_every_edge():
    """A set of k is found if there is one, in graphs of all densities."""
    generator, sets = rng(), (np.arange(2048)[:, None] >> np.arange(11) & 1).astype(bool)
    for density in np.linspace(0.15, 0.75, 120):
        far = np.triu(generator.random((11, 11)) < density, 1)
        pairs = np.argwhere(far)
        covers = (sets[:, pairs[:, 0]] | sets[:, pairs[:, 1]]).all(1)
        least = sets[covers].sum(1).min()
        edges = [int(row @ (1 << np.arange(11))) for row in (far | far.T)]
        assert rules._cover(edges, 2047, least - 1) is None
        found = rules._cover(edges, 2047, least)
        assert found is not None and covers[found] and found.bit_count() <= least


def test_of_equals_the_first_is_taken():
    """Two pairs of rows are as near to the last row; rounding does not choose among scores that are equal."""
    X = np.array([[1.0, 0], [-1, 0], [1, 0.1], [-1, 0.1], [0, 0]])
    np.testing.assert_allclose(mpiclip.aggregate(X, ["mda"], 2), X[[0, 2, 4]].mean(0))
    assert rules._lowest(np.array([[1.0, 1 - 1e-15, 2], [4, 1 + 1e-13, 1]]), 2).tolist() == [[0, 1], [1, 2]]


@every
def test_every_rule_ends_for_rows_of_any_size(names):
    """Also where squares are no longer numbers of full precision, or none at all."""
    for size in (1e-30, 1e-155, 1e-161, 1e-300, 1e60, 1e148):
        X = rng().normal(2, 1, (9, 20)) * np.where(np.arange(9) % 4 | (size < 1), size, 1)[:, None]
        assert np.isfinite(mpiclip.aggregate(X, names, 3)).all()


class Recorder(Rows):
    def combine(self, w):
        return w


def independent(far, m):
    """Whether there are m rows no two of which are far: by integer programming."""
    n, pairs = len(far), np.argwhere(np.triu(far, 1))
    A = np.zeros((len(pairs), n))
    A[np.arange(len(pairs))[:, None], pairs] = 1
    found = milp(-np.ones(n), constraints=LinearConstraint(A, ub=1), integrality=np.ones(n), bounds=Bounds(0, 1))
    return -found.fun > m - 0.5


@pytest.mark.parametrize("d", [2, 30])
def test_smallest_eigenvalue_among_a_thousand_sets(d):
    for k in range(3):
        X = rng(k).normal(size=(14, d))
        np.testing.assert_allclose(mpiclip.aggregate(X, ["smea"], 4), reference.smea(X, 4), rtol=1e-12, atol=1e-12)


def test_centred_clipping_remembers():
    memory, v = {}, np.zeros(8)
    rule = {"name": "centered_clipping", "threshold": 0.7, "iterations": 2}
    for k in range(4):
        X = rng(k).normal(1, 1, (7, 8))
        found = mpiclip.aggregate(X, ["nnm", rule], 2, memory=memory)
        v = reference.centered_clipping(reference.nnm(X, 2), 2, 0.7, 2, v)
        np.testing.assert_allclose(found, v, rtol=1e-12)
        found[:] = np.nan           # the caller's: not what is remembered
    assert list(memory) == ["rule1_centered_clipping"]


@pytest.mark.parametrize("n, s", [(7, 3), (6, 2), (5, 1), (4, 9)])
def test_buckets(n, s):
    """Each row is in one bucket; the last one may have fewer."""
    X = np.eye(n)
    B = rules.bucketing(Rows(X), 0, s=s, random=np.random.default_rng(5)).columns()
    assert B.shape == (-(-n // s), n)
    np.testing.assert_allclose(sorted((B > 0).sum(1)), sorted([s] * (n // s) + [n % s] * (n % s > 0)) if s < n else [n])
    assert ((B > 0).sum(0) == 1).all()
    np.testing.assert_allclose(B.sum(1), 1)
    again, other = (mpiclip.aggregate(X, [{"name": "bucketing", "s": s}, "krum"], 0, seed=k) for k in (0, 0))
    np.testing.assert_array_equal(again, other)


def test_buckets_are_dealt_anew():
    X = np.eye(9)
    seen = {mpiclip.aggregate(X, [{"name": "bucketing", "s": 2}, "krum"], 1, seed=k).tobytes() for k in range(8)}
    assert len(seen) > 3


# ---- what rules ask for


@pytest.mark.parametrize("names, n, f, words", [
    (["median"], 4, 2, ["aggregate.f: 2 of 4 workers", "n > 2f"]),
    (["mean"], 4, -1, ["f ≥ 0"]),
    (["bucketing", "median"], 9, 3, ["'median' is handed n = 5 rows", "n > 2f"]),
    (["nnm", "bucketing", "bucketing", "krum"], 9, 2, ["'krum' is handed n = 3 rows"]),
    ([{"name": "monna", "pivot": 5}], 5, 1, ["'monna'", "pivot < n"]),
    ([{"name": "monna", "pivot": -1}], 5, 1, ["monna.pivot = -1", "greater than or equal to 0"]),
    (["bucketing", {"name": "monna", "pivot": 3}], 5, 1, ["'monna' is handed n = 3 rows", "pivot < n"]),
    (["mda"], 100, 33, ["'mda'", "n = 100", "f ≤ 32"]),
    (["arc", "smea"], 64, 12, ["'smea'", "n = 64", "n choose f ≤ 200000"]),
    (["median", "mean"], 4, 1, ["'median' gives one vector"]),
    (["medain"], 4, 1, ["medain", "'median'"]),
    ([{"name": "clipping", "threshold": 0.0}], 4, 1, ["aggregate.rules.clipping.threshold = 0.0", "greater than 0"]),
    ([{"name": "clipping", "threshold": float("nan")}], 4, 1, ["threshold = nan", "finite"]),
    ([{"name": "clipping", "treshold": 1.0}], 4, 1, ["treshold", "'threshold'"]),
    ([{"name": "bucketing", "s": 0}], 4, 1, ["bucketing.s = 0", "greater than or equal to 1"]),
    ([{"name": "bucketing", "s": 1.5}], 4, 1, ["bucketing.s = 1.5", "integer"]),
    ([{"name": "bucketing", "random": 1}], 4, 1, ["random"]),
    ([{"name": "geometric_median", "nu": -1.0}], 4, 1, ["geometric_median.nu = -1.0"]),
    ([{"name": "geometric_median", "iterations": True}], 4, 1, ["geometric_median.iterations = True"]),
    ([{"name": "centered_clipping", "iterations": 0}], 4, 1, ["centered_clipping.iterations = 0"]),
    ([{"name": "median", "f": 1}], 4, 1, ["'f'"]),
    ([7], 4, 1, ["aggregate.rules = 7", "expected a name"]),
])
def test_what_does_not_fit_is_refused_in_one_line(names, n, f, words):
    with pytest.raises(mpiclip.InputError) as caught:
        mpiclip.aggregate(np.ones((n, 3)), names, f)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_every_rule_is_in_the_table():
    assert set(rules.RULES) == {entry if isinstance(entry, str) else entry["name"]
                                for names, _ in EVERY.values() for entry in names}


# ---- ARC on paper


def arc(X, f):
    return rules.arc(Rows(X), f).columns()


def lengths(X):
    return np.linalg.norm(X, axis=1)


def bar(X, f):
    """C, to which ARC shortens: the (k+1)-th largest norm"""
    return sorted(lengths(X))[len(X) - 1 - 2 * f * (len(X) - f) // len(X)]


@examples
@given(matrices())
def test_arc_shortens_to_the_next_length(case):
    """1, 3, 4, 6: nothing with f = 0; norms end at C, which at least k + 1 rows have; directions stay; ARC ∘ ARC = ARC;
    ARC(sX) = s ARC(X); rows of one length stay."""
    X, f = case
    n, k, before = len(X), 2 * f * (len(X) - f) // len(X), X.copy()
    found = arc(X, f)
    np.testing.assert_array_equal(X, before)
    if f == 0:
        np.testing.assert_array_equal(found, X)
    C = bar(X, f)
    np.testing.assert_allclose(lengths(found).max(), C, rtol=1e-12, atol=1e-300)
    assert (lengths(found) >= C * (1 - 1e-12)).sum() >= k + 1
    assert (found == X).all(1).sum() >= n - k
    np.testing.assert_allclose(found * lengths(X)[:, None], X * lengths(found)[:, None], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(arc(found, f), found, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(arc(7 * X, f), 7 * found, rtol=1e-12, atol=1e-300)
    units = X[lengths(X) > 0]
    if len(units) > 2 * f:
        units = units / lengths(units)[:, None]
        np.testing.assert_allclose(arc(units, f), units, rtol=1e-14)


@pytest.mark.parametrize("n", [*range(1, 60), 241, 242, 1499, 1500])
def test_arc_never_clips_half_of_the_rows_or_fewer_than_f(n):
    """2: f ≤ k ≤ 2f, k ≤ n/2, k + 1 ≤ n − f: of any n − f rows one is at least as long as C."""
    X = rng(n).permutation(np.arange(1.0, n + 1))[:, None]
    for f in {*range(1, min((n + 1) // 2, 6)), (n - 1) // 2} - {0}:
        k = int((arc(X, f) != X).any(1).sum())
        assert f <= k <= 2 * f and 2 * k <= n and k + 1 <= n - f


@settings(max_examples=40, deadline=None)
@given(matrices(), st.floats(1, 1e12), st.integers(0, 2**32 - 1))
def test_arc_is_not_moved_by_what_f_rows_do(case, size, seed):
    """5: whatever f rows become, C is at most the longest honest norm; a clipped row may as well be longer."""
    X, f = case
    n, generator = len(X), rng(seed)
    lying = generator.permutation(n)[:f]
    honest = np.setdiff1d(np.arange(n), lying)
    worse = X.copy()
    worse[lying] = size * generator.standard_normal((f, X.shape[1]))
    limit = lengths(X[honest]).max()
    assert (lengths(arc(worse, f)) <= limit * (1 + 1e-12)).all()
    C = bar(X, f)
    longer = X * np.where(lengths(X) > C, size, 1)[:, None]
    np.testing.assert_allclose(arc(longer, f), arc(X, f), rtol=1e-9, atol=1e-12)
    # 8: so the mean, of rows no longer than that, is no longer either
    assert lengths(mpiclip.aggregate(worse, ["arc"], f)[None])[0] <= limit * (1 + 1e-12)


@examples
@given(matrices(), st.integers(0, 2**32 - 1))
def test_arc_costs_little_where_nobody_lies(case, seed):
    """7: ‖mean_S(ARC) − mean_S‖² ≤ f/(n − 2f) · the variance over S, for any n − f rows S."""
    X, f = case
    S = rng(seed).permutation(len(X))[:len(X) - f]
    spread = ((X[S] - X[S].mean(0)) ** 2).sum(1).mean()
    shift = ((arc(X, f)[S].mean(0) - X[S].mean(0)) ** 2).sum()
    assert shift <= f / (len(X) - 2 * f) * spread * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("name", ["mean", "geometric_median", "krum", "multi_krum", "mda", "monna", "caf", "smea",
                                  "nnm"])
@settings(max_examples=20, deadline=None)
@given(case=matrices())
def test_rules_that_average_rows_give_nothing_longer_than_the_honest_behind_arc(name, case):
    """Lemma 5.1: ‖F∘ARC(X)‖ ≤ max_{i ∈ S} ‖x_i‖, for every S of n − f rows."""
    X, f = case
    assert np.linalg.norm(mpiclip.aggregate(X, ["arc", name], f)) <= np.sort(lengths(X))[len(X) - f - 1] * (1 + 1e-9)


@examples
@given(matrices())
def test_arc_keeps_robustness(case):
    """Theorem 3.2: behind ARC, an (f, κ)-robust rule is (f, κ + 2f/(n − 2f))-robust; the trimmed mean has
    κ = 6f/(n − 2f) (1 + f/(n − 2f)) (Allouah et al. 2023, arXiv:2302.01772, Proposition 2)."""
    X, f = case
    n = len(X)
    r = f / (n - 2 * f)
    found = mpiclip.aggregate(X, ["arc", "trimmed_mean"], f)
    for S in combinations(range(n), n - f):
        honest = X[list(S)]
        spread = ((honest - honest.mean(0)) ** 2).sum(1).mean()
        assert ((found - honest.mean(0)) ** 2).sum() <= (6 * r * (1 + r) + 2 * r) * spread * (1 + 1e-9) + 1e-9


@every
def test_static_clipping_is_not_robust(names):
    """Lemma 3.1: n equal vectors have no spread, and clipping moves them by R − C; ARC does not touch them."""
    x = np.full(9, 4.0)                     # of length 12
    X = np.tile(x, (7, 1))
    clipped = mpiclip.aggregate(X, [{"name": "clipping", "threshold": 3.0}, *names], 2)
    expected = mpiclip.aggregate(X / 4, names, 2)
    np.testing.assert_allclose(clipped, expected, rtol=1e-9)
    np.testing.assert_allclose(mpiclip.aggregate(X, ["arc", *names], 2), mpiclip.aggregate(X, names, 2), rtol=1e-12)


def test_arc_is_not_translation_equivariant():
    X = rng().normal(size=(7, 3))
    assert not np.allclose(arc(X + 10, 2), arc(X, 2) + 10)


# ---- attacks, and what is not finite


def test_sign_flip_is_minus_the_mean_of_the_honest():
    X, byzantine = rng().normal(size=(6, 4)), np.array([0, 1, 0, 0, 1, 0], bool)
    found = sign_flip(Rows(X), byzantine, None).columns()
    np.testing.assert_allclose(found[~byzantine], X[~byzantine], rtol=1e-14)
    np.testing.assert_allclose(found[byzantine], np.tile(-X[~byzantine].mean(0), (2, 1)), rtol=1e-12)


@chains
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_that_are_not_finite_count_as_zeros(names, dtype):
    X = rng().normal(size=(7, 30)).astype(dtype)
    X[1, 4], X[5, :2], zeroed = np.nan, [np.inf, -np.inf], X.copy()
    zeroed[[1, 5]] = 0
    before = X.copy()
    for f in (2, 3):
        np.testing.assert_array_equal(mpiclip.aggregate(X, names, f), mpiclip.aggregate(zeroed, names, f))
        if "nnm" not in names:              # rows of one length are equally far from a row of zeros
            np.testing.assert_allclose(mpiclip.aggregate(X, names, f), by_definition(zeroed, names, f), atol=2e-6)
    np.testing.assert_array_equal(X, before)
    for f in (0, 1):
        with pytest.raises(mpiclip.InputError, match=rf"workers 1, 5 are not finite.*aggregate.f = {f}"):
            mpiclip.aggregate(X, names, f)


@pytest.mark.parametrize("X", [np.ones(3), np.ones((2, 3, 4)), np.ones((3, 2), int), np.ones((3, 2), bool)])
def test_aggregate_wants_a_matrix_of_floats(X):
    with pytest.raises(mpiclip.InputError, match="expected floats"):
        mpiclip.aggregate(X, ["mean"])


def test_aggregate_without_rules_is_the_mean():
    X = rng().normal(size=(4, 3))
    np.testing.assert_allclose(mpiclip.aggregate(X, []), X.mean(0), rtol=1e-14)
