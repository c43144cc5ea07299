"""torch's default initialisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Target = TypeVar("Target", nnx.Module, Mapping[str, Any])


def torch_default_init(target: Target, key: jax.Array) -> Target:
    """Draws the weights anew as `torch.nn.Linear` and `torch.nn.Conv2d` draw theirs.

        kernel, bias ~ U(−1/√fan_in, 1/√fan_in),    fan_in = all axes of the kernel but the last

    which is what torch's kaiming_uniform(a=√5) comes to. Flax's own default, which every block
    here starts from, is lecun_normal for kernels and zeros for biases. Norms are left as they
    are: both frameworks start them at scale 1 and bias 0.

    Args:
        target: an NNX module, changed in place, or Linen variables (or their "params").
        key: a `jax.random.key`.

    Returns:
        The same module, or new variables.
    """
    if isinstance(target, nnx.Module):
        drawn = _redraw(nnx.to_pure_dict(nnx.state(target, nnx.Param)), key)
        state = nnx.state(target, nnx.Param)
        nnx.replace_by_pure_dict(state, drawn)
        nnx.update(target, state)
        return target
    return _redraw(target, key)


def _redraw(tree: Any, key: jax.Array) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    if "kernel" in tree:
        kernel = tree["kernel"]
        bound = float(jnp.prod(jnp.array(kernel.shape[:-1]))) ** -0.5
        keys = dict(zip(("kernel", "bias"), jax.random.split(key), strict=True))
        drawn = {
            name: jax.random.uniform(keys[name], tree[name].shape, tree[name].dtype, -bound, bound)
            for name in keys
            if tree.get(name) is not None
        }
        return {**tree, **drawn}
    keys = jax.random.split(key, max(len(tree), 1))
    return {name: _redraw(child, k) for (name, child), k in zip(tree.items(), keys, strict=True)}
