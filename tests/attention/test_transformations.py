"""Every block under the transformations of jax, in its number types; NNX and Linen."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import gam_flax
from tests.frameworks import NNXBlock

SMALL = {"ratio": 4}  # of 8 channels

every_block = pytest.mark.parametrize("name", ["GAM", "CBAM", "SqueezeExcitation", "BAM"])
in_both = pytest.mark.parametrize("make", ["nnx", "linen"], indirect=True)


def pictures(*shape: int, dtype: type = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(dtype))


def close(a, b) -> None:
    """Equal but for float32 rounding, of the largest number in either tree."""
    scale = max((np.abs(leaf).max() for leaf in jax.tree.leaves(b)), default=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), a, b)


def nnx_block(name: str) -> nnx.Module:
    return NNXBlock(name, 8, **SMALL).module


def layer_of(stack, k: int):
    """Layer `k` of stacked ones."""
    return jax.tree.map(lambda leaf: leaf[k], stack)


@cache
def evaluation(name: str):
    return NNXBlock(name, 8, **SMALL).pure()


@every_block
@given(size=st.tuples(st.integers(0, 3), st.integers(1, 300), st.integers(1, 300)))
def test_any_height_and_width(name, size):
    apply, params, stats = evaluation(name)
    x = jax.ShapeDtypeStruct((*size, 8), jnp.float32)
    assert jax.eval_shape(apply, params, stats, x)[0].shape == x.shape


@in_both
@every_block
def test_jit_of_a_training_step(make, name):
    apply, params, stats = make(name, 8, **SMALL).pure(train=True)
    x = pictures(2, 5, 4, 8)
    close(jax.jit(apply)(params, stats, x), apply(params, stats, x))


@in_both
@every_block
def test_first_and_second_order_gradients(make, name):
    """Along one random direction of input and parameters, against central differences."""
    with jax.enable_x64(True):
        apply, params, stats = make(name, 8, param_dtype=jnp.float64, **SMALL).pure(train=True)
        at = (params, pictures(2, 3, 2, 8, dtype=np.float64))
        rng = np.random.default_rng(1)
        along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), at)

        def loss(t, s):
            params, x = jax.tree.map(lambda a, v: a + (t + s) * v, at, along)
            return jnp.sum(jnp.sin(apply(params, stats, x)[0]))

        def slope(t):
            """Reverse mode; its own derivative below is forward over reverse."""
            return jax.grad(loss, argnums=1)(t, 0.0)

        @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # runs thrice
        def values(t):
            return loss(t, 0.0), slope(t), jax.jacfwd(slope)(t)

        step = 1e-5
        before, here, after = values(-step), values(0.0), values(step)
        for order in (0, 1):
            expected = (after[order] - before[order]) / (2 * step)
            np.testing.assert_allclose(here[order + 1], expected, rtol=1e-5)


@in_both
@every_block
def test_vmap_over_one_more_axis(make, name):
    apply, params, stats = make(name, 8, **SMALL).pure()
    x = pictures(3, 2, 5, 4, 8)
    together = jax.vmap(lambda x: apply(params, stats, x)[0])(x)
    close(together, np.stack([apply(params, stats, one)[0] for one in x]))


@every_block
def test_nnx_split_and_merge(name):
    graph, state = nnx.split(nnx_block(name))
    x = pictures(2, 5, 4, 8)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), nnx_block(name)(x))
    # jit looks its programs up by this hash: an equal block compiles nothing anew
    assert hash(graph) == hash(nnx.split(nnx_block(name))[0])


@pytest.mark.parametrize("name", ["GAM", "CBAM", "BAM"])
def test_nnx_train_eval_and_view(name):
    x = pictures(2, 5, 4, 8)
    block = nnx_block(name)
    training = block(x)
    block = nnx_block(name)
    evaluating = nnx.view(block, use_running_average=True)(x)
    np.testing.assert_array_equal(block(x), training)  # a view leaves its module as it was
    assert np.abs(evaluating - training).max() > 1e-3
    block = nnx_block(name)
    block.eval()
    np.testing.assert_array_equal(block(x), evaluating)
    block.train()
    np.testing.assert_array_equal(block(x), training)


@every_block
def test_nnx_jit_and_remat_train_in_place(name):
    x = pictures(2, 5, 4, 8)

    def loss(block, x):
        return jnp.sum(block(x) ** 2)

    def gradients(loss):
        block = nnx_block(name)
        return nnx.jit(nnx.grad(loss))(block, x), nnx.state(block)

    plain, checkpointed = gradients(loss), gradients(nnx.remat(loss))
    close(checkpointed, plain)
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(plain[0])) > 1e-3
    tracked = [leaf for leaf in jax.tree.leaves(plain[1]) if leaf.dtype == jnp.int32]
    assert all(count == 1 for count in tracked)


@every_block
def test_nnx_layers_created_by_vmap_and_run_by_scan(name):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return getattr(gam_flax, name)(8, **SMALL, rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    stack, x = create(nnx.Rngs(0)), pictures(2, 5, 4, 8)
    graph, state = nnx.split(stack)
    layers = [nnx.merge(graph, layer_of(state, k)) for k in range(3)]
    y = forward(x, stack)
    for layer in layers:
        x = layer(x)
    close(y, x)
    for k, layer in enumerate(layers):
        close(layer_of(nnx.state(stack), k), nnx.state(layer))


@every_block
def test_linen_layers_under_scan_and_remat(name):
    """In the ways of Linen's guide; the gradients too are those of the plain loop."""
    block = getattr(gam_flax.linen, name)
    # `train` is Python's, no array: it is argument 2, counted from the module
    checkpointed = nn.remat(block, static_argnums=(2,))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return checkpointed(**SMALL, name="block")(x, train), None

    stack = nn.scan(
        Layer,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=2,
    )()
    x = pictures(2, 5, 4, 8)
    variables = stack.init(jax.random.key(0), x, False)
    params, stats = variables["params"], variables.get("batch_stats", {"block": {}})

    def scanned(params):
        variables = {"params": params, "batch_stats": stats}
        (y, _), after = stack.apply(variables, x, True, mutable=["batch_stats"])
        return jnp.sum(y**2), after

    def looped(params):
        y, after = x, []
        for k in range(2):
            layer = layer_of({"params": params["block"], "batch_stats": stats["block"]}, k)
            y, changed = block(**SMALL).apply(layer, y, True, mutable=["batch_stats"])
            after.append({kind: {"block": tree} for kind, tree in changed.items()})
        return jnp.sum(y**2), jax.tree.map(lambda *layers: jnp.stack(layers), *after)

    results = [jax.jit(jax.value_and_grad(f, has_aux=True))(params) for f in (scanned, looped)]
    close(*results)


