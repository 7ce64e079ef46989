"""The bench of preference data: intervals, differences and claims by hand, and that its comparisons name real settings."""

from __future__ import annotations

import json
import random

import pytest

from tests.bench import forgetful, preference, readme
from tests.bench.dstc_model import is_right
from tests.bench.dual_play import pasodoble
from tests.bench.preference import BENCHES, Claim, judged, result, summary
from trl_ext.methods import METHODS
from trl_ext.sandbox import programs
from trl_ext.sandbox.tasks import problems

SEEDS = [{"bco": {"accuracy": 0.4, "valid": 0.8}, "bco, UDM": {"accuracy": 0.6, "valid": 0.8}}]
SEEDS += [{"bco": {"accuracy": 0.5}, "bco, UDM": {"accuracy": 0.6, "valid": 0.9}}]


def test_differences_are_paired_by_seed():
    found = summary(SEEDS)
    assert found["bco"]["accuracy"]["mean"]["mean"] == pytest.approx(0.45)
    assert found["bco, UDM"]["accuracy"]["difference"]["mean"] == pytest.approx(0.15)
    assert found["bco, UDM"]["accuracy"]["difference"]["low"] == pytest.approx(0.15 - 12.7062 * 0.05, abs=1e-4)
    assert found["bco, UDM"]["valid"]["difference"]["n"] == 1, "one seed alone has both"


def test_claims_are_judged_by_their_interval():
    found = summary(SEEDS)
    over = Claim("bco", "more", "bco, UDM", "accuracy")
    assert judged(over, found, "bco")["outcome"] == "not seen"
    assert judged(Claim("bco", "more", "bco, UDM", "accuracy", "above", 0.5), found, "bco")["outcome"] == "confirmed"
    assert (
        judged(Claim("bco", "less", "bco, UDM", "accuracy", "below", 0.5), found, "bco")["outcome"] == "contradicted"
    )
    assert judged(Claim("bco", "x", "bco, UDM", "length"), found, "bco")["outcome"] == "not measured"


def test_what_is_stored_reaches_the_readme(tmp_path):
    stored = result("bco_udm", SEEDS, {"steps": 1})
    preference.write_json(tmp_path / "preference_bco_udm.json", stored)
    text = readme.parts(tmp_path)["bench:preference"]
    assert "bco_udm: distribution matching helps" in text and "**not seen** (accuracy against bco: +0.150 [" in text
    assert any("distribution matching" in line for line in readme.evidence(tmp_path)["bco"])


def test_claims_name_methods_and_numbers():
    for bench in BENCHES.values():
        assert all(claim.method is None or claim.method in METHODS for claim in bench.claims)


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("def f(x):\n    return x * 3", True),
        ("def f(y):\n    return 3 * y", True),
        ("def f(x):\n    return x + 3", False),
        ("def f(x):\n    return x + x", False),
        ("def f(x):\n    return x // 3", False),
        ("def f(x):\n    return y * 3", False),
        ("def g(x):\n    return x * 3", False),
        ("def f(x):\n    return [x][0] * 3", False),
        ("def f(x):", False),
        (None, False),
    ],
)
def test_a_code_is_right_on_all_inputs_without_being_run(code, right):
    assert is_right(code, "*", 3) is right


def test_every_code_without_a_slip_is_right(monkeypatch):
    monkeypatch.setattr(programs, "WRONG_CODE", 0.0)
    assert all(is_right(programs.code(op, n, random.Random(0)), op, n) for _, op, n in programs.tasks())


def test_a_forgetful_reply_has_both_keys_or_one(monkeypatch):
    monkeypatch.setattr(forgetful, "MALFORMED", 0.0)
    rng, stream = random.Random(0), problems(random.Random(0), "train")
    kinds = {"steps answer": 0, "answer": 0, "steps": 0}
    for problem in (next(stream) for _ in range(300)):
        kinds[" ".join(json.loads(forgetful.reply(problem, rng)))] += 1
    assert min(kinds.values()) > 70


def test_dual_play_plays_and_compares_early_with_late():
    found = pasodoble(0, 2, 8)["online"]
    assert found["accuracy_gain"] == pytest.approx(found["accuracy"] - found["accuracy_before"])
    assert found["skipped_drop"] == pytest.approx(found["skipped_early"] - found["skipped_late"])
    assert 0 <= found["pass_rate_early"] <= 1 and 0 <= found["diversity_late"] <= 1
    names = {claim.number for claim in BENCHES["pasodoble"].claims}
    assert names <= set(found)
