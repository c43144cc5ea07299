"""BatchNorm of NNX and Linen against torch's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

in_both = pytest.mark.parametrize("make", ["nnx", "linen"], indirect=True)
CHANNELS = 3


def values(*shape: int, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    """float64, every channel with a mean and a spread of its own."""
    x = np.random.default_rng(seed).normal(size=(*shape, CHANNELS))
    return x * [0.5, 1.0, 2.0] + [-1.0, 0.0, 3.0] + offset


def torch_norm(**options):
    """torch's in float64, channels last as here, for vectors (N, C) and pictures (B, H, W, C)."""

    class Norm(torch.nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.reshape(-1, CHANNELS)).reshape(x.shape)

    return Norm(CHANNELS, **options).double()


@in_both
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)], ids=["vectors", "pictures"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("momentum", [0.1, 0.6, None])
def test_forward_and_statistics_over_several_steps(make, shape, eps, momentum):
    twin = torch_norm(eps=eps, momentum=momentum)
    with jax.enable_x64(True):
        options = {"eps": eps, "momentum": momentum, "param_dtype": jnp.float64}
        norm = make("BatchNorm", CHANNELS, **options)
        for step in range(4):
            x = values(*shape, seed=step)
            expected = twin(torch.from_numpy(x)).detach().numpy()
            np.testing.assert_allclose(norm(x, train=True), expected, rtol=0, atol=1e-12)
            for key, value in norm.tensors().items():
                np.testing.assert_allclose(value, twin.state_dict()[key], rtol=1e-13, err_msg=key)
        expected = twin.eval()(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(norm(x), expected, rtol=0, atol=1e-12)
    assert norm.tensors()["num_batches_tracked"] == 4


@in_both
def test_gradients(make):
    """Through the batch's mean and variance, of the input and of the parameters."""
    twin, x = torch_norm(), values(2, 3, 4)
    leaf = torch.from_numpy(x).requires_grad_()
    torch.sin(twin(leaf)).sum().backward()
    with jax.enable_x64(True):
        apply, params, stats = make("BatchNorm", CHANNELS, param_dtype=jnp.float64).pure(train=True)
        of_params, of_x = jax.grad(
            lambda params, x: jnp.sin(apply(params, stats, x)[0]).sum(), argnums=(0, 1)
        )(params, x)
    np.testing.assert_allclose(of_x, leaf.grad, rtol=0, atol=1e-12)
    bias, scale = jax.tree.leaves(of_params)  # in the order of their names
    np.testing.assert_allclose(bias, twin.bias.grad, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scale, twin.weight.grad, rtol=0, atol=1e-12)


@in_both
def test_no_gradient_through_running_statistics(make):
    apply, params, stats = make("BatchNorm", CHANNELS).pure(train=True)

    def remembered(x):
        after = jax.tree.leaves(apply(params, stats, x)[1])
        return sum(jnp.sum(leaf) for leaf in after if leaf.ndim)

    x = jnp.asarray(values(4), jnp.float32)
    assert remembered(x) != remembered(x + 1)
    assert not jax.grad(remembered)(x).any()


@in_both
def test_variance_is_stable_at_a_large_mean(make):
    """float32 at a mean of 1000: as close to float64 as torch, where E[x²] − E[x]² is lost."""
    x = values(8, 8, offset=1000.0).astype(np.float32)
    exact = (x - x.mean((0, 1), dtype=np.float64)) / np.sqrt(x.var((0, 1), dtype=np.float64) + 1e-5)

    def error(y):
        return np.abs(y - exact).max()

    of_torch = error(torch_norm().float()(torch.from_numpy(x)).detach().numpy())
    of_flax = error(nnx.BatchNorm(CHANNELS, use_running_average=False, rngs=nnx.Rngs(0))(x))
    ours = error(make("BatchNorm", CHANNELS)(x, train=True))
    assert ours < 4 * of_torch + 1e-6
    assert of_flax > 100 * ours  # this test would notice


@in_both
def test_bfloat16_input_keeps_float32_statistics(make):
    norm = make("BatchNorm", CHANNELS, momentum=1.0)
    x = jnp.asarray(values(4, 4, 4), jnp.bfloat16)
    assert norm(x, train=True).dtype == np.float32  # the wider of the input and the parameters
    exact, kept = np.asarray(x, np.float64), norm.tensors()
    assert kept["running_mean"].dtype == kept["running_var"].dtype == np.float32
    axes = (0, 1, 2)
    np.testing.assert_allclose(kept["running_mean"], exact.mean(axes), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kept["running_var"], exact.var(axes, ddof=1), rtol=1e-5)


@in_both
def test_bfloat16_evaluation_uses_float32_statistics(make):
    """nnx.BatchNorm rounds a mean of 100 to bfloat16, so to halves, before it subtracts it."""
    norm = make("BatchNorm", CHANNELS, momentum=1.0, dtype=jnp.bfloat16)
    x = jnp.asarray(values(8, 8, offset=100.0), jnp.bfloat16)
    norm(x, train=True)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean((0, 1))) / np.sqrt(exact.var((0, 1), ddof=1) + 1e-5)
    assert np.abs(y.astype(np.float64) - exact).max() < 0.02  # half of bfloat16's step at 4


@in_both
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)], ids=str)
def test_one_value_a_channel(make, shape):
    norm, x = make("BatchNorm", CHANNELS), np.ones((*shape, CHANNELS), np.float32)
    assert norm(x).shape == x.shape
    with pytest.raises(ValueError, match=f"more than one value.*{len(shape) * '1, '}3"):
        norm(x, train=True)


@in_both
def test_under_jit_and_vmap(make):
    """Mapped over an axis, every slice has statistics of its own."""
    apply, params, stats = make("BatchNorm", CHANNELS).pure(train=True)
    x = jnp.stack([jnp.asarray(values(4, seed=seed), jnp.float32) for seed in range(3)])
    mapped = jax.jit(jax.vmap(apply, in_axes=(None, None, 0)))(params, stats, x)
    for i, alone in enumerate(x):
        expected = jax.tree.leaves(apply(params, stats, alone))
        for a, b in zip(jax.tree.leaves(mapped), expected, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def test_constructor_of_nnx_starts_in_either_mode():
    from gam_flax import BatchNorm

    x = jnp.asarray(values(4), jnp.float32)
    fixed = BatchNorm(CHANNELS, use_running_average=True)
    np.testing.assert_allclose(fixed(x), x / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert fixed.num_batches_tracked[...] == 0
    assert BatchNorm(CHANNELS)(x).mean(0) == pytest.approx(0, abs=1e-6)
