"""Where a change comes from: more replies in the right format, or more right answers among those."""

from __future__ import annotations

from evals.result import Split

NOTHING = 0.005
"""Changes below half a point are not named: they round to nothing."""
MOSTLY = 0.75
"""Share of the change from which one factor is called its source."""


def split_change(base: tuple[float, float], candidate: tuple[float, float], real: bool) -> Split:
    """Headline = F * C with F = P(format) and C = P(content | format); each side is given as (F, headline).

    Symmetric (Shapley) shares of H' - H, which add up to it whatever is changed first:
    format (F' - F)(C + C') / 2, content (C' - C)(F + F') / 2. Where F = 0 nothing is known of C; it is taken from the
    other side, so that all of the change is format. `real`: whether the words may call it a gain or a loss.
    Raises ValueError when a headline exceeds its format share: then the grader breaks headline = F * C.
    """
    for share, headline in (base, candidate):
        if headline > share + 1e-9:
            raise ValueError(f"split: the headline {headline:.4f} exceeds the share in the right format {share:.4f}")
    known = [headline / share if share > 0 else None for share, headline in (base, candidate)]
    old = known[0] if known[0] is not None else (known[1] or 0.0)
    new = known[1] if known[1] is not None else old
    from_format = (candidate[0] - base[0]) * (old + new) / 2
    from_content = (new - old) * (base[0] + candidate[0]) / 2
    before, after = (base[0], old), (candidate[0], new)
    return Split(before, after, from_format, from_content, split_words(before, after, real))


def split_words(base: tuple[float, float], candidate: tuple[float, float], real: bool) -> str:
    """ "the gain is format: valid replies 40% -> 99%, right among valid 63% -> 65%" for (F, C) on both sides."""
    if base[0] == 0 and candidate[0] == 0:
        return "no valid replies on either side"
    shares = f"valid replies {base[0]:.0%} -> {candidate[0]:.0%}"
    if base[0] == 0 or candidate[0] == 0:
        when, content = ("before", candidate[1]) if base[0] == 0 else ("after", base[1])
        return f"the change is format: {shares}, right among valid {content:.0%} (none {when} to compare with)"
    return f"{_source(base, candidate, real)}: {shares}, right among valid {base[1]:.0%} -> {candidate[1]:.0%}"


def _source(base: tuple[float, float], candidate: tuple[float, float], real: bool) -> str:
    form = (candidate[0] - base[0]) * (base[1] + candidate[1]) / 2
    content = (candidate[1] - base[1]) * (base[0] + candidate[0]) / 2
    total = form + content
    if max(abs(form), abs(content)) < NOTHING:
        return "neither format nor content changed"
    word = ("gain" if total > 0 else "loss") if real else "difference"
    if min(abs(form), abs(content)) >= NOTHING and form * content < 0:
        up, down = ("format", "content") if form > 0 else ("content", "format")
        return f"{up} rose and {down} fell ({100 * form:+.1f} points by format, {100 * content:+.1f} by content)"
    if abs(form) >= MOSTLY * (abs(form) + abs(content)):
        return f"the {word} is format"
    if abs(content) >= MOSTLY * (abs(form) + abs(content)):
        return f"the {word} is content"
    return f"the {word} is both ({100 * form:+.1f} points by format, {100 * content:+.1f} by content)"
