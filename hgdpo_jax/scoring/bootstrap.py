"""Measures with 95 % intervals, by bootstrap over people (Efron 1979).

A resample takes people with replacement, each with all images of their caption and all their photographs. All models
are resampled alike, so that differences between them have intervals too. `n` people, `r` resamples.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 400

Weights = Float[np.ndarray, "r n"]


class Measure(NamedTuple):
    """A measure of each resample; the first resample is the people themselves. No value of it is below `least` or above
    `most`, such as 0 and 1 of a share."""

    values: Float[np.ndarray, "r"]
    least: float = -math.inf
    most: float = math.inf

    @property
    def value(self) -> float:
        """The measure itself."""
        return float(self.values[0])

    @property
    def interval(self) -> list[float]:
        """[low, high]: the middle 95 % of the resamples, moved so that their mean is the measure, for some measures are
        biased by people who occur twice; cut where the measure can have no value."""
        deviations = self.values[1:] - self.values[1:].mean()
        moved = self.value + np.quantile(deviations, (0.025, 0.975))
        return [float(x) for x in moved.clip(self.least, self.most)]

    def __sub__(self, other: "Measure") -> "Measure":
        return Measure(self.values - other.values, self.least - other.most, self.most - other.least)


def resamples(people: int) -> Weights:
    """How often each of n > 1 people occurs in each resample: once in the first. No resample is one person alone."""
    drawn = np.random.default_rng(0).multinomial(people, np.full(people, 1.0 / people), RESAMPLES)
    return np.concatenate([np.ones((1, people)), drawn[drawn.max(1) < people]])


def mean(
    values: Float[np.ndarray, "n k"], weights: Weights, least: float = -math.inf, most: float = math.inf
) -> Measure:
    """Mean over people of a quantity that was measured k times for each, and lies between `least` and `most`."""
    return Measure(weights @ values.mean(1, dtype=np.float64) / weights.sum(1), least, most)
