"""The generated pages on recipes and engines: rows by hand, what is refused, nothing claimed that was not run."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tests.bench import engines, recipes
from trl_ext import memory
from trl_ext.method import HIDDEN, TEACHER, Attempt, Method, Revision
from trl_ext.methods import METHODS
from trl_ext.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"


def test_a_row_of_the_recipes_page() -> None:
    cells = dict(zip(recipes.COLUMNS, recipes.row(FOLDER / "fgrpo_qwen2.5_vl_3b.yaml"), strict=True))
    assert cells["paper"] == "[2604.08476](https://arxiv.org/abs/2604.08476)"
    assert (cells["trainer"], cells["model"]) == ("grpo", "`Qwen/Qwen2.5-VL-3B-Instruct`")
    assert cells["needs"] == "a GPU of 48 GB, images, an endpoint for a judge"
    total = memory.predict(load_recipe(str(FOLDER / "fgrpo_qwen2.5_vl_3b.yaml"), recipes.ON_CPU)).total
    assert cells["predicted, GiB"] == f"{total / 2**30:.1f}"


def test_what_recipes_need() -> None:
    def needs(name: str) -> list[str]:
        path = FOLDER / f"{name}.yaml"
        return list(recipes.needs(path, recipes.recipes_of(path)[0]))

    assert needs("safe_qwen2.5_3b") == ["a GPU of 48 GB", "the reward model `Skywork/Skywork-Reward-V2-Qwen3-4B`"]
    assert needs("trace_qwen3_1.7b") == ["a GPU of 24 GB"]  # its endpoint is a comment
    assert needs("otc_qwen2.5_3b") == ["a GPU of 48 GB", "tools: calculator"]
    assert needs("sandbox_trace") == ["a CPU"]


def test_every_real_recipe_fits_the_gpu_that_it_states() -> None:
    """With 2 GiB left for what is not counted."""
    real = [path for path in sorted(FOLDER.glob("*.yaml")) if not path.stem.startswith("sandbox")]
    assert len(real) > 20
    for path in real:
        gib = recipes.stated_gpu(path)
        assert gib is not None, f"{path.stem}: its head must say `One GPU with N GB`"
        for recipe in recipes.recipes_of(path):
            assert memory.predict(recipe).fits(gib - 2) == [], path.stem


class Heavy(Method):
    """Needs what sharded weights do not give, draws again, and sets its learning rate."""

    name: ClassVar[str] = "heavy"

    def needs(self) -> frozenset[str]:
        return frozenset({HIDDEN, TEACHER})

    def revise(self, attempt: Attempt) -> Revision | None:
        return None

    def learning_rate(self, lr: float, step: int) -> float:
        return lr / 2


def test_a_row_of_the_engines_page() -> None:
    recipe, reasons = load_recipe("sandbox_grpo"), {}
    cells = engines.row(Heavy, recipe, {"heavy"}, reasons)
    assert cells[1:4] == ["grpo", "ran", "equal"]
    assert cells[4:7] == ["refused (1)", "refused (2)", "refused (3)"]
    texts = list(reasons)
    assert "hidden, teacher is not tested under fsdp" in texts[0]
    assert texts[1].startswith("DeepSpeed makes its update") and "zero3" in texts[2] and "DeepSpeed" in texts[2]
    assert cells[7] == "not tested; asks for extra completions in a rollout"
    light = engines.row(METHODS["epo"], recipe, set(), reasons)
    assert light[3:] == ["not tested"] * 4 + ["not tested; asks for nothing more"]


def test_the_engines_page_claims_no_run_that_no_test_makes() -> None:
    text = engines.page(METHODS)
    compared = engines.split_cases()
    for name, cls in METHODS.items():
        (line,) = [x for x in text.splitlines() if x.startswith(f"| [`{name}`]")]
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert len(cells) == len(engines.COLUMNS)
        assert (cells[3] == "equal") == (cls.name in compared)
        assert all(cell == "not tested" or cell.startswith("refused (") for cell in cells[4:7])
