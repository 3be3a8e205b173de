"""Numbers with 95 % intervals: one type, and one way to write them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from scipy import stats

TAIL = 0.025  # probability outside a 95 % interval, on either side


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


NOWHERE = Interval(np.nan, np.nan)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, NaN where there is none, as with one seed; or the `reason` why there is none."""

    value: float = np.nan
    interval: Interval = NOWHERE
    reason: str = ""

    @classmethod
    def of(cls, value: float, low: float = np.nan, high: float = np.nan) -> Self:
        """From a number and the ends of its interval."""
        return cls(float(value), Interval(float(low), float(high)))

    @property
    def low(self) -> float:
        """The lower end."""
        return self.interval.low

    @property
    def high(self) -> float:
        """The upper end."""
        return self.interval.high

    @property
    def numbers(self) -> tuple[float, float, float]:
        """The number and the ends of its interval."""
        return self.value, self.low, self.high

    def signed(self, digits: int = 2) -> str:
        """`−0.12 [−0.24, +0.01]`: of what may lie on both sides of 0."""
        return self._written(lambda number: signed(number, digits))

    def plain(self, digits: int = 3) -> str:
        """`0.018 [0.001, 0.054]`: of what has no sign to speak of."""
        return self._written(lambda number: plain(number, digits))

    def _written(self, write: Callable[[float], str]) -> str:
        ends = f" [{write(self.low)}, {write(self.high)}]"
        return write(self.value) + (ends if np.isfinite([self.low, self.high]).any() else "")


def over_seeds(values: np.ndarray) -> Estimate:
    """The mean over seeds with Student's interval; NaN if there is none."""
    if len(values) == 0:
        return Estimate()
    half_width = np.nan
    if len(values) > 1:
        half_width = stats.t.isf(TAIL, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate.of(values.mean(), values.mean() - half_width, values.mean() + half_width)


def signed(value: float, digits: int = 2) -> str:
    """Two decimals with a sign; a true minus, and no sign on what rounds to zero."""
    rounded = round(float(value), digits)
    return f"{0:.{digits}f}" if rounded == 0 else f"{rounded:+.{digits}f}".replace("-", "−")


def signed_range(values: Iterable[float]) -> str:
    """The least and the most of some values, or the one that they all are."""
    ordered = sorted(values)
    least, most = signed(ordered[0]), signed(ordered[-1])
    return least if least == most else f"{least} to {most}"


def plain(value: float, digits: int = 3) -> str:
    """Three decimals; a true minus, where there is one."""
    return f"{round(float(value), digits) + 0.0:.{digits}f}".replace("-", "−")
