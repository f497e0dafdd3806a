"""Rows and robust rules against float64 references (tests/reference.py), and the invariants that ARC has on paper
(Allouah et al. 2024, arXiv:2405.14432)."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import methodcaller
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mpiclip
import reference
from mpiclip import rules
from mpiclip.attacks import sign_flip
from mpiclip.rows import BLOCK, Rows

CHAINS = [["mean"], ["median"], ["trimmed_mean"], ["arc"], ["nnm"], ["arc", "trimmed_mean"], ["arc", "median"],
          ["nnm", "trimmed_mean"], ["arc", "nnm", "median"], ["nnm", "arc", "nnm", "mean"]]
ROBUST = [names for names in CHAINS if names[-1] in ("median", "trimmed_mean")]     # "nnm" alone, say, is not
chains = pytest.mark.parametrize("names", CHAINS, ids="-".join)
many_columns = pytest.mark.parametrize("d", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
examples = settings(max_examples=60, deadline=None)


def rng(seed=0):
    return np.random.default_rng(seed)


def by_definition(X, names, f):
    X = X.astype(float)
    for name in names:
        X = getattr(reference, name)(X, f)
    return X if X.ndim == 1 else sum(X) / len(X)


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
    largest = rows.coordinates(lambda X: X.max(0))
    np.testing.assert_allclose(largest, expected.max(0), atol=size)


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
    np.testing.assert_allclose(rows.gram(), exact @ exact.T, rtol=1e-11)
    np.testing.assert_allclose(rows.distances(), ((exact[:, None] - exact[None]) ** 2).sum(2), rtol=1e-11, atol=1e-9)
    for names in (["mean"], ["trimmed_mean"], ["arc", "nnm", "median"]):
        found = rules.chain(Rows(X), names, 2)
        assert found.shape == (d,) and found.dtype == dtype
        np.testing.assert_allclose(found, by_definition(X, names, 2), **tolerance)
    np.testing.assert_allclose(rows.mix(W).coordinates(lambda X: X.min(0)), (W @ exact).min(0), **tolerance)


def test_replaced_rows():
    X = rng().normal(size=(5, 7))
    before, marked = X.copy(), np.array([0, 1, 0, 0, 1], bool)
    W = rng(1).normal(size=(5, 5))
    for rows, expected in ((Rows(X), X), (Rows(X).mix(W), W @ X)):
        expected = np.where(marked[:, None], np.arange(7.0), expected)
        replaced = rows.replace(marked, np.arange(7.0))
        np.testing.assert_allclose(replaced.columns(), expected, rtol=1e-13)
        np.testing.assert_allclose(replaced.norms(), np.linalg.norm(expected, axis=1), rtol=1e-13)
    np.testing.assert_array_equal(X, before)


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
    halves, added, met = (X[:, :11], X[:, 11:]), [None, None], Barrier(2)

    def total(here, part):
        added[here] = part
        met.wait()
        result = added[0] + added[1]
        met.wait()
        return result

    for attribute in ("norms", "gram", "distances"):
        with ThreadPoolExecutor(2) as pool:
            holders = [Rows(halves[here], partial(total, here)) for here in (0, 1)]
            found = list(pool.map(methodcaller(attribute), holders))
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
@settings(max_examples=40, deadline=None)
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


def test_arc_is_not_translation_equivariant():
    X = rng().normal(size=(7, 3))
    assert not np.allclose(arc(X + 10, 2), arc(X, 2) + 10)


# ---- attacks, and what is not finite


def test_sign_flip_is_minus_the_mean_of_the_honest():
    X, byzantine = rng().normal(size=(6, 4)), np.array([0, 1, 0, 0, 1, 0], bool)
    found = sign_flip(Rows(X), byzantine).columns()
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
