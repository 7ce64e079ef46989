"""The model card: metadata that the Hub reads back, results as measured, papers as the classes name them, code to load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from evals.stats import Estimate
from tests.hub.conftest import BASE
from tests.hub.standin import StandIn
from trl_ext import card_data, cards
from trl_ext.card_data import Card, License, evaluation_of
from trl_ext.cli import main
from trl_ext.methods import METHODS
from trl_ext.run_facts import PublishError, Run, read_run

NAMES = ("README.md", "recipe.yaml", "curves.png")


def facts(run: Run, **changes: object) -> Card:
    return dataclasses.replace(Card(run, "alice/my-run", BASE, License("apache-2.0"), NAMES), **changes)


def changed(run: Run, adapter: dict | None = None, **recipe: object) -> Run:
    own = None if run.adapter is None else {**run.adapter, **(adapter or {})}
    return dataclasses.replace(run, adapter=own, recipe={**run.recipe, **recipe})


@pytest.fixture(scope="session")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small evaluation of the run."""
    folder = tmp_path_factory.mktemp("evaluated")
    words = (
        f"--tasks sandbox_json --limit 4 --samples 2 --max-new-tokens 4 --store {folder}/replies --out {folder}/report"
    )
    assert main(["eval", str(trained), *words.split()]) == 0
    return folder / "report"


def test_metadata(trained: Path) -> None:
    run = changed(read_run(trained), dataset_name="openai/gsm8k")
    text = cards.card(facts(run))
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "trl_ext_run": "my-run",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "datasets": ["openai/gsm8k"],
        "tags": ["trl-ext", "trl", "grpo", f"base_model:adapter:{BASE}", "lora", "high_entropy"],
    }
    assert "Not evaluated: nothing is known about whether this is better than its base." in text
    assert "model-index" not in text and "| measure |" not in text
    assert cards.card(facts(run)) == text, "the same run gives the same card, so that nothing is sent twice"


def test_results_are_those_of_the_evaluation(trained: Path, evaluated: Path) -> None:
    run = read_run(trained)
    found = evaluation_of(evaluated, run)
    assert found.name == "my-run"
    task = found.result.tasks[0]
    own = task.scores[1].metrics | {"valid_and_correct": Estimate(0.625, 0.5, 0.75, 4, 2)}
    scores = (task.scores[0], dataclasses.replace(task.scores[1], metrics=own))
    result = dataclasses.replace(found.result, tasks=(dataclasses.replace(task, scores=scores),))
    text = cards.card(facts(run, evaluation=dataclasses.replace(found, result=result)))
    gain = task.versus[0].metrics["valid_and_correct"]
    results = {r.metric_type: r for r in ModelCard(text).data.eval_results}
    assert set(results) == {"valid_and_correct", "valid_and_correct_gain"}
    for name, share in {"valid_and_correct": 0.625, "valid_and_correct_gain": gain.comparison.difference}.items():
        assert results[name].metric_value == round(100 * share, 2)
        assert results[name].verified is False and results[name].dataset_type == "generated/sandbox_json"
    assert (
        f"{gain.verdict} on sandbox_json" in text and "62.5% \\[50.0, 75.0\\]" in text and "Not evaluated" not in text
    )
    assert str(evaluated) not in text


def test_an_evaluation_of_other_weights_is_refused(trained: Path, evaluated: Path, run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    with pytest.raises(PublishError, match=r"it evaluated base, my-run, and none has the weights"):
        evaluation_of(evaluated, read_run(run))
    with pytest.raises(PublishError, match="expected a folder that `trl-ext eval` wrote"):
        evaluation_of(tmp_path, read_run(trained))


def test_before_and_after_of_the_run_itself(trained: Path) -> None:
    share = {"mean": 0.25, "low": 0.2, "high": 0.3, "n": 10, "samples": 4}
    measure = {"before": share, "after": {**share, "mean": 0.5, "high": 0.75}, "words": "better: +25.0 points [1, 2]"}
    own = {"problems": 10, "samples": 4, "temperature": 1.0, "measures": {"accuracy": measure}}
    run = dataclasses.replace(changed(read_run(trained), dataset_name="sandbox/math"), report={"evaluation": own})
    text = cards.card(facts(run))
    assert "| accuracy | 25.0% [20.0, 30.0] | 50.0% [20.0, 75.0] | better: +25.0 points \\[1, 2\\] |" in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_type, result.metric_value, result.verified) == ("accuracy", 50.0, False)
    assert result.dataset_name == "sandbox/math, 10 generated held-out problems"
    assert "datasets" not in ModelCard(text).data.to_dict(), "what is generated is not on the Hub"


