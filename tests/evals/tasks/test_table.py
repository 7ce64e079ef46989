"""The table of tasks: names, presets, golds that pass their own graders, hostile replies, groups and errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.data.build import fingerprint
from evals.data.suites import FINGERPRINTS
from evals.task import Item, Source, Task
from evals.tasks import GROUPS, TASKS, get_tasks
from tests.evals.data import stand_ins

tasks = pytest.mark.parametrize("name", sorted(TASKS))


def items_of(task: Task, tmp_path: Path) -> list[Item]:
    if task.generated:
        return task.load(Source())
    return task.load(Source(str(stand_ins.make(task.name, tmp_path))))


RIGHT: dict[str, Callable[[Item], str]] = {
    "math": lambda item: f"We add.\nSo the result is \\boxed{{{item.gold}}}.",
    "choice": lambda item: f"Let me think: A is wrong.\nAnswer: {item.gold}",
    "structured": lambda item: json.dumps(item.gold if item.gold is not None else {"a": 1}),
}
HOSTILE = ["", "\0", "\ud800", "[" * 20_000, "{" * 50 + "}" * 50, "\\boxed{" + "9" * 5000, "NaN", "Answer: ABCD"]


@tasks
def test_every_gold_passes_its_own_grader(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    items = items_of(task, tmp_path)
    for item in items:
        grade = task.grade(item, RIGHT[task.kind](item))
        assert grade.scores[task.headline] == 1, item
        assert grade.scores[task.format_metric] == 1
        assert grade.answer is not None


@tasks
def test_a_wrong_reply_does_not_pass(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    item = items_of(task, tmp_path)[0]
    if task.kind == "structured":
        wrong = json.dumps({"a": "one", "reasoning": 3})
    else:
        wrong = {"math": "\\boxed{12345}", "choice": f"Answer: {'ABCD'.replace(item.gold, '')[0]}"}[task.kind]
    grade = task.grade(item, wrong)
    assert grade.scores[task.headline] == 0
    assert grade.scores[task.format_metric] == 1


@tasks
def test_any_reply_gets_every_metric(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    item = items_of(task, tmp_path)[0]
    needed = {m for m, metric in task.metrics.items() if not metric.ratio}
    needed |= {count for metric in task.metrics.values() for count in metric.ratio or ()}
    for text in [*HOSTILE, RIGHT[task.kind](item)]:
        grade = task.grade(item, text)
        assert needed <= set(grade.scores), text[:20]
        assert all(value == value and value >= 0 for value in grade.scores.values())


def test_votes_name_the_option_not_the_letter() -> None:
    task = TASKS["mcq_synth"]
    items = task.load(Source(limit=3))
    for question in {item.question for item in items}:
        rotated = [item for item in items if item.question == question]
        right = {task.grade(item, f"Answer: {item.gold}").answer for item in rotated}
        assert right == {"Correct Answer"}
        always_a = {task.grade(item, "Answer: A").answer for item in rotated}
        assert len(always_a) == 4
        # A model that always says the same letter is right in one of four rotations: exactly the chance level.
        assert sum(task.grade(item, "Answer: A").scores["accuracy"] for item in rotated) / 4 == task.chance


@tasks
def test_fields_are_consistent(name: str) -> None:
    task = TASKS[name]
    assert task.name == name
    assert task.headline in task.metrics
    assert task.format_metric in task.metrics
    assert {"quick", "full"} <= set(task.presets)
    assert ("offline" in task.presets) == task.generated == (task.name in FINGERPRINTS)
    if task.generated:
        assert task.stand_in is None
    else:
        stand_in = TASKS[str(task.stand_in)]
        assert stand_in.generated
        assert set(task.presets) <= set(stand_in.presets)
    assert (task.chance == 0.25) == (task.kind == "choice")
    assert task.gated == (name == "gpqa_diamond")
    assert (task.memorable is not None) == (name == "aime24" or name.startswith("gsm8k"))


def per_question(name: str, preset: str) -> int:
    rotations = 4 if TASKS[name].kind == "choice" else 1
    return TASKS[name].presets[preset].samples * rotations


def test_presets_are_the_protocol_s() -> None:
    for name in ("aime24", "aime25", "gpqa_diamond"):
        for preset in ("quick", "full"):
            s = TASKS[name].presets[preset]
            assert (s.temperature, s.top_p, s.top_k, s.max_new_tokens) == (0.6, 0.95, 20, 32_768)
    assert [per_question("aime24", p) for p in ("quick", "full")] == [8, 32]
    assert [per_question("gpqa_diamond", p) for p in ("quick", "full")] == [4, 8]
    for name in ("gsm8k", "gsm8k_json", "gsm8k_json_platinum"):
        greedy, sampled = TASKS[name].presets["full"], TASKS[name].presets["sampled"]
        assert (greedy.samples, greedy.temperature, greedy.max_new_tokens) == (1, 0, 2048)
        assert (sampled.samples, sampled.temperature) == (4, 0.7)
    assert all(s.max_new_tokens >= 1024 for s in TASKS["structured"].presets.values())
    for name in GROUPS["offline"]:
        s = TASKS[name].presets["offline"]
        assert per_question(name, "offline") == 4
        assert (s.temperature, s.max_new_tokens) == (1.0, 64 if name == "sandbox_json" else 96)


def test_names_and_groups() -> None:
    assert [t.name for t in get_tasks(["aime25", "aime"])] == ["aime25", "aime24"]
    assert {t.name for t in get_tasks(["offline"])} == set(FINGERPRINTS)
    assert [t.name for t in get_tasks(["all"])] == list(TASKS)
    assert all(set(members) <= set(TASKS) for members in GROUPS.values())
    assert not set(GROUPS) & set(TASKS)


def test_all_unknown_names_are_listed_with_what_may_have_been_meant() -> None:
    with pytest.raises(ValueError) as caught:
        get_tasks(["aime24", "gpqa_dimond", "gsm8kjson", "xyz"])
    lines = str(caught.value).split("\n")
    assert lines[0] == "no task or group 'gpqa_dimond': did you mean 'gpqa_diamond'?"
    assert lines[1] == "no task or group 'gsm8kjson': did you mean 'gsm8k_json'?"
    assert lines[2] == "no task or group 'xyz'"
    assert all(name in lines[3] for name in [*TASKS, *GROUPS])
    with pytest.raises(ValueError, match="no task named"):
        get_tasks([])


def test_fingerprints_of_real_data_follow_the_content(tmp_path: Path) -> None:
    folder = stand_ins.make("aime25", tmp_path)
    before = fingerprint(TASKS["aime25"].load(Source(str(folder))))
    assert before == fingerprint(TASKS["aime25"].load(Source(str(folder))))
    rows = stand_ins.aime25()
    rows[4]["answer"] = "77"
    stand_ins.jsonl(rows, folder / "test.jsonl")
    assert before != fingerprint(TASKS["aime25"].load(Source(str(folder))))


def test_only_the_sandbox_task_imports_the_trainer() -> None:
    folder = Path(__file__).parents[3] / "evals"
    found = [
        p.name
        for sub in ("data", "tasks")
        for p in (folder / sub).rglob("*.py")
        if "import trl_ext" in p.read_text() or "from trl_ext" in p.read_text()
    ]
    assert found == ["sandbox_json.py"]
