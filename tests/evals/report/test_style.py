"""The style sheet: every colour of text reads on every ground, in light and in dark."""

from __future__ import annotations

import re

import pytest

from evals.report.style import CSS

TEXT = ("ink", "soft", "up", "down", "format", "link")
MARKS = ("s0", "s1", "s2", "s3", "s4", "s5", "content", "format", "up", "down")


def palettes():
    return [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", CSS, re.S)]


def luminance(colour):
    """WCAG 2: relative luminance of "#rrggbb"."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_on_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("index", [0, 1])
def test_text_has_a_contrast_of_4_5_and_marks_of_3(index):
    palette = palettes()[index]
    assert len(palettes()) == 2 and set(palettes()[0]) == set(palettes()[1])
    for ground in ("paper", "wash"):
        assert {name: contrast(palette[name], palette[ground]) >= 4.5 for name in TEXT} == dict.fromkeys(TEXT, True)
    assert {name: contrast(palette[name], palette["paper"]) >= 3 for name in MARKS} == dict.fromkeys(MARKS, True)
