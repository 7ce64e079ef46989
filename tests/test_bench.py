"""The benches themselves: their arithmetic by hand, their probe, and each of them once with tiny sizes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import trl_ext
from tests.bench import claims, learning, learning_report, overhead, plots, readme, steps
from tests.bench.common import Interval, spread, t_interval, table
from tests.bench.flops import Passes, Shape, body_flops, floor_ratio, head_flops, step_flops
from tests.bench.learning_run import RunSettings, run
from tests.bench.probe import Lift, SpanProbe, lift
from tests.bench.steps import Bench, Variant, known
from tests.tiny import assert_equal, grpo_args, prompts, tiny_path, weights
from trl_ext.methods import METHODS
from trl_ext.methods.grpo.trace import ERROR, KEY
from trl_ext.plan import settings_of
from trl_ext.recipe import load_recipe

# 2 layers, hidden 2, one head of size 2, MLP 3, vocabulary 5; 2 rows of 1 + 3 tokens
HAND = Shape(2, 1, 3, hidden=2, layers=2, heads=1, kv_heads=1, head_dim=2, intermediate=3, vocab=5)


def test_flops_by_hand():
    """Per layer q, k, v, o of 4 weights each and 3 x 6 in the MLP: 34; two layers: 68."""
    assert HAND.body_weights == 68
    # 2 x 68 x 8 tokens = 1088; attention: 2 products x 2 x 4 x 4 x 2 features x 2 layers x 2 rows = 512
    assert body_flops(HAND, rows=2, length=4) == 1088 + 512
    assert head_flops(HAND, tokens=6) == 2 * 2 * 5 * 6
    # every token: 2 x 3 scored positions, 4 head passes, 3 body passes
    assert step_flops(HAND, Passes()) == 3 * 1600 + 4 * 120
    # LoRA with checkpointing on a GPU: body 1 + 1 + 1, head 2 + 1, completion tokens alone (6 of them)
    assert step_flops(HAND, Passes(frozen=True, checkpointing=True, every_token=False)) == 3 * 1600 + 3 * 120


def test_floor_by_hand():
    """One row of 2 + 3 tokens: 2 x 68 x 5 + 4 x 25 x 2 x 2 = 1080; 3 span tokens x 4 projections of 20."""
    assert floor_ratio(HAND, Passes(), teacher_rows=1, teacher_prompt=2, span_tokens=3) == 1 + (1080 + 240) / 5280
    assert floor_ratio(HAND, Passes(), 0, 2, 0) == 1.0


def test_interval_by_hand():
    """Values 1, 2, 3: mean 2, s 1, t(0.975, 2) = 4.303, half width 4.303 / sqrt 3."""
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    half = 4.303 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert found.sign == 0 and t_interval([5.0, 5.1, 5.2]).sign == 1 and t_interval([-5.0, -5.1]).sign == -1
    assert t_interval([0.5]) == Interval(0.5, None, None, 1) and t_interval([0.5]).sign == 0
    with pytest.raises(ValueError, match="finite"):
        t_interval([1.0, math.nan])


def test_interval_beyond_the_table():
    """40 values of +-1: s^2 = 40/39, t(0.975, 39) = 2.0227 (a table), half width t sqrt(40/39/40)."""
    found = t_interval([1.0, -1.0] * 20)
    assert found.high == pytest.approx(2.0227 / math.sqrt(39), rel=1e-4)


def test_spread_and_table():
    assert dataclasses.astuple(spread([4.0, 1.0, 3.0, 2.0, 5.0])) == (3.0, 2.0, 4.0)
    assert dataclasses.astuple(spread([2.0, 1.0])) == (1.5, 1.0, 2.0)
    assert table(("a", "b"), [("x", "1")]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_peak_memory_counts_what_lives_at_once():
    """Two tensors of 4 MB, the first one freed before a third of 2 MB: at most 8 MB at once."""

    def work() -> None:
        first, second = torch.ones(10**6), torch.ones(10**6)
        del first
        third = torch.ones(5 * 10**5)
        del second, third

    assert steps.peak_bytes(work) == pytest.approx(8e6, rel=0.01)


@pytest.fixture(scope="module")
def result():
    return overhead.run({"tiny": overhead.TINY}, {}, rounds=1)


def test_overhead_is_well_formed(result):
    rows = {row["label"]: row for row in result["shapes"][0]["variants"]}
    assert list(rows)[:3] == ["trl", "trl again", "no method"] and {"high_entropy", "trace, 100% of rows"} <= set(rows)
    assert all(row["seconds"]["median"] > 0 and row["peak_mib"] > 0 for row in rows.values())
    assert rows["trl"]["ratio"]["median"] == 1.0 and rows["no method"]["held_mib"] == 0
    json.dumps(result)
    assert all(label in overhead.markdown(result) for label in rows)


def test_fixed_rollout_routes_the_share_that_is_named(result):
    """8 rows of 32 tokens; a flagged row has its first line, 8 of 32 tokens, in the span."""
    tokens = {row["label"]: row["span_tokens"] for row in result["shapes"][0]["variants"]}
    assert tokens["trace, 0% of rows"] == tokens["trace, after its window"] == tokens["trl"] == 0
    assert (
        tokens["trace, 100% of rows"] == 4 * tokens["trace, 25% of rows"] == 8 * 7
    )  # the line break is in no segment
    floors = {row["label"]: row["floor"] for row in result["shapes"][0]["variants"]}
    assert floors["no method"] == 1.0 < floors["trace, 25% of rows"] < floors["trace, 100% of rows"]


TRACE = {"action": "both", "annotator": steps.FLAGGED, "clip_mode": "none", "top_k": None}


@pytest.mark.parametrize(("name", "options"), [("trace", TRACE), ("dgpo", {"tau": 0.05})])
def test_a_naive_version_is_the_same_loss(tmp_path, name, options):
    """It differs in cost alone: after `train`'s step and two more the weights agree."""
    model, found = steps.build_model(overhead.TINY), []
    with known(steps.NaiveTrace, steps.NaiveDgpo):
        for variant in (Variant(n, {n: options}) for n in (name, f"naive_{name}")):
            bench = Bench(variant, overhead.TINY, copy.deepcopy(model), str(tmp_path), learning_rate=1e-2)
            bench.step()
            bench.step()
            found.append(weights(bench.trainer))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-4)