def test_papers_come_from_the_classes(trained: Path) -> None:
    text = cards.card(facts(read_run(trained)))
    cls = METHODS["high_entropy"]
    assert (
        f"- `high_entropy`: {cls.title} ([arXiv {cls.paper}](https://arxiv.org/abs/{cls.paper})); quantile=0.5" in text
    )
    assert "[arXiv 2402.03300]" in text, "the trainer's own"
    assert f"eprint = {{{cls.paper}}}" in text and f"title = {{{{{cls.title}}}}}" in text
    assert "author" not in text.split("```bibtex")[1], "nobody's name is made up"
    assert card_data.papers(changed(read_run(trained), trainer="sft", methods={}, loop={"pasodoble": {}})) == [
        ("pasodoble", "PasoDoble: Better LLM Reasoning via Dual-Play", "2511.11881")
    ]
    assert "`gone`: not known" in cards.card(facts(changed(read_run(trained), methods={"gone": {}})))


def test_bibtex() -> None:
    assert cards.bibtex("A & B_c", "2510.00819") == (
        "@misc{arxiv:2510.00819,\n  title = {{A \\& B\\_c}},\n  year = {2025},\n  eprint = {2510.00819},\n"
        "  archivePrefix = {arXiv},\n  url = {https://arxiv.org/abs/2510.00819}\n}"
    )


@pytest.mark.parametrize(("rank", "pattern", "allowed"), [(4, {}, 8), (16, {}, 16), (16, {"q_proj": 33}, 64)])
def test_vllm_gets_a_rank_that_it_takes(trained: Path, rank: int, pattern: dict, allowed: int) -> None:
    text = cards.card(facts(changed(read_run(trained), {"r": rank, "rank_pattern": pattern})))
    assert f'LLM("{BASE}", enable_lora=True, max_lora_rank={allowed})' in text


def test_the_base_is_loaded_as_it_was_trained_on(trained: Path) -> None:
    text = cards.card(facts(changed(read_run(trained), model_revision="v2", trust_remote_code=True)))
    how = 'revision="v2", trust_remote_code=True'
    assert f'AutoTokenizer.from_pretrained("{BASE}", {how})' in text
    assert f'from_pretrained("{BASE}", dtype="auto", device_map="auto", {how})' in text
    assert f'LLM("{BASE}", {how}, enable_lora=True' in text
    assert 'PeftModel.from_pretrained(model, "alice/my-run")' in text


def test_a_model_of_images_says_so(run: Path) -> None:
    (run / "preprocessor_config.json").write_text("{}")
    text = cards.card(facts(read_run(run)))
    assert ModelCard(text).data.pipeline_tag == "image-text-to-text"
    assert f'processor = AutoProcessor.from_pretrained("{BASE}")' in text and "AutoModelForImageTextToText" in text


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"r": 1024}, {"bias": "all"}]
)
def test_vllm_is_not_promised_what_it_refuses(trained: Path, setting: dict) -> None:
    text = cards.card(facts(changed(read_run(trained), setting)))
    assert "enable_lora" not in text and "merge it first" in text


def test_every_python_block_of_the_card_compiles(trained: Path) -> None:
    blocks = cards.card(facts(read_run(trained))).split("```python\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")


