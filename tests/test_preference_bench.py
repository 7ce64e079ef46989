"""The bench of preference data: intervals, differences and claims by hand, and that its comparisons name real settings."""

from __future__ import annotations

import pytest

from tests.bench import preference, readme
from tests.bench.preference import BENCHES, Claim, judged, result, summary
from trl_ext.methods import METHODS

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