def test_bench_methods_leave_the_table():
    before = dict(METHODS)
    with pytest.raises(RuntimeError), known(steps.NaiveTrace):
        raise RuntimeError
    assert before == METHODS


def test_lift_by_hand():
    """One row: two key tokens of which the teacher supports one, an error token, an outside token, a padded one."""
    before = torch.tensor([[-1.0, -1.0, -2.0, -1.0, 0.0]])
    after = torch.tensor([[-0.5, -1.2, -2.4, -1.1, 9.0]])
    teacher = torch.tensor([[-0.1, -3.0, -3.0, 0.0, 0.0]])
    kinds = torch.tensor([[KEY, KEY, ERROR, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    found = {name: pair.tolist() for name, pair in lift(before, after, teacher, kinds, mask).items()}
    assert found["key_lift"] == pytest.approx([0.3, 2]) and found["key_lift_supported"] == pytest.approx([0.5, 1])
    assert found["key_mass"] == pytest.approx([0.7, 2]) and found["error_lift"] == pytest.approx([-0.4, 1])
    assert found["error_lift_supported"] == [0, 0] and found["outside_mass"] == pytest.approx([0.1, 1])


def half_right(completions, **kwargs):
    return [float(i % 2) for i in range(len(completions))]


def train(folder, methods, learning_rate=1e-2):
    with known(SpanProbe):
        args = grpo_args(str(folder), max_steps=2, learning_rate=learning_rate)
        config = trl_ext.GRPOConfig(**args, methods=methods)
        trainer = trl_ext.GRPOTrainer(tiny_path(), half_right, config, prompts())
        probe = Lift(trainer)
        if methods:
            trainer.add_callback(probe)
        trainer.train()
    return trainer, probe


PROBE = {"span_probe": {"annotator": "tests.tiny.annotate_first", "action": "both", "coverage": 1.0}}


def test_probe_measures_and_changes_nothing(tmp_path):
    """With the probe the weights are plain GRPO's. A small step raises right rollouts above wrong ones."""
    plain, _ = train(tmp_path, None)
    probed, probe = train(tmp_path, PROBE)
    assert_equal(weights(plain), weights(probed))
    assert not probed.plan.in_loss and len(probe.steps) == 2
    _, small = train(tmp_path, PROBE, learning_rate=1e-4)
    assert small.steps[0]["key_lift"] > small.steps[0]["error_lift"]


def test_probe_sees_no_lift_without_an_update(tmp_path):
    _, probe = train(tmp_path, PROBE, learning_rate=0.0)
    assert all(value == 0 for step in probe.steps for value in step.values())


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Two seeds of plain GRPO and of TRACE on the random tiny model, run in this process."""
    folder, calls = tmp_path_factory.mktemp("learning"), []

    def go(settings: RunSettings):
        calls.append((settings.arm, settings.seed))
        return run(settings)

    overrides = ("--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "8")
    sizes = {"steps": 2, "eval_every": 1, "eval_rows": 4, "model": tiny_path(), "overrides": overrides, "probe": True}
    chosen = learning.arms(["trace"], False, {})
    first = learning.bench(chosen, 2, folder, 1, go, **sizes)
    again = learning.bench(chosen, 2, folder, 1, go, **sizes)
    return folder, calls, first, again


def test_learning_is_well_formed_and_resumes(learned):
    folder, calls, first, again = learned
    assert calls == [("grpo", 0), ("trace", 0), ("grpo", 1), ("trace", 1)], "finished runs are not repeated"
    assert first["tables"] == again["tables"] and first["verdict"] == again["verdict"]
    stored = json.loads((folder / "learning_trace.json").read_text())
    assert stored["about"]["arms"]["grpo"] == {} and set(stored["summary"]) == {"grpo", "trace"}
    one = json.loads(next((folder / "runs").glob("trace-seed0-*.json")).read_text())
    assert [e["step"] for e in one["held_out"]] == [0, 1, 2] and len(one["log"]["entropy"]) == len(one["lift"]) == 2
    assert "error_lift" in one["lift"][0]
    picture = (folder / stored["picture"]).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 200_000


def test_arms_take_their_settings_from_the_recipe():
    found = learning.arms(["trace", "trace+high_entropy"], True, {"high_entropy": {"quantile": 0.5}})
    assert list(found) == ["grpo", "trace", "trace, all tokens", "trace, random spans", "trace+high_entropy"]
    assert found["trace"]["trace"]["annotator"] == "sandbox" and found["trace, all tokens"]["trace"]["spans"] == "all"
    assert found["trace+high_entropy"]["high_entropy"] == {"quantile": 0.5}


def test_recipe_changes_are_what_the_methods_own_recipe_changes_beside_the_method():
    assert learning.recipe_changes(["trace"]) == ()
    changed = dict(zip(*[iter(learning.recipe_changes(["capo", "trace"]))] * 2, strict=True))
    assert changed["--learning_rate"] == "0.01" and "--methods" not in changed


def test_an_arm_of_rewards_changes_its_own_recipe_alone(tmp_path):
    chosen = learning.arms(["rl_struct", "trace"], True, {})
    assert list(chosen)[:4] == ["grpo", "rl_struct", "rl_struct, without struct", "rl_struct, without valid"]
    assert learning.recipe_changes(["rl_struct", "trace"]) == () == learning.own_changes("trace")
    asked = {}

    def go(settings):
        asked[settings.arm] = load_recipe(learning.RECIPE, settings.overrides)
        held = [e | {"step": i} for i, e in enumerate(_run(0.3)["held_out"])]
        return _run(0.3) | {"held_out": held, "seconds": 1.0, "cpu_seconds": 1.0}

    sizes = {"steps": 4, "eval_every": 2, "eval_rows": 40}
    learning.bench(chosen, 1, tmp_path, 1, go, overrides=("--learning_rate", "2e-3"), **sizes)
    assert {recipe.training_args.learning_rate for recipe in asked.values()} == {2e-3}
    assert asked["grpo"].reward_names == asked["trace"].reward_names == ["json_valid", "answer_correct"]
    weights = {arm: r.training_args.reward_weights for arm, r in asked.items() if arm.startswith("rl_struct")}
    assert weights == {
        "rl_struct": [1.0, 1.0, 0.5, 0.5, 0.1],
        "rl_struct, without struct": [1.0, 0.0, 0.5, 0.5, 0.1],
        "rl_struct, without valid": [0.0, 1.0, 0.5, 0.5, 0.1],
    }


def test_the_lead_of_syntax_over_content():
    """Means over 5 steps: valid 0.1, 0.3, 0.5, 0.7, 0.9, 0.9 ...; correct five steps later."""
    rise = [0.1] * 5 + [0.9] * 15
    late = [0.1] * 10 + [0.9] * 10
    log = {"rewards/rl_struct_valid/mean": rise, "rewards/rl_struct_correct/mean": late}
    lead = claims.CLAIMS["rl_struct"][0].metric.read
    assert lead({"log": log}) == 5
    assert lead({"log": log | {"rewards/rl_struct_valid/mean": [0.5] * 20}}) is None, "never rose"
    assert lead({"log": {}}) is None


def test_the_lead_of_syntax_on_held_out_problems():
    """Nine tenths of the way: validity at step 9 of 10, accuracy (0 to 0.4, aim 0.36) at 10 + 10 * 0.16 / 0.2 = 18."""
    points = [(0, 0.0, 0.0), (10, 1.0, 0.2), (20, 1.0, 0.4)]
    held = [{"step": step, "valid": valid, "accuracy": right} for step, valid, right in points]
    lead = claims.CLAIMS["rl_struct"][1].metric.read
    assert lead({"held_out": held}) == pytest.approx(9)
    assert lead({"held_out": [entry | {"valid": 0.5} for entry in held]}) is None, "never rose"


@pytest.mark.parametrize(
    ("expected", "low", "high", "level", "words"),
    [
        ("above", 0.1, 0.3, 0.0, "confirmed"),
        ("above", -0.1, 0.3, 0.0, "not seen"),
        ("above", -0.3, -0.1, 0.0, "contradicted"),
        ("below", -0.3, -0.1, 0.0, "confirmed"),
        ("below", 0.1, 0.3, 0.0, "contradicted"),
        ("above", 0.1, 0.3, 0.2, "not seen"),
        ("not below", -0.1, 0.3, 0.0, "no loss seen"),
        ("not below", -0.3, -0.1, 0.0, "contradicted"),
        ("above", None, None, 0.0, "one seed only"),
    ],
)
def test_outcome_of_a_claim(expected, low, high, level, words):
    assert claims.outcome(expected, low, high, level) == words


def test_a_claim_is_checked_against_grpo_a_control_or_a_number(monkeypatch):
    """Accuracy differences +10, +12, +11 points against grpo, 0 against the control."""
    chosen = [
        claims.Claim("learns more", learning_report.ACCURACY, "above"),
        claims.Claim("the control does worse", learning_report.ACCURACY, "above", "control"),
        claims.Claim("reaches a fifth", learning_report.ACCURACY, "above", 0.2),
        claims.Claim("an ablation that was not run", learning_report.ACCURACY, "above", "absent"),
    ]
    monkeypatch.setattr(claims, "CLAIMS", {"trace": chosen})
    base = {0: _run(0.20), 1: _run(0.20), 2: _run(0.20)}
    clear = {0: _run(0.30), 1: _run(0.32), 2: _run(0.31)}
    found = claims.check({"grpo": base, "trace": clear, "trace, control": clear}, "trace")
    assert [one["outcome"] for one in found] == ["confirmed", "not seen", "confirmed"]
    assert found[0]["found"] == "+11.0 [8.5, 13.5] points" and found[2]["found"] == "31.0 [28.5, 33.5] points"


def _run(accuracy: float, entropy: float = 0.3) -> dict:
    held = [{"accuracy": 0.1, "valid": 0.5, "length": 20.0}, {"accuracy": accuracy, "valid": 0.9, "length": 20.0}]
    return {"held_out": held, "log": {"entropy": [entropy]}, "lift": []}


def test_verdict_says_what_the_interval_allows():
    """Differences +10, +12, +11 points: mean 11, s 1, half width 4.303 / sqrt 3 = 2.48. Then differences around 0."""
    base = {0: _run(0.20), 1: _run(0.20), 2: _run(0.20)}
    clear = {0: _run(0.30), 1: _run(0.32), 2: _run(0.31)}
    unclear = {0: _run(0.18), 1: _run(0.22), 2: _run(0.21)}
    lines = learning_report.verdict({"grpo": base, "trace": clear})
    assert lines[0] == (
        "trace ends 11.0 [8.5, 13.5] points above grpo in held-out accuracy (95% interval over 3 seeds)."
    )
    assert "no difference could be told" in learning_report.verdict({"grpo": base, "trace": unclear})[0]
    below = learning_report.verdict({"grpo": clear, "trace": base})[0]
    assert below.startswith("trace ends 11.0 [8.5, 13.5] points below grpo")
    assert "one seed, so no interval" in learning_report.verdict({"grpo": {0: _run(0.2)}, "trace": {0: _run(0.3)}})[0]


def test_running_mean_and_band():
    curve = plots.running_mean([(1, 2.0), (2, 4.0), (3, 9.0)], width=2)
    assert curve == [(1, 2.0), (2, 3.0), (3, 6.5)]
    assert plots.band([[(1, 1.0), (2, 3.0)], [(2, 3.0)]]) == ([2], [3.0], [3.0], [3.0])


def test_generated_readme(tmp_path):
    """Parts are filled in, a second run changes nothing, `--check` notices a stale one, a lost marker is an error."""
    path, folder, papers = tmp_path / "README.md", tmp_path / "results", tmp_path / "papers.md"
    with pytest.raises(SystemExit, match="does not exist yet"):
        readme.main([], path, folder, papers, {})
    path.write_text("# T\n<!-- methods -->\nold\n<!-- /methods -->\n<!-- bench:overhead --><!-- /bench:overhead -->\n")
    with pytest.raises(SystemExit, match="make docs"):
        readme.main(["--check"], path, folder, papers, {})
    readme.main([], path, folder, papers, {})
    readme.main(["--check"], path, folder, papers, {})
    text = path.read_text()
    assert "old" not in text and "arxiv.org/abs/2605.10194" in text and "make bench-overhead" in text
    assert (
        "[`trace`](trl_ext/methods/README.md#trace)" in text
        and "rollout data, teacher, token weights, added loss" in text
    )
    path.write_text("<!-- methods -->\n")
    with pytest.raises(ValueError, match="has no <!-- /methods -->"):
        readme.main([], path, folder, papers, {})


def test_newer_rows_take_the_place_of_stored_ones():
    stored = [{"label": "trl", "ratio": 1}, {"label": "a", "ratio": 2}]
    found = overhead.merged(stored, [{"label": "a", "ratio": 3}, {"label": "b", "ratio": 4}])
    assert [(row["label"], row["ratio"]) for row in found] == [("trl", 1), ("a", 3), ("b", 4)]


def test_every_default_says_where_it_comes_from():
    assert readme.kind_of("card: paper, table 3") == "paper" and readme.kind_of("card: official code") == "code"
    assert readme.kind_of("card: a choice, not seen in the paper") == readme.kind_of("ours") == "decided"
    assert readme.kind_of("card: paper (released code 0.8)") == "paper"
    with pytest.raises(ValueError, match="must say whether"):
        readme.kind_of("card")
    for cls in METHODS.values():
        counts = [int(n) for n in readme.provenance(cls).split(" / ")]
        assert sum(counts) == len(settings_of(cls)) > 0


def test_learning_part_of_the_readme(learned):
    text = readme.parts(learned[0])["bench:learning"]
    assert "[picture](tests/bench/results/learning_trace.png)" in text and "held-out accuracy" in text
    assert "| `trace` |" in text and "2 seeds, 2 steps" in text


def test_readme_is_current():
    assert readme.main(["--check"]) is None


def test_gpu_bench_says_what_it_needs():
    from tests.bench import gpu

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.main([])


def test_device_script_pins_every_wheel():
    """Each package that `device.sh` collects has its version in constraints.txt."""
    script = (Path(readme.ROOT) / "tests" / "bench" / "device.sh").read_text()
    names = script.split("names=(")[1].split(")")[0].split()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (readme.ROOT / "constraints.txt").open()}
    assert "trl" in names and not [name for name in names if name.lower().replace("_", "-") not in pinned]
