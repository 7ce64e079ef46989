"""The model card of a published run: what a reader needs to judge and to use the adapter.

Everything in it comes from the run's own files, the methods' classes and an evaluation's results.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import ModelCard

from evals.report.markdown import escape, markdown
from evals.stats import Estimate
from trl_ext.card_data import TRAINERS, Card, check, data_sets, metadata, named, papers, trainers
from trl_ext.report.evaluation import percent
from trl_ext.run_facts import RECIPE, PublishError, Run
from trl_ext.staging import CURVES

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `max_lora_rank`."""


def card(facts: Card) -> str:
    """The text of README.md. Raises PublishError when the metadata are not what the Hub takes."""
    data = metadata(facts)
    check(data)
    body = "\n\n".join(part for part in _sections(facts) if part)
    text = f"---\n{data.to_yaml()}\n---\n\n{body}\n"
    if ModelCard(text).data.to_dict() != data.to_dict():
        raise PublishError("the model card cannot be written", ["its metadata do not survive YAML"])
    return text


def _sections(facts: Card) -> Iterator[str]:
    run, what = facts.run, "LoRA adapter" if facts.run.adapter is not None else "model"
    methods = ", ".join(f"`{name}`" for name in named(run)) or "no method beside it"
    trainer = ", then ".join(TRAINERS.get(name, (name,))[0] for name in trainers(run))
    yield f"# {facts.name}"
    yield (
        f"A {what} trained from [{facts.base}](https://huggingface.co/{facts.base}) with {trainer} ({methods}) by "
        "`trl-ext`, an extension of [TRL](https://github.com/huggingface/trl)."
    )
    yield _methods(run)
    yield _data(run)
    yield _training(facts)
    yield _evaluation(facts)
    yield _loading(facts)
    yield _versions(run)
    yield _citations(run)


def _methods(run: Run) -> str:
    settings = run.report.get("methods") or {}
    lines = []
    for name, title, paper in papers(run):
        changed = f"; {escape(settings[name])}" if name in settings else ""
        lines.append(f"- `{name}`: {escape(title)} ([arXiv {paper}](https://arxiv.org/abs/{paper})){changed}")
    known = {name for name, _, _ in papers(run)}
    lines += [f"- `{name}`: not known to this version of trl-ext" for name in named(run) if name not in known]
    return "\n".join(["## Methods", "", *lines]) if lines else ""


def _data(run: Run) -> str:
    lines = []
    for name, split in data_sets(run):
        if run.on_hub(name):
            lines.append(f"- [{name}](https://huggingface.co/datasets/{name}), split {split}")
        elif name.startswith("sandbox/"):
            lines.append(f"- `{name}`: problems that trl-ext generates, split {split}; not a benchmark")
        else:
            lines.append("- a data set that is not public")
    for recipe in run.recipes:
        rewards = recipe.get("rewards") or recipe.get("reward_funcs")
        lines += (
            [f"- rewards: {', '.join(f'`{name}`' for name in rewards)}"] if isinstance(rewards, list | dict) else []
        )
    return "\n".join(["## Data", "", *(lines or ["The recipe names no data set."])])


def _training(facts: Card) -> str:
    lines = ["## Training", "", f"Every setting is in [{RECIPE}]({RECIPE})."]
    before = [f"[{name}](recipe_{name}.yaml)" for name in facts.run.earlier]
    lines += [f"That is the last stage; before it came {', '.join(before)}."] if before else []
    recipe = facts.run.recipe
    bits = 4 if recipe.get("load_in_4bit") else 8 if recipe.get("load_in_8bit") else None
    lines += [f"The base was loaded in {bits} bits."] if bits else []
    lines += ["", f"![training curves]({CURVES})"] if CURVES in facts.files else ["", "No curves were drawn."]
    return "\n".join(lines)


def _evaluation(facts: Card) -> str:
    own, parts = facts.run.report.get("evaluation"), []
    if facts.evaluation is not None:
        parts.append(markdown(facts.evaluation.result).strip())
    if own:
        parts.append(_before_after(own, bool(facts.run.earlier) and facts.run.adapter is not None))
    if not parts:
        parts.append("## Evaluation\n\nNot evaluated: nothing is known about whether this is better than its base.")
    return "\n\n".join(parts)


def _before_after(own: Mapping[str, Any], staged: bool) -> str:
    lines = ["| measure | before | after | verdict |", "| --- | ---: | ---: | --- |"]
    for name, found in own["measures"].items():
        before, after = (percent(_estimate(found[key])) for key in ("before", "after"))
        lines.append(f"| {name} | {before} | {after} | {escape(found['words'])} |")
    return "\n".join(
        [
            f"## Before and after {'the last stage' if staged else 'training'}",
            "",
            f"On {own['problems']} generated held-out problems, {own['samples']} sampled replies to each at temperature "
            f"{own['temperature']:g}; 95% intervals. The noise of another training seed is not in them.",
            "",
            *lines,
        ]
    )


