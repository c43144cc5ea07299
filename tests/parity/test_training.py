"""Two models trained with one optimizer, written in torch and in optax."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from gam_flax.parity.judge import magnitude
from gam_flax.parity.optimizers import CLIP, NAMES, recipe
from gam_flax.parity.training import laid
from tests.parity.networks import X, torch_net
from tests.parity.training import (
    BEFORE_A_NORM,
    LAY,
    Pair,
    errors,
    linen_twin,
    nnx_twin,
    one_thread,
    wide_state,
)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    with one_thread():
        yield


@pytest.mark.parametrize("optimizer", NAMES)
@pytest.mark.parametrize("twin", [nnx_twin, linen_twin], ids=["nnx", "linen"])
def test_twenty_steps_agree(twin, optimizer):
    model = torch_net()
    own, flax, partners = Pair(model, twin(model), optimizer).both()
    found = errors(own, flax, partners)
    assert max(found.values()) < 1e-14
    assert own.losses[-1] < own.losses[0] and len(own.losses) == len(flax.losses) == 20
    assert own.optimizer_state.keys() == flax.optimizer_state.keys() and not flax.unnamed
    kinds = {"losses", "parameters", "statistics", "output"}
    kinds |= {"optimizer_state"} if own.optimizer_state else set()
    assert {kind for kind, _ in found} == kinds
    assert len(found) == len(own.parameters) + 5 + len(own.optimizer_state)
    clipped = optimizer.endswith("+clip")
    norm = np.sqrt(sum((g**2).sum() for g in gradients(model)))
    assert not clipped or norm > 2 * CLIP, "so that clipping shows"


@cache
def gradients(model: torch.nn.Module) -> list[np.ndarray]:
    """Of the first step."""
    first = Pair(model, None, "momentum", steps=1).torch()
    return list(first.optimizer_state.values())


# Rounding noise


def test_noise_drifts_under_adam_unless_it_is_frozen():
    """Adam makes steps of the learning rate of it; float64 has less noise, but no other kind."""
    model = torch_net()
    twin = nnx_twin(model)
    drift = {}
    for dtype in ("float64", "float32"):
        for frozen in ((), BEFORE_A_NORM):
            pair = Pair(model, twin, "adamw", 60, dtype, frozen=frozen)
            found = errors(*pair.both())
            drift[dtype, bool(frozen)] = max(
                error for (kind, _), error in found.items() if kind == "parameters"
            )
    assert drift["float64", True] < 1e-14 and drift["float32", True] < 1e-5
    assert drift["float64", False] > 1e-12 and drift["float32", False] > 1e-3


def test_what_is_frozen_decays_alike():
    model = torch_net()
    before = model.conv1.bias.detach().double().numpy()
    own, flax, _ = Pair(model, nnx_twin(model)).both()
    expected = before * (1 - 1e-3 * 1e-2) ** 20
    for after in (own.parameters["conv1.bias"], flax.parameters["conv1.bias"]):
        np.testing.assert_allclose(after, expected, rtol=1e-14)


# Narrow types


def neighbours(dtype: str, keys: Any) -> list[tuple[np.ndarray, dict[str, float]]]:
    """As `compare` does it: inputs and weights a few units off."""
    kind = ml_dtypes.finfo(dtype).dtype
    rng, step = np.random.default_rng(0), 8 * float(ml_dtypes.finfo(dtype).eps)
    found = []
    for _ in range(8):
        x = X * (1 + step * rng.uniform(-1, 1, X.shape))
        factors = {key: float(1 + step * rng.uniform(-1, 1)) for key in keys}
        found.append((x.astype(kind).astype(np.float64), factors))
    return found


@pytest.mark.parametrize("optimizer", ["nesterov", "adam+clip", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_types_are_as_near_to_float64_as_torch_is(dtype, optimizer):
    model = torch_net()
    pair = Pair(model, nnx_twin(model), optimizer, dtype=dtype)
    program, partners = pair.flax()
    worst: dict[tuple[str, str], np.ndarray] = {}
    for x, factors in neighbours(dtype, partners):
        flax = program(x, {partners[key]: factor for key, factor in factors.items()})
        own, oracle = (pair.torch(factors, kind, x) for kind in (dtype, "float64"))
        oracles = laid(oracle, flax, partners, LAY)
        for place, (array, theirs) in laid(own, flax, partners, LAY).items():
            truth = oracles[place][0]
            sizes = [np.abs(array - truth).max(), np.abs(theirs - truth).max(), magnitude(truth)]
            worst[place] = np.maximum(worst.get(place, 0.0), sizes)
    unit = float(ml_dtypes.finfo(dtype).eps)
    assert len(worst) > 20
    for place, (own, theirs, scale) in worst.items():
        assert theirs <= 4 * own + unit * scale, place


# What is trained


def test_what_needs_no_gradient_is_not_trained_and_does_not_decay():
    model = torch_net()
    model.conv1.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    own, flax, partners = Pair(model, nnx_twin(model), "adamw+clip").both()
    assert max(errors(own, flax, partners).values()) < 1e-14
    kept = wide_state(model)
    for key in ("conv1.weight", "fc.bias"):
        np.testing.assert_array_equal(own.parameters[key], kept[key])
        assert f"{key}.exp_avg" not in {**own.optimizer_state, **flax.optimizer_state}
    assert not np.array_equal(own.parameters["fc.weight"], kept["fc.weight"])


def test_in_evaluation_statistics_stay():
    model = torch_net()
    own, flax, partners = Pair(model, nnx_twin(model), "momentum", train=False, frozen=()).both()
    assert max(errors(own, flax, partners).values()) < 1e-14
    for leaf in ("running_mean", "running_var"):
        kept = wide_state(model)[f"norm.{leaf}"]
        np.testing.assert_array_equal(own.statistics[f"norm.{leaf}"], kept)


class Idle(torch.nn.Identity):
    """With a parameter that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))


