"""Whole networks in training: forward, every gradient and every running statistic, to 1e-12."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import gam_flax
import gam_torch
from gam_flax.convert import load_torch
from gam_flax.parity import ParityReport, compare
from tests.attention.twins import randomize

SLIM = {"layers": (1, 2), "widths": (8, 16), "num_classes": 5}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar": ("resnet20", SLIM | {"stem": "cifar", "shortcut": "projection"}),
    "pad": ("resnet20", SLIM | {"stem": "cifar", "shortcut": "pad"}),
    "bottleneck": ("resnet50", SLIM | {"widths": (4, 8)}),
    "mobilenet": ("mobilenet_v2", {"width_mult": 0.1, "dropout": 0.0, "num_classes": 5}),
}
GROUPED = {"variant": "grouped", "ratio": 2, "groups": 2, "kernel_size": 3}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "gam": {"attention": "gam", "attention_options": {"ratio": 4, "kernel_size": 3}},
    "grouped": {"attention": "gam", "attention_options": GROUPED},
    "cbam": {"attention": "cbam", "attention_options": {"ratio": 4, "kernel_size": 3}},
    "se": {"attention": "se", "attention_options": {"ratio": 2}},
    "bam": {"attention": "bam", "attention_options": {"ratio": 4, "dilation": 2}},
}
SIDES = {"cifar": (10, 11), "pad": (10, 11), "bottleneck": (32, 33), "mobilenet": (64, 65)}
ALL = [
    (network, attention, at, odd)
    for network in NETWORKS
    for attention in ATTENTIONS
    for at in ("blocks", (2, 1))
    for odd in (False, True)
    if attention != "none" or at == "blocks"
]
QUICK = [
    ("cifar", "none", "blocks", True),
    ("cifar", "gam", "blocks", False),
    ("cifar", "cbam", (2, 1), True),
    ("pad", "none", "blocks", True),
    ("pad", "grouped", "blocks", True),
    ("pad", "bam", (2, 1), False),
    ("bottleneck", "none", "blocks", False),
    ("bottleneck", "cbam", "blocks", False),
    ("bottleneck", "se", "blocks", True),
    ("bottleneck", "gam", (2, 1), True),
    ("mobilenet", "grouped", (2, 1), True),
]
assert set(QUICK) <= set(ALL)


def marks(combination: tuple) -> list[Any]:
    return [] if combination in QUICK else [pytest.mark.slow]


PRODUCT = [pytest.param(*combination, marks=marks(combination)) for combination in ALL]


def twins(name: str, **options: Any) -> tuple[torch.nn.Module, nnx.Module]:
    """The same network twice, with no number left at its initial value.

    Small biases keep the pixels of a deep network apart, see `test_torchvision`.
    """
    theirs = gam_torch.create_model(name, **options)
    randomize(theirs)
    with torch.no_grad():
        for key, tensor in theirs.named_parameters():
            tensor.mul_(0.2 if key.endswith("bias") else 1)
    ours = nnx.eval_shape(lambda: gam_flax.create_model(name, rngs=nnx.Rngs(0), **options))
    load_torch(ours, theirs)
    return theirs, ours


def of_kind(network: str, attention: str = "none", at: Any = "blocks"):
    name, options = NETWORKS[network]
    return twins(name, **options, **ATTENTIONS[attention], attention_at=at)


def pictures(side: int, batch: int = 4) -> np.ndarray:
    return np.random.default_rng(side).normal(size=(batch, side, side, 3))


def first_wrong(report: ParityReport, stage: str = "forward") -> str | None:
    return next((r.path for r in report.rows if r.stage == stage and not r.ok), None)


@pytest.mark.parametrize("network, attention, at, odd", PRODUCT)
def test_training_is_the_same(network, attention, at, odd):
    theirs, ours = of_kind(network, attention, at)
    report = compare(theirs, ours, pictures(SIDES[network][odd]), train=True)
    assert report.ok, str(report)
    compared = {(row.stage, row.path) for row in report.rows}
    for key, _ in theirs.named_parameters():
        assert ("gradients", key) in compared
    for key, _ in theirs.named_buffers():
        assert ("running statistics", key) in compared
    assert ("input gradient", "") in compared
    noise = {row.path.rpartition(".")[2] for row in report.rows if row.verdict == "noise"}
    assert noise <= {"bias"}  # of a convolution before a norm, which takes it off again


def test_running_statistics_have_moved():
    """The comparison above is of statistics after a step, not of those that were loaded."""
    theirs, ours = of_kind("cifar")
    before = {key: value.clone() for key, value in theirs.named_buffers()}
    x = pictures(10).astype(np.float32)
    theirs.train()(torch.from_numpy(x).permute(0, 3, 1, 2))
    ours.train()
    ours(jnp.asarray(x))
    for key, value in theirs.named_buffers():
        assert not torch.equal(value, before[key]), key
    assert int(ours.bn1.num_batches_tracked[...]) == int(before["bn1.num_batches_tracked"]) + 1


# Seeded faults


def _same_padding(conv: nnx.Conv) -> nnx.Conv:
    """`conv` with Flax's default padding, which torch has not at stride 2."""
    features, size = (conv.in_features, conv.out_features), conv.kernel_size
    groups = {"feature_group_count": conv.feature_group_count}
    types = {"strides": 2, "padding": "SAME", "use_bias": False, "rngs": nnx.Rngs(0)}
    wrong = nnx.Conv(*features, size, **types, **groups)
    wrong.kernel[...] = conv.kernel[...]
    return wrong


