"""Sequential: torch's paths, and a list's manners."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

from gam_flax.ops import Sequential


def layers() -> Sequential:
    rngs = nnx.Rngs(0)
    return Sequential([nnx.Linear(3, 4, rngs=rngs), jax.nn.relu, nnx.Linear(4, 2, rngs=rngs)])


def test_applies_its_layers_in_turn():
    stack, x = layers(), jnp.ones((5, 3))
    assert jnp.array_equal(stack(x), stack[2](jax.nn.relu(stack[0](x))))
    assert Sequential([])(x) is x


def test_paths_are_those_of_torch():
    twin = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(layers()))}
    assert {path.replace("kernel", "weight") for path in paths} == set(twin.state_dict())


def test_is_read_as_a_list():
    stack = layers()
    assert len(stack) == 3 and list(stack) == [stack[i] for i in range(3)]
    assert stack[-1] is stack[2] and stack[1] is jax.nn.relu
    with pytest.raises(IndexError):
        stack[3]


def test_survives_split_merge_and_jit():
    stack, x = layers(), jnp.ones((5, 3))
    assert jnp.array_equal(nnx.merge(*nnx.split(stack))(x), stack(x))
    assert jnp.allclose(nnx.jit(lambda stack, x: stack(x))(stack, x), stack(x))
