"""From text to segments, from tokens to character intervals, from spans to a token mask (TRACE card steps 3 and 4).

All intervals are half-open character offsets into the original text. Letters: T completion tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice, pairwise, takewhile

from trl_ext.annotate.base import Span

Interval = tuple[int, int]

UNKNOWN = "\ufffd"  # what a decoder writes for bytes that are not a whole character
MAX_UTF8_BYTES = 4
RESYNC_CHARS = 64  # how far ahead a piece is looked for that does not match at the cursor: bounds the work per token
RESYNC_PIECES = 3  # how many literal pieces may mark the end of a run of split characters

_LINE = re.compile(r"[^\r\n]+")
# A mark, closing signs, then white space (so that 3.14 has no sentence end); full-width marks need no space.
_SENTENCE_END = re.compile(r"""[.!?][)\]}"'$*]*\s+|[。！？]""")
_RUNS = re.compile(f"{UNKNOWN}+|[^{UNKNOWN}]+")


def segment(text: str, max_chars: int = 300) -> list[Interval]:
    """Segments of a completion: its lines without the blank ones; a line over `max_chars` is cut at sentence ends.

    White space around a segment is left out. A long line without a sentence end stays whole. Card: open question 4.
    """
    segments: list[Interval] = []
    for line in _LINE.finditer(text):
        start, end = _strip(text, *line.span())
        ends = [m.end() for m in _SENTENCE_END.finditer(text, start, end)] if end - start > max_chars else []
        pieces = (_strip(text, a, b) for a, b in zip([start, *ends], [*ends, end], strict=True))
        segments += [piece for piece in pieces if piece[0] < piece[1]]
    return segments


def _strip(text: str, start: int, end: int) -> Interval:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())


def token_offsets(token_ids: Sequence[int], decode_one: Callable[[int], str], text: str) -> list[Interval]:
    """Character interval of each token in `text`, by greedy alignment of single-token decodes. (T,)

    - A piece that is at the cursor takes its characters. Otherwise the next match within `RESYNC_CHARS` counts, without
      leading white space. A piece that is not there (special token, dropped space) gets an empty interval.
    - A character whose bytes are split over tokens decodes to U+FFFD in each of them. A run of these takes the
      characters up to the next literal piece, in proportion: exact for one character, close for several in a row.

    Starts and ends never decrease. Linear time. No text and no pieces make it raise.
    """
    pieces = {token: _RUNS.findall(decode_one(token)) or [""] for token in dict.fromkeys(token_ids)}
    atoms = [(t, run) for t, token in enumerate(token_ids) for run in pieces[token]]
    offsets: list[Interval | None] = [None] * len(token_ids)
    cursor = index = 0
    while index < len(atoms):
        placed = _place(text, cursor, atoms, index)
        for (t, _), (start, end) in zip(atoms[index : index + len(placed)], placed, strict=True):
            first = offsets[t]
            offsets[t] = (first[0] if first else start, end)
        cursor = placed[-1][1]
        index += len(placed)
    return [interval for interval in offsets if interval is not None]  # every token has an atom, so none is None


def _place(text: str, cursor: int, atoms: list[tuple[int, str]], index: int) -> list[Interval]:
    """Intervals of the literal atom at `index`, or of the whole run of U+FFFD atoms that starts there."""
    run = [len(atom) for atom in takewhile(_is_unknown, _from(atoms, index))]
    if not run:
        return [_place_literal(text, cursor, atoms[index][1])]
    end = _run_end(text, cursor, sum(run), atoms, index + len(run))
    edges = [0, *accumulate(run)]
    chars, marks = end - cursor, edges[-1]
    return [(cursor + chars * a // marks, cursor - (-chars * b // marks)) for a, b in pairwise(edges)]


def _place_literal(text: str, cursor: int, piece: str) -> Interval:
    if text.startswith(piece, cursor):
        return cursor, cursor + len(piece)
    piece = piece.lstrip()
    found = text.find(piece, cursor, cursor + RESYNC_CHARS + len(piece)) if piece else -1
    return (found, found + len(piece)) if found >= 0 else (cursor, cursor)


def _run_end(text: str, cursor: int, marks: int, atoms: list[tuple[int, str]], after: int) -> int:
    """Where a run of `marks` U+FFFD ends: it stands for at least marks/4 characters and at most `marks`."""
    shortest, longest = cursor - (-marks // MAX_UTF8_BYTES), cursor + marks
    for literal in islice(_literals(atoms, after), RESYNC_PIECES):
        found = text.find(literal, shortest, longest + len(literal))
        if found >= 0:
            return found
    return len(text) if len(text) <= longest else shortest


def _literals(atoms: list[tuple[int, str]], start: int) -> Iterator[str]:
    """Literal pieces from `start` up to the next U+FFFD, without empty ones."""
    return (atom for atom in takewhile(lambda atom: not _is_unknown(atom), _from(atoms, start)) if atom)


def _from(atoms: list[tuple[int, str]], start: int) -> Iterator[str]:
    return (atoms[i][1] for i in range(start, len(atoms)))  # no slice: a copy per run would take quadratic time


def _is_unknown(atom: str) -> bool:
    return atom.startswith(UNKNOWN)


def span_token_mask(
    spans: Sequence[Span], segments: Sequence[Interval], offsets: Sequence[Interval], n_tokens: int, cap: int
) -> list[bool]:
    """True for each token whose interval meets the characters of a span. (n_tokens,)

    Spans are taken in the annotator's order, tokens from left to right, until `cap` distinct tokens are marked (card:
    open question 5; cap = floor(alpha * T)). Tokens after the last offset (padding) are False.
    Raises ValueError for a segment id that does not exist or for more offsets than tokens.
    """
    if len(offsets) > n_tokens:
        raise ValueError(f"span_token_mask: {len(offsets)} token offsets for {n_tokens} tokens; they must fit")
    mask = [False] * n_tokens
    for span in spans:
        start, end = _span_interval(span, segments)
        for t, (left, right) in enumerate(offsets):
            if max(left, start) < min(right, end) and not mask[t]:
                if cap <= 0:
                    return mask
                mask[t] = True
                cap -= 1
    return mask


def _span_interval(span: Span, segments: Sequence[Interval]) -> Interval:
    ids = span.segment_ids
    if not ids or min(ids) < 0 or max(ids) >= len(segments):
        raise ValueError(f"the annotator gave segment ids {ids}, but there are segments 0 to {len(segments) - 1}")
    return segments[min(ids)][0], segments[max(ids)][1]
