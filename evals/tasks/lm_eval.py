"""Our tasks as lm-eval 0.4.13 tasks: same prompts, same sampling, same grader, in its engine and by its command.

A row that lm-eval sees is flat, as `datasets` and its result files want it: strings, with JSON for what has structure.
The system text is the column `system`, which lm-eval takes because `description` names that column; so with a chat
template and no system instruction of its own, the model gets exactly `item.messages`. All replies to a prompt are kept
and graded by `Task.grade`; a metric is the mean over the replies, a ratio is pooled over all prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.data.build import canonical
from evals.task import Item, Metric, Sampling, Source, Task

if TYPE_CHECKING:
    from datasets import DatasetDict
    from lm_eval.api.task import ConfigurableTask

Doc = Mapping[str, Any]
Counts = tuple[float, float]


def yaml_folder() -> Path:
    """The folder for lm-eval's `--include_path`."""
    return Path(__file__).with_name("yaml")


def to_doc(item: Item, task: str) -> dict[str, Any]:
    """`item` as a flat row. ValueError unless its messages are one user turn, after at most one system turn."""
    turns = {message["role"]: message["content"] for message in item.messages}
    if [m["role"] for m in item.messages] not in (["user"], ["system", "user"]):
        raise ValueError(f"{item.id}: lm-eval can ask one user turn after one system turn, not {list(turns)}")
    return {
        "task": task,
        "id": item.id,
        "question": item.question,
        "group": item.group,
        "level": json.dumps(item.level),
        "system": turns.get("system", ""),
        "user": turns["user"],
        "gold": canonical(item.gold),
        "details": canonical(item.details),
    }


def from_doc(doc: Doc) -> Item:
    """The item of a row; `from_doc(to_doc(item, name)) == item` up to the type of its sequences."""
    system = [{"role": "system", "content": doc["system"]}] if doc["system"] else []
    return Item(
        id=doc["id"],
        question=doc["question"],
        messages=[*system, {"role": "user", "content": doc["user"]}],
        gold=json.loads(doc["gold"]),
        group=doc["group"],
        level=json.loads(doc["level"]),
        details=json.loads(doc["details"]),
    )


def user_text(doc: Doc) -> str:
    """`doc_to_text`: a function, for as a template the text itself would be read as one."""
    return str(doc["user"])


def gold_text(doc: Doc) -> str:
    """`doc_to_target`: the gold as JSON; a template would evaluate what looks like a list."""
    return str(doc["gold"])


def score(task: Task, doc: Doc, results: Sequence[Sequence[str]]) -> dict[str, float | Counts]:
    """`process_results`: every metric of the task for one prompt, over all its replies `results[0]`.

    A plain metric is the mean; a ratio is (sum of numerators, sum of denominators), for `pooled`.
    """
    item = from_doc(doc)
    scores = [task.grade(item, text).scores for text in results[0]]
    return {name: _one(metric, name, scores) for name, metric in task.metrics.items()}


def _one(metric: Metric, name: str, scores: Sequence[Mapping[str, float]]) -> float | Counts:
    if metric.ratio is None:
        return math.fsum(s[name] for s in scores) / len(scores)
    above, below = metric.ratio
    return math.fsum(s[above] for s in scores), math.fsum(s[below] for s in scores)


def pooled(counts: Iterable[Counts]) -> float | str:
    """Sum of numerators over sum of denominators; lm-eval's own "N/A" if nothing was counted, so that no rate exists.

    NaN would make the result file one that is no JSON.
    """
    pairs = list(counts)
    below = math.fsum(pair[1] for pair in pairs)
    return math.fsum(pair[0] for pair in pairs) / below if below else "N/A"


def generation_kwargs(sampling: Sampling) -> dict[str, Any]:
    """Every field stated, since lm-eval, transformers and the model's own generation config all have defaults."""
    return {
        "until": [],
        "do_sample": sampling.temperature > 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_gen_toks": sampling.max_new_tokens,
    }


def config(task: Task, samples: int, sampling: Sampling) -> dict[str, Any]:
    """The part of a task's configuration that is data; `samples` replies to each prompt, all kept."""
    return {
        "task": task.name,
        "test_split": "test",
        "output_type": "generate_until",
        "description": "system",
        "num_fewshot": 0,
        "repeats": samples,
        "generation_kwargs": generation_kwargs(sampling),
        "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": samples}]}],
        "metadata": {"version": task.version},
    }


def metric_list(task: Task, pool: Any = pooled) -> list[dict[str, Any]]:
    """The task's metrics, headline first; `pool` aggregates the ratios."""
    names = sorted(task.metrics, key=lambda name: name != task.headline)
    return [
        {
            "metric": name,
            "aggregation": pool if task.metrics[name].ratio else "mean",
            "higher_is_better": task.metrics[name].higher_is_better,
        }
        for name in names
    ]


def dataset(task: Task, items: Sequence[Item]) -> DatasetDict:
    """The items' rows as split `test`."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list([to_doc(item, task.name) for item in items])})


def as_lm_eval(task: Task, items: Sequence[Item], samples: int, sampling: Sampling) -> ConfigurableTask:
    """A task object for `lm_eval.simple_evaluate(tasks=[...])` that asks exactly `items`, `samples` replies each.

    Replies come from `sampling`, but for its own `samples`. Pass `apply_chat_template=True` and no system instruction.
    """
    from lm_eval.api.task import ConfigurableTask

    functions: dict[str, Callable[..., Any]] = {
        "custom_dataset": lambda **_: dataset(task, items),
        "doc_to_text": user_text,
        "doc_to_target": gold_text,
        "process_results": lambda doc, results: score(task, doc, results),
    }
    return ConfigurableTask(config=config(task, samples, sampling) | functions | {"metric_list": metric_list(task)})


def load_named(name: str, data_folder: str | None = None, data_seed: int = 0) -> DatasetDict:
    """The rows of a task by name, for the YAML twins."""
    from evals.tasks import TASKS

    return dataset(TASKS[name], TASKS[name].load(Source(data_folder, None, data_seed)))


def score_named(doc: Doc, results: Sequence[Sequence[str]]) -> dict[str, float | Counts]:
    """`score` with the task that the row names."""
    from evals.tasks import TASKS

    return score(TASKS[doc["task"]], doc, results)
