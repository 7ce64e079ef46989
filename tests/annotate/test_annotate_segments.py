"""Segments, token alignment and span masks (TRACE card, steps 3 and 4)."""

import itertools
import random
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trl_ext.annotate import Span, segment, span_token_mask, token_offsets

PLAIN = ["the cat sat on the mat", "we add two and three to get five", "12 + 34 = 46", 'so {"answer": 46}\n'] * 20
MIXED = "naïve café: x = 3 😀\nalors 中文字 é è😀😂🎉 done\n\n  Привет мир 👩‍👩‍👧 end"


def byte_level(special=()):
    """A GPT-2 style byte-level BPE that has never seen an accent or an emoji, so these split into single bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PLAIN, trainer)
    return tokenizer


def decoder(tokenizer):
    return lambda token: tokenizer.decode([token], skip_special_tokens=False)


def assert_monotone(offsets, text):
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    for (a, b), (c, d) in itertools.pairwise(offsets):
        assert a <= c and b <= d


def texts(text, intervals):
    return [text[a:b] for a, b in intervals]


def test_segments_are_lines_without_blank_ones_and_index_the_original():
    text = "\n first line \r\n\r\n \t\n\tsecond: 1. a 2. b\n\nthird"
    assert texts(text, segment(text)) == ["first line", "second: 1. a 2. b", "third"]
    assert segment("") == segment(" \n \r\n") == []


def test_a_long_line_is_cut_at_sentence_ends_only():
    text = 'Let x = 3.14. Then (it holds.) Why? "Yes!" 因此。所以 end'
    pieces = ["Let x = 3.14.", "Then (it holds.)", "Why?", '"Yes!"', "因此。", "所以 end"]
    assert texts(text, segment(text, max_chars=20)) == pieces
    assert texts(text, segment(text, max_chars=len(text))) == [text]


def test_three_hundred_characters_is_the_border():
    line = "a" * 147 + ". " + "b" * 151
    assert len(line) == 300 and len(segment(line)) == 1
    assert texts(line + "b", segment(line + "b")) == ["a" * 147 + ".", "b" * 152]


def test_a_long_line_without_sentence_ends_stays_whole():
    text = "1+" * 500
    assert segment(text) == [(0, 1000)]


@pytest.mark.parametrize(
    "text", ["." * 1_000_000, ".)" * 500_000, ". " * 500_000, "\n" * 1_000_000, " " * 1_000_000, ".)))))))" * 100_000]
)
def test_segment_is_linear(text):
    start = time.process_time()
    assert all(a < b for a, b in segment(text))
    assert time.process_time() - start < 3


def test_plain_text_alignment_is_exact():
    tokenizer = byte_level()
    text = "".join(PLAIN[:4])
    encoding = tokenizer.encode(text)
    assert token_offsets(encoding.ids, decoder(tokenizer), text) == [
        (a, b) for a, b in _exact(tokenizer, encoding.ids, text)
    ]


def _exact(tokenizer, ids, text):
    """Characters that each token has a byte of, from the true bytes of each token: the slow reference."""
    alphabet = {char: byte for byte, char in _bytes_to_unicode().items()}
    char_of_byte = [i for i, char in enumerate(text) for _ in char.encode()]
    at = 0
    for token in ids:
        size = len([alphabet[char] for char in tokenizer.id_to_token(token)])
        yield char_of_byte[at], char_of_byte[at + size - 1] + 1
        at += size
    assert at == len(char_of_byte)


def _bytes_to_unicode():
    """The byte table of GPT-2: printable bytes stand for themselves, the rest is moved up from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in plain}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(rest)}


@pytest.mark.parametrize(
    "text", ["a é b", "naïve café.", "x😀y", "😀 😂 🎉\nok", "é", "中 a 字", "tail 😀", "🎉 head"]
)
def test_one_split_character_between_literals_is_exact(text):
    tokenizer = byte_level()
    ids = tokenizer.encode(text).ids
    assert any("\ufffd" in decoder(tokenizer)(i) for i in ids)
    assert token_offsets(ids, decoder(tokenizer), text) == list(_exact(tokenizer, ids, text))


def test_runs_of_split_characters_are_close_and_do_not_spoil_the_rest():
    tokenizer = byte_level()
    ids = tokenizer.encode(MIXED).ids
    found, exact = token_offsets(ids, decoder(tokenizer), MIXED), list(_exact(tokenizer, ids, MIXED))
    assert_monotone(found, MIXED)
    for token, (a, b), (c, d) in zip(ids, found, exact, strict=True):
        if "\ufffd" not in decoder(tokenizer)(token):
            assert (a, b) == (c, d)
        assert abs(a - c) <= 2 and abs(b - d) <= 2
    assert set(range(len(MIXED))) == {i for a, b in found for i in range(a, b)}  # every character has a token


