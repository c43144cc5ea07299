"""The same block with the same weights in torch, NNX and Linen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import gam_flax
import gam_torch
from gam_flax.convert.flax_paths import linen_leaves, nnx_variables
from gam_flax.convert.leaves import flax_name, to_flax_layout


def torch_block(name: str, channels: int, *, seed: int = 0, **options: Any) -> torch.nn.Module:
    """A block of `gam_torch` with no number left at its initial value, in float32."""
    model = gam_torch.create_attention(name, channels, **options)
    randomize(model, seed)
    return model


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws every parameter and buffer anew, so that no two tensors of a model are alike.

    Kernels ~ N(0, 1/fan_in), which keeps the size of what passes through; a scale and a variance
    ∈ [0.5, 1.5]; biases and means ~ N(0, 1/4); counters ∈ [1, 9].
    """
    rng = np.random.default_rng(seed)
    for key, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if key.endswith("num_batches_tracked"):
            value = rng.integers(1, 10, shape)
        elif tensor.ndim > 1:
            value = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        elif key.endswith(("weight", "running_var")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, 0.5, shape)
        tensor.copy_(torch.from_numpy(np.asarray(value)))


def flax_leaves(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Flax path → array, of the model's state_dict by the leaf table."""
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    names = {key: flax_name(key, array.ndim) for key, array in state.items()}
    return {name: to_flax_layout(name, state[key]) for key, name in names.items()}


def nnx_twin(model: torch.nn.Module, name: str, channels: int, **options: Any) -> nnx.Module:
    """The NNX block of the same name and options, filled from `model`."""
    twin = nnx.eval_shape(
        lambda: gam_flax.create_attention(name, channels, rngs=nnx.Rngs(0), **options)
    )
    fill_nnx(twin, model)
    return twin


def fill_nnx(twin: nnx.Module, model: torch.nn.Module) -> None:
    """Gives `twin` the weights of `model`, float64 where they are, with nothing left over."""
    values, variables = flax_leaves(model), nnx_variables(twin)
    assert values.keys() == variables.keys(), values.keys() ^ variables.keys()
    with jax.enable_x64(True):
        for path, variable in variables.items():
            assert variable.shape == values[path].shape, path
            variable.set_value(jnp.array(_counted(values[path])))


def linen_twin(
    model: torch.nn.Module, name: str, channels: int, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The Linen block of the same name and options, and its variables, filled from `model`."""
    twin = gam_flax.linen.create_attention(name, **options)
    shapes = jax.eval_shape(twin.init, jax.random.key(0), jnp.zeros((1, 2, 2, channels)))
    return twin, fill_linen(shapes, model)


def fill_linen(variables: Any, model: torch.nn.Module) -> dict[str, Any]:
    """Variables of the same structure with the weights of `model`, as numpy arrays."""
    values, places = flax_leaves(model), linen_leaves(variables)
    names = {path: ".".join(path[1:]) for path in places}
    assert values.keys() == set(names.values()), values.keys() ^ set(names.values())
    filled: dict[str, Any] = {}
    for path, place in places.items():
        value = values[names[path]]
        assert place.shape == value.shape, path
        node = filled
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = _counted(value)
    return filled


def _counted(value: np.ndarray) -> np.ndarray:
    """Counters are int64 in torch and int32 in Flax."""
    return value.astype(np.int32) if value.dtype == np.int64 else value


TWINS = {"nnx": nnx_twin, "linen": linen_twin}


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    """N(0, 1) in float64, as Flax takes it: (B, H, W, C)."""
    return np.random.default_rng(seed).normal(size=shape)
