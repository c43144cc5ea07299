"""One battery over every block, in PyTorch, NNX and Linen."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

from gam_flax.attention import variants
from gam_flax.convert.leaves import to_torch_layout
from tests.frameworks import TorchBlock

VARIANTS = {
    "GAM": variants.GAM_VARIANTS,
    "CBAM": variants.CBAM_VARIANTS,
    "SqueezeExcitation": variants.SE_VARIANTS,
    "BAM": variants.BAM_VARIANTS,
}
REGISTRY = {"gam": "GAM", "cbam": "CBAM", "se": "SqueezeExcitation", "bam": "BAM"}
NORMS = ["GAM", "CBAM", "BAM"]  # the blocks that remember statistics

BLOCKS = [(name, variant) for name, table in VARIANTS.items() for variant in table]
BLOCKS += [("ChannelAttention", None), ("SpatialAttention", None)]

every_block = pytest.mark.parametrize("name", VARIANTS)


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# Shapes and statistics


@pytest.mark.parametrize("name, variant", BLOCKS)
@pytest.mark.parametrize("size", [(0, 3, 2), (1, 1, 1), (3, 8, 5)], ids=str)
def test_output_has_the_shape_of_the_input(make, name, variant, size):
    x = pictures(*size, 16)
    y = make(name, 16, variant)(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert np.isfinite(y).all()


@every_block
def test_evaluation_treats_every_picture_alone_and_changes_nothing(make, name):
    block, x = make(name, 16), pictures(3, 5, 4, 16)
    before = block.tensors()
    alone = np.concatenate([block(x[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(block(x), alone, rtol=1e-5, atol=1e-6)
    after = block.tensors()
    assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("batch", [0, 2])
def test_training_counts_batches_and_moves_statistics_unless_the_batch_is_empty(make, name, batch):
    block, x = make(name, 16), pictures(batch, 5, 4, 16)
    before = block.tensors()
    assert block(x, train=True).shape == x.shape
    after = block.tensors()
    statistics = [key for key in before if "running" in key]
    moved = [not np.array_equal(before[key], after[key]) for key in statistics]
    assert statistics and (all(moved) if batch else not any(moved))
    assert {int(after[k]) for k in before if k.endswith("num_batches_tracked")} == {1}


# Variants and the registry


@pytest.mark.parametrize(
    "name, variant, options",
    [(*block, {}) for block in BLOCKS]
    + [
        ("GAM", None, {"ratio": 2, "kernel_size": 3, "groups": 2, "use_bias": False}),
        ("CBAM", None, {"ratio": 2, "kernel_size": 3, "use_bias": False, "spatial_bias": True}),
        ("SqueezeExcitation", None, {"ratio": 2, "projection": "conv", "use_bias": True}),
        ("BAM", None, {"ratio": 2, "use_bias": False}),
    ],
)
def test_every_framework_has_the_same_tensors(make, name, variant, options):
    """Names are equal after the leaf table, shapes after its transposition."""
    pytest.importorskip("torch")
    twin = TorchBlock(name, 16, variant, **options).tensors()
    tensors = make(name, 16, variant, **options).tensors()
    if make.framework != "torch":
        tensors = {
            key: to_torch_layout("kernel" if value.ndim > 1 else "", value)
            for key, value in tensors.items()
        }
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in twin.items()}


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({}, {"ratio": 4, "groups": 4, "shuffle": "gate"}),
        ({"ratio": 8}, {"ratio": 8, "groups": 8}),  # as every rewrite has it: groups = rate
        ({"ratio": 8, "groups": 2}, {"ratio": 8, "groups": 2}),
        ({"groups": 1}, {"ratio": 4, "groups": 1, "shuffle": "gate"}),  # family C0
        ({"norm_eps": 1e-3, "use_bias": False}, {"norm_eps": 1e-3, "use_bias": False}),
    ],
    ids=str,
)
def test_overrides_of_the_grouped_family(make, overrides, expected):
    block = make("GAM", 64, "grouped", **overrides)
    assert {name: getattr(block.module, name) for name in expected} == expected
    hidden, groups = 64 // block.module.ratio, block.module.groups
    weights = [v for k, v in block.tensors().items() if k.endswith("conv1.weight")]
    assert weights[0].size == hidden * (64 // groups) * 49


@every_block
def test_overrides_win_over_the_variant(make, name):
    for variant, options in VARIANTS[name].items():
        for option in options:
            default = getattr(make(name, 16).module, option)
            assert getattr(make(name, 16, variant).module, option) == options[option]
            block = make(name, 16, variant, **{option: default})
            assert getattr(block.module, option) == default


def test_one_registry_contract(make):
    package = import_module(make.package)
    args, kwargs = make.arguments(16)
    assert package.list_attentions() == sorted(REGISTRY)
    for name, cls in REGISTRY.items():
        assert type(package.create_attention(name, *args, **kwargs)) is getattr(package, cls)
        for variant, options in VARIANTS[cls].items():
            options = {**options, "use_bias": True}
            block = package.create_attention(name, *args, variant=variant, use_bias=True, **kwargs)
            assert {key: getattr(block, key) for key in options} == options
    with pytest.raises(ValueError, match=r"\['bam', 'cbam', 'gam', 'se'\], got 'eca'"):
        package.create_attention("eca", *args, **kwargs)
    with pytest.raises(ValueError, match=r"'grouped'.* got 'G'"):
        package.create_attention("gam", *args, variant="G", **kwargs)
