"""JSON of a given shape as five reward functions: RL-Struct (arXiv 2512.00319, Eqs. 1 to 5), with the evaluation's graders.

R_total = 1.0 valid + 1.0 struct + 0.5 format + 0.5 correct + 0.1 length, in [-0.01, 2.9]. In a recipe `rl_struct` names
all five with these weights; each can also be named alone (`rl_struct_valid`, ...), and then has TRL's weight of 1. To
leave a term out, but keep it in the log, set its entry of `reward_weights` to 0.

Decisions where the paper is silent are those of its card: keys as quoted text, validity without one fence, the values of
the keys that the gold object has as whitespace tokens, 10 to 2000 characters. A thought before the answer is not looked
at, except by `length`. Hostile texts are bounded by `evals.graders.strict_json`: one million characters, 200 levels.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evals.graders import rl_struct
from evals.graders.rl_struct import LENGTH, WEIGHTS
from evals.graders.schema import Schema, compiled
from evals.graders.strict_json import load, load_tolerant
from evals.graders.structured import values_at
from evals.graders.text import after_thought
from trl_ext.rewards.checked import Reward
from trl_ext.rewards.gold import GOLD_FORMATS, kept
from trl_ext.rewards.registry import imported
from trl_ext.sandbox.rewards import reply_text

Source = Mapping[str, Any] | str | type
Score = Callable[[str], float]
NO_MARKDOWN = re.compile(
    r"\b(?:no|not|without|never|avoid|don't)\b[^.\n]{0,40}\b(?:markdown|code ?blocks?|(?:code )?fences?|backticks)"
    r"|\bJSON only\b|\bonly (?:the |a |one )?(?:valid )?JSON\b|\bnothing else\b",
    re.IGNORECASE,
)
"""A prompt that forbids a code block, or asks for JSON and nothing else."""
logger = logging.getLogger("trl_ext")


def make_rl_struct(
    schema: Source | None = None,
    keys: Sequence[str] | None = None,
    profile: str = "fenced",
    struct_on: str = "text",
    gold: str | None = "answer",
    gold_format: str = "json",
    content_keys: Sequence[str] | None = None,
    l_min: int = LENGTH[0],
    l_max: int = LENGTH[1],
) -> tuple[Reward, ...]:
    """The five terms, in the order valid, struct, format, correct, length, each with the paper's `default_weight`.

    `gold` None leaves `correct` out, for data without gold. All else as in the factory of each term.
    """
    made = {
        "valid": make_valid(),
        "struct": make_struct(schema, keys, struct_on),
        "format": make_format(profile),
        "length": make_length(l_min, l_max),
    }
    if gold is not None:
        made["correct"] = make_correct(gold, gold_format, content_keys)
        _check_content_keys(content_keys, schema)
    elif content_keys is not None or gold_format != "json":
        raise ValueError(
            "content_keys and gold_format read the gold column, and gold is none: remove them, or name it"
        )
    for name, reward in made.items():
        reward.default_weight = WEIGHTS[name]  # type: ignore[attr-defined]
    return tuple(made[name] for name in WEIGHTS if name in made)


def make_valid() -> Reward:
    """`rl_struct_valid`: 1 if the reply, without thought and one fence around it, is JSON (Eq. 3)."""
    return _per_reply("rl_struct_valid", rl_struct.valid)


def make_struct(schema: Source | None = None, keys: Sequence[str] | None = None, struct_on: str = "text") -> Reward:
    """`rl_struct_struct`: 1 if every required key is there, nested ones too (Eq. 1).

    Either `schema` (see `schema_of`) or `keys`, the required keys of the top level. `struct_on` "text": each stands in
    the text as a quoted key, whether it can be parsed or not; "parsed": each is in its place in the parsed value.
    """
    if (schema is None) == (keys is None):
        raise ValueError("name either `schema` (a mapping, a .json file, a Pydantic model) or `keys` (a list of keys)")
    if schema is None and (not isinstance(keys, (list, tuple)) or not all(isinstance(key, str) for key in keys)):
        raise ValueError(f"keys: expected a list of names, got {keys!r}")
    found = schema_of({"type": "object", "required": list(keys or ())} if schema is None else schema)
    if not found.required:
        raise ValueError("the schema requires no key, so that every reply would get 1: list `required` in it")
    if struct_on not in ("text", "parsed"):
        raise ValueError(f"struct_on: {struct_on!r} is neither text nor parsed")

    def on_text(text: str) -> float:
        return rl_struct.struct(_visible(text), found.required_keys)

    def on_value(text: str) -> float:
        parsed = load_tolerant(text)
        return float(parsed.ok and all(values_at(parsed.value, path) for path in found.required))

    return _per_reply("rl_struct_struct", on_text if struct_on == "text" else on_value)


def make_format(profile: str = "fenced") -> Reward:
    """`rl_struct_format`, at most 0.8 (Eq. 2).

    `profile` "fenced": 0.5 for a closed Markdown code block and 0.3 more if one is tagged json, as in the paper; warns
    once when a prompt forbids that. "raw", ours: 0.8 if the reply as it stands is JSON.
    """
    if profile not in ("fenced", "raw"):
        raise ValueError(f"profile: {profile!r} is neither fenced nor raw")
    style: Literal["fenced", "raw"] = "fenced" if profile == "fenced" else "raw"
    warned = style == "raw"

    def rl_struct_format(completions: Sequence[Any], prompts: Sequence[Any] = (), **kwargs: Any) -> list[float]:
        nonlocal warned
        forbidding = (
            None if warned else next(filter(None, (NO_MARKDOWN.search(_prompt_text(p)) for p in prompts)), None)
        )
        if forbidding:
            warned = True
            logger.warning(
                "rl_struct_format: profile `fenced` pays for a Markdown code block, and a prompt says %r. The model "
                "learns the opposite of what it is told: use profile: raw, or change the prompt",
                forbidding[0],
            )
        return [
            rl_struct.form(text if style == "raw" else _visible(text), style) for text in map(reply_text, completions)
        ]

    return rl_struct_format


def make_correct(gold: str = "answer", gold_format: str = "json", content_keys: Sequence[str] | None = None) -> Reward:
    """`rl_struct_correct`: token F1 of the values against the gold object's, 0 if the reply is not JSON (Eq. 4).

    `gold`: the column. `gold_format` "json": JSON text, or an object; "gsm8k": GSM8K's text, which becomes
    {"reasoning": ..., "answer": number}. `content_keys`: only these keys of the gold object count; ["answer"] makes
    GSM8K's F1 an exact match. None for a row whose gold cannot be read or has none of these keys.
    """
    if gold_format not in GOLD_FORMATS:
        raise ValueError(f"gold_format: {gold_format!r} is not one of {', '.join(GOLD_FORMATS)}")
    if content_keys is not None and (isinstance(content_keys, str) or not content_keys):
        raise ValueError(f"content_keys: expected a list of keys, got {content_keys!r}")

    def rl_struct_correct(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        wanted = [kept(GOLD_FORMATS[gold_format](value), content_keys) for value in kwargs[gold]]
        return [
            None if value is None else rl_struct.correct(reply_text(completion), value)
            for completion, value in zip(completions, wanted, strict=True)
        ]

    rl_struct_correct.needs_columns = [(gold,)]  # type: ignore[attr-defined]
    return rl_struct_correct


def make_length(l_min: int = LENGTH[0], l_max: int = LENGTH[1]) -> Reward:
    """`rl_struct_length`: -0.1 for a reply of fewer than `l_min` or more than `l_max` characters (Eq. 5)."""
    if not 0 <= l_min <= l_max:
        raise ValueError(f"l_min {l_min} and l_max {l_max}: expected 0 <= l_min <= l_max")
    return _per_reply("rl_struct_length", lambda text: rl_struct.length(text, l_min, l_max))


def make_json_schema(schema: Source) -> Reward:
    """`json_schema`, ours: 1 if the reply, without thought and one fence, is JSON that passes `schema`, types too."""
    found = schema_of(schema)

    def score(text: str) -> float:
        parsed = load_tolerant(text)
        return float(parsed.ok and found.valid(parsed.value))

    return _per_reply("json_schema", score)


def schema_of(source: Source) -> Schema:
    """The compiled schema of a mapping, a path to a .json file, a Pydantic model or its name `module.Class`.

    ValueError says what cannot be read. A path is relative to the current folder.
    """
    if isinstance(source, Mapping):
        return compiled(dict(source))
    if isinstance(source, str) and source.endswith(".json"):
        try:
            return schema_of(json.loads(Path(source).read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"schema: cannot read {source}: {error}") from error
    model = imported(source) if isinstance(source, str) else source
    if not hasattr(model, "model_json_schema"):
        raise ValueError(f"schema: {source!r} is no mapping, no .json file and no Pydantic model (module.Class)")
    return compiled(model.model_json_schema())


def _per_reply(name: str, score: Score) -> Reward:
    """The reward function called `name` that scores each reply's text by itself."""

    def reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return [score(reply_text(completion)) for completion in completions]

    reward.__name__ = name
    return reward


def _visible(text: str) -> str:
    """What the evaluation judges: all of a text that is JSON, else what follows the thought."""
    return text if load(text).ok else after_thought(text) or ""


def _prompt_text(prompt: Any) -> str:
    turns = prompt if isinstance(prompt, list) else [{"content": prompt}]
    return "\n".join(turn["content"] for turn in turns if isinstance(turn.get("content"), str))


def _check_content_keys(content_keys: Sequence[str] | None, schema: Source | None) -> None:
    """ValueError for content keys that the schema does not have; a list of required keys says nothing of others."""
    if content_keys is None or schema is None:
        return
    unknown = [key for key in content_keys if schema_of(schema).key_counts({key: None})[0]]
    if unknown:
        raise ValueError(f"content_keys: the schema has no key {', '.join(map(repr, unknown))} at its top level")
