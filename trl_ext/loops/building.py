"""One round's data: sampled replies -> verdicts -> pairs or labels with replay, and what there is to say of them.

Rows are plain JSON values, as the files of a round hold them (`trl_ext.loops.round_files`).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from trl_ext.data_sources import DataError
from trl_ext.loops.iterative_settings import Iterative
from trl_ext.loops.labels import balance, labels_from_scores, with_replay
from trl_ext.loops.pairs import TYPES, Pair, chosen_pairs, contradicted, losing, repeats, replayed, self_play_rewards
from trl_ext.loops.sampling import Sample
from trl_ext.loops.scorers import Judged, Reply, Scorer
from trl_ext.plan import did_you_mean

Row = Mapping[str, Any]
Line = dict[str, Any]


def distinct(prompts: Iterable[Any]) -> list[int]:
    """Numbers of the prompts that did not come before: a duplicate could be held out and trained on."""
    first: dict[str, int] = {}
    for number, prompt in enumerate(prompts):
        first.setdefault(json.dumps(prompt, sort_keys=True), number)
    return list(first.values())


def splits(rows: Sequence[int], loop: Iterative, seed: int) -> tuple[list[int], list[list[int]]]:
    """Of these numbers of rows the held-out ones and each round's, none of them twice. DataError when there are too few."""
    order = list(rows)
    random.Random(f"prompts/{seed}").shuffle(order)
    size = loop.prompts_per_round or (len(order) - loop.eval_prompts) // loop.rounds
    needed = loop.eval_prompts + loop.rounds * max(size, 1)
    if needed > len(order):
        raise DataError(
            f"{loop.rounds} rounds x {max(size, 1)} prompts + {loop.eval_prompts} held-out ones take {needed} prompts, the "
            f"data set has {len(order)} different ones; lower prompts_per_round, rounds or eval_prompts"
        )
    starts = [loop.eval_prompts + size * number for number in range(loop.rounds)]
    return order[: loop.eval_prompts], [order[start : start + size] for start in starts]


def check_teachers(rows: Any, column: str | None) -> None:
    """DataError when there is no such column, or a row has what is neither a reply nor null in it."""
    if column is None:
        return
    if column not in rows.column_names:
        near = did_you_mean(column, rows.column_names)
        raise DataError(
            f"loop: iterative: teacher_column: there is no column '{column}'{near}; the data set has: "
            f"{', '.join(rows.column_names)}"
        )
    for number, reply in enumerate(rows[column]):
        if not (reply is None or isinstance(reply, str) or (isinstance(reply, list) and all(map(_is_turn, reply)))):
            raise DataError(
                f"loop: iterative: teacher_column: row {number} of '{column}' has {reply!r}; expected a text, a list of "
                "turns whose last one is the reply, or null for no reply"
            )


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("content"), str)


def teacher_of(row: Row, column: str | None) -> str | None:
    """A teacher's reply as text: the text itself, or the content of its last turn. None without a reply."""
    reply = None if column is None else row[column]
    return reply if reply is None or isinstance(reply, str) else reply[-1]["content"] if reply else None


def replies_of(line: Line, tokenizer: Any, share: float | None) -> list[Reply]:
    """The replies of a sampled prompt, `negative` by `share`; the teacher's, if there is one, is the first."""
    own = [Reply(s["text"], tuple(s["tokens"]), negative(s, share)) for s in line["replies"]]
    teacher = line["teacher"]
    return own if teacher is None else [Reply(teacher, tuple(tokenizer(teacher)["input_ids"])), *own]


def negative(sample: Sample, share: float | None) -> bool:
    """Whether a sample loses against all others: cut off before its end, or full of one repeated 4-gram."""
    return sample["cut"] or (share is not None and repeats(sample["tokens"], share))


def verdicts(
    rows: Sequence[Row], lines: Sequence[Line], scorer: Scorer, loop: Iterative, tokenizer: Any
) -> list[Line]:
    """The scorer's verdict on each prompt's replies, with the automatic negatives put in."""
    replies = [replies_of(line, tokenizer, loop.repeat_share) for line in lines]
    found = scorer.judge(rows, replies)
    return [_verdict(*each, scorer) for each in zip(lines, replies, found, strict=True)]


def _verdict(line: Line, replies: Sequence[Reply], judged: Judged, scorer: Scorer) -> Line:
    bad = [reply.negative for reply in replies]
    wins = losing(judged.wins, bad)
    return {
        **{key: line[key] for key in ("round", "prompt", "sampler")},
        "scorer": scorer.name,
        "scores": judged.scores,
        "wins": wins.tolist(),
        "rewards": self_play_rewards(wins).tolist() if len(wins) > 1 else [None],  # a reply alone
        "negatives": bad,
        "unread": judged.unread,
    }


