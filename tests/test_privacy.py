"""The accountant against independent references: Balle and Wang's formula, zCDP by hand, sampled privacy losses."""

import json
from dataclasses import asdict, replace
from math import exp, inf, log, sqrt
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from mpiclip import methods, privacy
from mpiclip.__main__ import main
from mpiclip.errors import InputError
from mpiclip.privacy import Mechanism, epsilon, paper_scaling, sigma_for, statement

EXAMPLE = Mechanism(1.1, 1.0, 1e-5, "example", "add_remove", rate=0.01)      # FACTS: RDP 1.712, PLD 1.515


def balle_wang(z, releases, delta):
    """ε of the Gaussian mechanism with σ/Δ = z/√T. Balle, Wang (2018), arXiv:1805.06530, Theorem 8."""
    s = sqrt(releases) / z
    def off(e):
        return norm.cdf(s / 2 - e / s) - exp(e + norm.logcdf(-s / 2 - e / s)) - delta
    return 0.0 if off(0) <= 0 else brentq(off, 0, s * s / 2 + s * sqrt(2 * log(1 / delta)), xtol=1e-10)


def zcdp(z, releases, delta):
    """An upper bound. Bun, Steinke (2016), arXiv:1605.02065, Propositions 1.3 and 1.6."""
    rho = releases / (2 * z * z)
    return rho + 2 * sqrt(rho * log(1 / delta))


# ---- without sampling

@given(z=st.floats(0.3, 100), releases=st.integers(1, 500), delta=st.floats(1e-10, 0.1),
       adjacency=st.sampled_from(["replace", "add_remove"]), bound=st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_the_composition_of_gaussians_is_balle_and_wangs_formula(z, releases, delta, adjacency, bound):
    m = Mechanism(1.0, bound, delta, adjacency=adjacency)
    m = replace(m, sigma=z * m.sensitivity)
    expected = balle_wang(z, releases, delta)
    assert epsilon(m, releases) == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert epsilon(m, releases) >= expected * (1 - 1e-9) - 1e-9
    by_renyi = epsilon(replace(m, accountant="rdp"), releases)
    assert expected * (1 - 1e-6) - 1e-9 <= by_renyi
    assert epsilon(m, releases) <= zcdp(z, releases, delta) and by_renyi <= zcdp(z, releases, delta) * (1 + 1e-9)


def test_pld_and_renyi_agree_with_dp_accountings_own_accountant():
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(4.0), 10)
    own = PLDAccountant().compose(event).get_epsilon(1e-5)
    assert epsilon(Mechanism(4.0, 1.0, 1e-5, adjacency="add_remove"), 10) == pytest.approx(own, rel=1e-6)


def test_to_replace_is_twice_the_sensitivity():
    for accountant in ("pld", "rdp"):
        m = Mechanism(3.0, 1.0, 1e-5, accountant=accountant)
        assert epsilon(m, 50) == epsilon(replace(m, adjacency="add_remove", sigma=1.5), 50)
        assert epsilon(m, 50) > 2 * epsilon(replace(m, adjacency="add_remove"), 50)


def test_the_numbers_of_the_paper_and_of_zcdp():
    """T = 100, τ = 0.01, ε = 8, δ = 4e-4: the scaling gives 0.0350, zCDP 0.0599 (Δ = τ) and 0.1198 (Δ = 2τ)."""
    assert paper_scaling(0.01, 8, 4e-4, 100) == pytest.approx(0.0349644)
    root = sqrt(log(1 / 4e-4))
    for adjacency, bound in (("add_remove", 0.0599), ("replace", 0.1198)):
        m = Mechanism(0.0, 0.01, 4e-4, adjacency=adjacency)
        assert m.sensitivity * sqrt(100 / 2) / (sqrt(root**2 + 8) - root) == pytest.approx(bound, rel=1e-3)
        assert 0.8 * bound < sigma_for(8, 100, m) < bound
        assert 0.9 * bound < sigma_for(8, 100, replace(m, accountant="rdp")) < bound
        assert epsilon(replace(m, sigma=paper_scaling(0.01, 8, 4e-4, 100)), 100) > 8        # it guarantees nothing


