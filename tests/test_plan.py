"""From text to a plan: every problem at once, each with a way out. Also common properties of all methods."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import trl

import trl_ext
from tests.tiny import grpo_args
from trl_ext import compat, plan
from trl_ext.method import NEEDS, Method, Setup, overrides, param
from trl_ext.methods import METHODS
from trl_ext.plan import PlanError, make_plan, normalise, settings_of


@pytest.mark.parametrize(
    "spec, expected",
    [
        (None, {}),
        ("trace", {"trace": {}}),
        (["trace", "high_entropy"], {"trace": {}, "high_entropy": {}}),
        ({"trace": None}, {"trace": {}}),
        ('{"trace": {"weight": 1}}', {"trace": {"weight": 1}}),
        ('["trace"]', {"trace": {}}),
    ],
)
def test_ways_to_write_methods(spec, expected):
    assert normalise(spec) == expected


@pytest.mark.parametrize("spec", [3, {"trace": 3}, [{"trace": {}}], "{broken", {"trace": [1]}])
def test_other_shapes_are_refused(spec):
    with pytest.raises(PlanError, match="methods"):
        normalise(spec)


def test_all_problems_at_once():
    spec = {"tracee": {}, "trace": {"weigth": 1, "coverage": 2, "action": "fkl"}, "high_entropy": {"quantile": "x"}}
    with pytest.raises(PlanError) as error:
        make_plan(spec)
    assert len(error.value.problems) == 5
    text = str(error.value)
    for words in (
        "did you mean 'trace'",
        "did you mean 'weight'",
        "must be <= 1",
        "'fkl' is not one of",
        "expected float",
    ):
        assert words in text


def test_order_is_the_recipes():
    assert [m.name for m in make_plan({"trace": {}, "high_entropy": {}}).methods] == ["trace", "high_entropy"]
    assert [m.name for m in make_plan({"high_entropy": {}, "trace": {}}).methods] == ["high_entropy", "trace"]


def test_the_wrong_trainer_is_named():
    with pytest.raises(PlanError, match="runs in the grpo trainer, this is dpo"):
        make_plan("trace", trainer="dpo")


def test_conflicts_show_their_reason(monkeypatch):
    @dataclass(frozen=True)
    class Enemy(Method):
        name = "enemy"
        title = paper = "none"
        conflicts = {"trace": "both want the moon; set trace.weight: 0"}

    monkeypatch.setitem(METHODS, "enemy", Enemy)
    with pytest.raises(PlanError, match="trace and enemy do not go together: both want the moon"):
        make_plan(["trace", "enemy"])


def test_unknown_need_is_refused(monkeypatch):
    @dataclass(frozen=True)
    class Greedy(Method):
        name = "greedy"
        title = paper = "none"

        def needs(self):
            return frozenset({"oracle"})

    monkeypatch.setitem(METHODS, "greedy", Greedy)
    with pytest.raises(PlanError, match="no trainer provides \\['oracle'\\]"):
        make_plan("greedy")


@dataclass(frozen=True)
class Typed(Method):
    name = "typed"
    title = paper = "none"
    number: float = param(1.0, "a number", source="test", gt=0, lt=10)
    count: int = param(1, "an integer", source="test", ge=0)
    flag: bool = param(False, "a switch", source="test")
    word: str = param("a", "a word", source="test")
    maybe: float | None = param(None, "may be absent", source="test", ge=1)
    either: str | dict = param("x", "text or mapping", source="test")
    items: list = param([1], "a list", source="test")


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"number": "2e-3"}, 0.002),
        ({"number": 3}, 3.0),
        ({"count": "4"}, 4),
        ({"count": 4.0}, 4),
        ({"flag": "True"}, True),
        ({"word": 5}, "5"),
        ({"maybe": "none"}, None),
        ({"maybe": None}, None),
        ({"maybe": "2"}, 2.0),
        ({"either": {"a": 1}}, {"a": 1}),
        ({"items": [2]}, [2]),
    ],
)
def test_values_are_cast_to_the_field(monkeypatch, settings, expected):
    monkeypatch.setitem(METHODS, "typed", Typed)
    (method,) = make_plan({"typed": settings}).methods
    value = getattr(method, next(iter(settings)))
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"number": True},
        {"number": "nan"},
        {"number": 0},
        {"number": 10},
        {"number": None},
        {"number": "abc"},
        {"count": 1.5},
        {"count": "inf"},
        {"count": -1},
        {"flag": 2},
        {"flag": None},
        {"word": [1]},
        {"maybe": 0.5},
        {"either": [1]},
        {"items": "abc"},
        {"state": {}},
    ],
)
def test_values_that_do_not_fit(monkeypatch, settings):
    monkeypatch.setitem(METHODS, "typed", Typed)
    with pytest.raises(PlanError, match=f"typed: .*{next(iter(settings))}"):
        make_plan({"typed": settings})


def test_defaults_are_not_shared():
    assert Typed().items is not Typed().items
    assert Typed().state is not Typed().state


def test_plan_describes_stages_in_order():
    rows = make_plan({"high_entropy": {}, "trace": {}}).describe()
    assert ("token weights", "high_entropy, trace") in rows and ("added loss", "trace") in rows
    order = list(plan.STAGES)
    assert [order.index(stage) for stage, _ in rows] == sorted(order.index(stage) for stage, _ in rows)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"loss_type": "dpao"}, "loss_type: 'dpao' is not one of"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level"),
        ({"scale_rewards": "all"}, "scale_rewards"),
    ],
)
def test_names_that_trl_checks_late_are_checked_at_construction(tmp_path, settings, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **settings))


def test_config_survives_json(tmp_path):
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods='{"trace": {"weight": "0.2"}}')
    assert args.methods == {"trace": {"weight": "0.2"}}
    assert trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods=args.to_dict()["methods"]).methods == args.methods


# Every method, by common properties


WITHOUT_DEFAULT = {"fgrpo", "nesterov"}  # constraints, and the policy of the round before, are the user's


@pytest.mark.parametrize("cls", METHODS.values(), ids=str)
def test_every_method_is_well_formed(cls):
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert METHODS[cls.name] is cls and cls.title and cls.paper.count(".") == 1
    assert cls.__doc__ and "Card:" in (__import__(cls.__module__, fromlist=["x"]).__doc__ or "")
    method = cls()
    assert method.needs() <= NEEDS and method.cost()
    assert method.check(Setup(None)) == [] or cls.name in WITHOUT_DEFAULT
    for name, field in settings_of(cls).items():
        assert field.metadata["doc"] and field.metadata["source"], f"{name} has no documentation or source"
    assert make_plan({cls.name: {n: getattr(method, n) for n in settings_of(cls)}}, cls.trainer).methods == (method,)


@pytest.mark.parametrize("cls", METHODS.values(), ids=str)
def test_every_number_has_bounds_that_hold(cls):
    for name, field in settings_of(cls).items():
        rules = {k: v for k, v in field.metadata.items() if k in ("ge", "gt", "le", "lt") and v is not None}
        for rule, bound in rules.items():
            outside = {
                "ge": math.nextafter(bound, -math.inf),
                "gt": bound,
                "le": math.nextafter(bound, math.inf),
                "lt": bound,
            }
            with pytest.raises(PlanError, match=name):
                make_plan({cls.name: {name: outside[rule]}}, cls.trainer)


PAIR_HOOKS = {"reference_logps", "pair_loss", "pair_aux_loss", "observe_pairs"}
LABEL_HOOKS = {"start_labels", "label_loss", "observe_labels"}


@pytest.mark.parametrize("cls", METHODS.values(), ids=str)
def test_no_method_changes_a_hook_that_its_trainer_never_calls(cls):
    changed = {hook for hooks in plan.STAGES.values() for hook in hooks if overrides(cls(), hook)}
    own = PAIR_HOOKS if cls.trainer == "dpo" else set()
    own = own | LABEL_HOOKS if "kto" in (cls.trainer, *cls.also_in) else own
    assert changed and (changed <= own if own else not changed & (PAIR_HOOKS | LABEL_HOOKS))


def test_every_hook_has_a_stage():
    """A hook that no stage lists would be missing from the plan that people read."""
    listed = {hook for hooks in plan.STAGES.values() for hook in hooks}
    declared = {"needs", "check", "cost", "summary", "pair_columns", "frozen_models"}
    declared |= {"state_problem", "start_training", "sentence_encoders"}
    assert {n for n, v in vars(Method).items() if callable(v) and not n.startswith("_")} == listed | declared


def test_trls_own_parser_takes_methods(tmp_path):
    """From YAML as a mapping, from the command line as JSON."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("output_dir: x\nuse_cpu: true\nbf16: false\nmethods:\n  trace: {weight: 2e-1}\n")
    (from_yaml,) = trl.TrlParser(trl_ext.GRPOConfig).parse_args_and_config(["--config", str(recipe)])
    words = ["--output_dir", "x", "--use_cpu", "--bf16", "false", "--methods", '{"trace": {"weight": 0.2}}']
    (from_words,) = trl.TrlParser(trl_ext.GRPOConfig).parse_args_and_config(words)
    assert make_plan(from_yaml.methods) == make_plan(from_words.methods)
    assert make_plan(from_yaml.methods).methods[0].weight == 0.2


# The seams of TRL


def test_the_installed_trl_has_our_seams():
    compat.check_trl()
    assert trl.__version__.startswith(compat.SUPPORTED)


def test_another_trl_is_refused_with_the_version_to_install(monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, inputs, extra: None)
    with pytest.raises(ImportError, match=r"_compute_loss.*pip install 'trl~=1.16.0'"):
        compat.check_trl()


def test_image_arguments_follow_trls_signature():
    assert {"pixel_values", "image_grid_thw", "num_images", "image_position_ids"} <= set(compat.multimodal_names())
    assert "compute_entropy" not in compat.multimodal_names()