def _estimate(found: Mapping[str, Any]) -> Estimate:
    return Estimate(**found)


def _loading(facts: Card) -> str:
    parts = ["## How to load", "", "With transformers" + (":" if facts.run.adapter is None else " and PEFT:"), ""]
    parts += _python(_transformers(facts))
    if facts.run.adapter is None:
        return "\n".join(parts)
    served = _vllm(facts)
    parts += (
        ["", "With vLLM:", "", *_python(served)]
        if served
        else ["", "vLLM does not load this kind of adapter as it is: merge it first."]
    )
    merged = f"hf download {facts.repo} --local-dir {facts.name}\ntrl-ext merge {facts.name} --out {facts.name}-merged"
    return "\n".join([*parts, "", "Merged into its base:", "", "```bash", merged, "```"])


def _python(code: str) -> list[str]:
    return ["```python", code, "```"]


def _transformers(facts: Card) -> str:
    run, peft = facts.run, facts.run.adapter is not None
    model, reader = (
        ("AutoModelForImageTextToText", "AutoProcessor") if run.images else ("AutoModelForCausalLM", "AutoTokenizer")
    )
    how = "".join(f", {key}={value!r}" for key, value in run.loading.items()).replace("'", '"')
    own = "tokenizer_config.json" in facts.files
    lines = ["from peft import PeftModel"] if peft else []
    lines += [f"from transformers import {model}, {reader}", ""]
    lines += [
        f'{reader[4:].lower()} = {reader}.from_pretrained("{facts.repo if own else facts.base}"{"" if own else how})'
    ]
    source, how = (facts.base, how) if peft else (facts.repo, "")
    lines += [f'model = {model}.from_pretrained("{source}", dtype="auto", device_map="auto"{how})']
    return "\n".join([*lines, *([f'model = PeftModel.from_pretrained(model, "{facts.repo}")'] if peft else [])])


def _vllm(facts: Card) -> str | None:
    """Code, or None for an adapter that vLLM refuses."""
    config: Mapping[str, Any] = facts.run.adapter or {}
    rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    unusual = config.get("use_dora") or config.get("modules_to_save") or config.get("bias", "none") != "none"
    if config.get("peft_type") != "LORA" or unusual or rank > VLLM_RANKS[-1]:
        return None
    fitting = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    how = "".join(f", {key}={value!r}" for key, value in facts.run.loading.items()).replace("'", '"')
    how += f', tokenizer="{facts.repo}"' if "tokenizer_config.json" in facts.files else ""
    return "\n".join(
        [
            "from huggingface_hub import snapshot_download",
            "from vllm import LLM",
            "from vllm.lora.request import LoRARequest",
            "",
            f'llm = LLM("{facts.base}"{how}, enable_lora=True, max_lora_rank={fitting})',
            f'adapter = LoRARequest("{facts.name}", 1, snapshot_download("{facts.repo}"))',
            'llm.chat([{"role": "user", "content": "..."}], lora_request=adapter)',
        ]
    )


def _versions(run: Run) -> str:
    found = {"python": run.versions.get("python"), **(run.versions.get("packages") or {})}
    rows = [f"| {name} | {escape(version)} |" for name, version in found.items() if version]
    seeds = [f"{name} {seed}" for name, seed in (run.versions.get("seeds") or {}).items() if seed is not None]
    git = run.versions.get("git") or {}
    code = (
        f"trl-ext at commit `{git['commit']}`{', with local changes' if git.get('dirty') else ''}. "
        if git.get("commit")
        else ""
    )
    return "\n".join(
        ["## Versions", "", "| package | version |", "| --- | --- |", *rows, "", f"{code}Seeds: {', '.join(seeds)}."]
    )


def _citations(run: Run) -> str:
    titles = {paper: title for _, title, paper in papers(run)}
    entries = [bibtex(title, paper) for paper, title in titles.items()]
    if not entries:
        return ""
    said = "Authors are left out: see the papers' pages."
    return "\n".join(["## Citations", "", said, "", "```bibtex", *entries, "```"])


def bibtex(title: str, paper: str) -> str:
    """An entry from title and arXiv id alone; an id begins with year and month of submission."""
    safe = re.sub(r"([&%#_$])", r"\\\1", title)
    fields = {"title": f"{{{safe}}}", "year": f"20{paper[:2]}", "eprint": paper, "archivePrefix": "arXiv"}
    lines = [f"  {key} = {{{value}}}," for key, value in fields.items()]
    return "\n".join([f"@misc{{arxiv:{paper},", *lines, f"  url = {{https://arxiv.org/abs/{paper}}}", "}"])
