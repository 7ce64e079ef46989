"""Charts: places and sizes of the marks against hand-computed values."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from evals.report import charts, svg
from evals.result import Curve
from evals.stats import Estimate


def marks(drawing, tag, kind=""):
    root = ElementTree.fromstring(drawing)
    return [e for e in root.iter(tag) if kind in (e.get("class") or "").split() or not kind]


def test_nice_steps():
    assert [charts.nice(v) for v in (0.03, 1, 1.1, 2.2, 2.6, 51)] == [0.05, 1, 2, 2.5, 5, 100]


def test_span_around_zero_holds_all_values_and_is_symmetric():
    assert svg.span_around_zero([]) == svg.Span(-0.05, 0.05)
    assert svg.span_around_zero([0.05, -0.01]) == svg.Span(-0.05, 0.05)
    assert svg.span_around_zero([-0.12, 0.051]) == svg.Span(-0.15, 0.15)
    assert (svg.Span(-1, 1).at(-1), svg.Span(-1, 1).at(0), svg.Span(-1, 1).at(0.5)) == ("2.000%", "50.000%", "74.000%")


def test_interval_row_places_bar_and_mark():
    row = svg.interval_row("a", 0.25, 0.0, 0.5, svg.Span(0, 1), "s1")
    (bar,) = marks(row, "line", "bar")
    assert (bar.get("x1"), bar.get("x2")) == ("2.000%", "50.000%")
    assert marks(row, "circle")[0].get("cx") == "26.000%"
    assert len(marks(row, "line", "track")) == 1 and not marks(row, "line", "zero")
    assert len(marks(svg.interval_row("a", 0, 0, 0, svg.Span(-1, 1), "up", zero=True), "line", "zero")) == 1


def test_dots_row_draws_the_base_last_and_hollow():
    dots = marks(svg.dots_row("a", (0.5, 0.25, 1.0), svg.Span(0, 1)), "circle")
    assert [d.get("cx") for d in dots] == ["98.000%", "26.000%", "50.000%"]
    assert [d.get("class") for d in dots] == ["mark s2", "mark s1", "mark s0 hollow"]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((0.02, 0.01), [("50.000%", "19.200%"), ("69.200%", "9.600%")]),  # edge 5 points: 96 % are 10 points
        ((-0.02, -0.01), [("30.800%", "19.200%"), ("21.200%", "9.600%")]),
        ((0.02, -0.01), [("50.000%", "19.200%"), ("40.400%", "9.600%")]),
        ((0.0, 0.0), [("50.000%", "0.000%"), ("50.000%", "0.000%")]),
    ],
)
def test_split_bar_end_to_end_or_to_either_side(parts, expected):
    assert [(r.get("x"), r.get("width")) for r in marks(svg.split_bar("a", *parts), "rect")] == expected


def test_scatter_area_is_proportional_to_questions_and_the_name_counts_them():
    chart = charts.scatter([0, 0, 0, 0, 1, 0.5], [1, 1, 1, 1, 0, 0.5], ("base", "new"))
    big, *small = marks(chart, "circle", "bubble")
    assert float(big.get("r")) == pytest.approx(2 * float(small[0].get("r")), abs=0.02)
    assert [b.get("class").split()[1] for b in (big, *small)] == ["up", "down", "same"]
    assert "4 higher, 1 lower, 1 equal" in chart and "4 questions: base 0.0%, new 100.0%" in chart
    assert float(big.get("cx")) < float(small[0].get("cx")) and float(big.get("cy")) < float(small[0].get("cy"))


def test_scatter_of_many_different_points_stays_small():
    scores = [i / 5000 for i in range(5000)]
    circles = marks(charts.scatter(scores, scores[::-1], ("a", "b")), "circle")
    assert len(circles) <= 2 * 41  # 41 values across, rounding may part a pair


def test_curves_mark_the_last_k_as_the_whole_sample():
    curve = Curve((1, 2, 4), (0.25, 0.5, 1.0), (0.1, 0.3, 0.9), (0.4, 0.7, 1.0))
    chart = charts.curves([(0, "base", curve)], samples=4)
    dots = marks(chart, "circle", "mark")
    x, y = [float(d.get("cx")) for d in dots], [float(d.get("cy")) for d in dots]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.02)  # log scale
    assert y[1] - y[2] == pytest.approx(2 * (y[0] - y[1]), abs=0.03)
    (line,), (band,) = marks(chart, "polyline"), marks(chart, "polygon")
    corners = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
    assert [c for c, _ in corners] == pytest.approx(x, abs=0.01)
    assert [c for _, c in corners] == pytest.approx(y, abs=0.01)
    assert [float(place.split(",")[0]) for place in band.get("points").split()] == pytest.approx(x + x[::-1], abs=0.01)
    texts = [t.text for t in marks(chart, "text")]
    assert "4 = K" in texts and "2" in texts
    assert "pass@2: 50.0% [30.0, 70.0]" in chart.replace("base, ", "")


def test_bins_have_a_round_width_and_shares_that_add_up():
    width, shares = charts.bins([[0, 99, 100, 1999], [], [500]])
    assert width == 100
    assert shares[0][0] == 0.5 and shares[0][1] == 0.25 and shares[0][19] == 0.25
    assert [sum(s) for s in shares] == [1.0, 0.0, 1.0] and len({len(s) for s in shares}) == 1
    assert charts.bins([[0]])[1] == [[1.0]]


def test_checkpoints_in_the_order_of_steps_with_the_base_as_a_level_line():
    def at(mean):
        return Estimate(mean, mean - 0.1, mean + 0.1, 10, 4)

    chart = charts.steps(at(0.5), [(200, 2, at(0.5)), (100, 1, at(0.25))])
    dots = marks(chart, "circle", "mark")
    assert [d[0].text.split(":")[0] for d in dots] == ["step 100", "step 200"]
    (level,) = marks(chart, "line", "curve")
    assert level.get("y1") == dots[1].get("cy")


def test_more_subjects_than_colours_share_those_of_candidates():
    assert [svg.colour(i) for i in (0, 1, 5, 6, 10, 11)] == ["s0", "s1", "s5", "s1", "s5", "s1"]
