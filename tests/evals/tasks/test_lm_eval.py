"""Our tasks inside lm-eval: exact prompts, all replies, our grader's numbers, and its own command on every twin."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from evals.task import Grade, Item, Metric, Sampling, Source, Task
from evals.tasks import GROUPS, TASKS
from evals.tasks.lm_eval import as_lm_eval, from_doc, pooled, score, to_doc, yaml_folder
from evals.tasks.twins import twin
from tests.tiny import tiny_path

SAMPLING = Sampling(2, 0.7, top_p=0.9, top_k=5, max_new_tokens=33)


class Scripted(LM):
    """Replies by a function of (row, number of the reply); keeps the requests."""

    def __init__(self, reply: Callable[[dict, int], str]) -> None:
        super().__init__()
        self.reply = reply
        self.requests: list[Instance] = []

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return json.dumps(chat_history)

    @property
    def tokenizer_name(self) -> str:
        return "none"

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.requests = requests
        count: dict[str, int] = {}
        replies = []
        for request in requests:
            name = request.doc["id"]
            count[name] = count.get(name, -1) + 1
            replies.append(self.reply(request.doc, count[name]))
        return replies

    def loglikelihood(self, requests: list[Instance]) -> list:
        raise AssertionError

    loglikelihood_rolling = loglikelihood


def evaluate(model: LM, task: object, **kwargs: object) -> dict:
    return simple_evaluate(
        model,
        tasks=[task],
        apply_chat_template=True,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
        **kwargs,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", GROUPS["offline"])
def test_rows_bring_the_item_back(name: str) -> None:
    for item in TASKS[name].load(Source(limit=16)):
        doc = to_doc(item, name)
        assert all(isinstance(value, str) for value in doc.values())
        assert from_doc(doc) == item


def test_other_conversations_are_refused() -> None:
    turn = {"role": "user", "content": "x"}
    for messages in (
        [turn, turn],
        [{"role": "system", "content": "x"}],
        [turn, {"role": "assistant", "content": "y"}],
    ):
        with pytest.raises(ValueError, match="one user turn"):
            to_doc(Item("a", "a", messages, 1), "task")


@pytest.mark.parametrize("name", GROUPS["offline"])
def test_the_model_gets_exactly_the_messages_and_every_sampling_field(name: str) -> None:
    items = TASKS[name].load(Source(limit=3))
    model = Scripted(lambda doc, k: "x")
    evaluate(model, as_lm_eval(TASKS[name], items, 3, SAMPLING))
    asked = [json.loads(request.args[0]) for request in model.requests]
    assert asked == [item.messages for item in items for _ in range(3)]
    for request in model.requests:
        assert request.args[1] == {
            "until": [],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "max_gen_toks": 33,
        }


def test_greedy_is_stated() -> None:
    task = TASKS["aime_synth"]
    model = Scripted(lambda doc, k: "x")
    evaluate(model, as_lm_eval(task, task.load(Source(limit=1)), 1, Sampling(1, 0.0)))
    assert model.requests[0].args[1]["do_sample"] is False
    assert model.requests[0].args[1]["temperature"] == 0


@pytest.mark.parametrize("name", GROUPS["offline"])
def test_metrics_are_the_grader_s_means_over_all_replies(name: str) -> None:
    task = TASKS[name]
    items = task.load(Source(limit=4))

    def reply(doc: dict, k: int) -> str:
        """Right in the first k = 0, 1 of 4 replies; broken in others."""
        item = from_doc(doc)
        right = {
            "math": f"\\boxed{{{item.gold}}}",
            "choice": f"Answer: {item.gold}",
            "structured": json.dumps(item.gold),
        }[task.kind]
        return [right, "nothing", '{"zzz": 1}', right[:-1]][(k + int(item.id[-1])) % 4]

    result = evaluate(Scripted(reply), as_lm_eval(task, items, 4, SAMPLING))
    grades = [[task.grade(item, reply(to_doc(item, name), k)) for k in range(4)] for item in items]
    flat = [g.scores for row in grades for g in row]
    for metric, spec in task.metrics.items():
        found = result["results"][name][f"{metric},all"]
        if spec.ratio:
            above, below = (sum(s[count] for s in flat) for count in spec.ratio)
            assert found == pytest.approx(above / below)
        else:
            assert found == pytest.approx(sum(s[metric] for s in flat) / len(flat))
    assert result["results"][name][f"{task.headline},all"] > 0
    assert result["versions"][name] == task.version
    assert len(result["samples"][name]) == len(items)
    assert all(len(sample["resps"][0]) == 4 or len(sample["resps"]) == 4 for sample in result["samples"][name])


def test_a_ratio_is_pooled_over_all_replies_and_a_mean_is_not() -> None:
    grades = {"a": ((1.0, 2.0), 1.0), "b": ((3.0, 4.0), 0.0), "c": ((0.0, 0.0), 0.5)}
    task = Task(
        name="t",
        title="",
        version=1,
        origin="",
        headline="m",
        metrics={"m": Metric(""), "r": Metric("", ratio=("n", "d"))},
        load=lambda source: [],
        grade=lambda item, text: Grade({"n": grades[text][0][0], "d": grades[text][0][1], "m": grades[text][1]}, None),
        presets={},
        format_metric="m",
        kind="math",
    )
    doc = to_doc(Item("i", "i", [{"role": "user", "content": "?"}], 1), "t")
    assert score(task, doc, [["a", "b"]]) == {"m": 0.5, "r": (4.0, 6.0)}
    assert score(task, doc, [["a", "b", "c"]]) == {"m": 0.5, "r": (4.0, 6.0)}
    assert pooled([(1, 2), (3, 4)]) == pytest.approx(4 / 6)
    assert pooled([(0, 0)]) == "N/A"


def test_twins_on_disk_are_the_table_s() -> None:
    files = {path.stem: path.read_text("utf-8") for path in yaml_folder().glob("*.yaml")}
    assert files == {name: twin(task) for name, task in TASKS.items()}


class _Loader(yaml.SafeLoader):
    """Reads `!function name` as name."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_a_twin_differs_from_the_object_in_its_functions_alone() -> None:
    for name in GROUPS["offline"]:
        task = TASKS[name]
        fields = yaml.load(twin(task), _Loader)
        sampling = task.presets["offline"]
        config = as_lm_eval(task, task.load(Source(limit=1)), sampling.samples, sampling).config
        for key in set(fields) - {"custom_dataset", "dataset_kwargs", "metric_list", "fewshot_config"}:
            if not callable(config[key]):
                assert fields[key] == config[key], (name, key)
        assert [m["metric"] for m in fields["metric_list"]] == [m["metric"] for m in config["metric_list"]]


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def test_lm_eval_s_own_command_runs_every_generated_task(tmp_path: Path) -> None:
    names = GROUPS["offline"]
    command = [sys.executable, "-m", "lm_eval", "--include_path", str(yaml_folder()), "--tasks", ",".join(names)]
    command += ["--model", "hf", "--model_args", f"pretrained={tiny_path(max_position_embeddings=4096)}"]
    command += ["--limit", "2", "--batch_size", "16", "--device", "cpu", "--apply_chat_template", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    # Another working directory than the repository's: nothing is found by a relative path.
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(found.read_text(), parse_constant=refuse)["results"]
    assert set(results) == set(names)
    for name in names:
        task = TASKS[name]
        assert {f"{metric},all" for metric in task.metrics} <= set(results[name])
        (samples,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        items = task.load(Source())[:2]
        assert [row["doc"]["id"] for row in rows] == [item.id for item in items]
        for row, item in zip(rows, items, strict=True):
            texts = row["filtered_resps"][0]
            assert len(texts) == task.presets["offline"].samples
            mean = sum(task.grade(item, text).scores[task.headline] for text in texts) / len(texts)
            assert row[task.headline] == pytest.approx(mean)
            for message in item.messages:
                assert message["content"] in row["arguments"]["gen_args_0"]["arg_0"]
