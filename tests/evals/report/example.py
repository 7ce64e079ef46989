"""Results built by hand for the tests of the report: seeded scores, real statistics, own questions."""

from __future__ import annotations

from math import comb

import numpy as np

from evals import stats
from evals.result import (
    Curve,
    Paired,
    Part,
    Result,
    Scores,
    Shown,
    Skipped,
    Split,
    Spread,
    Subject,
    TaskResult,
    Versus,
)

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=y>\x00\x1b[31m\u202egnp.exe\ud800&amp;\"'\ufffe\u200b"
BASE = Subject("Qwen3-0.6B", "base-5f1c0a9e", "Qwen/Qwen3-0.6B", dtype="bfloat16")


def subjects(number: int) -> tuple[Subject, ...]:
    names = [("dapo-r16", "outputs/dapo-r16"), ("grpo-r16", "outputs/grpo-r16")]
    made = [
        Subject(name, f"{name}-77ab41", "Qwen/Qwen3-0.6B", folder, "nf4", "bfloat16")
        for name, folder in names[: number - 1]
    ]
    return (BASE, *made)


def table(ability, gain, reaction, noise):
    """(N, K) of 0 and 1; questions react differently to a gain, subjects share the sampling noise."""
    p = np.clip(ability + gain * reaction, 0, 1)
    return (noise < p[:, None]).astype(float)


def pass_at(scores) -> Curve:
    n, total = scores.shape
    k = [2**i for i in range(total.bit_length()) if 2**i <= total]
    right = scores.sum(1)
    rows = [[1 - comb(int(total - c), j) / comb(total, j) for c in right] for j in k]
    mean = [float(np.mean(row)) for row in rows]
    half = [1.96 * float(np.std(row)) / n**0.5 for row in rows]
    low = tuple(max(0.0, m - h) for m, h in zip(mean, half, strict=True))
    high = tuple(min(1.0, m + h) for m, h in zip(mean, half, strict=True))
    return Curve(tuple(k), tuple(mean), low, high)


def scores_of(rng, values, headline, scale, has_pass):
    form = np.clip(values + (rng.random(values.shape) < 0.6), 0, 1)
    right = [1500 * scale] * bool(values.any())
    return Scores(
        metrics={headline: stats.estimate(values), "answer_found": stats.estimate(form)},
        truncated=0.046 * scale,
        no_answer=0.031,
        lengths=tuple(int(x) for x in rng.gamma(4, 220 * scale, values.size)),
        tokens_right=right[0] if right else None,
        tokens_wrong=1830.4 * scale,
        majority=stats.estimate((values.mean(1) > 0.5).astype(float)),
        pass_at=pass_at(values) if has_pass else None,
    )


def paired(base, now, holm=None):
    found = stats.compare(base, now)
    p = found.p if holm is None else holm
    word = (
        "no evidence" if p >= 0.05 or found.low <= 0 <= found.high else "better" if found.difference > 0 else "worse"
    )
    fixed = (found.difference - 0.013, found.difference + 0.013) if base.shape[1] >= 4 else None
    return Paired(found, word, None if holm is None else p, fixed)


def questions(values, text):
    shown = []
    for i in range(len(values[0])):
        scores = tuple(float(v[i].mean()) for v in values)
        a, b = 4 + i % 7, 5 + i % 11
        through = comb(a + 1, 2) * comb(b - 1, 2)
        gold = comb(a + b, a) - through
        prompt = (
            f"How many shortest lattice paths lead from (0, 0) to ({a}, {b}) without passing through the point "
            f"({a - 1}, 2)?\n\nReason step by step, and put the final integer within \\boxed{{}}."
        )
        replies = tuple(
            f"All shortest paths: C({a + b}, {a}) = {comb(a + b, a)}.\nThrough ({a - 1}, 2): {through}.\n"
            + (f"\\boxed{{{gold}}}" if v[i, 0] else f"So about {comb(a + b, a)} paths are left.")
            for v in values
        )
        texts = (prompt, str(gold), replies) if text else (None, None, None)
        shown.append(Shown(f"paths-{i:03d}", ["paths", "digits", "dice"][i % 3], 1 + i % 4, scores, *texts))
    return tuple(shown)


def split_of(change):
    more = "more" if change > 0 else "fewer"
    words = f"{70 * change:+.1f} of {100 * change:+.1f} points come from the format: {more} replies state an answer."
    return Split((0.72, 0.55), (0.83, 0.58), change * 0.7, change * 0.3, words)


def task(name, title, n, samples, number, gains, seed, generated=False, gated=False, headline="correct", p=0.5):
    rng = np.random.default_rng(seed)
    ability = rng.beta(1.2 * p, 1.2 * (1 - p), n)
    reaction, noise = rng.normal(1, 1.2, n), rng.random((n, samples))
    values = [table(ability, gain, reaction, noise) for gain in (0.0, *gains)[:number]]
    names = [subject.name for subject in subjects(number)]
    versus = tuple(
        Versus(
            names[i],
            {headline: paired(values[0], values[i], min(1.0, 2 * stats.compare(values[0], values[i]).p))}
            | {"answer_found": paired(values[0], values[i])},
            split_of(stats.compare(values[0], values[i]).difference),
        )
        for i in range(1, number)
    )
    parts = {
        "level": tuple(
            Part(str(level + 1), len(range(level, n, 4)), tuple(float(v[level::4].mean()) for v in values))
            for level in range(4)
        )
    }
    if gated:
        parts["gold letter"] = tuple(
            Part("ABCD"[i], len(range(i, n, 4)), tuple(float(v[i::4].mean()) for v in values)) for i in range(4)
        )
    return TaskResult(
        name=name,
        title=title,
        kind="choice" if gated else "math",
        generated=generated,
        gated=gated,
        version=1,
        origin="made by this program, seed 0" if generated else "Hub data set, test split",
        headline=headline,
        metrics={headline: "the answer equals the gold answer", "answer_found": "the reply states one answer"},
        sampling={
            "samples": samples,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "max_new_tokens": 4096,
            "seed": 0,
        },
        samples=samples,
        chance=0.25 if gated else None,
        scores=tuple(scores_of(rng, v, headline, 1 + 0.25 * i, samples > 1) for i, v in enumerate(values)),
        versus=versus,
        parts=parts,
        questions=questions(values, text=not gated),
        notes=("4.6% of the base's replies were cut at the token limit.",),
    )


def sentence(name, tasks) -> str:
    found = {t.title: next(v for v in t.versus if v.candidate == name).metrics[t.headline].verdict for t in tasks}
    said = [f"{word} on {title}" for title, word in found.items() if word != "no evidence"]
    return f"{name} is {', '.join(said)}." if said else f"{name}: no evidence of a difference on any task."


def result(number: int = 2, samples: int = 8) -> Result:
    """`number` subjects (1 to 3) on a generated, an open and a gated task."""
    names = [subject.name for subject in subjects(number)]
    tasks = (
        task("aime_synth", "Competition integers", 60, samples, number, (0.15, 0.06), 1, generated=True, p=0.4),
        task("gsm8k_json", "GSM8K as JSON", 150, samples, number, (0.01, -0.01), 2, headline="valid_and_correct"),
        task("gpqa_diamond", "GPQA-Diamond", 120, samples, number, (-0.09, 0.02), 3, gated=True, p=0.3),
    )
    verdict = tuple(sentence(name, tasks) for name in names[1:])
    return Result(
        subjects=subjects(number),
        tasks=tasks,
        verdict=verdict or ("Qwen3-0.6B alone: no candidate to compare.",),
        environment={
            "date": "2026-11-21",
            "command": "trl-ext eval --model Qwen/Qwen3-0.6B --adapter outputs/dapo-r16 --suite quick",
            "versions": {"trl_ext": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "lm_eval": "0.4.13"},
            "hardware": {"gpu": "1 × H200, 139 GiB", "cpu": "16 cores"},
            "seeds": {"sampling": 0, "data": 0, "scheme": "gumbel-1"},
        },
        skipped=(Skipped("aime25", "The Hub cannot be reached: pass --data with a folder that holds the data set."),),
        spread=(Spread("Competition integers", (0.061, 0.094, 0.112), 0.089, 0.0257, 0.025, 0.153),)
        if number > 1
        else (),
        guard="GPQA-Diamond, beside the target, lost points: read the gain together with this loss."
        if number > 1
        else None,
        notes=("The adapter's training data shares no 13-gram with the prompts.",),
    )
