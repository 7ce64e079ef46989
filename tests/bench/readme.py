"""Writes the generated parts of README.md, the paper index, recipes/README.md and ENGINES.md: `python -m tests.bench.readme`; with `--check` it only says what is stale.

Each part stands between `<!-- NAME -->` and `<!-- /NAME -->`: `bench:overhead`, `bench:evals`, `bench:gpu` and `bench:learning` come
from tests/bench/results/*.json, `methods` from the classes. A marker pair that is absent is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import RESULTS, ROOT, Interval, quiet, table

quiet()

from tests.bench import engines, evals, gpu, index, learning_report, overhead, recipes  # noqa: E402 - after the environment is set
from trl_ext.method import Method  # noqa: E402
from trl_ext.methods import METHODS  # noqa: E402
from trl_ext.plan import settings_of  # noqa: E402

OTHERS: Mapping[Path, Callable[[], str]] = {
    ROOT / "recipes" / "README.md": recipes.page,
    RESULTS / "OVERHEAD.md": lambda: _result("overhead", "bench-overhead", overhead.page, RESULTS),
    ROOT / "trl_ext" / "methods" / "ENGINES.md": lambda: engines.page(METHODS),
}
"""Pages that are generated as a whole, beside README.md and the paper index."""
MISSING = "No result yet: run `make {target}`."


def methods_table(methods: Mapping[str, type[Method]]) -> str:
    """A line for each method; the paper index says more."""
    head = ("name", "trainer", "paper", "stages it changes", "defaults: stated / from code / decided")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, cls in methods.items():
        title, _, rest = cls.title.partition(": ")
        paper = f"[{title if rest and len(title) < 40 else cls.title}](https://arxiv.org/abs/{cls.paper})"
        trainers = ", ".join((cls.trainer, *cls.also_in))
        link = f"[`{name}`](trl_ext/methods/README.md#{name})"
        lines.append(f"| {link} | {trainers} | {paper} | {index.stages_of(cls)} | {provenance(cls)} |")
    return "\n".join(lines)


KINDS: Mapping[str, Sequence[str]] = {
    "decided": ("ours", "decision", "open question", "choice", "inferred", "generalisation", "not seen"),
    "code": ("code", "script", "released", "readme"),
    "paper": ("paper", "ablation", "variant"),
}
"""Where a default comes from -> words of its `source` that say so; the word that comes first counts."""


def kind_of(source: str) -> str:
    """ "paper" (stated there), "code" (read in released code), or "decided" (inferred, or our own decision).

    Only what stands before a semicolon counts. Raises ValueError for a source that says none of these.
    """
    text = source.lower().partition(";")[0]
    places = [(text.find(word), kind) for kind, words in KINDS.items() for word in words if word in text]
    if not places:
        raise ValueError(f"a default's source must say whether it is the paper's, the code's or decided: {source!r}")
    return min(places)[1]


def provenance(cls: type[Method]) -> str:
    """How many defaults are stated in the paper, read in code, and inferred or decided."""
    kinds = [kind_of(f.metadata["source"]) for f in settings_of(cls).values()]
    return " / ".join(str(kinds.count(kind)) for kind in ("paper", "code", "decided"))


def _result(name: str, target: str, show: Callable[[dict[str, Any]], str], folder: Path) -> str:
    path = folder / f"{name}.json"
    return show(json.loads(path.read_text())) if path.exists() else MISSING.format(target=target)


def _learning(folder: Path) -> str:
    """A row for each stored learning bench, then what was found of the cards' claims; all else is in the JSON files."""
    results = {path: json.loads(path.read_text()) for path in sorted(folder.glob("learning_*.json"))}
    if not results:
        return MISSING.format(target="bench-learning")
    rows = [
        _learning_row(result, arm, _setting(path, arm))
        for path, result in results.items()
        for arm in _main_arms(result)
    ]
    head = ("method", "held-out accuracy, %", "minus GRPO, points", "minus GRPO, entropy in nats", "curves")
    foot = "\n".join(dict.fromkeys(learning_report.foot(result) for result in results.values()))
    return "\n\n".join(part for part in (table(head, rows), foot) if part)


