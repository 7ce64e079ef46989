"""The paper index, trl_ext/methods/README.md: an entry for each method, from its class, recipes and stored benches."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import ROOT
from trl_ext.method import Method, overrides
from trl_ext.plan import STAGES, settings_of

HEAD = """# Paper index

One entry for each method, written by `make docs` from the classes, the recipes and the stored benches: change those.
A default's source says where it comes from; "card" is the summary of the paper that this project was built from.
"""


def stages_of(cls: type[Method]) -> str:
    """The stages of a step that the class changes, in their order."""
    return ", ".join(stage for stage, hooks in STAGES.items() if any(overrides(cls(), hook) for hook in hooks))


def refused(cls: type[Method], methods: Mapping[str, type[Method]]) -> dict[str, str]:
    """Other methods of the same trainer that do not go with `cls`: owners of the same slot, and conflicts -> why."""
    others = [other for other in methods.values() if other is not cls and other.trainer == cls.trainer]
    found = {}
    for other in others:
        shared = ", ".join(sorted({*cls.owns} & {*other.owns}))
        reason = cls.conflicts.get(other.name) or other.conflicts.get(cls.name)
        if reason or shared:
            found[other.name] = reason or f"both replace the {shared}"
    return found


def free(cls: type[Method], methods: Mapping[str, type[Method]]) -> list[str]:
    """Other methods of the same trainer that no conflict and no slot keeps apart from `cls`."""
    against = refused(cls, methods)
    return [o.name for o in methods.values() if o is not cls and o.trainer == cls.trainer and o.name not in against]


def page(methods: Mapping[str, type[Method]], evidence: Mapping[str, Sequence[str]]) -> str:
    """The whole page. `evidence`: method -> lines about what was measured on the sandbox."""
    names = " · ".join(f"[{name}](#{name})" for name in methods)
    return "\n\n".join([HEAD.strip(), names, *(entry(cls, methods, evidence) for cls in methods.values())]) + "\n"


def entry(cls: type[Method], methods: Mapping[str, type[Method]], evidence: Mapping[str, Sequence[str]]) -> str:
    """One method: paper, what its file says, settings, recipes, evidence, composition."""
    module = importlib.import_module(cls.__module__)
    parts = [
        f"## {cls.name}",
        f"[{cls.title}](https://arxiv.org/abs/{cls.paper}). Trainer: {cls.trainer}. Changes: {stages_of(cls)}. "
        f"Code: [{Path(module.__file__ or '').name}]({_place(module)}). Recipes: {_recipes(cls.name) or 'none'}.",
        "```text\n" + inspect.cleandoc(module.__doc__ or "") + "\n```",
        _settings(cls),
    ]
    if lines := evidence.get(cls.name):
        parts.append(
            "On the sandbox (5 seeds; tests/bench/results/NOTES.md says what was tried):\n\n" + "\n".join(lines)
        )
    parts.append(_composition(cls, methods))
    return "\n\n".join(part for part in parts if part)


def _place(module: Any) -> str:
    return Path(module.__file__).relative_to(ROOT / "trl_ext" / "methods").as_posix()


def _recipes(name: str) -> str:
    """Links to the recipes that name the method."""
    named = re.compile(rf"^  {name}:", re.MULTILINE)
    found = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if named.search(path.read_text())]
    return ", ".join(f"[{path.stem}](../../recipes/{path.name})" for path in found)


def _settings(cls: type[Method]) -> str:
    lines = ["| setting | default | meaning | source |", "| --- | --- | --- | --- |"]
    for key, field in settings_of(cls).items():
        default = getattr(cls(), key)
        cells = (f"`{key}`", f"`{default}`", field.metadata["doc"], field.metadata["source"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _composition(cls: type[Method], methods: Mapping[str, type[Method]]) -> str:
    together = ", ".join(f"`{name}`" for name in free(cls, methods)) or "no other method yet"
    against = [f"- not with `{name}`: {reason}." for name, reason in refused(cls, methods).items()]
    return "\n".join([f"Composes with {together}.", *([""] if against else []), *against])
