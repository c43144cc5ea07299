"""What the maps say is what the blocks did."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gam_flax
from gam_flax.maps import attention_maps

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32))


def network(attention, **options):
    """Three blocks of two sizes, in training mode, of weights as torch draws them."""
    model = gam_flax.create_model(
        "resnet8",
        layers=(1, 2),
        widths=(8, 8),
        attention=attention,
        attention_options={"ratio": 2},
        num_classes=3,
        rngs=nnx.Rngs(0),
        **options,
    )
    gam_flax.torch_default_init(model, jax.random.key(0))
    return model


def evaluated(model, x=X):
    copy = nnx.clone(model)
    copy.eval()
    return copy(x)


@pytest.mark.parametrize("attention", ["gam", "cbam", "se", "bam"])
def test_before_and_the_gates_make_after(attention):
    model = network(attention)
    output, maps = attention_maps(model, X, blocks="all")
    np.testing.assert_allclose(output, evaluated(model), rtol=1e-5, atol=1e-6)
    assert [m.path for m in maps] == [f"layer{n}.attention" for n in ("1.0", "2.0", "2.1")]
    for found in maps:
        spatial = 1 if found.spatial is None else found.spatial
        factor = 1 + found.channel if found.joint else found.channel * spatial
        assert np.abs(found.after - found.before).max() > 1e-2
        np.testing.assert_allclose(found.after, found.before * factor, rtol=1e-5, atol=1e-6)


def test_the_model_stays_as_it_is():
    model = network("gam")
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    attention_maps(model, X)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    assert not model.layer1[0].bn1.use_running_average  # still in training


def test_the_last_block_of_each_size():
    _, maps = attention_maps(network("se"), X)
    assert [m.path for m in maps] == ["layer1.0.attention", "layer2.1.attention"]
    assert [m.before.shape[1] for m in maps] == [12, 6]


def test_blocks_by_their_paths():
    _, maps = attention_maps(network("se"), X, blocks=["layer2.0.attention"])
    assert [m.path for m in maps] == ["layer2.0.attention"]
    with pytest.raises(ValueError, match="no attention block at 'layer9'; there are layer1.0.att"):
        attention_maps(network("se"), X, blocks=["layer9"])


def test_no_attention_is_said():
    with pytest.raises(ValueError, match="no GAM, CBAM, SE or BAM in ResNet"):
        attention_maps(network(None), X)


def test_a_block_by_itself():
    block = gam_flax.GAM(3, ratio=1, kernel_size=3, rngs=nnx.Rngs(0))
    _, (found,) = attention_maps(block, X)
    assert found.path == ""
    np.testing.assert_array_equal(found.before, X)


@pytest.mark.parametrize("change", ["remat", "optimized"])
def test_the_same_gates(change):
    """Where blocks are computed again in training, and after norms were folded."""
    model = network("gam")
    changed = network("gam", remat=True)
    if change == "optimized":
        changed = gam_flax.optimize_for_inference(model, X.shape)
    _, expected = attention_maps(model, X)
    _, maps = attention_maps(changed, X)
    for one, other in zip(maps, expected, strict=True):
        np.testing.assert_allclose(one.spatial, other.spatial, atol=1e-5)


class Twice(nnx.Module):
    """A user's own network: a list of blocks, one of them called twice, one never."""

    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([gam_flax.CBAM(3, ratio=1, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return self.blocks[1](self.blocks[1](x))


def test_a_block_called_twice_is_there_twice():
    _, maps = attention_maps(Twice(nnx.Rngs(0)), X, blocks="all")
    assert [m.path for m in maps] == ["blocks.1", "blocks.1"]
    np.testing.assert_array_equal(maps[0].after, maps[1].before)
