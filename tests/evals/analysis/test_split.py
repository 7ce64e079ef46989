"""Format against content: the parts add up, and the words say which it was."""

from __future__ import annotations

import itertools

import pytest

from evals.analysis.split import split_change


def test_the_gain_is_format():
    # F 0.40 -> 0.99, C 0.63 -> 0.65: format 0.59 * 0.64 = 0.3776, content 0.02 * 0.695 = 0.0139.
    found = split_change((0.40, 0.40 * 0.63), (0.99, 0.99 * 0.65), True)
    assert (found.from_format, found.from_content) == pytest.approx((0.3776, 0.0139))
    assert found.words == "the gain is format: valid replies 40% -> 99%, right among valid 63% -> 65%"


@pytest.mark.parametrize(
    ("base", "candidate"), itertools.permutations([(0.2, 0.1), (0.9, 0.3), (1.0, 1.0), (0.5, 0)], 2)
)
def test_parts_add_up_and_turn_with_the_sides(base, candidate):
    found, back = split_change(base, candidate, True), split_change(candidate, base, True)
    assert found.from_format + found.from_content == pytest.approx(candidate[1] - base[1])
    assert (back.from_format, back.from_content) == pytest.approx((-found.from_format, -found.from_content))


@pytest.mark.parametrize(
    ("base", "candidate", "start"),
    [
        ((1.0, 0.4), (1.0, 0.7), "the gain is content: "),
        ((1.0, 0.7), (1.0, 0.4), "the loss is content: "),
        ((0.5, 0.25), (0.75, 0.5625), "the gain is both (+15.6 points by format, +15.6 by content): "),
        ((0.5, 0.4), (0.9, 0.45), "format rose and content fell (+26.0 points by format, -21.0 by content): "),
        ((0.9, 0.45), (0.5, 0.4), "content rose and format fell (-26.0 points by format, +21.0 by content): "),
        ((0.9, 0.45), (0.9, 0.45), "neither format nor content changed: "),
    ],
)
def test_words(base, candidate, start):
    assert split_change(base, candidate, True).words.startswith(start)


def test_no_gain_is_claimed_without_evidence():
    assert split_change((1.0, 0.4), (1.0, 0.5), False).words.startswith("the difference is content")


def test_nothing_valid_on_a_side():
    found = split_change((0.0, 0.0), (0.8, 0.6), True)
    assert (found.from_format, found.from_content) == pytest.approx((0.6, 0))
    assert "right among valid 75% (none before to compare with)" in found.words
    assert "none after" in split_change((0.8, 0.6), (0.0, 0.0), True).words
    assert split_change((0.0, 0.0), (0.0, 0.0), False).words == "no valid replies on either side"


def test_a_headline_above_its_format_is_a_broken_grader():
    with pytest.raises(ValueError, match=r"0\.5000 exceeds the share in the right format 0\.4000"):
        split_change((0.4, 0.5), (0.9, 0.5), True)
