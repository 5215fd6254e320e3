from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downstream.evaluation.rate_accuracy import Curve, RatePoint, curves_of, delta, deltas, rate_at


def curve(*points: tuple[float, float], codec: str = "codec") -> Curve:
    return Curve(codec, "adapted", tuple(RatePoint(str(n), *point) for n, point in enumerate(points)))


ANCHOR = curve((0.1, 0.4), (0.2, 0.5), (0.4, 0.6), (0.8, 0.7), codec="anchor")


def test_delta__of_a_curve_at_half_the_rate_is_minus_50_percent():
    """Accuracy is linear in log rate here, so the mean difference is the same at every accuracy."""
    found = delta(ANCHOR, curve((0.05, 0.4), (0.1, 0.5), (0.2, 0.6), (0.4, 0.7)))
    assert found.rate == pytest.approx(-0.5)
    assert found.accuracy == pytest.approx(0.1)  # an octave is worth 0.1
    assert found.warnings == ("BD-accuracy: Insufficient curve overlap: '50.00'. Minimum overlap: '75.00'.",)


def test_delta__by_hand_where_curves_differ_and_overlap_in_part():
    """Straight lines in log2 rate: the anchor's is 10 r + 0.4 from r = 0; ours has twice the slope from r = 0."""
    anchor = curve((1.0, 0.0), (2.0, 0.1), (4.0, 0.2))
    ours = curve((1.0, 0.0), (2.0, 0.2), (4.0, 0.4))
    found = delta(anchor, ours)
    # Over accuracies 0..0.2 log2 rates are 10 a and 5 a: the mean of their difference is -5 * 0.1 octaves.
    assert found.rate == pytest.approx(2**-0.5 - 1)
    # Over rates of 0..2 octaves accuracies are 0.1 r and 0.2 r: the mean difference is 0.1.
    assert found.accuracy == pytest.approx(0.1)
    assert len(found.warnings) == 1 and "BD-rate: Insufficient curve overlap: '50.00'" in found.warnings[0]


def test_delta__curves_that_share_no_accuracy_have_no_rate_and_a_warning():
    found = delta(ANCHOR, curve((0.1, 0.1), (0.8, 0.3)))
    assert found.rate is None and found.accuracy is not None
    assert any("do not overlap" in warning for warning in found.warnings)


def test_delta__one_point_is_no_curve():
    found = delta(ANCHOR, curve((0.1, 0.5)))
    assert (found.rate, found.accuracy) == (None, None) and "1 usable point" in found.warnings[0]


@given(st.floats(0.05, 20), st.lists(st.floats(0.01, 0.2), min_size=2, max_size=5))
def test_delta__of_scaled_rates_is_the_scale(scale: float, steps: list[float]):
    points = [(0.1 * 2**n, 0.1 + sum(steps[:n])) for n in range(len(steps) + 1)]
    found = delta(curve(*points), curve(*((rate * scale, accuracy) for rate, accuracy in points)))
    assert found.rate == pytest.approx(scale - 1, rel=1e-6, abs=1e-9)


def test_delta__points_of_different_seeds_have_a_warning():
    points = [point._replace(seeds=(0, 1)) for point in ANCHOR.points]
    both = Curve("anchor", "adapted", tuple(points))
    assert not delta(both, both).warnings
    part = Curve("codec", "adapted", (*points[:-1], points[-1]._replace(seeds=(0,))))
    assert delta(both, part).warnings == ("points are means over different seeds; finish the sweep",)


def test_deltas__compare_curves_of_one_protocol():
    frozen = Curve("anchor", "frozen", ANCHOR.points)
    half = curve((0.05, 0.4), (0.1, 0.5), (0.2, 0.6), (0.4, 0.7))
    ((compared, gain),) = deltas([ANCHOR, frozen, half], "anchor")
    assert compared is half and gain.rate == pytest.approx(-0.5)
    assert deltas([half], "anchor") == []


def test_frontier__leaves_out_what_another_point_beats():
    points = curve((0.1, 0.5), (0.2, 0.45), (0.3, 0.6), (0.3, 0.55)).frontier()
    assert [(point.bpp, point.accuracy) for point in points] == [(0.1, 0.5), (0.3, 0.6)]


def test_curves_of__means_over_seeds_with_their_spread():
    rows = [
        {"codec": "dicm", "protocol": "adapted", "quality": "0.5", "seed": seed, "value": value, "bpp_payload": rate,
         "bpp": 9.0}
        for seed, (value, rate) in enumerate(((0.5, 0.1), (0.6, 0.3), (None, 0.2)))
    ]  # fmt: skip
    (found,) = curves_of(rows)
    (point,) = found.points
    assert (point.bpp, point.accuracy) == (pytest.approx(0.2), pytest.approx(0.55))
    assert (point.seeds, point.num_seeds) == ((0, 1), 2)
    assert point.accuracy_spread == pytest.approx(math.sqrt(0.005))
    assert curves_of(rows, "bpp")[0].points[0].bpp == 9.0


def test_rate_at__is_interpolated_in_log_rate_and_none_outside():
    assert rate_at(ANCHOR, 0.55) == pytest.approx(math.sqrt(0.2 * 0.4))
    assert rate_at(ANCHOR, 0.4) == pytest.approx(0.1)
    assert rate_at(ANCHOR, 0.39) is None and rate_at(ANCHOR, 0.71) is None
