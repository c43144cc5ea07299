"""torch's default initialisation."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

Target = TypeVar("Target", nnx.Module, Mapping[str, Any])


def torch_default_init(target: Target, key: jax.Array) -> Target:
    """Draws the weights anew as `torch.nn.Linear` and `torch.nn.Conv2d` draw theirs.

        kernel, bias ~ U(−1/√fan_in, 1/√fan_in),    fan_in = all axes of the kernel but the last

    which is what torch's kaiming_uniform(a=√5) comes to. Flax's own default, which every block
    here starts from, is lecun_normal for kernels and zeros for biases. Norms are left as they
    are: both frameworks start them at scale 1 and bias 0.

    The draw of a tensor hangs on the key and the tensor's path alone: NNX and Linen twins get the
    same numbers, and another layer elsewhere changes none of them.

    Args:
        target: an NNX module, changed in place, or Linen variables (or their "params").
        key: a `jax.random.key`.

    Returns:
        The same module, or new variables.
    """
    if isinstance(target, nnx.Module):
        state = nnx.state(target, nnx.Param)
        nnx.replace_by_pure_dict(state, _redraw(nnx.to_pure_dict(state), key))
        nnx.update(target, state)
        return target
    if "params" in target:
        return {**target, "params": _redraw(target["params"], key)}
    return _redraw(target, key)


def _redraw(tree: Any, key: jax.Array) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    keys = {name: jax.random.fold_in(key, zlib.crc32(str(name).encode())) for name in tree}
    if "kernel" not in tree:
        return {name: _redraw(child, keys[name]) for name, child in tree.items()}
    bound = math.prod(tree["kernel"].shape[:-1]) ** -0.5
    return {
        name: jax.random.uniform(keys[name], leaf.shape, leaf.dtype, -bound, bound)
        if name in ("kernel", "bias") and leaf is not None
        else leaf
        for name, leaf in tree.items()
    }
