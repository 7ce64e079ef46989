"""The harness's wall time over the bare model's and over plain lm-eval's.

The sandbox's model answers the same prompts in three ways that take turns: `model.generate` alone; ours (shared noise,
store on disk, grading, statistics, lm-eval's result layout); lm-eval's own HFLM on the same task object. Loading the
model and importing the libraries are left out. Ratios are medians over rounds; nothing is asserted on wall time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.common import machine, machine_text, quiet, say, spread, table

quiet()

import torch  # noqa: E402 - after the environment is set

from evals import models, runs  # noqa: E402
from evals.data.build import fingerprint  # noqa: E402
from evals.generation.hf import left_padded  # noqa: E402
from evals.generation.lm import prompt_text  # noqa: E402
from evals.run import Evaluation, Ready  # noqa: E402
from evals.score import score  # noqa: E402
from evals.settings import Settings  # noqa: E402
from evals.task import Sampling, Source  # noqa: E402
from evals.tasks import TASKS  # noqa: E402
from evals.tasks.lm_eval import as_lm_eval  # noqa: E402

TASK = TASKS["sandbox_json"]


class Loaded(Evaluation):
    """An evaluation on a model that is in memory already."""

    engine: models.Loaded

    def _load(self, spec: Any, adapters: Any) -> models.Loaded:
        return self.engine


def bare(loaded: models.Loaded, prompts: list[str], sampling: Sampling, batch: int) -> None:
    """`model.generate` on the repeated prompts, sampled as ours are."""
    jobs = [text for text in prompts for _ in range(sampling.samples)]
    ids = sorted(loaded.tokenizer(jobs, add_special_tokens=False)["input_ids"], key=len, reverse=True)
    for at in range(0, len(ids), batch):
        tokens, mask = left_padded(ids[at : at + batch], loaded.tokenizer.pad_token_id)
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        with torch.no_grad():
            loaded.model.generate(
                input_ids=tokens, attention_mask=mask, max_new_tokens=sampling.max_new_tokens, **settings
            )


def ours(loaded: models.Loaded, items: Any, sampling: Sampling, batch: int) -> None:
    """Everything that `trl-ext eval` does for one subject, after loading."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Ready(TASK, items, Source(limit=len(items)), fingerprint(items), sampling)
        settings = Settings((TASK,), batch_size=batch, store=str(Path(folder) / "replies"))
        plan = runs.Plan("sandbox", loaded.spec, (), (), loaded.spec.model, (), {})
        one = Loaded(plan, settings, [ready], [], lambda count, total: None)
        one.engine = loaded
        score(one.go(), loaded.tokenizer, {})


def plain(loaded: models.Loaded, items: Any, sampling: Sampling, batch: int) -> None:
    """lm-eval's engine and its own model class on the same task object."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch),
        tasks=[as_lm_eval(TASK, items, sampling.samples, sampling)],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        log_samples=False,
        bootstrap_iters=0,
    )


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run(questions: int, samples: int, rounds: int, batch: int) -> dict[str, Any]:
    """Medians over `rounds`, after one round that is not counted."""
    torch.set_num_threads(1)
    base = models.BaseSpec(runs._path("sandbox"))
    tokenizer = models.load_tokenizer(base.model, base)
    loaded = models.load(base, tokenizer, (), torch.device("cpu"))
    items = TASK.load(Source(limit=questions))
    sampling = Sampling(samples, 1.0, max_new_tokens=64)
    prompts = [prompt_text(tokenizer, item.messages, {}) for item in items]
    ways = {
        "bare": lambda: bare(loaded, prompts, sampling, batch),
        "ours": lambda: ours(loaded, items, sampling, batch),
        "lm-eval": lambda: plain(loaded, items, sampling, batch),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            taken[name].append(seconds(way))
        say(f"round {turn} of {rounds}: " + ", ".join(f"{name} {taken[name][-1]:.1f} s" for name in ways))
    counted = {name: values[1:] for name, values in taken.items()}
    ratios = {
        f"ours / {other}": [a / b for a, b in zip(counted["ours"], counted[other], strict=True)]
        for other in ("bare", "lm-eval")
    }
    return {
        "bench": "evals_harness",
        "machine": {**machine(), "threads": 1},
        "about": {"questions": questions, "samples": samples, "rounds": rounds, "batch": batch},
        "seconds": {name: statistics.median(values) for name, values in counted.items()},
        "ratios": {name: vars(spread(values)) for name, values in ratios.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """The ratios as a table."""
    rows = [(name, f"{r['median']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}") for name, r in result["ratios"].items()]
    about = result["about"]
    foot = f"{about['questions']} questions x {about['samples']} replies, batch {about['batch']}, sandbox model. "
    return table(("wall time", "ratio", "quartiles"), rows) + f"\n\n{foot}{machine_text(result['machine'])}."
