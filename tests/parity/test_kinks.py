"""Where rounding decides on which side of a kink a number lies, both gradients are right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from gam_flax.convert import load_torch
from gam_flax.parity import compare

V = np.random.default_rng(0).normal(size=(4, 6))


class Mix(nn.Module):
    """Leaves all features but the last, which becomes tiny, with the slope of before."""

    def forward(self, x):
        tiny = (x - x.detach()) + 1e-9
        return torch.cat([x[:, :-1], tiny[:, -1:]], 1)


class FlaxMix(nnx.Module):
    def __call__(self, x):
        tiny = (x + 1e-9) - jax.lax.stop_gradient(x)  # 0 in float32
        return jnp.concatenate([x[:, :-1], tiny[:, -1:]], 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.mix, self.head = nn.Linear(6, 6), Mix(), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.relu(self.mix(self.fc(x) + 3)))


class FlaxNet(nnx.Module):
    """With its gradients of the body multiplied by a factor."""

    def __init__(self, factor: float = 1.0):
        self.fc, self.head = (nnx.Linear(6, n, rngs=nnx.Rngs(0)) for n in (6, 2))
        self.mix, self.factor = FlaxMix(), factor

    def __call__(self, x):
        y = jax.nn.relu(self.mix(self.fc(x) + 3))
        kept = jax.lax.stop_gradient(y)
        return self.head(kept + self.factor * (y - kept))


def test_slopes_are_compared_at_one_point(monkeypatch):
    torch.manual_seed(0)
    model, twin, wrong = Net(), FlaxNet(), FlaxNet(factor=1.0001)
    load_torch(twin, model)
    load_torch(wrong, model)
    report = compare(model, twin, V, dtype="float32")
    assert report.ok, str(report)
    assert "gradient" in compare(model, wrong, V, dtype="float32").first_divergence.stage
    assert compare(model, twin, V).ok
    monkeypatch.setattr("gam_flax.parity.runs._there", lambda *args: None)
    assert not compare(model, twin, V, dtype="float32").ok


class Sloped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.head, self.function = nn.Linear(6, 2), function

    def forward(self, x):
        return self.head(self.function(x))


class FlaxSloped(nnx.Module):
    def __init__(self, function):
        self.head, self.function = nnx.Linear(6, 2, rngs=nnx.Rngs(0)), function

    def __call__(self, x):
        return self.head(self.function(x))


def sloped_causes(torch_function, flax_function, x) -> tuple[str, ...]:
    model, twin = Sloped(torch_function), FlaxSloped(flax_function)
    load_torch(twin, model)
    first = compare(model, twin, x).first_divergence
    assert first is not None and first.stage == "input gradient"
    return first.causes


@pytest.mark.parametrize(
    ("torch_function", "flax_function"),
    [
        (torch.abs, jnp.abs),
        (torch.relu, lambda x: jnp.maximum(x, 0)),
        (lambda x: x.clamp(0, 9), lambda x: jnp.clip(x, 0, 9)),
    ],
)
def test_other_slopes_at_zero_are_named(torch_function, flax_function):
    (cause,) = sloped_causes(torch_function, flax_function, np.maximum(V, 0))
    assert cause.startswith("they differ only where the input is exactly 0: torch and jax")


def test_one_number_that_is_off_is_no_kink():
    def stopped(x):
        return x.at[1, 2].set(jax.lax.stop_gradient(x[1, 2]))

    assert not any("kink" in cause for cause in sloped_causes(lambda x: x * 1, stopped, V))