# ---- sampled rows

def test_sampled_gaussians_have_the_known_epsilon():
    assert epsilon(EXAMPLE, 1000) == pytest.approx(1.515, abs=1e-3)
    assert epsilon(replace(EXAMPLE, accountant="rdp"), 1000) == pytest.approx(1.712, abs=1e-3)


@pytest.mark.parametrize("adjacency, rate, z, releases", [("add_remove", 0.1, 1.0, 30), ("replace", 0.1, 1.0, 30),
                                                          ("replace", 0.5, 3.0, 10), ("add_remove", 0.9, 3.0, 10)])
def test_sampled_gaussians_against_sampled_losses(adjacency, rate, z, releases):
    """δ(ε) = E max(0, 1 − e^{ε − L}), L the sum of the losses ln p/q over outputs drawn from p. The worst pair: the sum
    is shifted by +C with the probability `rate`, against not at all, or against −C; the noise has σ = z C. The ε that
    the accountant gives for a δ must give that δ back, within the error of 150,000 draws."""
    rng = np.random.default_rng(5)
    def log_density(y, shift):
        return np.logaddexp(np.log1p(-rate) - y**2 / (2 * z * z), np.log(rate) - (y - shift)**2 / (2 * z * z))
    draws, worst = 150_000, 0.0
    other = -1.0 if adjacency == "replace" else 0.0
    m = Mechanism(z, 1.0, 0.02, "example", adjacency, rate=rate)
    claimed = epsilon(m, releases)
    for p, q in ((1.0, other), (other, 1.0)):               # either data set may be the one that is there
        total = np.zeros(draws)
        for _ in range(releases):
            y = rng.normal(0, z, draws) + p * (rng.random(draws) < rate)
            total += log_density(y, p) - log_density(y, q)
        tail = np.maximum(0, -np.expm1(claimed - total))
        worst = max(worst, tail.mean())
        assert tail.mean() <= 0.02 + 5 * tail.std() / sqrt(draws)
    assert worst >= 0.02 - 5 * 0.14 / sqrt(draws) - 2e-4


def test_no_pair_of_rows_is_worse_than_opposite_ones():
    """Rows a and b, ‖a‖, ‖b‖ ≤ C, one in the place of the other, in one sampled release: the divergence at the ε that
    is claimed for δ is at most δ, on a grid over the plane that holds them."""
    rate, z, delta = 0.3, 0.8, 1e-2
    claimed = epsilon(Mechanism(z, 1.0, delta, "example", "replace", rate=rate), 1)
    line = np.linspace(-7, 7, 561)
    grid = np.stack(np.meshgrid(line, line), -1)
    def density(mean):
        def normal(centre):
            return np.exp(-((grid - centre)**2).sum(-1) / (2 * z * z)) / (2 * np.pi * z * z)
        return (1 - rate) * normal(np.zeros(2)) + rate * normal(np.array(mean))
    cell = (line[1] - line[0])**2
    found = {}
    for b in [(-1, 0), (0, 1), (0, 0), (-0.6, 0.8), (-0.5, 0), (0.6, 0.8), (-0.9, 0)]:
        found[b] = np.maximum(0, density((1, 0)) - exp(claimed) * density(b)).sum() * cell
    assert max(found.values()) == found[-1, 0] == pytest.approx(delta, rel=5e-3)


def test_sampling_helps_and_rate_1_is_no_sampling():
    for adjacency in ("replace", "add_remove"):
        always = replace(EXAMPLE, adjacency=adjacency, rate=1.0)
        assert epsilon(replace(always, rate=0.999999), 20) == pytest.approx(epsilon(always, 20), rel=1e-3)
        assert epsilon(replace(always, rate=0.1), 20) < 0.5 * epsilon(always, 20)


