"""Curves of accuracy over rate, and what one codec saves against another: Bjøntegaard's deltas.

    rows of a sweep -> Curve (means over seeds, with their spread) -> BD-rate, BD-accuracy against an anchor

BD-rate is the mean difference of rate at equal accuracy, BD-accuracy that of accuracy at equal rate, over the range
that both curves share, by the `bjontegaard` package, piecewise cubic (PCHIP). Its warnings are part of the result:
curves that barely overlap say little. Where a curve is not monotone, points that another one of it beats at no more
bits are left out of the interpolation, for both sides alike; they stay in tables and pictures.

Source: Bjøntegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001; Barman et al. 2024 and
Herglotz et al. 2022 for the interpolation.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from downstream.errors import TaskError

METHOD = "pchip"
LEAST_POINTS = 2


class RatePoint(NamedTuple):
    """Means over seeds at one quality, and standard deviations (0 of a single seed)."""

    quality: str
    bpp: float
    accuracy: float
    bpp_spread: float = 0.0
    accuracy_spread: float = 0.0
    seeds: tuple[int, ...] = ()

    @property
    def num_seeds(self) -> int:
        """How many it is the mean of."""
        return max(1, len(self.seeds))


@dataclass(frozen=True)
class Curve:
    """A codec's points on one data set, by rising rate."""

    codec: str
    protocol: str
    points: tuple[RatePoint, ...]

    def frontier(self) -> list[RatePoint]:
        """The points that no other one beats: rising rate, rising accuracy."""
        found: list[RatePoint] = []
        for point in sorted(self.points, key=lambda point: (point.bpp, -point.accuracy)):
            if not found or point.accuracy > found[-1].accuracy:
                found.append(point)
        return found


@dataclass(frozen=True)
class Delta:
    """What a curve gains over an anchor's.

    Attributes:
        rate: mean difference of rate at equal accuracy, as a share of the anchor's: -0.6 saves 60 %; None where the
            curves share no accuracy.
        accuracy: mean difference of accuracy at equal rate; None where they share no rate.
        warnings: of the package, in its words.
    """

    rate: float | None
    accuracy: float | None
    warnings: tuple[str, ...] = field(default=())

    @property
    def rate_text(self) -> str:
        """In per cent, with its sign; a dash for none."""
        return "-" if self.rate is None else f"{100 * self.rate:+.1f} %"

    @property
    def accuracy_text(self) -> str:
        """In points, with its sign; a dash for none."""
        return "-" if self.accuracy is None else f"{100 * self.accuracy:+.1f}"


def check_seeds(rows: Iterable[dict[str, Any]]) -> None:
    """Refuse (TaskError) rows that would be averaged as seeds and are none: of two runs of one seed."""
    runs: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = tuple(row[name] for name in ("task", "data", "codec", "quality", "protocol", "seed"))
        other = runs.setdefault(key, row["run"])
        if other != row["run"]:
            name = " ".join(part for part in (row["codec"], row["quality"], row["protocol"]) if part)
            raise TaskError(
                f"{name} of {row['task']} on {row['data']} is there of runs {other} and {row['run']}, which have one "
                f"seed ({row['seed']}) and would be averaged as if they had two; fine-tune with seeds of their own "
                "(seed=1), or keep the two apart: another out= or label=, a report of each"
            )


def curves_of(rows: Iterable[dict[str, Any]], rate: str = "bpp_payload") -> list[Curve]:
    """Curves of a sweep's rows, all of one task and data set; a gate's number of channels is a curve of its own.

    Args:
        rate: column of the rate, `bpp_payload` or `bpp` with all headers.
    """
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["value"] is not None:
            groups[row["codec"], row["protocol"]][row["quality"]].append(row)
    return [
        Curve(codec, protocol, tuple(sorted((_point(*each, rate) for each in by_quality.items()), key=lambda p: p.bpp)))
        for (codec, protocol), by_quality in groups.items()
    ]


def _point(quality: str, rows: list[dict[str, Any]], rate: str) -> RatePoint:
    rates, accuracies = [row[rate] for row in rows], [row["value"] for row in rows]
    bpp_spread, accuracy_spread = (statistics.stdev(each) if len(rows) > 1 else 0.0 for each in (rates, accuracies))
    means = statistics.fmean(rates), statistics.fmean(accuracies)
    return RatePoint(quality, *means, bpp_spread, accuracy_spread, tuple(sorted(row["seed"] for row in rows)))


def delta(anchor: Curve, test: Curve) -> Delta:
    """BD-rate and BD-accuracy of `test` against `anchor`."""
    from bjontegaard import bd_psnr, bd_rate

    ours, theirs = test.frontier(), anchor.frontier()
    for curve, points in ((test, ours), (anchor, theirs)):
        if len(points) < LEAST_POINTS:
            return Delta(
                None, None, (f"{curve.codec} has {len(points)} usable point(s), a curve needs {LEAST_POINTS}",)
            )
    columns = [[getattr(point, name) for point in points] for points in (theirs, ours) for name in ("bpp", "accuracy")]
    found: list[float | None] = []
    told: list[str] = []
    for name, function in (("BD-rate", bd_rate), ("BD-accuracy", bd_psnr)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = float(function(*columns, method=METHOD, require_matching_points=False))
        found.append(None if math.isnan(value) else value)
        told += [f"{name}: {str(warning.message).split(' You can')[0]}" for warning in caught]
    if len({point.seeds for point in (*ours, *theirs)}) > 1:
        told.append("points are means over different seeds; finish the sweep")
    rate, accuracy = found
    return Delta(None if rate is None else rate / 100, accuracy, tuple(told))


def deltas(curves: Sequence[Curve], against: str) -> list[tuple[Curve, Delta]]:
    """What every other curve gains over that of the codec `against` under the same protocol, where there is one."""
    anchors = {curve.protocol: curve for curve in curves if curve.codec == against}
    return [
        (curve, delta(anchors[curve.protocol], curve))
        for curve in curves
        if curve.codec != against and curve.protocol in anchors
    ]


def rate_at(curve: Curve, accuracy: float) -> float | None:
    """The rate at which a curve reaches an accuracy, interpolated in log rate; None outside its range."""
    points = curve.frontier()
    if not points or not points[0].accuracy <= accuracy <= points[-1].accuracy:
        return None
    for low, high in pairwise(points):
        if low.accuracy <= accuracy <= high.accuracy:
            share = (accuracy - low.accuracy) / (high.accuracy - low.accuracy)
            return math.exp(math.log(low.bpp) + share * (math.log(high.bpp) - math.log(low.bpp)))
    return points[0].bpp
