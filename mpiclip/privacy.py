"""What the noise of a run is worth: (ε, δ)-differential privacy for σ, and σ for ε. The accounting is dp-accounting's.

A release is what somebody outside may see once: a message, or a gradient, to which N(0, σ² I) was added. All that the
accountant has to know of it is in a Mechanism; docs/privacy.md says what is protected, against whom, and what is not.

Δ is counted here, never by dp-accounting: its two accountants do not agree on what a noise multiplier is where a
record is replaced (google/differential-privacy#378; one of them would tell half of ε)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, exp, expm1, floor, inf, log, log1p, log10, sqrt
from typing import Any, Literal

from .errors import InputError

SMALLEST, LARGEST = 1e-6, 1e6       # σ/Δ of all releases as one: below, ε is ∞ (above 5e11); above, as for LARGEST
FINE, COARSE = 30, 10               # steps of the grid of losses in one standard deviation of a loss
MANY, MOST = 10_000, 1_000_000      # sampled releases: from here on the coarse grid will do; more are not composed
POINTS = 4_000, 100_000             # of that grid, at least and at most
ROUNDING = 1e-12, 1e-15             # what the FFT may be off in δ: at all, and for each release (measured: 1/30 of it)
SAMPLED = 1e-2, 1e4                 # noise multipliers at which sampling is looked at; beyond it changes nothing of use
SLACK = 1e-14                       # what a sampled release's Rényi divergence may be off


@dataclass(frozen=True)
class Mechanism:
    """One release of a run, as the accountant sees it. Raises InputError for what it cannot account for.

    sigma           σ, the standard deviation of each coordinate of the noise, in the units of what it is added to
    bound           the longest ℓ2 norm of what the protected one contributes to a release: a message's bound τ, or
                    C/B, the clipped gradient's share in the mean of an expected B rows
    delta           δ, of all releases together
    level           who is protected: a worker, which is its whole data set, or an example, one row of it
    adjacency       two data sets are neighbours if one such record is replaced by any other, or if it is there or not.
                    A worker that is not there sends zeros
    against         who looks: the server (or anybody) at every message, or somebody at nothing but the models
    rate            the probability with which a row is in a sample, whatever the others do (Poisson); 1: always
    accountant      pld: privacy loss distributions, tight; rdp: Rényi, looser
    contributors    how many workers' noise is in the mean of the messages, which is all that a model shows of them"""

    sigma: float
    bound: float
    delta: float
    level: Literal["worker", "example"] = "worker"
    adjacency: Literal["replace", "add_remove"] = "replace"
    against: Literal["server", "model"] = "server"
    rate: float = 1.0
    accountant: Literal["pld", "rdp"] = "pld"
    contributors: int = 1

    def __post_init__(self):
        expect("sigma", self.sigma, 0 <= self.sigma < inf, "a number ≥ 0")
        expect("bound", self.bound, 0 < self.bound < inf, "a finite number above 0: without a bound no noise suffices")
        expect("delta", self.delta, 0 < self.delta < 1, "a number between 0 and 1")
        expect("rate", self.rate, 0 < self.rate <= 1, "a probability above 0, at most 1")
        expect("contributors", self.contributors, self.contributors >= 1, "at least 1 worker")
        expect("rate", self.rate, self.rate == 1 or self.level == "example",
               "1 where workers are protected: every worker takes part in every round")
        expect("accountant", self.accountant, self.accountant == "pld" or self.adjacency == "add_remove"
               or self.rate == 1, "'pld', or adjacency 'add_remove': there is no Rényi bound for samples of rows of "
                                  "which one is replaced")
        expect("against", self.against, self.against == "server" or self.level == "worker",
               "'server' where examples are protected: each worker's own noise protects its rows, and what a method "
               "makes of noisy gradients need not be a mean, in which the noise would add up")

    @property
    def sensitivity(self) -> float:
        """Δ: how far, in ℓ2, what the noise is added to differs between two neighbours."""
        return self.bound * (2 if self.adjacency == "replace" else 1)

    @property
    def multiplier(self) -> float:
        """σ/Δ; of the mean of n messages, where nothing else is seen: (σ/√n)/(Δ/n) = √n σ/Δ."""
        return self.sigma / self.sensitivity * sqrt(self.contributors if self.against == "model" else 1)


