"""Training stops in one framework and goes on in the other, as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from gam_flax.convert import load_torch_optimizer, to_torch_optimizer
from tests.convert.optimizers import FIRST, RECIPES, SECOND, Recipe, in_optax
from tests.convert.training import (
    TRAININGS,
    PlainTraining,
    Training,
    disagreement,
    torch_net,
    train_torch,
)

WHOLE = range(9)
AGREES, DIFFERS = 1e-12, 1e-5


@pytest.fixture(autouse=True)
def wide():
    """float64 in jax; one thread in torch, whose network is too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with jax.enable_x64(True):
        yield
    torch.set_num_threads(threads)


def in_torch(recipe: Recipe, steps: range) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch_net()
    optimizer = recipe.torch(model)
    train_torch(model, optimizer, steps, recipe.before)
    return model, optimizer


@cache
def torch_first(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Model and optimizer after FIRST in torch, to be read only."""
    return in_torch(RECIPES[name], FIRST)


@cache
def torch_alone(name: str) -> dict[str, torch.Tensor]:
    """The weights and statistics after all steps in torch."""
    return in_torch(RECIPES[name], WHOLE)[0].state_dict()


def goes_on_in_flax(training: type[Training], name: str, fault: Callable | None = None) -> float:
    """FIRST in torch, then SECOND in Flax, against all in torch; `fault` befalls the state."""
    recipe = RECIPES[name]
    model, optimizer = torch_first(name)
    ours = training(model, in_optax(name))
    ours.state = load_torch_optimizer(
        ours.state, ours.params, optimizer, names=model, step=recipe.step
    )
    ours.state = fault(ours.state) if fault else ours.state
    ours.train(SECOND)
    return disagreement(ours.weights(), torch_alone(name))


def goes_on_in_torch(training: type[Training], name: str, fault: Callable | None = None) -> float:
    """FIRST in Flax, then SECOND in torch, against all in torch."""
    recipe = RECIPES[name]
    model = torch_net()
    ours = training(model, in_optax(name))
    ours.train(FIRST)
    model.load_state_dict({key: torch.tensor(w) for key, w in ours.weights().items()})
    optimizer = recipe.torch(model)
    state = to_torch_optimizer(ours.state, ours.params, optimizer, names=model, step=recipe.step)
    if fault:
        fault(state["state"])
    optimizer.load_state_dict(state)
    train_torch(model, optimizer, SECOND, recipe.before)
    return disagreement(dict(model.state_dict()), torch_alone(name))


# Training goes on


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_goes_on_in_flax(training, name):
    assert goes_on_in_flax(training, name) < AGREES


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_goes_on_in_torch(training, name):
    assert goes_on_in_torch(training, name) < AGREES


def test_the_step_of_nnx_optimizer_goes_over():
    model, optimizer = torch_first("adamw")
    ours = TRAININGS["optimizer"](model, in_optax("adamw"))
    filled = load_torch_optimizer(ours.state, ours.params, optimizer, names=model)
    assert filled is ours.state and filled.step[...] == len(FIRST)
    assert filled.step[...].dtype == jnp.uint32


# Faults are seen


def nothing_converted(state: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, state)


def late(state: Any) -> Any:
    adam, *rest = state
    return (adam._replace(count=adam.count + 1), *rest)


def early(state: Any) -> Any:
    adam, *rest = state
    return (adam._replace(count=adam.count - 1), *rest)


def swapped(state: Any) -> Any:
    adam, *rest = state
    return (adam._replace(mu=adam.nu, nu=jax.tree.map(jnp.abs, adam.mu)), *rest)


def not_transposed(state: Any) -> Any:
    """The moments of the one square kernel as torch has them."""
    return jax.tree.map(lambda leaf: leaf.T if leaf.shape == (6, 6) else leaf, state)


@pytest.mark.parametrize(
    "name, fault",
    [
        ("momentum", nothing_converted),
        ("nesterov", nothing_converted),
        ("sgd, schedule", nothing_converted),
        ("rmsprop", nothing_converted),
        ("adamw", nothing_converted),
        ("adamw, two groups", nothing_converted),
        ("adamw", late),
        ("adamw", early),
        ("adamw", swapped),
        ("momentum", not_transposed),
        ("adamw", not_transposed),
    ],
)
def test_a_fault_on_the_way_to_flax_is_seen(name, fault):
    assert goes_on_in_flax(PlainTraining, name, fault) > DIFFERS


def change_step(by: int) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        for entry in state.values():
            entry["step"] += by

    return change


def swap_moments(state: dict) -> None:
    for entry in state.values():
        entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg_sq"], entry["exp_avg"].abs()


@pytest.mark.parametrize(
    "name, fault",
    [
        ("momentum", dict.clear),
        ("adamw", dict.clear),
        ("adamw", change_step(1)),
        ("adamw", change_step(-1)),
        ("adamw", swap_moments),
    ],
)
def test_a_fault_on_the_way_to_torch_is_seen(name, fault):
    assert goes_on_in_torch(PlainTraining, name, fault) > DIFFERS