def pair_lines(rows: Sequence[Row], lines: Sequence[Line], scored: Sequence[Line], loop: Iterative) -> list[Line]:
    """The pairs of a round, each with its prompt, margin, type and origin; none of two replies with the same text."""
    found = []
    for row, line, verdict in zip(rows, lines, scored, strict=True):
        texts = _texts(line)
        for pair in _pairs(line, verdict, loop):
            if texts[pair.chosen] == texts[pair.rejected]:
                continue  # a reply and the same one cut off, or a scorer that is not the same twice: nothing to learn
            found.append(
                {
                    **prompt_of(row),
                    "chosen": said(texts[pair.chosen]),
                    "rejected": said(texts[pair.rejected]),
                    "win_margin": pair.win_margin,
                    "type": pair.type,
                    "rewards": [verdict["rewards"][pair.chosen], verdict["rewards"][pair.rejected]],
                    **_origin(line, [pair.chosen, pair.rejected]),
                }
            )
    return found


def _pairs(line: Line, verdict: Line, loop: Iterative) -> list[Pair]:
    return chosen_pairs(*_case(line, verdict, loop)) if len(verdict["wins"]) > 1 else []


def identical(lines: Sequence[Line], scored: Sequence[Line], loop: Iterative) -> int:
    """How many pairs a round leaves out since their two replies are the same text."""
    cases = [(_texts(line), _pairs(line, verdict, loop)) for line, verdict in zip(lines, scored, strict=True)]
    return sum(texts[pair.chosen] == texts[pair.rejected] for texts, pairs in cases for pair in pairs)


def contradictions(lines: Sequence[Line], scored: Sequence[Line], loop: Iterative) -> int:
    """How many pairs a round leaves out since win rates do not say what scores say."""
    cases = [(line, verdict) for line, verdict in zip(lines, scored, strict=True) if len(verdict["wins"]) > 1]
    return sum(contradicted(*_case(line, verdict, loop)) for line, verdict in cases)


def _case(line: Line, verdict: Line, loop: Iterative) -> tuple[Any, ...]:
    """What `chosen_pairs` takes. An automatic negative is below every score."""
    scores = verdict["scores"]
    if scores is not None:
        scores = [-math.inf if bad else s for s, bad in zip(scores, verdict["negatives"], strict=True)]
    teacher = None if line["teacher"] is None else 0
    return loop.pairs, scores, torch.tensor(verdict["wins"], dtype=torch.float64), teacher, loop.rubric


def label_lines(rows: Sequence[Row], lines: Sequence[Line], scored: Sequence[Line], loop: Iterative) -> list[Line]:
    """Every reply with a score, labelled by the threshold; an automatic negative is undesirable."""
    found, threshold = [], loop.label_threshold
    assert threshold is not None  # `Iterative.check`
    for row, line, verdict in zip(rows, lines, scored, strict=True):
        labels = labels_from_scores(verdict["scores"], threshold)
        for i, (text, label, bad) in enumerate(zip(_texts(line), labels, verdict["negatives"], strict=True)):
            if label is not None or bad:
                kept = {"completion": said(text), "label": bool(label) and not bad}
                found.append({**prompt_of(row), **kept, **_origin(line, [i])})
    return found


def stand_ins(rows: Sequence[Row], kto: bool) -> list[Line]:
    """Two rows such as `columns` takes, of the first prompt, for a trainer that only has to be built."""
    prompt = prompt_of(rows[0])
    if kto:
        return [{**prompt, "completion": said(text), "label": text == "yes"} for text in ("yes", "no")]
    return [{**prompt, "chosen": said("yes"), "rejected": said("no"), "win_margin": 0.5}] * 2


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
        raise DataError(
            f"round {number}: no {'labelled reply' if kto else 'pair'} came out of its samples; {hint}. The settings of a "
            "run that was begun cannot change: start a new run (without --resume)"
        )


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
    missing = sum(s is None for verdict in scored for s in verdict["scores"] or [])
    numbers = {
        "length": sum(len(sample["tokens"]) for sample in samples) / len(samples),
        "cut": sum(sample["cut"] for sample in samples) / len(samples),
        "negatives": sum(bad) / len(bad),
        "unread": float(sum(verdict["unread"] for verdict in scored)),
    }
    return numbers | ({"score": sum(scores) / len(scores), "unscored": float(missing)} if scores else {})


def _texts(line: Line) -> list[str]:
    own = [sample["text"] for sample in line["replies"]]
    return own if line["teacher"] is None else [line["teacher"], *own]


def prompt_of(row: Row) -> Line:
    """A row's prompt, with what its template is called with."""
    return {key: row[key] for key in ("prompt", "chat_template_kwargs") if row.get(key) is not None}


def said(text: str) -> list[dict[str, str]]:
    """A reply as TRL's conversational data sets have it."""
    return [{"role": "assistant", "content": text}]


def _origin(line: Line, replies: list[int]) -> Line:
    return {"round": line["round"], "index": line["prompt"], "replies": replies, "sampler": line["sampler"]}
