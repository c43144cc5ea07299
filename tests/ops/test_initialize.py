"""torch's default initialisation, drawn in Flax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

import gam_flax
from gam_flax import torch_default_init
from gam_flax.convert.leaves import to_flax_layout
from gam_flax.ops import conv2d


def leaves(module: nnx.Module) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}


def linen_leaves(variables) -> dict[str, np.ndarray]:
    pairs = jax.tree.leaves_with_path(variables)
    return {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in pairs}


@pytest.mark.parametrize(
    "flax_layer, torch_layer",
    [
        (lambda r: nnx.Linear(64, 256, rngs=r), lambda nn: nn.Linear(64, 256)),
        (lambda r: conv2d(16, 64, 5, rngs=r), lambda nn: nn.Conv2d(16, 64, 5)),
        (  # where fan_in is of one group
            lambda r: conv2d(32, 128, 3, groups=4, rngs=r),
            lambda nn: nn.Conv2d(32, 128, 3, groups=4),
        ),
    ],
    ids=["linear", "conv", "grouped conv"],
)
def test_the_distribution_is_that_of_torch(flax_layer, torch_layer):
    torch.manual_seed(0)
    twin = torch_layer(torch.nn)
    layer = torch_default_init(flax_layer(nnx.Rngs(0)), jax.random.key(0))
    bound = (twin.weight[0].numel()) ** -0.5
    for ours, theirs in ((layer.kernel, twin.weight), (layer.bias, twin.bias)):
        ours, theirs = np.asarray(ours[...]), to_flax_layout("kernel", theirs.detach().numpy())
        assert ours.shape == theirs.shape and np.abs(ours).max() <= bound
        of, near = np.linspace(0, 1, 11), 6 / np.sqrt(ours.size)
        quantiles = [np.quantile(drawn / bound, of) for drawn in (ours, theirs, of * 2 * bound)]
        np.testing.assert_allclose(quantiles[0], quantiles[1], atol=near)
        np.testing.assert_allclose(quantiles[0], quantiles[2] - 1, atol=near)


@pytest.mark.parametrize("use_bias", [True, False])
def test_nnx_in_place_and_linen_by_value_draw_the_same(use_bias):
    module = gam_flax.CBAM(16, use_bias=use_bias, rngs=nnx.Rngs(0))
    linen = gam_flax.linen.CBAM(use_bias=use_bias)
    variables = linen.init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))
    before = linen_leaves(variables)

    assert torch_default_init(module, jax.random.key(1)) is module
    drawn = torch_default_init(variables, jax.random.key(1))

    assert linen_leaves(variables).keys() == before.keys()
    for path, value in linen_leaves(variables).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    inside = {path.partition(".")[2]: value for path, value in linen_leaves(drawn).items()}
    assert inside.keys() == leaves(module).keys()
    for path, value in leaves(module).items():
        np.testing.assert_array_equal(inside[path], value, err_msg=path)
    alone = torch_default_init(variables["params"], jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, alone, drawn["params"])


def test_draws_hang_on_the_key_and_the_path_alone():
    def block(key, channels=16, **options):
        return leaves(
            torch_default_init(
                gam_flax.GAM(channels, kernel_size=3, rngs=nnx.Rngs(5), **options),
                jax.random.key(key),
            )
        )

    first, again, other = block(0), block(0), block(1)
    for path, value in first.items():
        drawn = path.endswith(("kernel", "bias")) and "norm" not in path
        assert np.array_equal(value, again[path])
        assert np.array_equal(value, other[path]) is not drawn, path
    # no two tensors share their numbers, and none of them changes with what else there is
    heads = [v.ravel()[:4].tobytes() for k, v in first.items() if "norm" not in k]
    assert len(set(heads)) == len(heads)
    without = block(0, use_bias=False)
    assert all(np.array_equal(value, first[path]) for path, value in without.items())


def test_norms_are_left_alone():
    module = gam_flax.GAM(8, kernel_size=1, rngs=nnx.Rngs(0))
    module.spatial_attention.norm1.scale[...] = jnp.full(2, 7.0)
    module.spatial_attention.norm1.var[...] = jnp.full(2, 3.0)
    before = leaves(module)
    after = leaves(torch_default_init(module, jax.random.key(0)))
    assert all(np.array_equal(after[path], before[path]) for path in before if "norm" in path)
    assert not np.array_equal(
        after["spatial_attention.conv1.kernel"], before["spatial_attention.conv1.kernel"]
    )


def test_under_jit_and_in_the_type_of_the_parameters():
    layer = nn.Dense(4, param_dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    drawn = torch_default_init(variables, jax.random.key(0))
    compiled = jax.jit(torch_default_init)(variables, jax.random.key(0))
    assert drawn["params"]["kernel"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, compiled, drawn)
