"""Two runs that differ in anything but the model are refused, with all reasons at once."""

from __future__ import annotations

import pytest

from evals.compare import MUST_AGREE, Mismatch, check_comparable, require_comparable

RUN = {name: name for name in MUST_AGREE} | {
    "sampling": {"samples": 8, "temperature": 0.6, "max_new_tokens": 2048},
    "model": "m",
    "adapter": None,
    "key": "k",
}
PROMPTS = {f"q{i}": f"hash{i}" for i in range(6)}


def test_only_the_model_may_differ():
    other = RUN | {"model": "n", "adapter": "a", "key": "l"}
    assert check_comparable(RUN, other, PROMPTS, dict(PROMPTS)) == []
    assert require_comparable(RUN, other) == []


@pytest.mark.parametrize("name", MUST_AGREE)
def test_every_field_counts(name):
    assert check_comparable(RUN, RUN | {name: "other"}) == [f"{name}: {name} against other"]
    lacking = {key: value for key, value in RUN.items() if key != name}
    assert check_comparable(lacking, RUN) == [f"{name}: not recorded against {name}"]
    assert check_comparable(lacking, lacking) == []


@pytest.mark.parametrize(
    ("name", "value"), [("samples", 4), ("temperature", 0.7), ("max_new_tokens", 100), ("top_k", 20)]
)
def test_every_sampling_field_counts(name, value):
    other = RUN | {"sampling": RUN["sampling"] | {name: value}}
    before = RUN["sampling"].get(name, "not recorded")
    assert check_comparable(RUN, other) == [f"sampling.{name}: {before} against {value}"]


def test_items_and_prompts():
    other = {k: v for k, v in PROMPTS.items() if k != "q0"} | {"q9": "x", "q1": "changed"}
    assert check_comparable(RUN, RUN, PROMPTS, other) == [
        "item ids: only in the first run q0",
        "item ids: only in the second run q9",
        "prompt hashes: other prompts for q1",
    ]
    assert check_comparable(RUN, RUN, PROMPTS, {}) == ["item ids: only in the first run q0, q1, q2 and 3 more"]
    with pytest.raises(ValueError, match="one side only"):
        check_comparable(RUN, RUN, PROMPTS)


def test_refusal_lists_all_and_names_the_way_out():
    other = RUN | {"dtype": "float16", "quantization": "4-bit"}
    with pytest.raises(Mismatch) as refused:
        require_comparable(RUN, other)
    message = str(refused.value)
    assert "quantization: quantization against 4-bit" in message and "dtype: dtype against float16" in message
    assert "--allow-mismatch" in message
    assert require_comparable(RUN, other, allow_mismatch=True) == refused.value.mismatches