# Types


@in_both
@every_block
def test_bfloat16_computation_keeps_float32_parameters(make, name):
    half, full = make(name, 8, dtype=jnp.bfloat16, **SMALL), make(name, 8, **SMALL)
    x = pictures(2, 5, 4, 8)
    y = half(x.astype(jnp.bfloat16), train=True)
    assert y.dtype == jnp.bfloat16
    expected = full(x, train=True)
    assert np.abs(y.astype(np.float32) - expected).max() < 0.03 * np.abs(expected).max()
    assert {str(value.dtype) for value in half.tensors().values()} <= {"float32", "int32"}
    # without a dtype the wider of the two wins, as in Flax
    assert full(x.astype(jnp.bfloat16)).dtype == np.float32


@in_both
@every_block
def test_bfloat16_parameters_keep_float32_statistics(make, name):
    block = make(name, 8, param_dtype=jnp.bfloat16, **SMALL)
    x = pictures(2, 5, 4, 8).astype(jnp.bfloat16)
    assert block(x, train=True).dtype == jnp.bfloat16
    for key, value in block.tensors().items():
        if not key.endswith("num_batches_tracked"):
            assert value.dtype == (np.float32 if "running" in key else jnp.bfloat16), key


@in_both
@every_block
def test_float64(make, name):
    with jax.enable_x64(True):
        block = make(name, 8, param_dtype=jnp.float64, **SMALL)
        y = block(pictures(2, 5, 4, 8, dtype=np.float64), train=True)
        assert y.dtype == np.float64
        assert {str(value.dtype) for value in block.tensors().values()} <= {"float64", "int32"}