def test_what_cannot_be_accounted_for_is_refused():
    for change, why in [({"adjacency": "replace", "accountant": "rdp"}, "accountant = 'rdp': expected 'pld'"),
                        ({"against": "model"}, "against = 'model': expected 'server'"),
                        ({"rate": 1.5}, "rate = 1.5"),
                        ({"rate": 0.0}, "rate = 0"), ({"level": "worker"}, "rate = 0.01: expected 1"),
                        ({"bound": inf}, "bound = inf"), ({"bound": 0.0}, "bound = 0"), ({"sigma": -1.0}, "sigma = -1"),
                        ({"sigma": inf}, "sigma = inf"), ({"delta": 0.0}, "delta = 0"), ({"delta": 1.0}, "delta = 1"),
                        ({"sigma": float("nan")}, "sigma = nan"), ({"contributors": 0}, "contributors = 0")]:
        with pytest.raises(InputError, match=why):
            replace(EXAMPLE, **change)
    with pytest.raises(InputError, match="delta = 1e-13: expected at least 1e-11"):
        epsilon(replace(EXAMPLE, delta=1e-13), 100)
    assert 0 < epsilon(replace(EXAMPLE, delta=1e-13, accountant="rdp"), 100) < inf
    with pytest.raises(InputError, match="releases = 10000000: expected at most 1000000|releases = 1e"):
        epsilon(replace(EXAMPLE, delta=1e-2), 10**7)
    with pytest.raises(InputError, match="releases = -1"):
        epsilon(EXAMPLE, -1)
    for target in (0.0, -1.0, 1e10, inf, float("nan")):
        with pytest.raises(InputError, match="epsilon = "):
            sigma_for(target, 10, EXAMPLE)


# ---- what holds for all

@given(z=st.floats(0.5, 20), factor=st.floats(1, 3), releases=st.integers(1, 200), more=st.integers(0, 50),
       delta=st.floats(1e-8, 0.1), adjacency=st.sampled_from(["replace", "add_remove"]),
       accountant=st.sampled_from(["pld", "rdp"]))
@settings(max_examples=50, deadline=None)
def test_what_costs_less(z, factor, releases, more, delta, adjacency, accountant):
    """More noise, fewer releases, a larger δ, neighbours that are closer."""
    m = Mechanism(z, 1.0, delta, adjacency=adjacency, accountant=accountant)
    spent = epsilon(m, releases)
    most = spent * (1 + 1e-9)                               # a factor of 1 but for the last digit changes nothing else
    assert epsilon(replace(m, sigma=z * factor), releases) <= most
    assert spent <= epsilon(m, releases + more) * (1 + 1e-9)
    assert epsilon(replace(m, delta=min(0.5, delta * factor)), releases) <= most
    assert epsilon(replace(m, adjacency="add_remove"), releases) <= (1 + 1e-9) * epsilon(
        replace(m, adjacency="replace"), releases)


@pytest.mark.parametrize("change", [{}, {"adjacency": "replace"}, {"accountant": "rdp"}])
def test_sampled_epsilon_is_monotone(change):
    m = replace(EXAMPLE, **change)
    spent = [epsilon(m, releases) for releases in (0, 1, 10, 100, 101, 1000)]
    assert spent == sorted(spent) and spent[0] == 0
    assert epsilon(replace(m, rate=0.02), 100) > epsilon(m, 100) > epsilon(replace(m, sigma=1.3), 100)


@given(target=st.floats(1e-3, 1e3), releases=st.integers(1, 10_000), delta=st.floats(1e-10, 0.1),
       bound=st.floats(1e-9, 1e9), adjacency=st.sampled_from(["replace", "add_remove"]),
       accountant=st.sampled_from(["pld", "rdp"]), n=st.sampled_from([None, 1, 7]))
@settings(max_examples=50, deadline=None)
def test_sigma_for_epsilon_is_enough_and_hardly_more(target, releases, delta, bound, adjacency, accountant, n):
    m = Mechanism(123.0, bound, delta, adjacency=adjacency, accountant=accountant, against="model" if n else "server",
                  contributors=n or 1)
    sigma = sigma_for(target, releases, m)
    assert sigma == sigma_for(target, releases, replace(m, sigma=0.0))
    assert epsilon(replace(m, sigma=sigma), releases) <= target
    assert epsilon(replace(m, sigma=sigma * 0.999), releases) > target


