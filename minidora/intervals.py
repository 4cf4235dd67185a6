"""What several seeds can tell: means with their errors, paired differences, what would be found.

    difference = paired_difference(dora, lora)       # one value a seed each
    difference.verdict                               # "higher", "lower" or no difference detected
    seeds_to_detect(0.5, spread=1.2)                 # how many seeds such a difference takes

Reference:
    power of a t test: Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences"
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev


@dataclass(frozen=True)
class Difference:
    """The paired difference of two methods in test accuracy, in percentage points.

    Attributes:
        values: one difference a seed.
        mean, error: their mean and its standard error.
        low, high: the 95 % t interval of the mean.
        detectable: the smallest true difference that a test at 5 % would have found with a
            probability of 80 %, with this spread and this number of seeds.
    """

    values: tuple[float, ...]
    mean: float
    error: float
    low: float
    high: float
    detectable: float

    @property
    def verdict(self) -> str:
        """ "higher" or "lower" where the interval lies on one side of 0, else no difference."""
        if self.low <= 0 <= self.high:
            return "no difference detected"
        return "higher" if self.low > 0 else "lower"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, stdev / sqrt(n) with n - 1 in the stdev.

    Raises:
        ValueError: fewer than two values have no spread.
    """
    if len(values) < 2:
        raise ValueError(f"a spread needs at least 2 seeds, got {len(values)}")
    return fmean(values), stdev(values) / math.sqrt(len(values))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """first - second, seed by seed: what the seeds have in common drops out.

        mean +- t(0.975; n - 1) * error

    Raises:
        ValueError: not equally many values, or fewer than two.
    """
    from scipy import stats  # type: ignore[import-untyped]

    if len(first) != len(second):
        raise ValueError(
            f"a pair needs one value of each a seed, got {len(first)} and {len(second)}"
        )
    values = tuple(a - b for a, b in zip(first, second, strict=True))
    mean, error = mean_and_error(values)
    half_width = float(stats.t.ppf(0.975, len(values) - 1)) * error
    detectable = detectable_difference(error, len(values))
    return Difference(values, mean, error, mean - half_width, mean + half_width, detectable)


def at_as_many(trained: int, losses: Mapping[int, Sequence[float]]) -> list[float] | None:
    """The losses, one a seed, of a method that trained so many numbers.

    Between the two nearest runs they are taken as linear in the logarithm of what those trained,
    seed by seed. None where no two runs lie around the number: nothing is extrapolated.

    Args:
        losses: {trained numbers: one loss a seed}.
    """
    for low, high in pairwise(sorted(losses)):
        if low <= trained <= high:
            share = math.log(trained / low) / math.log(high / low)
            return [a + share * (b - a) for a, b in zip(losses[low], losses[high], strict=True)]
    return None


def detectable_difference(
    error: float, seeds: int, level: float = 0.05, power: float = 0.8
) -> float:
    """The smallest true difference that a two-sided paired t test would find.

    With a true difference delta (in units of error, the standard error of the mean) the test finds

        |z + delta| > t(1 - level / 2; n - 1) * s,      z normal,  s^2 = chi^2(n - 1) / (n - 1)

    where s is how much the measured spread misses the true one. delta is where this has the
    probability asked for: the power of the noncentral t distribution, averaged over s.

    Raises:
        ValueError: seeds below 2, error below 0, or not 0 < level < power < 1.
    """
    from scipy import optimize, stats

    if seeds < 2 or not error >= 0:
        raise ValueError(f"seeds must be at least 2 and error at least 0, got {seeds}, {error}")
    if not 0 < level < power < 1:
        raise ValueError(f"it takes 0 < level < power < 1, got level={level}, power={power}")
    critical = stats.t.ppf(1 - level / 2, seeds - 1)
    count = 10_000
    quantiles = [(k + 0.5) / count for k in range(count)]
    threshold = critical * (stats.chi2.ppf(quantiles, seeds - 1) / (seeds - 1)) ** 0.5

    def found(delta: float) -> float:
        tails = stats.norm.sf(threshold - delta) + stats.norm.sf(threshold + delta)
        return float(tails.mean())

    delta = optimize.brentq(lambda delta: found(delta) - power, 0.0, 100 * critical)
    return error * float(delta)


def seeds_to_detect(difference: float, spread: float) -> int:
    """The fewest seeds whose detectable_difference is at most this difference.

    Args:
        spread: standard deviation of the paired difference from seed to seed, in the same unit.

    Raises:
        ValueError: difference or spread is not above 0.
    """
    if not (difference > 0 and spread > 0):
        raise ValueError(f"difference and spread must be above 0, got {difference}, {spread}")

    def enough(seeds: int) -> bool:
        return detectable_difference(spread / math.sqrt(seeds), seeds) <= difference

    few, many = 1, 2
    while not enough(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many
