"""On a GPU the networks of the examples agree with the CPU; skipped where there is none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gam_flax

PRECISIONS = {"highest": 1e-5, "tensorfloat32": 1e-2, "bfloat16": 1e-1}
"""`jax.default_matmul_precision` → largest difference, of the largest number."""

NETWORKS = {
    "gam": (lambda **k: gam_flax.create_attention("gam", 64, **k), (4, 28, 28, 64)),
    "cbam": (lambda **k: gam_flax.create_attention("cbam", 64, **k), (4, 28, 28, 64)),
    "resnet8": (
        lambda **k: gam_flax.create_model("resnet8", attention="gam", num_classes=10, **k),
        (4, 32, 32, 3),
    ),
}


@pytest.fixture
def gpu():
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU here")


def answer_and_gradients(make, shape):
    """On jax's default device. The batch's own statistics, as in training."""
    model = make(rngs=nnx.Rngs(0))
    gam_flax.torch_default_init(model, jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))

    def loss(model):
        y = model(x)
        return jnp.mean(y**2), y

    gradients, y = nnx.jit(nnx.grad(loss, has_aux=True))(model)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((y, gradients))]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_gpu_agrees_with_the_cpu(name, precision, gpu):
    with jax.default_device(jax.devices("cpu")[0]):
        expected = answer_and_gradients(*NETWORKS[name])
    with jax.default_device(gpu), jax.default_matmul_precision(precision):
        found = answer_and_gradients(*NETWORKS[name])
    largest = max(np.abs(one).max() for one in expected[1:])  # of the gradients
    scales = [np.abs(expected[0]).max(), *[largest] * (len(expected) - 1)]
    for ours, theirs, scale in zip(found, expected, scales, strict=True):
        assert np.abs(ours - theirs).max() <= PRECISIONS[precision] * scale