def test_emoji_of_four_single_byte_tokens_are_exact_in_a_row():
    text = "😀😂🎉"
    pieces = ["\ufffd"] * 12
    assert token_offsets(range(12), pieces.__getitem__, text) == [(i // 4, i // 4 + 1) for i in range(12)]


def test_special_tokens_that_are_not_in_the_text_are_empty():
    tokenizer = byte_level(["<|im_end|>", "<|pad|>"])
    end, pad = (tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|pad|>"))
    a, b = tokenizer.encode("the cat 😀").ids, tokenizer.encode(" sat on the mat").ids
    ids = [pad, *a, end, *b, end, pad, pad]
    text = "the cat 😀 sat on the mat"
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    offsets = token_offsets(ids, decoder(tokenizer), text)
    exact = list(_exact(tokenizer, [*a, *b], text))
    split = len(text[: text.index(" sat")])
    assert offsets[0] == (0, 0)
    assert offsets[1 : 1 + len(a)] == exact[: len(a)]
    assert offsets[1 + len(a)] == (split, split)
    assert offsets[2 + len(a) : -3] == exact[len(a) :]
    assert offsets[-3:] == [(len(text), len(text))] * 3


def test_special_tokens_that_are_in_the_text_take_their_characters():
    tokenizer = byte_level(["<|im_end|>"])
    text = "the cat<|im_end|>"
    assert token_offsets(tokenizer.encode(text).ids, decoder(tokenizer), text)[-1] == (7, 17)


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        (["foo", "bar"], "foo bar", [(0, 3), (4, 7)]),  # the decode drops the leading space
        ([" foo", " bar"], "foo bar", [(0, 3), (3, 7)]),  # the text was stripped
        (["\n\n", "a", " "], "a", [(0, 0), (0, 1), (1, 1)]),
        (["x", " ,", " y"], "x, y", [(0, 1), (1, 2), (2, 4)]),  # cleaned-up spaces
        (["a", "", "b"], "ab", [(0, 1), (1, 1), (1, 2)]),
        (["ab", "?!", "cd"], "abXYcd", [(0, 2), (2, 2), (4, 6)]),  # a piece that is not there
        (["a\ufffd", "\ufffdb"], "aéb", [(0, 2), (1, 3)]),  # halves of one character with neighbours
        (["a", "\ufffd", " b"], "a\ufffd b", [(0, 1), (1, 2), (2, 4)]),  # a real U+FFFD in the text
        (["a", "\ufffd", "\ufffd"], "a\ufffd", [(0, 1), (1, 2), (1, 2)]),  # cut off inside a character
        # a special token ends the run, the piece after it tells where: é and é, not é alone
        (["\ufffd"] * 4 + ["<s>", "ab"], "ééab", [(0, 1), (0, 1), (1, 2), (1, 2), (2, 2), (2, 4)]),
        (["\ufffd", "\ufffd", "é"], "éé", [(0, 1), (0, 1), (1, 2)]),  # the run has a character, so not the first é
        ([], "abc", []),
        (["a", "b"], "", [(0, 0), (0, 0)]),
    ],
)
def test_hand_made_pieces(pieces, text, expected):
    assert token_offsets(range(len(pieces)), pieces.__getitem__, text) == expected


def test_any_pieces_and_any_text_give_monotone_offsets():
    rng = random.Random(0)
    alphabet = ["a", "b", " ", "\n", "é", "😀", "\ufffd", "\ud800", "", "ab", " a", "\ufffd\ufffd", "<s>"]
    for _ in range(3000):
        pieces = ["".join(rng.choices(alphabet, k=rng.randint(0, 3))) for _ in range(rng.randint(0, 12))]
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 12)))
        offsets = token_offsets(range(len(pieces)), pieces.__getitem__, text)
        assert len(offsets) == len(pieces)
        assert_monotone(offsets, text)


@pytest.mark.parametrize("piece", ["a", "\ufffd", "x\ufffd", "", "zz", " "])
def test_alignment_is_linear(piece):
    text = "a" * 50_000 + "é" * 50_000
    start = time.process_time()
    assert len(token_offsets([0] * 100_000, lambda _: piece, text)) == 100_000
    assert time.process_time() - start < 3


OFFSETS = [(0, 2), (2, 3), (3, 6), (6, 6), (6, 9), (9, 12)]
SEGMENTS = [(0, 4), (5, 8), (9, 12)]


@pytest.mark.parametrize(
    ("spans", "cap", "expected"),
    [
        ([(0,)], 9, [0, 1, 2]),
        ([(1,)], 9, [2, 4]),  # token 2 has a character on each side; token 3 is empty
        ([(1, 2)], 9, [2, 4, 5]),
        ([(2,), (0,)], 3, [0, 1, 5]),  # the annotator's order decides what the cap cuts
        ([(0,), (1,)], 4, [0, 1, 2, 4]),  # token 2 counts once
        ([(0,)], 2, [0, 1]),
        ([(0,)], 0, []),
        ([], 9, []),
    ],
)
def test_span_token_mask(spans, cap, expected):
    mask = span_token_mask([Span(ids, "insight") for ids in spans], SEGMENTS, OFFSETS, n_tokens=8, cap=cap)
    assert len(mask) == 8 and [t for t, marked in enumerate(mask) if marked] == expected


@pytest.mark.parametrize("ids", [(3,), (-1,), (2, 3), ()])
def test_mask_refuses_segments_that_do_not_exist(ids):
    with pytest.raises(ValueError, match="segment ids"):
        span_token_mask([Span(ids, "insight")], SEGMENTS, OFFSETS, 8, 8)


def test_mask_refuses_more_offsets_than_tokens():
    with pytest.raises(ValueError, match="6 token offsets for 5 tokens"):
        span_token_mask([], SEGMENTS, OFFSETS, 5, 8)
