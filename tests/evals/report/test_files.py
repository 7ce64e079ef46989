"""results.json, report.html and report.md: whole, clean, and back again without loss."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from evals.report import files
from evals.report.clean import publishable
from evals.report.files import load, write
from tests.evals.report.example import HOSTILE, result

LM_EVAL = {
    "results": {"aime_synth": {"alias": "aime_synth", "avg@k,all": 0.558, "avg@k_stderr,all": float("nan")}},
    "configs": {
        "aime_synth": {
            "task": "aime_synth",
            "process_results": "def score(doc, results):\n    return {}",
            "doc_to_text": lambda doc: doc,
            "config_source": "/home/jo/evals/tasks/aime_synth.yaml",
            "fewshot_config": {"sampler": "first_n", "samples": [{"question": "a shot"}]},
        }
    },
    "versions": {"aime_synth": 1},
    "n-shot": {"aime_synth": 0},
    "higher_is_better": {"aime_synth": {"avg@k": True}},
    "n-samples": {"aime_synth": {"original": 60, "effective": 60}},
    "samples": {"aime_synth": [{"doc": {"problem": "a whole question"}}]},
    "config": {"model": "hf", "model_args": "pretrained=/home/jo/models/qwen,token=hf_AbCdEfGh1234"},
    "date": 1763700000.5,
}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_round_trip_is_exact(tmp_path, number):
    made = result(number)
    found = load(write(tmp_path / "new" / "folder", made).results)
    assert found == made
    assert load(tmp_path / "new" / "folder") == made
    assert type(found.tasks[0].questions) is tuple and type(found.spread) is tuple


def test_round_trip_of_hostile_texts_and_of_nan(tmp_path):
    made = result(2)
    task = made.tasks[0]
    questions = tuple(replace(q, prompt=HOSTILE, gold=HOSTILE, replies=(HOSTILE * 9, "")) for q in task.questions)
    split = replace(task.versus[0].split, base=(0.0, math.nan))
    task = replace(task, questions=questions, versus=(replace(task.versus[0], split=split),))
    made = replace(made, tasks=(task, *made.tasks[1:]))
    found = load(write(tmp_path, made).results)
    assert math.isnan(found.tasks[0].versus[0].split.base[1])
    assert found.tasks[0].questions == questions
    assert "content given format –" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_lm_eval_keys_stand_beside_ours_without_paths_sources_and_texts(tmp_path):
    made = result(2)
    content = json.loads(write(tmp_path, made, LM_EVAL).results.read_text())
    assert set(content) == set(LM_EVAL) - {"samples"} | {"trl_ext"}
    assert content["results"]["aime_synth"] == {"alias": "aime_synth", "avg@k,all": 0.558, "avg@k_stderr,all": None}
    assert content["configs"]["aime_synth"] == {
        "task": "aime_synth",
        "config_source": "…/aime_synth.yaml",
        "fewshot_config": {"sampler": "first_n"},
    }
    assert content["config"]["model_args"] == "pretrained=…/qwen,token=<token>"
    assert content["n-samples"] == LM_EVAL["n-samples"] and content["date"] == 1763700000.5
    assert content["trl_ext"] == json.loads(json.dumps(made.as_json()))


def test_no_machine_path_and_no_token_in_any_file(tmp_path):
    here = str(Path.cwd())
    made = result(2)
    subjects = (made.subjects[0], replace(made.subjects[1], adapter=f"{here}/outputs/dapo-r16"))
    made = replace(
        made,
        subjects=subjects,
        environment={
            "command": f"python {here}/x.py",
            "env": {"HF_TOKEN": "hf_AbCdEfGh1234"},
            "home": str(Path.home()),
        },
        notes=(f"data from {tmp_path}/data",),
        skipped=(replace(made.skipped[0], reason=f"no such folder: {Path.home()}/gpqa"),),
    )
    for path in write(tmp_path, made, LM_EVAL):
        text = path.read_text(encoding="utf-8")
        for secret in (here, str(Path.home()) + "/", str(tmp_path), "/home/jo", "hf_AbCd"):
            assert secret not in text, (path.name, secret)
    assert load(tmp_path) == publishable(made)


def test_texts_of_gated_tasks_are_in_no_file(tmp_path):
    made = result(2)
    gated = made.tasks[2]
    secret = "A particle of mass m decays, and the question goes on."
    carried = tuple(
        replace(q, prompt=secret, gold="gold letter with its text", replies=(secret, secret)) for q in gated.questions
    )
    made = replace(made, tasks=(*made.tasks[:2], replace(gated, questions=carried)), guard=f"see: {secret}")
    lm_eval = {"configs": {"gpqa_diamond": {"description": f"Like this: {secret}"}}}
    for path in write(tmp_path, made, lm_eval):
        text = path.read_text(encoding="utf-8")
        assert "particle" not in text and "gold letter with" not in text, path.name
    assert load(tmp_path).tasks[2].questions[0].prompt is None


def test_a_failure_leaves_the_old_files_whole(tmp_path, monkeypatch):
    write(tmp_path, result(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"results.json", "report.html", "report.md"}
    bad = replace(result(2), environment={"x": math.inf})
    with pytest.raises(ValueError):
        write(tmp_path, bad)
    monkeypatch.setattr(files.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, result(2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "no key 'trl_ext'"),
        ("[1]", "no key 'trl_ext'"),
        ('{"trl_ext": 3}', "trl_ext: expected an object, found int"),
        ('{"trl_ext": {"subjects": []}}', "missing or unknown environment, guard"),
    ],
)
def test_load_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_load_names_the_place_of_a_wrong_value(tmp_path):
    path = write(tmp_path, result(2)).results
    content = json.loads(path.read_text())
    content["trl_ext"]["tasks"][1]["scores"][0]["lengths"][2] = "long"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"trl_ext.tasks\[1\].scores\[0\].lengths\[2\]: expected int, found str"):
        load(path)
