"""One round's data: sampled replies -> verdicts -> pairs or labels with replay, and what there is to say of them.

Rows are plain JSON values, as the files of a round hold them (`trl_ext.loops.round_files`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trl_ext.data_sources import DataError
from trl_ext.loops.iterative_settings import Iterative
from trl_ext.loops.labels import balance, labels_from_scores, with_replay
from trl_ext.loops.pairs import TYPES, chosen_pairs, losing, repeats, replayed, self_play_rewards
from trl_ext.loops.sampling import Sample
from trl_ext.loops.scorers import Judged, Reply, Scorer

Row = Mapping[str, Any]
Line = dict[str, Any]


def splits(rows: int, loop: Iterative, seed: int) -> tuple[list[int], list[list[int]]]:
    """Numbers of the held-out prompts and of each round's, none of them twice. DataError when there are too few."""
    order = list(range(rows))
    random.Random(f"prompts/{seed}").shuffle(order)
    size = loop.prompts_per_round or (rows - loop.eval_prompts) // loop.rounds
    needed = loop.eval_prompts + loop.rounds * max(size, 1)
    if needed > rows:
        raise DataError(
            f"{loop.rounds} rounds x {max(size, 1)} prompts + {loop.eval_prompts} held-out ones take {needed} prompts, the "
            f"data set has {rows}; lower prompts_per_round, rounds or eval_prompts"
        )
    starts = [loop.eval_prompts + size * number for number in range(loop.rounds)]
    return order[: loop.eval_prompts], [order[start : start + size] for start in starts]


def replies_of(line: Line, tokenizer: Any) -> list[Reply]:
    """The replies of a sampled prompt; the teacher's, if there is one, is the first."""
    own = [Reply(sample["text"], tuple(sample["tokens"])) for sample in line["replies"]]
    teacher = line["teacher"]
    return own if teacher is None else [Reply(teacher, tuple(tokenizer(teacher)["input_ids"])), *own]


def negative(sample: Sample, share: float | None) -> bool:
    """Whether a sample loses against all others: cut off before its end, or full of one repeated 4-gram."""
    return sample["cut"] or (share is not None and repeats(sample["tokens"], share))


def verdicts(
    rows: Sequence[Row], lines: Sequence[Line], scorer: Scorer, loop: Iterative, tokenizer: Any
) -> list[Line]:
    """The scorer's verdict on each prompt's replies, with the automatic negatives put in."""
    found = scorer.judge(rows, [replies_of(line, tokenizer) for line in lines])
    return [_verdict(line, one, scorer, loop) for line, one in zip(lines, found, strict=True)]


def _verdict(line: Line, judged: Judged, scorer: Scorer, loop: Iterative) -> Line:
    bad = [negative(sample, loop.repeat_share) for sample in line["replies"]]
    bad = bad if line["teacher"] is None else [False, *bad]
    wins = losing(judged.wins, bad)
    return {
        **{key: line[key] for key in ("round", "prompt", "sampler")},
        "scorer": scorer.name,
        "scores": judged.scores,
        "wins": wins.tolist(),
        "rewards": self_play_rewards(wins).tolist() if len(wins) > 1 else [0.5],
        "negatives": bad,
        "unread": judged.unread,
    }


def pair_lines(rows: Sequence[Row], lines: Sequence[Line], scored: Sequence[Line], loop: Iterative) -> list[Line]:
    """The pairs of a round, each with its prompt, margin, type and origin."""
    found = []
    for row, line, verdict in zip(rows, lines, scored, strict=True):
        texts, teacher = _texts(line), None if line["teacher"] is None else 0
        scores = verdict["scores"]
        if scores is not None:  # an automatic negative is below every score
            scores = [-math.inf if bad else s for s, bad in zip(scores, verdict["negatives"], strict=True)]
        wins = torch.tensor(verdict["wins"], dtype=torch.float64)
        for pair in chosen_pairs(loop.pairs, scores, wins, teacher, loop.rubric):
            found.append(
                {
                    **_prompt(row),
                    "chosen": _said(texts[pair.chosen]),
                    "rejected": _said(texts[pair.rejected]),
                    "win_margin": pair.win_margin,
                    "type": pair.type,
                    "rewards": [verdict["rewards"][pair.chosen], verdict["rewards"][pair.rejected]],
                    **_origin(line, [pair.chosen, pair.rejected]),
                }
            )
    return found


