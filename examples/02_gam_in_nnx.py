"""GAM in a network of your own, in Flax NNX, trained for a moment.

    python examples/02_gam_in_nnx.py

Channels last, `rngs` to draw the weights, `train()` and `eval()` to switch the norms inside.
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gam_flax


class Net(nnx.Module):
    """Two convolutions with a GAM after each, the mean over the picture, ten classes."""

    def __init__(self, *, rngs: nnx.Rngs):
        halves = {"strides": 2, "padding": ((1, 1), (1, 1))}
        self.conv1 = nnx.Conv(1, 16, (3, 3), **halves, rngs=rngs)
        self.attention1 = gam_flax.GAM(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), **halves, rngs=rngs)
        self.attention2 = gam_flax.GAM.from_variant("gated", 32, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.attention1(nnx.relu(self.conv1(x)))
        x = self.attention2(nnx.relu(self.conv2(x)))
        return self.head(x.mean((1, 2)))


@nnx.jit
def step(net: Net, optimizer: nnx.Optimizer, x: jax.Array, labels: jax.Array) -> jax.Array:
    def loss(net: Net) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(net)
    optimizer.update(net, gradients)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description="GAM in your own NNX network.")
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps

    with np.load(str(files("gam_flax") / "assets" / "fashion_test_200.npz")) as data:
        x = jnp.asarray(data["images"][..., None] / 255.0, jnp.float32)
        labels = jnp.asarray(data["labels"], jnp.int32)

    net = Net(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
    net.train()  # batch statistics, and running ones updated
    for i in range(steps):
        value = step(net, optimizer, x, labels)
        if i == 0 or (i + 1) % 10 == 0:
            print(f"step {i + 1}: loss {value:.3f}")
    net.eval()  # the running ones used
    accuracy = (nnx.jit(lambda net, x: net(x))(net, x).argmax(-1) == labels).mean()
    print(f"accuracy on the 200 pictures it learnt: {accuracy:.1%}")


if __name__ == "__main__":
    main()