def expect(name: str, value: Any, right: bool, expected: str) -> None:
    """InputError unless it is right."""
    if not right:
        found = f"{value:g}" if isinstance(value, int | float) else repr(value)
        raise InputError(f"{name} = {found}: expected {expected}")


def mechanism_of(method: Any, table: Any, workers: int, rows: Sequence[int], batch: Literal["full"] | int) -> Mechanism:
    """What the experiment of a config releases; σ is method.sigma, 0 where it is still to be calculated from ε.

    table: the config's [privacy]. workers: n. rows: how many rows each honest worker has; not asked for where workers
    are protected. batch: run.batch. Raises InputError where nothing is guaranteed, or it cannot be accounted for."""
    example = table.level == "example"
    adjacency: Literal["replace", "add_remove"] = table.adjacency or ("add_remove" if example else "replace")
    bound, rate = method.bound(), 1.0
    if example:                 # the worker with the fewest rows has the largest sensitivity and rate
        fewest = min(rows)
        expect("run.batch", batch, batch == "full" or batch <= fewest,
               f"at most {fewest}, the rows of the smallest worker: a row cannot be drawn more than once")
        bound, rate = table.clip / (fewest if batch == "full" else batch), 1.0 if batch == "full" else batch / fewest
    expect("method.name", getattr(type(method), "name", None), bound is not None,
           "a method that bounds its messages, or privacy.level = 'example'")
    if table.against == "model":
        for key in ("noisy_state", "compressor"):
            expect(f"method.{key}", getattr(method, key, None), not getattr(method, key, None),
                   "none with privacy.against = 'model': the noise must enter the mean of the messages, and nothing "
                   "else, to add up in it")
    try:
        return Mechanism(method.sigma or 0.0, bound, method.delta, table.level, adjacency, table.against, rate,
                         table.accountant, workers)
    except InputError as error:
        raise InputError(f"privacy: {error}") from None


def epsilon(mechanism: Mechanism, releases: int) -> float:
    """ε of so many releases, each of which may depend on all before it: an upper bound, ∞ where there is no noise.

    Without sampling it takes about a millisecond. With it, the first call for a mechanism computes its distribution of
    losses, about a second, and each number of releases composes it, about a tenth of a second; both are remembered."""
    if releases < 0:
        raise InputError(f"releases = {releases}: expected at least 0")
    return _epsilon(mechanism.multiplier, mechanism.rate, mechanism.adjacency == "replace", mechanism.accountant,
                    mechanism.delta, releases, FINE)


def sigma_for(target: float, releases: int, mechanism: Mechanism) -> float:
    """The smallest σ, to a thousandth, with which so many releases of the mechanism (whose own σ is ignored) are
    (ε, δ)-differentially private for the target ε: what the accountant gives for it is never larger. 0 for no releases.

    A tenth of a second; up to half a minute with sampling. Raises InputError for an ε too small to be accounted for."""
    expect("epsilon", target, 0 < target <= 1e9, "a number above 0, at most 1e9")
    if releases == 0:
        return 0.0
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian
    from scipy.optimize import brentq
    unit = replace(mechanism, sigma=1.0).multiplier

    def spent(log_z: float, grid: int) -> float:
        return _epsilon(exp(log_z), mechanism.rate, mechanism.adjacency == "replace", mechanism.accountant,
                        mechanism.delta, releases, grid)

    def off(log_z: float, grid: int) -> float:          # falls with log_z; kept away from ∞, where no search ends
        return log(min(max(spent(log_z, grid), target / 1e3), target * 1e3) / target)

    def root(start: float, step: float, grid: int) -> float:
        low = high = start
        while off(high, grid) > 0:
            low, high = high, high + step
            expect("epsilon", target, high < start + 3, "more: this is too small for the accountant")
        while off(low, grid) <= 0:
            low, high = low - step, low
        return brentq(off, low, high, args=(grid,), xtol=1e-4)

    # Sampling only improves on what is known without it; the fine grid only improves on the coarse one.
    with _quiet():
        unsampled = get_sigma_gaussian(target, mechanism.delta)
    log_z = root(log(unsampled) + log(releases) / 2, 0.25, COARSE)
    if mechanism.rate < 1:
        log_z = root(log_z, 0.005, FINE)
    while epsilon(replace(mechanism, sigma=exp(log_z) / unit), releases) > target:
        log_z += 5e-5
    return exp(log_z) / unit


