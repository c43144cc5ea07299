"""Honest twins of random networks are never flagged, in any dtype, in training and evaluation."""

from __future__ import annotations

import pytest

from gam_flax.parity import compare
from tests.parity.random_networks import draw_plan, honest_twins

COUNT = 200
IN_CI = 6
"""The others are slow: 200 networks in three dtypes take half an hour of one core."""

SEEDS = [
    pytest.param(seed, marks=[] if seed < IN_CI else pytest.mark.slow) for seed in range(COUNT)
]


@pytest.mark.parametrize("seed", SEEDS)
def test_an_honest_twin_is_never_flagged(seed):
    model, twin, x = honest_twins(seed)
    for dtype in ("float64", "float32", "bfloat16"):
        gradients = dtype != "bfloat16"  # as in the project's own tests, see docs/parity.md
        report = compare(model, twin, x, dtype=dtype, train=bool(seed % 2), gradients=gradients)
        assert report.ok, f"{dtype}: {report}"


def test_the_plans_hold_all_kinds():
    steps = [step for seed in range(COUNT) for step in draw_plan(seed)[0]]
    assert {step["kind"] for step in steps} == {
        *("conv", "norm", "act", "pool", "residual", "attention", "head")
    }
    assert any(step.get("groups", 1) > 1 for step in steps)
    assert any(step.get("depthwise") for step in steps)
