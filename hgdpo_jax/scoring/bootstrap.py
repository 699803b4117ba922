"""Measures with 95 % intervals, by bootstrap over people (Efron 1979).

What is drawn for one person's caption goes together, and so do the photographs of one person: a resample takes whole
people, with replacement. All models are resampled alike, so that differences between them have intervals too.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 400

Weights = Float[np.ndarray, "r n"]


class Measure(NamedTuple):
    """A measure of each resample; the first is of the people as they are."""

    values: Float[np.ndarray, "r"]

    @property
    def value(self) -> float:
        """The measure itself."""
        return float(self.values[0])

    @property
    def interval(self) -> list[float]:
        """[low, high]: the middle 95 % of the resamples, moved so that their mean is the measure: some measures are
        biased by people who occur twice."""
        spread = self.values[1:] - self.values[1:].mean()
        return [float(self.value + x) for x in np.quantile(spread, (0.025, 0.975))]

    def __sub__(self, other: "Measure") -> "Measure":
        return Measure(self.values - other.values)


def resamples(people: int) -> Weights:
    """How often each of n > 1 people occurs in each resample; in the first, once. Some two differ in each."""
    drawn = np.random.default_rng(0).multinomial(people, np.full(people, 1.0 / people), RESAMPLES)
    return np.concatenate([np.ones((1, people)), drawn[drawn.max(1) < people]])


def mean(values: Float[np.ndarray, "n k"], weights: Weights) -> Measure:
    """Mean over people of what was measured k times for each."""
    return Measure(weights @ values.mean(1, dtype=np.float64) / weights.sum(1))