@pytest.mark.parametrize("change", [{}, {"adjacency": "replace"}, {"accountant": "rdp"}])
def test_sigma_for_epsilon_with_sampling(change):
    m = replace(EXAMPLE, rate=0.1, **change)
    sigma = sigma_for(2.0, 50, m)
    assert epsilon(replace(m, sigma=sigma), 50) <= 2.0 < epsilon(replace(m, sigma=sigma * 0.999), 50)


def test_the_ends_of_the_scale():
    m = Mechanism(1.0, 1.0, 1e-5)
    assert epsilon(m, 0) == 0 and sigma_for(1.0, 0, m) == 0
    assert epsilon(replace(m, sigma=0.0), 0) == 0 and epsilon(replace(m, sigma=0.0), 1) == inf
    for accountant in ("pld", "rdp"):
        m = replace(m, accountant=accountant)
        assert epsilon(replace(m, sigma=1e-300), 1) == inf
        assert 1e4 < epsilon(replace(m, sigma=1e-2), 1) < 1e5
        assert 0 <= epsilon(replace(m, sigma=1e300), 1) < 1e-3
        assert epsilon(m, 10**12) > 1e12
    for z in (0.005, 0.02, 1e5, 1e300):
        sampled = replace(EXAMPLE, sigma=z)
        assert 0 <= epsilon(sampled, 10) <= epsilon(replace(sampled, rate=1.0), 10) < inf
        assert 0 < epsilon(replace(sampled, accountant="rdp", rate=1e-9, delta=1e-8), 10) < inf     # not rounded to 0
    big = sigma_for(1e9, 7, m)
    assert 0.9e9 < epsilon(replace(m, sigma=big), 7) <= 1e9
    with pytest.raises(InputError, match="epsilon = 1e-12: expected more"):
        sigma_for(1e-12, 10**6, Mechanism(1.0, 1.0, 1e-12))


# ---- against those who see the models only

def test_against_the_model_the_noise_of_all_workers_counts():
    """The mean of n messages has noise σ/√n and sensitivity Δ/n: as good as √n σ in each message."""
    m = Mechanism(1.0, 0.1, 1e-5, against="model", contributors=25)
    assert m.multiplier == pytest.approx(5 * 1.0 / 0.2)
    assert epsilon(m, 40) == pytest.approx(epsilon(Mechanism(5.0, 0.1, 1e-5), 40), rel=1e-9)
    assert replace(m, against="server").multiplier == pytest.approx(5.0)
    assert sigma_for(2.0, 40, m) == pytest.approx(sigma_for(2.0, 40, replace(m, against="server")) / 5, rel=1e-3)


# ---- from a config

def table(**keys):
    return SimpleNamespace(**{"level": "worker", "clip": None, "adjacency": None, "against": "server",
                              "accountant": "pld"} | keys)


def test_the_mechanism_of_a_config():
    clip21 = methods.load("clip21")(tau=0.5, stepsize=0.1, sigma=2.0, delta=1e-5)
    m = privacy.mechanism_of(clip21, table(), 10, [], "full")
    assert m == Mechanism(2.0, 0.5, 1e-5, "worker", "replace", contributors=10) and m.sensitivity == 1.0
    m = privacy.mechanism_of(clip21, table(adjacency="add_remove", against="model"), 10, [], 32)
    assert m.sensitivity == 0.5 and m.multiplier == pytest.approx(4 * sqrt(10))
    assert Mechanism(**json.loads(json.dumps(asdict(m)))) == m

    examples = table(level="example", clip=3.0)
    m = privacy.mechanism_of(clip21, examples, 2, [60, 40], "full")
    assert (m.bound, m.rate, m.adjacency, m.sensitivity) == (3 / 40, 1.0, "add_remove", 3 / 40)     # the smallest
    m = privacy.mechanism_of(clip21, table(level="example", clip=3.0, adjacency="replace"), 2, [60, 40], 10)
    assert (m.bound, m.rate, m.sensitivity) == (0.3, 0.25, 0.6)
    with pytest.raises(InputError, match="run.batch = 41: expected at most 40"):
        privacy.mechanism_of(clip21, examples, 2, [60, 40], 41)
    with pytest.raises(InputError, match="privacy: accountant = 'rdp'"):
        rdp = table(level="example", clip=3.0, adjacency="replace", accountant="rdp")
        privacy.mechanism_of(clip21, rdp, 2, [60, 40], 10)
    with pytest.raises(InputError, match="method.name = 'gd'"):
        privacy.mechanism_of(methods.load("gd")(stepsize=0.1, sigma=2.0, delta=1e-5), table(), 10, [], "full")
    with pytest.raises(InputError, match=r"method.noisy_state = 1|method.noisy_state = True"):
        noisy = clip21.model_copy(update={"noisy_state": True})
        privacy.mechanism_of(noisy, table(against="model"), 10, [], "full")


