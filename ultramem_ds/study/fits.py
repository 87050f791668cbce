"""Straight lines through losses on logarithmic axes, with confidence bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LineFit:
    """Least squares of y on x, both already on the axes' scale.

    Attributes:
        residual_std: of one point around the line; NaN for two points.
    """

    slope: float
    intercept: float
    slope_error: float
    residual_std: float
    mean_x: float
    sum_square_x: float  # of deviations from the mean
    num_points: int

    def predict(self, x: FloatArray) -> FloatArray:
        """The line at ``x``."""
        return self.intercept + self.slope * x

    def half_band(self, x: FloatArray, confidence: float = 0.95) -> FloatArray:
        """Half width of the confidence band of the line (not of a further point) at ``x``.

        Raises:
            ValueError: with fewer than three points, through which any line has no band.
        """
        if self.num_points < 3:
            raise ValueError("a confidence band needs at least three points")
        from scipy.stats import t

        quantile = float(t.ppf(0.5 + confidence / 2, self.num_points - 2))
        spread = 1 / self.num_points + (x - self.mean_x) ** 2 / self.sum_square_x
        half: FloatArray = quantile * self.residual_std * np.sqrt(spread)
        return half


def fit_line(x: Sequence[float], y: Sequence[float]) -> LineFit | None:
    """Fit a line; None for points at fewer than two places."""
    if len(set(x)) < 2:
        return None
    from scipy.stats import linregress

    found = linregress(x, y)
    x_array, y_array = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    residuals = y_array - (found.intercept + found.slope * x_array)
    freedom = len(x) - 2
    residual_std = math.sqrt(float((residuals**2).sum()) / freedom) if freedom else math.nan
    return LineFit(
        slope=float(found.slope),
        intercept=float(found.intercept),
        slope_error=float(found.stderr) if freedom else math.nan,
        residual_std=residual_std,
        mean_x=float(x_array.mean()),
        sum_square_x=float(((x_array - x_array.mean()) ** 2).sum()),
        num_points=len(x),
    )


def fit_power_law(compute: Sequence[float], loss: Sequence[float]) -> LineFit | None:
    """Fit loss = exp(intercept) * compute^slope, on natural logarithms of both."""
    return fit_line([math.log(c) for c in compute], [math.log(value) for value in loss])
