"""What may leave the machine, and how foreign text is shown: no paths, no tokens, no gated texts, no hidden characters.

Replies are written by models and may hold anything: markup, control characters, text that runs backwards, megabytes.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from evals.result import Result, Shown, TaskResult

TOKENS = {
    "a Hugging Face token": re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{12,}|hf_[A-Za-z0-9]{30,}"),
    "an API key": re.compile(
        r"(?<![A-Za-z0-9])(?:sk-(?=[A-Za-z0-9_-]*\d)[A-Za-z0-9_-]{12,}|AIza[\w-]{30,}|glpat-[\w-]{16,}"
        r"|xox[abeprs]-[\w-]{10,})"
    ),
    "an AWS key": re.compile(r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    "a GitHub token": re.compile(
        r"(?<![A-Za-z0-9])gh[opusr]_[A-Za-z0-9]{16,}|gh[opusr]_[A-Za-z0-9]{30,}|github_pat_\w{16,}"
    ),
    "a bearer token": re.compile(r"\b(?i:bearer)\s+(?=\S*\d)[A-Za-z0-9._~+/=-]{12,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
}
"""What each is -> its form."""
_ANY_TOKEN = re.compile("|".join(f"(?:{form.pattern})" for form in TOKENS.values()))
CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
PATHS = re.compile(
    r"(?P<url>\b(?!file:)[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]*)"
    r"|(?:file://|(?<![\w./…~-]))~?(?:/[^\s/\"'<>|:;,()\[\]{}]+){2,}/?"
    r"|(?<![\w./…-])~/[^\s/\"'<>|:;,()\[\]{}]+/?"
    r"|(?<![\w])[A-Za-z]:\\[^\s\"'<>|:;,()]+"
)
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
SOURCE = re.compile(r"\s*(?:@[\w.]+|def \w+\(|async def |lambda\b|functools\.partial\(|class \w+[(:])")
TEXTS = ("prompt", "gold", "replies")
SHORT = 20
"""Characters: shorter texts of a gated question (a letter, a number) occur everywhere and give nothing away."""


def visible(text: str) -> str:
    """`text` with everything that is not seen, or that rearranges what is seen, spelled out: U+202E as "⟨U+202E⟩".

    Line ends become "\\n"; NUL and the other ASCII controls become their pictures (␀); format characters, lone
    surrogates and noncharacters become their number. The outcome is encodable as UTF-8 and legal in XML.
    """
    text = text.replace("\r\n", "\n")
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(char: str) -> str:
    code = ord(char)
    if char in "\n\t" or (32 <= code < 127):
        return char
    if code < 32 or code == 127:
        return chr(0x2400 + code) if code < 32 else "␡"
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") or code & 0xFFFE == 0xFFFE
    return f"⟨U+{code:04X}⟩" if hidden else char


def cut(text: str, limit: int) -> str:
    """At most `limit` characters of `text` and a note between its two halves: a reply's answer stands at its end."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _short(found: re.Match[str]) -> str:
    if found["url"]:
        return found[0]
    return "…/" + re.split(r"[/\\]", found[0].rstrip("/\\"))[-1]


def scrub_text(text: str) -> str:
    """`text` without tokens, credentials in URLs, memory addresses and the folders of absolute paths.

    "/home/jo/runs/a" becomes "…/a"; home, working and temporary folder by themselves become "…". URLs, Hub ids and
    relative paths stay.
    """
    text = ADDRESS.sub("", CREDENTIALS.sub("", _ANY_TOKEN.sub("<token>", text)))
    text = PATHS.sub(_short, text)
    for folder in (str(Path.home()), os.getcwd(), os.environ.get("TMPDIR", "/tmp")):
        if len(folder) > 1:
            text = re.sub(rf"(?<![\w./…-]){re.escape(folder)}(?![\w.-])", "…", text)
    return text


def scrub(value: Any) -> Any:
    """`value` as plain data for JSON, every string in it (keys too) without paths and tokens.

    Mappings lose functions and the source of functions, and "samples" (texts of questions). Sequences become lists;
    other objects become the first 200 characters of their text.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | os.PathLike):
        return scrub_text(str(value))
    if isinstance(value, Mapping):
        return {scrub_text(str(k)): scrub(v) for k, v in value.items() if not (_is_code(v) or _is_samples(k, v))}
    if isinstance(value, list | tuple | set | frozenset):
        return [scrub(item) for item in value if not _is_code(item)]
    if getattr(value, "ndim", None) == 0:  # a NumPy or torch scalar
        return value.item()
    return scrub_text(str(value)[:200])


def _is_samples(key: Any, value: Any) -> bool:
    """lm-eval's texts of questions and shots; a number of samples stays."""
    return key == "samples" and isinstance(value, Mapping | list | tuple)


def _is_code(value: Any) -> bool:
    if isinstance(value, str):
        return SOURCE.match(value) is not None
    return callable(value) and not is_dataclass(value)


def _scrubbed(value: Any) -> Any:
    """The same dataclasses and tuples with every string scrubbed, but for the texts of questions."""
    if isinstance(value, str):
        return scrub_text(value)
    if isinstance(value, tuple):
        return tuple(_scrubbed(item) for item in value)
    if isinstance(value, Mapping):
        return {scrub_text(str(key)): _scrubbed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_scrubbed(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        kept = TEXTS if isinstance(value, Shown) else ()
        found = {f.name: _scrubbed(getattr(value, f.name)) for f in fields(value) if f.name not in kept}
        return replace(value, **found)
    return value


def _without_texts(task: TaskResult) -> TaskResult:
    if not task.gated:
        return task
    return replace(task, questions=tuple(replace(q, prompt=None, gold=None, replies=None) for q in task.questions))


def gated_texts(result: Result) -> list[str]:
    """Texts of gated questions that a Result carries by mistake, longest first; there should be none."""
    found = {
        text
        for task in result.tasks
        if task.gated
        for question in task.questions
        for text in (question.prompt, question.gold, *(question.replies or ()))
        if text and len(text) >= SHORT
    }
    return sorted(found, key=len, reverse=True)


def withhold(value: Any, texts: list[str]) -> Any:
    """Plain data or dataclasses with each of `texts` replaced by "(gated)" in every string."""
    if not texts:
        return value
    if isinstance(value, str):
        for text in texts:
            value = value.replace(text, "(gated)")
        return value
    if isinstance(value, Mapping):
        return {withhold(key, texts): withhold(item, texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(withhold(item, texts) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: withhold(getattr(value, f.name), texts) for f in fields(value)})
    return value


def publishable(result: Result) -> Result:
    """`result` as it may be shown: no machine paths, no tokens, no text of a gated question anywhere.

    Doing it twice changes nothing. `environment` and `sampling` become plain data.
    """
    texts = gated_texts(result)
    tasks = tuple(replace(_without_texts(task), sampling=scrub(task.sampling)) for task in result.tasks)
    plain = replace(result, tasks=tasks, environment=scrub(result.environment))
    return withhold(_scrubbed(plain), texts)
