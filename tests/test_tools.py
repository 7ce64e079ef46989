"""Tools in a recipe: names become functions that TRL's tool loop calls."""

from __future__ import annotations

import pytest

from trl_ext.recipe import RecipeError, load_recipe
from trl_ext.sandbox.calculator import calculator
from trl_ext.tools import load_tools


def undescribed(x):
    return x


def test_names_become_functions():
    assert load_tools(None) == [] and load_tools("calculator") == [calculator]
    assert load_tools(["calculator", "trl_ext.sandbox.calculator.calculator"]) == [calculator, calculator]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("calculater", "did you mean 'calculator'"),
        ("no_such_module.tool", "cannot import"),
        ("tests.test_tools.undescribed", "cannot be described to the model"),
    ],
)
def test_what_is_no_tool_is_refused_with_words(spec, words):
    with pytest.raises(ValueError, match=words):
        load_tools(spec)


def test_a_recipe_names_its_tools():
    recipe = load_recipe("sandbox_grpo", ["--tools", "calculator", "--dataset_name", "sandbox/tool"])
    assert recipe.tools == (calculator,) and recipe.resolved()["tools"] == "calculator"
    with pytest.raises(RecipeError, match="tools: unknown tool 'abacus'"):
        load_recipe("sandbox_grpo", ["--tools", "abacus"])
