"""DSTC's build: sampling, running, selecting, what is on disk, going on after a stop, settings of a recipe, one real run."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from tests.tiny import dpo_args, tiny_path, tiny_tokenizer
from trl_ext.checkpoints import CheckpointError
from trl_ext.data_sources import DataError
from trl_ext.dpo import DPOConfig, DPOTrainer
from trl_ext.executor import Limits, NoIsolation, make_executor
from trl_ext.executor.base import Outcome
from trl_ext.loops import LoopError, dstc_data, dstc_run, make_loop
from trl_ext.loops.dstc_rows import Room, instructions, training_rows
from trl_ext.loops.dstc_settings import Dstc
from trl_ext.recipe import RecipeError, load_recipe
from trl_ext.run import train

CODES = {
    "double": [
        "def double(x):\n    return 2 * x",
        "def double(x):\n    return x",
        "def double(x):\n    return x + x + 1",
    ],
    "never": ["def never(x):\n    return 1", "def never(x):\n    return 2", "nothing"],
}
TESTS = {
    "double": ["assert double(3) == 6", "assert double(0) == 0", "assert twice(1) == 2", "assert double(1) == 5"],
    "never": ["assert never(1) == 3", "assert never(0) == 3", "assert never(", "assert never(1) == 3"],
}
ROWS = [
    {"prompt": [{"role": "user", "content": f"Task {name}."}], "entry_point": name} for name in ("double", "never")
]
LOOP = Dstc(executor="auto", num_codes=3, num_tests=4, generation_batch_size=4)


class Scripted:
    """A sampler that replies from CODES and TESTS; `asked` notes (entry point, kind, n, seed)."""

    def __init__(self):
        self.asked = []

    def sample(self, rows, n, drawing, seed):
        found = []
        for row in rows:
            text = row["prompt"][-1]["content"]
            name = next(name for name in CODES if f"Task {name}." in text)
            replies = TESTS[name] if "Do not solve" in text else CODES[name]
            assert len(replies) == n
            assert f"`{name}`" in text
            self.asked.append((name, "test" if replies is TESTS[name] else "code", n, seed))
            found.append([{"text": f"```python\n{reply}\n```", "tokens": [1], "cut": False} for reply in replies])
        return found


class InProcess:
    """An executor for these harmless texts alone: it runs them right here."""

    name = "in-process"

    def __init__(self, stop_after=None):
        self.ran, self.stop_after = 0, stop_after

    def run_all(self, jobs, limits=Limits(), at_once=None):
        if self.stop_after is not None and self.ran >= self.stop_after:
            raise KeyboardInterrupt
        self.ran += len(jobs)
        return [self._run(job) for job in jobs]

    @staticmethod
    def _run(job):
        try:
            exec(f"{job.code}\n{job.test or ''}", {})
            reason = "passed"
        except Exception as error:
            reason = type(error).__name__
        return Outcome(reason == "passed", False, False, None, "", reason, 0.5)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def built(folder, loop=LOOP, executor=None, sampler=None):
    return dstc_data.build(ROWS, loop, sampler or Scripted(), executor or InProcess(), str(folder), seed=0, model="m")


def test_a_build(tmp_path):
    double, never = built(tmp_path)
    # Usable tests of double: 3 = 6, 0 = 0 and the wrong 1 = 5. R = [[1,1,0],[0,1,0],[0,0,0]]: a = 2,1,0 and b = 1,2,0.
    results = lines_of(tmp_path / "rounds/dstc/part-0001/results.jsonl")[0]
    assert results["results"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert results["reasons"][2] == ["AssertionError"] * 3
    assert results["dropped"]["tests"] == {"no block": 0, "does not parse": 0, "does not call": 1, "duplicate": 0}
    assert double["selection"] == {"chosen_code": 0, "chosen_test": 0, "rejected_code": 2, "rejected_test": 1}
    assert double["chosen"] == (
        "```python\ndef double(x):\n    return 2 * x\n```\n\n```python\nassert double(3) == 6\n```"
    )
    assert double["rejected"].endswith("return x + x + 1\n```\n\n```python\nassert double(0) == 0\n```")
    assert (double["code_sums"], double["test_sums"]) == ([2, 0], [1, 2])
    assert never["skipped"] == "no code passes a test"


def test_provenance_and_report(tmp_path):
    built(tmp_path)
    (sample,) = lines_of(tmp_path / "rounds/dstc/part-0002/samples.jsonl")
    assert (sample["index"], sample["model"], sample["seed"]) == (1, "m", "0/dstc/2")
    assert [reply["text"] for reply in sample["codes"]] == [f"```python\n{text}\n```" for text in CODES["never"]]
    report = json.loads((tmp_path / "rounds/dstc/report.json").read_text())
    assert (report["instructions"], report["pairs"]) == (2, 1)
    assert report["skipped"] == {"no code passes a test": 0.5}
    # never: "nothing" parses as a name and counts as a code; its tests are two, one does not parse, one is a duplicate.
    assert report["code_pass_rate"] == pytest.approx((2 / 3 + 1 / 3 + 0 + 0 + 0 + 0) / 6)
    assert report["test_pass_rate"] == pytest.approx((1 / 3 + 2 / 3 + 0 + 0 + 0) / 5)
    assert report["dropped"]["tests"] == {"does not call": 1, "does not parse": 1, "duplicate": 1}
    assert (report["chosen_test_sums"], report["rejected_test_sums"]) == ({"1": 1}, {"2": 1})
    assert (report["runs"], report["seconds"]) == (15, 7.5)


def test_a_build_that_stopped_goes_on(tmp_path):
    whole = built(tmp_path / "a")
    first = Scripted()
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "b", executor=InProcess(stop_after=9), sampler=first)
    again = Scripted()
    assert built(tmp_path / "b", sampler=again) == whole
    assert [name for name, *_ in first.asked] == ["double", "double", "never", "never"]
    assert again.asked == []  # samples of the second part were whole; only their runs were missing
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.jsonl")]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_another_build_in_the_folder_is_refused(tmp_path):
    built(tmp_path)
    with pytest.raises(CheckpointError, match="selection was 'minimax', is 'random'"):
        built(
            tmp_path, loop=Dstc(executor="auto", num_codes=3, num_tests=4, generation_batch_size=4, selection="random")
        )


def test_other_data_of_the_same_length_are_refused(tmp_path):
    built(tmp_path)
    for changed in ({"prompt": [{"role": "user", "content": "Task double. Now."}]}, {"entry_point": "triple"}):
        rows = [{**ROWS[0], **changed}, ROWS[1]]
        with pytest.raises(CheckpointError, match="data was"):
            dstc_data.build(rows, LOOP, Scripted(), InProcess(), str(tmp_path), seed=0, model="m")


def test_a_run_is_asked_before_it_writes(tmp_path):
    """`trl_ext.run` calls this before the resolved recipe of a resumed run is written over."""

    def begun(folder, seed):
        args = SimpleNamespace(output_dir=str(folder), seed=seed, max_length=None)
        LOOP.check_begun(SimpleNamespace(training_args=args), "m", SimpleNamespace(train=ROWS))

    begun(tmp_path, 1)
    assert not list(tmp_path.iterdir()), "nothing was begun, and nothing is written"
    built(tmp_path)
    begun(tmp_path, 0)
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        begun(tmp_path, 1)


def test_how_the_data_are_made_may_change(tmp_path):
    whole = built(tmp_path)
    assert built(tmp_path, loop=dataclasses.replace(LOOP, executor="unshare", at_once=3)) == whole


def test_what_samples_may_not_change_but_its_address_may(tmp_path):
    """vLLM and transformers draw different replies for a seed."""
    built(tmp_path / "a")
    served = dataclasses.replace(LOOP, vllm_server_base_url="http://localhost:1")
    with pytest.raises(CheckpointError, match="backend was 'transformers', is 'vllm'"):
        built(tmp_path / "a", loop=served)
    whole = built(tmp_path / "b", loop=served)
    assert built(tmp_path / "b", loop=dataclasses.replace(served, vllm_server_base_url="http://localhost:2")) == whole
    for folder, backend in (("a", "transformers"), ("b", "vllm")):
        (sample,) = lines_of(tmp_path / folder / "rounds/dstc/part-0001/samples.jsonl")
        assert sample["backend"] == backend


def through_trl(rows, folder, **changed):
    """The token ids of each pair as our trainer's collator hands them to the model, without padding."""
    config = DPOConfig(**dpo_args(str(folder), per_device_train_batch_size=1, **changed))
    trainer = DPOTrainer(tiny_path(), args=config, train_dataset=rows, processing_class=tiny_tokenizer())
    for batch in trainer.get_train_dataloader():
        yield [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_a_pair_that_the_trainer_would_cut_is_skipped(tmp_path):
    (pair,) = through_trl(training_rows(built(tmp_path / "a"), False, 0), tmp_path / "t", max_length=None)
    longest = max(map(len, pair))
    loop = Dstc(executor="auto", num_codes=3, num_tests=4, generation_batch_size=4)

    def build(folder, limit):
        room = Room(tiny_tokenizer(), limit)
        return dstc_data.build(ROWS, loop, Scripted(), InProcess(), str(folder), seed=0, model="m", room=room)

    rows = training_rows(build(tmp_path / "b", longest), False, 0)
    (kept,) = through_trl(rows, tmp_path / "t", max_length=longest)
    assert [ids.tolist() for ids in kept] == [ids.tolist() for ids in pair]
    with pytest.raises(DataError, match=r"no pair came out.*longer than max_length"):
        build(tmp_path / "c", longest - 1)
    report = json.loads((tmp_path / "c/rounds/dstc/report.json").read_text())
    assert report["skipped"] == {"longer than max_length": 0.5, "no code passes a test": 0.5}
    with pytest.raises(CheckpointError, match=f"max_length was {longest}, is {longest - 1}"):
        build(tmp_path / "b", longest - 1)


def test_settings_of_the_chat_template_are_kept(tmp_path):
    """They shape what is sampled and what is trained on; a row without them gets none."""
    template = {"chat_template_kwargs": {"enable_thinking": False}}
    seen = []

    class Noting(Scripted):
        def sample(self, rows, n, drawing, seed):
            seen.extend(row.get("chat_template_kwargs") for row in rows)
            return super().sample(rows, n, drawing, seed)

    def build(rows, folder):
        return dstc_data.build(rows, LOOP, Noting(), InProcess(), str(folder), seed=0, model="m")

    lines = build([{**row, **template} for row in ROWS], tmp_path / "a")
    assert seen == [{"enable_thinking": False}] * 4
    for kto in (False, True):
        rows = training_rows([{**lines[0], "chat_template_kwargs": None}, *lines], kto, 0)
        found = [row["chat_template_kwargs"]["enable_thinking"] for row in rows]
        assert found.count(False) == found.count(None) == len(rows) // 2
    assert "chat_template_kwargs" not in training_rows(build(ROWS, tmp_path / "b"), False, 0).column_names
    with pytest.raises(CheckpointError, match="data was"):
        build(ROWS, tmp_path / "a")
    (pair,) = through_trl(training_rows(lines, False, 0), tmp_path / "t", max_length=None)
    assert len(pair) == 2


def test_tools_are_refused():
    tools = [{**ROWS[0], "tools": None}, {**ROWS[1], "tools": '[{"type": "function"}]'}]
    with pytest.raises(DataError, match="row 1 has tools"):
        instructions(tools, None)


def test_the_pair_is_a_completion_of_the_instruction_and_not_of_the_question_for_code(tmp_path):
    assert built(tmp_path / "a")[0]["prompt"] == ROWS[0]["prompt"]
    loop = dataclasses.replace(LOOP, train_prompt="{prompt} Name it `{entry_point}`.")
    (turn,) = built(tmp_path / "b", loop=loop)[0]["prompt"]
    assert turn["content"] == "Task double. Name it `double`."


def test_codes_alone(tmp_path):
    loop = Dstc(executor="auto", num_codes=3, num_tests=4, generation_batch_size=4, concat=False)
    assert built(tmp_path, loop=loop)[0]["chosen"] == "```python\ndef double(x):\n    return 2 * x\n```"


def test_rows_for_the_trainers(tmp_path):
    lines = built(tmp_path)
    (pair,) = training_rows(lines, kto=False, seed=0)
    assert set(pair) == {"prompt", "chosen", "rejected"}
    assert pair["prompt"][-1]["content"].startswith("Task double.")
    assert pair["chosen"] == [{"role": "assistant", "content": lines[0]["chosen"]}]
    many = [{**lines[0], "index": i, "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
    halves = training_rows(many, kto=True, seed=0)
    assert set(halves.column_names) == {"prompt", "completion", "label"}
    texts = [row["completion"][0]["content"] for row in halves]
    assert sorted(texts) == sorted(f"{kind} {i}" for i in range(20) for kind in ("good", "bad"))
    assert all(row["label"] == text.startswith("good") for row, text in zip(halves, texts, strict=True))
    assert texts != [f"{kind} {i}" for i in range(20) for kind in ("good", "bad")]
    assert texts == [row["completion"][0]["content"] for row in training_rows(many, kto=True, seed=0)]


def test_no_pair_at_all(tmp_path):
    with pytest.raises(DataError, match=r"no pair came out of 1 instructions.*no code passes a test"):
        dstc_data.build(ROWS[1:], LOOP, Scripted(), InProcess(), str(tmp_path), seed=0, model="m")


@pytest.mark.parametrize("name", [None, "not a name", "", 3])
def test_a_row_needs_its_entry_point(name):
    with pytest.raises(DataError, match="row 1 has entry_point"):
        instructions([ROWS[0], {"prompt": [], "entry_point": name}], None)


def test_one_name_for_all():
    assert [row["entry_point"] for row in instructions([ROWS[0], {"prompt": []}], "solve")] == ["solve", "solve"]
    found = Dstc(executor="auto", entry_point="a b").check(args(), [], True)
    assert found == ["entry_point: 'a b' is no name of a function"]


def test_braces_in_a_prompt_stay(tmp_path):
    row = {"prompt": [{"role": "user", "content": "Return {x} and {0}."}], "entry_point": "f"}
    assert dstc_data.asked(row, "{prompt} `{entry_point}`")[0]["content"] == "Return {x} and {0}. `f`"


@pytest.mark.parametrize("judging", ["separate", "together"])
def test_on_a_real_executor(tmp_path, judging):
    try:
        executor = make_executor("auto")
    except NoIsolation as error:
        pytest.skip(str(error))
    loop = Dstc(executor="auto", num_codes=3, num_tests=4, judging=judging, exec_timeout_s=20)
    built(tmp_path, loop=loop, executor=executor)
    (double, never) = lines_of(tmp_path / "rounds/dstc/part-0001/results.jsonl")
    assert double["results"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert double["reasons"][0] == ["passed", "passed", "AssertionError: "]
    assert never["results"] == [[0, 0]] * 3
    assert (double["executor"], double["judging"]) == (executor.name, judging)


# Settings


def args(**changed):
    return SimpleNamespace(**({"eval_strategy": "no", "world_size": 1} | changed))


def test_nothing_is_run_unless_the_recipe_names_an_executor():
    assert make_loop("dstc").executor == "none"
    (problem,) = make_loop("dstc").check(args(), [], True)
    assert problem.startswith("executor: model-written code is run, which is off by default")
    assert LOOP.check(args(), [], True) == []


def test_problems_of_settings():
    found = LOOP.check(args(eval_strategy="steps", world_size=2), ["math_correct"], True)
    assert [problem.split(":")[0] for problem in found] == [
        "rewards",
        "eval_strategy",
        "runs in one process",
    ]
    odd = Dstc(executor="auto", code_prompt="{prompt} {name}", test_prompt="{prompt} {entry_point} {")
    found = odd.check(args(), [], True)
    assert found[:2] == [
        "code_prompt: it has no {entry_point}",
        "code_prompt: unknown field {name} (it has: {prompt}, {entry_point})",
    ]
    assert found[2].startswith("test_prompt: ")
    assert found[2].endswith("write {{ and }} for literal braces")
    (problem,) = Dstc(executor="auto", train_prompt="{entry_point}").check(args(), [], True)
    assert problem == "train_prompt: it has no {prompt}"
    for setting in (
        {"num_codes": 1},
        {"num_tests": 1},
        {"selection": "best"},
        {"executor": "subprocess"},
        {"exec_timeout_s": 0},
    ):
        with pytest.raises(LoopError, match=next(iter(setting))):
            make_loop({"dstc": setting})


def test_the_limits_of_a_run():
    limits = Dstc(exec_timeout_s=0.4, memory_mb=128).limits
    assert (limits.wall_s, limits.cpu_s, limits.memory_mb, limits.processes) == (0.4, 1, 128, 1)


def test_a_recipe_says_what_is_wrong(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Add.", "entry_point": "add"}\n')
    recipe = {
        "trainer": "dpo",
        "model_name_or_path": "sandbox",
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "bf16": False,
        "max_steps": 1,
        "loop": {"dstc": {}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="loop: dstc: executor: model-written code is run"):
        load_recipe(str(tmp_path / "recipe.yaml"))
    packed = ["--loop.dstc.executor", "auto", "--use_peft", "true", "--load_in_4bit", "true"]
    assert load_recipe(str(tmp_path / "recipe.yaml"), packed).model_args.load_in_4bit, "nothing is merged here"
    loaded = load_recipe(str(tmp_path / "recipe.yaml"), ["--loop.dstc.executor", "auto"])
    assert loaded.loop == Dstc(executor="auto")
    assert "10 codes and 10 tests" in loaded.loop.describe(loaded.training_args)


def test_a_method_that_reads_a_column_is_refused_before_anything_is_sampled(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Add.", "entry_point": "add"}\n')
    recipe = {"trainer": "dpo", "model_name_or_path": "sandbox", "dataset_name": str(tmp_path / "rows.jsonl")}
    recipe |= {"bf16": False, "max_steps": 1, "loop": {"dstc": {"executor": "auto"}}, "loss_type": ["dno"]}

    def load(variant):
        text = yaml.safe_dump(recipe | {"methods": {"dno": {"variant": variant}}})
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(str(tmp_path / "recipe.yaml"))

    with pytest.raises(RecipeError, match="loop: dstc: methods: dno reads the column win_margin"):
        load("soft")
    assert load("prct").plan.methods[0].variant == "prct"


def test_a_stream_is_refused_before_anything_is_read():
    with pytest.raises(RecipeError, match=r"loop: dstc: dataset_streaming: .* set it to false"):
        load_recipe("dstc_qwen2.5_coder_7b", ["--use_cpu", "true", "--dataset_streaming", "true"])


def test_the_real_recipe_names_the_function_and_has_room_for_its_pairs():
    """512 tokens of prompt, a code, a test, and what stands around them."""
    recipe = load_recipe("dstc_qwen2.5_coder_7b", ["--use_cpu", "true"])
    loop, words = recipe.loop, [{"role": "user", "content": "Add two numbers."}]
    (row,) = instructions([{"prompt": words}], loop.entry_point)
    for template in (loop.train_prompt, loop.code_prompt, loop.test_prompt):
        assert "`solve`" in dstc_data.asked(row, template)[0]["content"]
    around = recipe.training_args.max_length - recipe.extra.max_prompt_tokens - 2 * loop.max_completion_length
    assert around >= 100


def test_the_schedule_is_that_of_the_pairs_whose_number_nobody_knows_yet(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Add.", "entry_point": "add"}\n' * 32)
    recipe = {"trainer": "dpo", "model_name_or_path": "sandbox", "dataset_name": str(tmp_path / "rows.jsonl")}
    recipe |= {"bf16": False, "num_train_epochs": 2, "per_device_train_batch_size": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"loop": {"dstc": {"executor": "auto"}}}))
    schedule = train(load_recipe(str(tmp_path / "recipe.yaml")), dry_run=True).schedule
    assert schedule.startswith("on what the loop makes of the data set: 4 pairs x ")
    assert schedule.endswith("; 2 epochs; the number of steps depends on the size of the data set")


def test_the_sampler_is_packed_as_the_trainer_s_model_is(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Add.", "entry_point": "add"}\n')
    recipe = {"trainer": "dpo", "model_name_or_path": "sandbox", "dataset_name": str(tmp_path / "rows.jsonl")}
    recipe |= {"bf16": False, "max_steps": 1, "use_peft": True, "load_in_4bit": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"loop": {"dstc": {"executor": "auto"}}}))
    loaded, asked = load_recipe(str(tmp_path / "recipe.yaml")), {}

    def from_pretrained(model, **kwargs):
        asked.update(kwargs)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(dstc_run.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    dstc_run._Late(loaded, "m", None, loaded.loop)._make()
    assert asked["quantization_config"].load_in_4bit
    assert asked["device_map"] == {"": loaded.training_args.device}