def _same_in_resnet(model):
    model.layer2[0].conv1 = _same_padding(model.layer2[0].conv1)


def _same_in_mobilenet(model):
    layer = model.features[2].conv[1]
    setattr(layer, "0", _same_padding(layer[0]))


def _eps(model):
    model.layer1[0].bn2.eps = 1.001e-5


def _momentum(model):
    model.layer2[0].bn1.momentum = 0.9  # Flax's meaning of the word


def _swapped_norms(model):
    block = model.layer2[1]
    block.bn1, block.bn2 = block.bn2, block.bn1


def _gate_without_sigmoid(model):
    gam = model.layer2[0].attention
    gam.channel_attention.gate = "identity"


FAULTS = [
    ("cifar", "none", 10, _same_in_resnet, "forward", "layer2.0.conv1"),
    ("mobilenet", "none", 64, _same_in_mobilenet, "forward", "features.2.conv.1.0"),
    ("cifar", "none", 11, _eps, "forward", "layer1.0.bn2"),
    ("cifar", "none", 11, _momentum, "running statistics", "layer2.0.bn1.running_mean"),
    ("pad", "none", 11, _swapped_norms, "forward", "layer2.1.bn1"),
    ("cifar", "gam", 10, _gate_without_sigmoid, "forward", "layer2.0.attention.channel_attention"),
]


@pytest.mark.parametrize("network, attention, side, fault, stage, where", FAULTS)
def test_a_fault_is_seen_where_it_is(network, attention, side, fault, stage, where):
    theirs, ours = of_kind(network, attention)
    fault(ours)
    report = compare(theirs, ours, pictures(side), train=True, gradients=False)
    assert first_wrong(report, stage) == where
    if stage == "running statistics":
        assert first_wrong(report) is None


def test_swapped_blocks_are_seen():
    name, options = NETWORKS["pad"]
    theirs, ours = twins(name, **options | {"layers": (1, 3)})
    stage = ours.layer2
    first, second = stage[1], stage[2]
    setattr(stage, "1", second)
    setattr(stage, "2", first)
    report = compare(theirs, ours, pictures(10), train=True, gradients=False)
    assert first_wrong(report) == "layer2.1.conv1"


def test_same_padding_is_no_fault_at_an_odd_side():
    """There both pad alike: why even sides are compared, too."""
    theirs, ours = of_kind("cifar")
    _same_in_resnet(ours)
    assert compare(theirs, ours, pictures(11), gradients=False).ok
    assert not compare(theirs, ours, pictures(10), gradients=False).ok


# Narrow types


@pytest.mark.parametrize("network, attention", [("bottleneck", "cbam"), ("mobilenet", "gam")])
def test_bfloat16_computes_narrow_and_keeps_wide(network, attention):
    name, options = NETWORKS[network]
    options = options | ATTENTIONS[attention] | {"attention_at": (2, 1)}
    model = gam_flax.create_model(name, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, **options)
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def features(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)
        stages = model.stage_outputs(x)
        return stages, model(x), nnx.state(model, nnx.BatchStat)

    x = jnp.zeros((2, 64, 64, 3), jnp.float32)
    stages, y, statistics = nnx.eval_shape(features, params, rest, x)
    assert {leaf.dtype for leaf in [*stages, y]} == {jnp.dtype(jnp.bfloat16)}
    kept = nnx.to_flat_state(nnx.state(model, nnx.Param)), nnx.to_flat_state(statistics)
    for path, leaf in (item for state in kept for item in state):
        counts = path[-1] == "num_batches_tracked"
        assert leaf.dtype == (jnp.int32 if counts else jnp.float32), path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", NETWORKS)
def test_flax_errs_no_more_than_torch_in_narrow_types(network, dtype):
    theirs, ours = of_kind(network, "se")
    report = compare(theirs, ours, pictures(SIDES[network][0]), dtype=dtype, gradients=False)
    assert report.ok, str(report)
