"""Estimators beside the core in `evals.stats`: ratios, curves over k, many comparisons, planning, judges."""