def label_lines(rows: Sequence[Row], lines: Sequence[Line], scored: Sequence[Line], loop: Iterative) -> list[Line]:
    """Every reply with a score, labelled by the threshold; an automatic negative is undesirable."""
    found, threshold = [], loop.label_threshold
    assert threshold is not None  # `Iterative.check`
    for row, line, verdict in zip(rows, lines, scored, strict=True):
        labels = labels_from_scores(verdict["scores"], threshold)
        for i, (text, label, bad) in enumerate(zip(_texts(line), labels, verdict["negatives"], strict=True)):
            if label is not None or bad:
                kept = {"completion": _said(text), "label": bool(label) and not bad}
                found.append({**_prompt(row), **kept, **_origin(line, [i])})
    return found


def training_lines(
    new: Sequence[Line], earlier: Sequence[Sequence[Line]], loop: Iterative, kto: bool, seed: str
) -> list[Line]:
    """The round's own rows and replayed ones of `earlier` rounds, oldest first. KTO's are shuffled: TRL reads in order."""
    rng = random.Random(seed)
    if kto:
        rows = with_replay(new, earlier, loop.replay_of("kto"))
        rng.shuffle(rows)
        return rows
    return [*new, *replayed(earlier[::-1], len(new), loop.replay_of("dpo"), rng)]


def check_lines(rows: Sequence[Line], number: int, kto: bool) -> None:
    """DataError when there is nothing to learn from."""
    if not rows:
        hint = (
            "is there a score?"
            if kto
            else "lower min_positive_score or the margins, sample more replies, or set pairs: all"
        )
        raise DataError(f"round {number}: no {'labelled reply' if kto else 'pair'} came out of its samples; {hint}")


def columns(rows: Sequence[Line], kto: bool) -> list[Line]:
    """What the trainer gets of each row."""
    names = ("completion", "label") if kto else ("chosen", "rejected", "win_margin")
    return [{key: row[key] for key in ("prompt", *names, "chat_template_kwargs") if key in row} for row in rows]


def pair_numbers(rows: Sequence[Line], number: int, prompts: int) -> dict[str, float]:
    """Of a round's pairs: how many by type, share of prompts without one, mean margin and win rates, replayed ones."""
    own = [row for row in rows if row["round"] == number]
    mean = {
        "margin": [row["win_margin"] for row in own],
        "reward_chosen": [row["rewards"][0] for row in own],
        "reward_rejected": [row["rewards"][1] for row in own],
    }
    return {
        "pairs": float(len(own)),
        **{f"pairs/{name}": float(sum(row["type"] == name for row in own)) for name in TYPES},
        "prompts_without_pair": 1 - len({row["index"] for row in own}) / prompts,
        "replayed": float(len(rows) - len(own)),
        **{name: sum(values) / len(values) for name, values in mean.items() if values},
    }


def label_numbers(rows: Sequence[Line], number: int, args: Any) -> tuple[dict[str, float], str | None]:
    """Of a round's labels: how many, the share of desirable ones, TRL's balance and what is wrong with it."""
    found = balance([row["label"] for row in rows], args.desirable_weight, args.undesirable_weight)
    numbers = {
        "labels": float(len(rows)),
        "desirable": found.desirable / len(rows),
        "balance": found.ratio,
        "replayed": float(sum(row["round"] != number for row in rows)),
    }
    return numbers, found.warning()


def sample_numbers(lines: Sequence[Line], scored: Sequence[Line]) -> dict[str, float]:
    """Of a round's samples: length in tokens, shares cut off and negative, mean score, a judge's missing answers."""
    samples = [sample for line in lines for sample in line["replies"]]
    bad = [flag for line, verdict in zip(lines, scored, strict=True) for flag in verdict["negatives"]]
    scores = [s for verdict in scored for s in verdict["scores"] or [] if s is not None]
    numbers = {
        "length": sum(len(sample["tokens"]) for sample in samples) / len(samples),
        "cut": sum(sample["cut"] for sample in samples) / len(samples),
        "negatives": sum(bad) / len(bad),
        "unread": float(sum(verdict["unread"] for verdict in scored)),
    }
    return numbers | ({"score": sum(scores) / len(scores)} if scores else {})


def _texts(line: Line) -> list[str]:
    own = [sample["text"] for sample in line["replies"]]
    return own if line["teacher"] is None else [line["teacher"], *own]


def _prompt(row: Row) -> Line:
    return {key: row[key] for key in ("prompt", "chat_template_kwargs") if row.get(key) is not None}


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _origin(line: Line, replies: list[int]) -> Line:
    return {"round": line["round"], "index": line["prompt"], "replies": replies, "sampler": line["sampler"]}