def evidence(folder: Path) -> dict[str, list[str]]:
    """Method -> what the benches found of its card's claims."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("preference_*.json")):
        for claim in json.loads(path.read_text())["claims"]:
            if claim["method"] is not None:
                found.setdefault(claim["method"], []).append(_claim(claim))
    for path in sorted(folder.glob("learning_*.json")):
        result = json.loads(path.read_text())
        for claim in result.get("claims", []):
            arm = _main_arms(result)[0]
            setting = _setting(path, arm)
            found.setdefault(arm, []).append(_claim(claim, f"With {setting}: " if setting else ""))
    return found


def _setting(path: Path, arm: str) -> str:
    """What the bench was run with beside the recipe: the end of the file's name, "" for the recipe itself."""
    return path.stem.removeprefix("learning_").removeprefix(arm).strip("_").replace("_", " ")


def _preference(folder: Path) -> str:
    """What became of the claims of each stored bench of preference data; the numbers of all arms are in the JSON files."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("preference_*.json"))]
    lines = [_claim(claim, f"{result['bench']}: ") for result in found for claim in result["claims"]]
    return "\n".join(lines) or MISSING.format(target="bench-preference")


def _main_arms(result: Mapping[str, Any]) -> list[str]:
    return [arm for arm in result["about"]["arms"] if arm != learning_report.BASELINE and "," not in arm]


def _learning_row(result: Mapping[str, Any], arm: str, setting: str) -> list[str]:
    found = result["summary"][arm]
    names = (learning_report.ACCURACY, learning_report.ENTROPY)
    cells = [_interval(found[learning_report.ACCURACY.name]["mean"], learning_report.ACCURACY)]
    cells += [_interval(found[metric.name]["minus_grpo"], metric, plus=True) for metric in names]
    return [f"`{arm}`{setting and ', '}{setting}", *cells, f"[picture](tests/bench/results/{result['picture']})"]


def _interval(values: Sequence[float] | None, metric: learning_report.Metric, plus: bool = False) -> str:
    return "" if values is None else Interval(*values, 0).text(metric.scale, metric.digits, plus)


def _claim(found: Mapping[str, Any], before: str = "") -> str:
    against = "" if isinstance(found["against"], float | int) else f" against {found['against']}"
    numbers = f" ({found['metric']}{against}: {found['found']})" if "found" in found else ""
    return f"- {before}{found['text']}: **{found['outcome']}**{numbers}."


def parts(folder: Path = RESULTS) -> dict[str, str]:
    """Marker -> text."""
    return {
        "bench:overhead": _result("overhead", "bench-overhead", overhead.ratios, folder),
        "bench:preference": _preference(folder),
        "bench:evals": _result("evals", "bench-evals", evals.markdown, folder),
        "bench:gpu": _result("gpu", "bench-gpu", gpu.markdown, folder),
        "bench:learning": _learning(folder),
        "methods": methods_table(METHODS),
    }


def fill(text: str, texts: Mapping[str, str]) -> str:
    """`text` with each part between its markers. ValueError for an opening marker that is never closed."""
    for name, content in texts.items():
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        if opening in text and closing not in text.split(opening, 1)[1]:
            raise ValueError(f"README.md: {opening} has no {closing} after it")
        whole = f"{opening}\n{content}\n{closing}"
        pattern = re.escape(opening) + r".*?" + re.escape(closing)
        text = re.sub(pattern, lambda _, whole=whole: whole, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main(
    words: Sequence[str] | None = None,
    readme: Path = ROOT / "README.md",
    folder: Path = RESULTS,
    papers: Path = ROOT / "trl_ext" / "methods" / "README.md",
    others: Mapping[Path, Callable[[], str]] = OTHERS,
) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a file would change")
    args = parser.parse_args(words)
    if not readme.exists():
        sys.exit(f"{readme} does not exist yet: write it with the markers that `--help` names, then run this again.")
    wanted = {readme: fill(readme.read_text(), parts(folder)), papers: index.page(METHODS, evidence(folder))}
    wanted |= {path: page() for path, page in others.items()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if stale and args.check:
        sys.exit(f"{', '.join(path.name for path in stale)} not current: run `make docs`.")
    for path in stale:
        path.write_text(wanted[path])
    print(f"{len(stale)} files written." if stale else "All is current.")


if __name__ == "__main__":
    main()