def paper_scaling(tau: float, epsilon: float, delta: float, rounds: int) -> float:
    """σ = (τ/ε) √(T ln(1/δ)), the scaling of Clip21-SGD2M's experiments (arXiv:2502.11682). It is no guarantee of this
    ε: what it is worth, only an accountant can tell."""
    return tau / epsilon * sqrt(rounds * log(1 / delta))


def statement(mechanism: Mechanism, releases: int, epsilon: float, noise: str = "secret",
              scaling: str = "certified") -> str:
    """What is guaranteed after so many releases, whose ε is `epsilon`: for whom, against whom, and under which
    assumptions. noise, scaling: the config's. A few lines of plain English; what is not private says so first."""
    m, worker = mechanism, mechanism.level == "worker"
    replaced, sampled = m.adjacency == "replace", m.rate < 1
    lines = []
    if noise == "reproducible":
        lines.append("NOT PRIVATE: the noise is reproducible, whoever knows the config can take it off. With secret "
                     "noise this would hold:")
    if m.sigma == 0:
        lines.append("NOT PRIVATE: σ = 0, there is no noise.")
        return "\n".join(lines)
    who = "one worker's whole data set" if worker else "one row (example) of one worker's data"
    accountant = {"pld": "privacy loss distributions", "rdp": "Rényi divergences"}[m.accountant]
    lines.append(f"(ε = {rounded_up(epsilon)}, δ = {m.delta:g})-differential privacy of {who}, for all {releases} "
                 f"releases together, accounted by {accountant}.")
    other = {("worker", True): "it is replaced by any other",
             ("worker", False): "it is there, or the worker has no data and sends zeros",
             ("example", True): "it is replaced by any other",
             ("example", False): "it is there or not, all else equal, what the sum is divided by included"}
    noisy = "each message" if worker else "each gradient that a worker computes"
    lines.append(f"Neighbours: {other[m.level, replaced]}; so {noisy} changes by at most Δ = "
                 f"{'2 · ' if replaced else ''}{m.bound:g}{f' = {m.sensitivity:g}' if replaced else ''}. Its noise has "
                 f"σ = {m.sigma:g}, σ/Δ = {m.sigma / m.sensitivity:.4g}."
                 + (f" Each row is used with probability {m.rate:g}, whatever the others do." if sampled else ""))
    if m.against == "server":
        lines.append("Against: everyone who sees all messages, all models and the server's state, but not the inside "
                     "of the workers.")
    else:
        n = m.contributors
        lines.append("Against: those who see the models, and no single message. Assumed: nobody but the workers sees "
                     f"single messages, and all {n} add their noise, so that the mean has σ/√{n} and Δ/{n}.")
    if scaling == "paper":
        lines.append("σ is the paper's scaling, which guarantees nothing; the ε above is the accountant's.")
    chosen = "τ, step size" if worker else "clip, batch, step size"
    public = "" if worker else ", whose number of rows is public"
    keys = "key of the noise and of the samples" if sampled else "key of the noise"
    lines.append(f"Assumed: the {keys} stays secret; {chosen} and rounds were chosen without a look at these data"
                 f"{public}; numbers are exact (they are floating-point: whoever studies last bits may learn more).")
    lines.append("Not covered: loss, grad_norm, accuracy, clipped, timings and error messages. They are computed from "
                 "the data without noise, for the experimenter; do not release them. Every other run on these data "
                 "has its own ε, which adds to this one.")
    return "\n".join(lines)


def rounded_up(epsilon: float) -> str:
    """ε with four digits, never less than it is."""
    if not 0 < epsilon < inf:
        return f"{epsilon:g}".replace("inf", "∞")
    digits = 3 - floor(log10(epsilon))
    return f"{ceil(epsilon * 10.0**digits - 1e-6) / 10.0**digits:.4g}"


# ---- for the command line

ADJACENCIES = {"replace": "one is replaced", "add_remove": "one is there or not"}
ACCOUNTANTS = ("pld", "rdp")