# ---- what is said

def test_the_statement_tells_all_that_the_guarantee_depends_on():
    m = Mechanism(0.06, 0.01, 4e-4, contributors=20)
    text = statement(m, 100, epsilon(m, 100))
    for fact in ("ε = 16.05", "δ = 0.0004", "one worker's whole data set", "all 100 releases",
                 "privacy loss distributions", "replaced by any other", "Δ = 2 · 0.01 = 0.02", "σ = 0.06", "σ/Δ = 3",
                 "everyone who sees all messages", "key of the noise stays secret", "without a look at these data",
                 "floating-point", "loss, grad_norm", "Every other run"):
        assert fact in text, fact
    assert "NOT PRIVATE" not in text and "paper" not in text and "models, and no single message" not in text

    text = statement(replace(m, adjacency="add_remove", accountant="rdp"), 100, 6.0)
    assert "sends zeros" in text and "Δ = 0.01." in text and "Rényi" in text
    text = statement(EXAMPLE, 1000, 1.5155)
    assert "one row (example)" in text and "ε = 1.516" in text and "probability 0.01" in text
    assert "key of the noise and of the samples" in text and "number of rows is public" in text
    text = statement(replace(m, against="model"), 100, 3.0)
    assert "no single message" in text and "all 20 add their noise" in text and "σ/√20 and Δ/20" in text


def test_the_statement_says_first_what_is_not_private():
    m = Mechanism(0.06, 0.01, 4e-4)
    assert statement(m, 100, 16.05, "reproducible").startswith("NOT PRIVATE: the noise is reproducible")
    nothing = statement(replace(m, sigma=0.0), 100, inf)
    assert nothing.startswith("NOT PRIVATE: σ = 0") and "differential" not in nothing


def test_the_paper_scaling_is_never_called_a_guarantee():
    m = Mechanism(paper_scaling(0.01, 8, 4e-4, 100), 0.01, 4e-4)
    text = statement(m, 100, epsilon(m, 100), scaling="paper")
    assert "paper's scaling, which guarantees nothing" in text and "ε = 34.7" in text and "ε = 8" not in text


@given(st.floats(1e-6, 1e6))
def test_epsilon_is_never_rounded_down(value):
    assert value * (1 - 1e-9) <= float(privacy.rounded_up(value)) <= value * 1.002


# ---- the verb

