"""What the harness gives back, and what it leaves alone."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from gam_flax.parity import ParityReport, assert_parity, compare
from tests.parity.networks import X, linen_net, nnx_net, pictures, stages, torch_net

STAGES = [
    *("parameters", "forward", "output", "single-step"),
    *("loss", "input gradient", "gradients"),
]


def test_assert_parity_shows_the_first_divergence():
    model = torch_net()
    with pytest.raises(AssertionError) as raised:
        assert_parity(model, nnx_net(model, padding="SAME"), pictures(side=8), gradients=False)
    lines = str(raised.value).splitlines()
    assert lines[0] == "no parity: 6 of 24 rows diverge (float64, eval), first forward conv1"
    assert lines[1].split()[:2] == ["stage", "path"]
    pointed = [line for line in lines if line.startswith(">")]
    assert len(pointed) == 1 and pointed[0].split()[1:3] == ["forward", "conv1"]
    assert "without a partner: torch buffer norm.num_batches_tracked" in lines[-1]


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), "SAME", "VALID"], ids=str)
def test_json_round_trip(padding):
    model = torch_net()
    report = compare(model, nnx_net(model, padding=padding), pictures(side=8), train=True)
    content = json.loads(report.to_json())
    assert ParityReport.from_json(report.to_json()) == report
    assert content["ok"] == report.ok and len(content["rows"]) == len(report.rows)
    assert report.rows[content["first_divergence"]] == report.first_divergence


def test_markdown_and_rich():
    from rich.console import Console

    model = torch_net()
    report = compare(model, nnx_net(model, padding="SAME"), pictures(side=8))
    lines = report.to_markdown().splitlines()
    assert lines[0] == f"{report.headline}."
    assert lines[2] == ("| stage | path | shape | max error | rms error | torch | Flax | verdict |")
    assert lines[4] == "| parameters | conv1.weight | 3×3×3×8 | 0 | 0 | 0 | 0 | ok |"
    bold = [line for line in lines if "**" in line]
    assert len(bold) == 1 and bold[0].startswith("| **forward** | **conv1** | **2×4×4×8** |")
    assert lines[-1].startswith("Without a partner: torch buffer norm.num_batches_tracked, torch")
    assert lines[-3].startswith("- Flax's numbers are torch's with this change: padding 'SAME'")
    assert len(lines) == 4 + len(report.rows) + 6
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert report.headline in text and "conv1.weight" in text and "torch layer relu" in text


# What it leaves alone


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_models_and_switches_are_as_before(train, mode):
    model = torch_net().train(mode)
    model.conv1.weight.requires_grad_(False)
    twin = nnx_net(model)
    twin.train() if mode else twin.eval()
    linen_twin = linen_net(model)
    x = X.copy()

    def everything() -> Any:
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        return (
            [(key, tensor.tolist()) for key, tensor in state.items()],
            [p.requires_grad for p in model.parameters()],
            [p.grad for p in model.parameters()],
            [module.training for module in model.modules()],
            [len(module._forward_hooks) for module in model.modules()],
            [(type(m), vars(m).get("use_running_average")) for _, m in nnx.iter_modules(twin)],
            jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(twin))),
            jax.tree.map(np.asarray, linen_twin[1]),
            jax.config.jax_enable_x64,
            jax.config.jax_default_matmul_precision,
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
            x.tolist(),
        )

    before = everything()
    compare(model, twin, x, train=train)
    compare(model, linen_twin, x, train=train, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, everything(), before)


def test_it_works_where_gradients_and_x64_are_switched():
    model = torch_net()
    twin = nnx_net(model)
    with torch.no_grad(), jax.enable_x64(True):
        assert compare(model, twin, X).ok and compare(model, twin, X, dtype="float32").ok
        assert jax.config.jax_enable_x64 and not torch.is_grad_enabled()


def test_gradients_can_be_left_out():
    model = torch_net()
    assert stages(compare(model, nnx_net(model), X, gradients=False)) == STAGES[:4]


def test_importing_parity_loads_no_framework():
    code = (
        "import sys, gam_flax.parity, gam_flax.parity.comparison; "
        "print({'torch', 'jax', 'flax', 'rich'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