def report(*, sigma: float | None = None, target: float | None = None, delta: float | None = None,
           rounds: int | None = None, tau: float | None = None, clip: float | None = None, batch: float = 1.0,
           rate: float = 1.0, workers: int = 1, against: Literal["server", "model"] = "server") -> dict[str, Any]:
    """ε for σ, or σ for ε (`target`): {"adjacency": {"replace": {"sensitivity", "pld", "rdp"}, …}}, for workers (tau)
    or examples (clip), and for workers' ε also {"paper": {"sigma", "epsilon": {"replace", "add_remove"}}}: the paper's
    scaling, and the ε that the accountant gives it. None: cannot be accounted for. Raises InputError naming the
    option."""
    if delta is None or rounds is None:
        raise InputError(f"{'--delta' if delta is None else '--rounds'}: missing; expected a number, or a config")
    expect("--sigma and --epsilon", (sigma, target), (sigma is None) != (target is None), "one of the two")
    expect("--tau and --clip", (tau, clip), (tau is None) != (clip is None), "one of the two: --tau where workers are "
           "protected, --clip where examples are")
    for name, value, right, expected in (
            ("--sigma", sigma, sigma is None or 0 <= sigma < inf, "a finite number, at least 0"),
            ("--epsilon", target, target is None or 0 < target <= 1e9, "a number above 0, at most 1e9"),
            ("--tau", tau, tau is None or 0 < tau < inf, "a finite number above 0: without a bound no noise suffices"),
            ("--clip", clip, clip is None or 0 < clip < inf, "a finite number above 0: without a bound no noise "
             "suffices"),
            ("--delta", delta, 0 < delta < 1, "a number between 0 and 1"),
            ("--rounds", rounds, rounds >= 0, "at least 0"),
            ("--batch", batch, 0 < batch < inf and (batch == 1 or clip is not None), "the expected rows of a gradient, "
             "above 0, with --clip"),
            ("--rate", rate, 0 < rate <= 1, "a probability above 0, at most 1"),
            ("--rate", rate, rate == 1 or clip is not None, "1 with --tau: every worker takes part in every round"),
            ("--workers", workers, workers >= 1, "at least 1"),
            ("--against", against, against == "server" or clip is None, "server with --clip")):
        expect(name, value, right, expected)
    found: dict[str, Any] = {"adjacency": {}}
    mechanisms = {}
    bound = tau if tau is not None else clip / batch            # type: ignore[operator]
    for adjacency in ADJACENCIES:
        m = mechanisms[adjacency] = Mechanism(sigma or 0.0, bound, delta, "example" if tau is None else "worker",
                                              adjacency, against, rate, "pld", workers)     # type: ignore[arg-type]
        line: dict[str, Any] = {"sensitivity": m.sensitivity}
        for accountant in ACCOUNTANTS:
            line[accountant] = None
            if accountant == "pld" or rate == 1 or adjacency == "add_remove":
                it = replace(m, accountant=accountant)          # type: ignore[arg-type]
                line[accountant] = epsilon(it, rounds) if target is None else sigma_for(target, rounds, it)
        found["adjacency"][adjacency] = line
    if target is not None and tau is not None:
        scaled = paper_scaling(tau, target, delta, rounds)
        found["paper"] = {"sigma": scaled, "epsilon": {adjacency: epsilon(replace(m, sigma=scaled), rounds)
                                                       for adjacency, m in mechanisms.items()}}
    return found


def report_text(found: dict[str, Any], asked: str) -> str:
    """The report as a small table. asked: "epsilon" or "sigma", what its columns hold."""
    letter = {"epsilon": "ε", "sigma": "σ"}[asked]
    def cell(value: float | None) -> str:
        return "-" if value is None else rounded_up(value)      # to err on the side of safety, also for σ
    rows = [("neighbours", "Δ", *(f"{letter} ({accountant})" for accountant in ACCOUNTANTS))]
    rows += [(ADJACENCIES[adjacency], f"{line['sensitivity']:g}", *(cell(line[a]) for a in ACCOUNTANTS))
             for adjacency, line in found["adjacency"].items()]
    lines = ["".join([f"{row[0]:<20}", *(f"  {text:<10}" for text in row[1:])]).rstrip() for row in rows]
    if "paper" in found:
        paper = found["paper"]
        lines.append(f"paper scaling: σ = {paper['sigma']:.4g}, which guarantees nothing; its ε (pld) is "
                     + ", ".join(f"{cell(value)} where {ADJACENCIES[adjacency]}"
                                 for adjacency, value in paper["epsilon"].items()))
    return "\n".join(lines)