@pytest.mark.parametrize(
    ("license", "words"),
    [
        (License("Apache 2.0"), "no identifier"),
        (License("other"), "its name and its link"),
        (License(""), "no identifier"),
    ],
)
def test_metadata_that_the_hub_would_refuse(trained: Path, license: License, words: str) -> None:
    with pytest.raises(PublishError, match=words):
        cards.card(facts(read_run(trained), license=license))


def pipeline(folder: Path, trained: Path, whole: Path) -> Path:
    """The files of a pipeline of two stages as its report names them; the last is `trained`, merged it is `whole`."""
    import shutil

    shutil.copytree(trained, folder / "2_grpo")
    shutil.copytree(trained, folder / "1_sft")
    shutil.copytree(whole, folder / "models" / "2_grpo")
    first = yaml.safe_load((trained / "recipe.yaml").read_text())
    first |= {
        "trainer": "sft",
        "model_name_or_path": BASE,
        "dataset_name": "org/demos",
        "methods": {},
        "rewards": None,
    }
    (folder / "1_sft" / "recipe.yaml").write_text(yaml.safe_dump(first))
    low, high = ({"mean": mean, "low": 0.1, "high": 0.9, "n": 20, "samples": 4} for mean in (0.25, 0.75))
    start, previous = ({"accuracy": {"words": words}} for words in ("better than the start", "better than the first"))
    stages = [
        {"stage": "0_start", "run": None, "model": "tiny", "scores": {"accuracy": low}},
        {"stage": "1_sft", "run": "1_sft", "model": "models/1_sft"},
        {"stage": "2_grpo", "run": "2_grpo", "model": "models/2_grpo", "scores": {"accuracy": high}}
        | {"versus_start": start, "versus_previous": previous},
    ]
    last = {"run": "2_grpo", "model": "models/2_grpo"}
    (folder / "pipeline.json").write_text(json.dumps({"stages": stages, "last": last}))
    (folder / "status.json").write_text('{"status": "finished"}')
    return folder


def test_a_pipeline_is_its_last_stage_s_whole_model(
    trained: Path, tmp_path: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny import tiny_path

    folder = pipeline(tmp_path / "staged", trained, Path(tiny_path()))
    assert main(["publish", str(folder), "--repo", "alice/staged"]) == 2
    assert "--full-model publishes it" in capsys.readouterr().err
    assert main(["publish", str(folder), "--repo", "alice/staged", "--full-model"]) == 0
    files = hub.repos["alice/staged"].files
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "recipe_1_sft.yaml"} <= set(files)
    assert files["model.safetensors"] == (Path(tiny_path()) / "model.safetensors").read_bytes()
    assert "adapter_model.safetensors" not in files and tiny_path().encode() not in b"".join(files.values())
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["datasets"]) == (BASE, "finetune", ["org/demos"])
    assert {"sft", "grpo", "high_entropy"} <= set(data["tags"])
    text = files["README.md"].decode()
    assert "sandbox, 20 generated held-out problems" in text, "and not the file that the last stage was trained on"
    assert "with SFT, then GRPO" in text and "## Before and after training" in text
    assert "| accuracy | 25.0% [10.0, 90.0] | 75.0% [10.0, 90.0] | better than the start |" in text
    assert "model_name_or_path" not in yaml.safe_load(files["recipe.yaml"])
    assert yaml.safe_load(files["recipe_1_sft.yaml"])["model_name_or_path"] == BASE


def test_the_adapter_of_a_later_stage_belongs_to_merged_weights(
    trained: Path, tmp_path: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny import tiny_path

    stage = str(pipeline(tmp_path / "staged", trained, Path(tiny_path())) / "2_grpo")
    for more in ([], ["--base", BASE]):
        assert main(["publish", stage, "--repo", "alice/stage", *more]) == 2
        assert "merged before it was trained" in capsys.readouterr().err
    assert not hub.uploads()
    hub.repos["alice/merged"] = hub.repos[BASE]
    assert main(["publish", stage, "--repo", "alice/stage", "--base", "alice/merged"]) == 0
    files = hub.repos["alice/stage"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "alice/merged"
    assert yaml.safe_load(files["recipe.yaml"])["model_name_or_path"] == "alice/merged"
