"""GAM in a network of your own, in Flax Linen, trained for a moment.

    python examples/03_gam_in_linen.py

The channels are read from the input, `train` is an argument of the call, and the running
statistics of the norms inside are the collection `batch_stats`.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gam_flax import linen


class Net(nn.Module):
    """Two convolutions with a GAM after each, the mean over the picture, ten classes."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        halves = {"strides": 2, "padding": ((1, 1), (1, 1))}
        x = nn.relu(nn.Conv(16, (3, 3), **halves)(x))
        x = linen.GAM()(x, train=train)
        x = nn.relu(nn.Conv(32, (3, 3), **halves)(x))
        x = linen.GAM.from_variant("gated")(x, train=train)
        return nn.Dense(10)(x.mean((1, 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description="GAM in your own Linen network.")
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps

    with np.load(str(files("gam_flax") / "assets" / "fashion_test_200.npz")) as data:
        x = jnp.asarray(data["images"][..., None] / 255.0, jnp.float32)
        labels = jnp.asarray(data["labels"], jnp.int32)

    net, optimizer = Net(), optax.adam(1e-2)
    variables: Any = net.init(jax.random.key(0), x[:1])
    params, statistics = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, statistics: Any, state: Any) -> tuple[Any, Any, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = net.apply(
                {"params": params, "batch_stats": statistics},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return each.mean(), updates["batch_stats"]

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), new, state, value

    for i in range(steps):
        params, statistics, state, value = step(params, statistics, state)
        if i == 0 or (i + 1) % 10 == 0:
            print(f"step {i + 1}: loss {value:.3f}")
    logits: Any = jax.jit(net.apply)({"params": params, "batch_stats": statistics}, x)
    accuracy = (logits.argmax(-1) == labels).mean()
    print(f"accuracy on the 200 pictures it learnt: {accuracy:.1%}")


if __name__ == "__main__":
    main()