def run_verb(capsys, line):
    status = main(["privacy", *line.split()])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_verb_answers_both_ways(capsys):
    status, out, _ = run_verb(capsys, "--sigma 0.06 --tau 0.01 --rounds 100 --delta 4e-4 --json")
    found = json.loads(out)["adjacency"]
    assert status == 0 and found["replace"]["pld"] == pytest.approx(balle_wang(3, 100, 4e-4), rel=1e-5)
    assert found["add_remove"]["rdp"] == epsilon(Mechanism(0.06, 0.01, 4e-4, adjacency="add_remove", accountant="rdp"),
                                                 100)
    status, out, _ = run_verb(capsys, "--epsilon 8 --tau 0.01 --rounds 100 --delta 4e-4 --json")
    found = json.loads(out)
    assert found["paper"]["sigma"] == pytest.approx(0.0349644)
    assert found["paper"]["epsilon"]["replace"] > 8
    assert found["adjacency"]["replace"]["pld"] == pytest.approx(0.1012, abs=1e-4)
    status, out, _ = run_verb(capsys, "--epsilon 8 --tau 0.01 --rounds 100 --delta 4e-4")
    assert "0.1012" in out and "0.0506" in out and "paper scaling: σ = 0.03496, which guarantees nothing" in out
    status, out, _ = run_verb(capsys, "--sigma 1.1 --clip 1 --rate 0.01 --rounds 1000 --delta 1e-5 --json")
    found = json.loads(out)["adjacency"]
    assert found["add_remove"]["rdp"] == pytest.approx(1.712, abs=1e-3) and found["replace"]["rdp"] is None
    status, model, _ = run_verb(capsys, "--sigma 0.06 --tau 0.01 --rounds 100 --delta 4e-4 --against model --workers 9 "
                                        "--json")
    assert json.loads(model)["adjacency"]["replace"]["pld"] == pytest.approx(balle_wang(9, 100, 4e-4), rel=1e-5)


@pytest.mark.parametrize("line, why", [
    ("--sigma 1 --epsilon 8 --tau 1 --rounds 1 --delta .1", "--sigma and --epsilon"),
    ("--tau 1 --rounds 1 --delta .1", "--sigma and --epsilon"),
    ("--sigma 1 --rounds 1 --delta .1", "--tau and --clip"),
    ("--sigma 1 --tau 1 --clip 1 --rounds 1 --delta .1", "--tau and --clip"),
    ("--sigma -1 --tau 1 --rounds 1 --delta .1", "--sigma = -1"),
    ("--epsilon 0 --tau 1 --rounds 1 --delta .1", "--epsilon = 0"),
    ("--sigma 1 --tau 0 --rounds 1 --delta .1", "--tau = 0"),
    ("--sigma 1 --tau inf --rounds 1 --delta .1", "--tau = inf"),
    ("--sigma 1 --clip nan --rounds 1 --delta .1", "--clip = nan"),
    ("--sigma 1 --tau 1 --rounds -1 --delta .1", "--rounds = -1"),
    ("--sigma 1 --tau 1 --rounds 1 --delta 1", "--delta = 1"),
    ("--sigma 1 --tau 1 --rounds 1 --delta 0", "--delta = 0"),
    ("--sigma 1 --tau 1 --rounds 1", "--delta: missing"),
    ("--sigma 1 --tau 1 --delta .1", "--rounds: missing"),
    ("--sigma 1 --clip 1 --rate 1.5 --rounds 1 --delta .1", "--rate = 1.5"),
    ("--sigma 1 --tau 1 --rate .5 --rounds 1 --delta .1", "--rate = 0.5: expected 1"),
    ("--sigma 1 --clip 1 --against model --rounds 1 --delta .1", "--against = 'model': expected server"),
    ("--set run.rounds=1 --sigma 1 --tau 1 --rounds 1 --delta .1", "--set run.rounds=1: expected a config")])
def test_bad_options_end_in_one_line_that_names_them(capsys, line, why):
    status, out, err = run_verb(capsys, line)
    assert status == 2 and out == "" and why in err and err.count("\n") == 1


def test_the_verb_reads_a_config(capsys, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("""[problem]\nname = "quadratic"\ncurvature = [[1], [2]]\ncentre = [[-3], [3]]
[method]\nname = "clip21"\ntau = 0.01\nstepsize = 0.1\nepsilon = 8\ndelta = 4e-4
[run]\nworkers = 2\nrounds = 100""")
    status, out, _ = run_verb(capsys, f"{path}")
    assert status == 0 and "one worker's whole data set" in out and "σ = 0.10119" in out and "releases together" in out
    status, out, _ = run_verb(capsys, f"{path} --set privacy.adjacency=add_remove --json")
    found = json.loads(out)
    assert found["releases"] == 100 and found["epsilon"] <= 8 and found["mechanism"]["adjacency"] == "add_remove"
    status, out, err = run_verb(capsys, f"{path} --sigma 3")
    assert status == 2 and "--sigma" in err