def test_a_parameter_that_the_loss_does_not_reach_decays_on_both_sides():
    """torch by itself would leave it as it is."""
    model = torch_net()
    twin = nnx_twin(model)
    model.idle = Idle()
    twin.idle = nnx.Module()
    twin.idle.scale = nnx.Param(jnp.ones(3))
    own, flax, partners = Pair(model, twin, steps=3).both()
    assert max(errors(own, flax, partners).values()) < 1e-14
    expected = (1 - 1e-3 * 1e-2) ** 3
    np.testing.assert_allclose(own.parameters["idle.weight"], expected, rtol=1e-14)


def test_a_loss_of_the_users_own():
    model = torch_net()
    loss = (lambda y: y.logsumexp(1).mean(), lambda y: jax.nn.logsumexp(y, 1).mean())
    own, flax, partners = Pair(model, nnx_twin(model), loss=loss).both()
    assert max(errors(own, flax, partners).values()) < 1e-14
    assert own.losses != Pair(model, None).torch().losses


# What is given, and what is left alone


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_optimizer_is_refused():
    for wrong_one in ("lion", "sgd+", ("sgd", optax.sgd(1e-2)), None):
        with pytest.raises(ValueError, match="^optimizer must be one of sgd, sgd.clip, momentum"):
            recipe(wrong_one)  # type: ignore[arg-type]


def test_an_optax_state_without_a_torch_name_is_told():
    model = torch_net()
    pair = (lambda ps: torch.optim.Adagrad(ps, lr=1e-2), optax.adagrad(1e-2))
    own, flax, _ = Pair(model, nnx_twin(model), pair, steps=1).both()
    assert "ScaleByRssState" in flax.unnamed and not flax.optimizer_state
    assert own.optimizer_state


def test_random_forwards_are_refused_and_all_is_as_before():
    model = torch_net(dropout=0.5)
    state, kept = torch.get_rng_state(), wide_state(model)
    with pytest.raises(ValueError, match="draws random numbers"):
        Pair(model, None).torch()
    pair = Pair(model, nnx_twin(model), train=False)
    with torch.no_grad():
        pair.both()
    assert torch.equal(torch.get_rng_state(), state) and not jax.config.jax_enable_x64
    for key, array in wide_state(model).items():
        np.testing.assert_array_equal(array, kept[key])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