# ---- inside

@lru_cache(maxsize=4096)
def _epsilon(z: float, rate: float, replaced: bool, accountant: str, delta: float, releases: int, grid: int) -> float:
    """ε of so many releases with σ/Δ = z."""
    if releases == 0:
        return 0.0
    if z < SMALLEST:
        return inf
    z = min(z, 1e150)                                   # its square is finite
    with _quiet():
        if accountant == "rdp":
            return _renyi(z, rate, delta, releases)
        unsampled = _gaussian(z, delta, releases)       # sampling never costs privacy, so this is always a bound
        if rate == 1 or not SAMPLED[0] <= z <= SAMPLED[1]:
            return unsampled
        expect("releases", releases, releases <= MOST, f"at most {MOST} with sampling, unless accountant = 'rdp'")
        off = ROUNDING[0] + ROUNDING[1] * releases
        expect("delta", delta, delta >= 10 * off, f"at least {10 * off:.1g}: less is lost in the rounding of "
               f"{releases} sampled releases, unless accountant = 'rdp'")
        losses = _losses(z, rate, replaced, grid if releases < MANY else COARSE).self_compose(releases)
        return min(unsampled, float(losses.get_epsilon_for_delta(delta - off)))


def _gaussian(z: float, delta: float, releases: int) -> float:
    """Exact: T releases are one with σ/√T (Dong, Roth, Su 2022), whose ε is that of Balle and Wang (2018)."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
    z = min(z / sqrt(releases), LARGEST)
    if z < SMALLEST:
        return inf
    return get_epsilon_gaussian(z, delta * (1 - 1e-8)) * (1 + 1e-12)    # both far beyond the rounding


def _renyi(z: float, rate: float, delta: float, releases: int) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, ZCDpEvent
    from dp_accounting.rdp import RdpAccountant
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
    release = GaussianDpEvent(z)
    if rate == 1:
        best = z * sqrt(2 * log(1 / delta) / releases)                  # about; the bound is flat around it
        orders = [1 + max(best, 0.02) * 2 ** (power / 16) for power in range(-64, 65)]
        return float(RdpAccountant(orders).compose(release, releases).get_epsilon(delta))
    accountant = RdpAccountant([*DEFAULT_RDP_ORDERS, 2048, 4096, 8192])
    accountant.compose(PoissonSampledDpEvent(rate, release), releases)
    # Where a divergence is lost in rounding, it must not be taken for 0, or less.
    return float(accountant.compose(ZCDpEvent(rho=0.0, xi=SLACK), releases).get_epsilon(delta))


@lru_cache(maxsize=32)
def _losses(z: float, rate: float, replaced: bool, grid: int) -> Any:
    """The distribution of the privacy loss of one sampled release, on a grid, rounded to the side of safety.

    Where a row is replaced, the worst pair is a sum with +C and one with −C, see docs/privacy.md.
    dp-accounting then takes C, not Δ = 2C, for its unit."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
    unit = 2 * z if replaced else z
    furthest = 0.5 / unit**2 + 10.5 / unit              # the loss of a row that is used, but for 1e-23 of cases
    spread = min(rate * sqrt(expm1(min(1 / unit**2, 100))), sqrt(rate) * (0.5 / unit**2 + 1 / unit))
    up = furthest + log(rate) if furthest > 600 else log1p(rate * expm1(furthest))
    span = 2 * up if replaced else up - log1p(rate * expm1(-furthest))
    points = min(max(span / spread, POINTS[0] / FINE), POINTS[1] / FINE) * grid
    relation = NeighboringRelation.REPLACE_ONE if replaced else NeighboringRelation.ADD_OR_REMOVE_ONE
    return from_gaussian_mechanism(unit, sampling_prob=rate, value_discretization_interval=span / points,
                                   neighboring_relation=relation, pessimistic_estimate=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """dp-accounting warns of every Rényi order that it leaves out, which only makes the bound larger, and NumPy where a
    δ is too small for a float."""
    import numpy as np
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        with np.errstate(divide="ignore"):
            yield
    finally:
        logger.disabled = before
