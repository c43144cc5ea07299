"""Resizing, pooling, gates and parameters between layers: named, and nothing where nothing fits."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

from gam_flax.convert import load_torch
from gam_flax.parity import compare
from gam_flax.parity.causes import LARGER
from gam_flax.parity.families import explain_by_families

WIDTH = 8


class Pair(nn.Module):
    """Two layers and what stands between them."""

    def __init__(self, between: Callable, first: nn.Module, second: nn.Module):
        super().__init__()
        self.a, self.b, self.between = first, second, between

    def forward(self, x):
        return self.b(self.between(self.a(x), x))


class FlaxPair(nnx.Module):
    def __init__(self, between: Callable, first: nnx.Module, second: nnx.Module):
        self.a, self.b, self.between = first, second, between

    def __call__(self, x):
        return self.b(self.between(self.a(x), x))


def pictures(own: Callable, flax: Callable, channels: int = WIDTH):
    rngs = nnx.Rngs(0)
    first, second = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(channels, 3, 1)
    twins = [nnx.Conv(WIDTH, WIDTH, (1, 1), rngs=rngs), nnx.Conv(channels, 3, (1, 1), rngs=rngs)]
    x = np.random.default_rng(0).normal(size=(2, 4, 6, WIDTH))
    return Pair(own, first, second), FlaxPair(flax, *twins), x


def sequences(own: Callable, flax: Callable):
    rngs = nnx.Rngs(0)
    twins = [nnx.Linear(WIDTH, width, rngs=rngs) for width in (WIDTH, 3)]
    x = np.random.default_rng(0).normal(size=(2, 5, WIDTH))
    return Pair(own, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)), FlaxPair(flax, *twins), x


def judged(model, twin, x):
    torch.manual_seed(0)
    for layer in (model.a, model.b):
        layer.reset_parameters()
    load_torch(twin, model)
    return compare(model, twin, x, gradients=False)


def larger(y, method: str):
    return jax.image.resize(y, (len(y), 8, 12, WIDTH), method)


def depth_to_space(y, order: tuple[int, ...]):
    parts = y.reshape(*y.shape[:3], *(2 if i else WIDTH // 4 for i in order))
    c, row, column = (3 + order.index(i) for i in range(3))
    return parts.transpose(0, 1, row, 2, column, c).reshape(len(y), 8, 12, WIDTH // 4)


up = partial(F.interpolate, scale_factor=2)
RESIZINGS = {
    "torch nearest, Flax tiled, not repeated": (
        lambda y, x: F.hardswish(up(y)),
        lambda y, x: jax.nn.hard_swish(jnp.tile(y, (1, 2, 2, 1))),
    ),
    "torch bicubic, Flax bicubic as jax.image has it (a = −0.5)": (
        lambda y, x: up(y, mode="bicubic"),
        lambda y, x: larger(y, "cubic"),
    ),
    "torch average pool 2, padding 0, Flax every 2. number": (
        lambda y, x: F.avg_pool2d(F.hardswish(y), 2),
        lambda y, x: jax.nn.hard_swish(y)[:, ::2, ::2],
    ),
}


@pytest.mark.parametrize("said", RESIZINGS)
def test_resizing(said):
    own, flax = RESIZINGS[said]
    first = judged(*pictures(own, flax)).first_divergence
    assert first.path == "b (input)" and any(c.endswith(said) for c in first.causes), first.causes


def test_resizing_of_a_part_of_a_concatenation():
    def own(y, x):
        return torch.cat([up(x), up(y, mode="bilinear")], 1)

    def flax(method, y, x):
        return jnp.concatenate([larger(x, "nearest"), larger(y, method)], -1)

    assert judged(*pictures(own, partial(flax, "bilinear"), 2 * WIDTH)).ok
    first = judged(*pictures(own, partial(flax, "nearest"), 2 * WIDTH)).first_divergence
    said = "a from 4×6 to 8×12: torch bilinear, Flax nearest, at 8–15 of axis 1 in torch"
    assert first.causes == (said,)


@pytest.mark.parametrize(
    ("order", "said"), [((0, 1, 2), ""), ((1, 2, 0), "(row, column, channel)")]
)
def test_the_order_of_channels_in_a_pixel_shuffle(order, said):
    flax = partial(depth_to_space, order=order)
    pair = pictures(lambda y, x: F.pixel_shuffle(y, 2), lambda y, x: flax(y), WIDTH // 4)
    report = judged(*pair)
    assert report.ok == (not said)
    assert report.ok or said in report.first_divergence.causes[0].partition("Flax")[2]


POOLINGS = {
    "pooling: torch the mean of a, Flax the first of a": (
        lambda y, x: y.mean(1),
        lambda y, x: y[:, 0],
    ),
    "pooling: torch the first of a, Flax the last of a": (
        lambda y, x: y[:, 0],
        lambda y, x: y[:, -1],
    ),
    "pooling: torch the mean of a, Flax the mean of a without the first": (
        lambda y, x: y[:, 0] + y.mean(1),
        lambda y, x: y[:, 0] + y[:, 1:].mean(1),
    ),
    "pooling, the mean of a: torch relu, Flax no activation": (
        lambda y, x: F.relu(y).mean(1),
        lambda y, x: y.mean(1),
    ),
}


HONEST = {
    "poolings": (lambda y, x: y[:, 0] + y.mean(1), lambda y, x: y[:, 0] + y.mean(1)),
    "gate": (lambda y, x: x * torch.sigmoid(y), lambda y, x: x * jax.nn.sigmoid(y)),
    "parameter": (lambda y, x: F.softplus(y, beta=3), lambda y, x: jax.nn.softplus(3 * y) / 3),
    "rounding": (
        lambda y, x: F.silu(y.half().double()),
        lambda y, x: jax.nn.silu(y.astype(jnp.float16).astype(y.dtype)),
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_twins_agree(name):
    assert judged(*sequences(*HONEST[name])).ok


@pytest.mark.parametrize("said", POOLINGS)
def test_pooling_of_tokens(said):
    own, flax = POOLINGS[said]
    first = judged(*sequences(own, flax)).first_divergence
    assert first.path == "b (input)" and first.causes == (said,), first.causes


GATES = {
    "torch sigmoid, Flax hard sigmoid": (
        lambda y, x: x * torch.sigmoid(y),
        lambda y, x: x * jax.nn.hard_sigmoid(y),
    ),
    "torch sigmoid, Flax tanh": (
        lambda y, x: F.silu(x) * torch.sigmoid(y),
        lambda y, x: jax.nn.silu(x) * jnp.tanh(y),
    ),
    "torch x · gate, Flax x + gate": (
        lambda y, x: x * torch.sigmoid(y),
        lambda y, x: x + jax.nn.sigmoid(y),
    ),
}


@pytest.mark.parametrize("said", GATES)
def test_a_gate(said):
    own, flax = GATES[said]
    first = judged(*sequences(own, flax)).first_divergence
    assert first.path == "b (input)", first
    assert any(cause.endswith(said) for cause in first.causes), first.causes


def softplus(beta: float) -> Callable:
    return lambda y, x: jax.nn.softplus(beta * y) / beta


PARAMETERS = {
    "alpha of an elu of a: torch 0.4, Flax 0.7": (
        lambda y, x: F.elu(y, 0.4),
        lambda y, x: jax.nn.elu(y, 0.7),
    ),
    "beta of a softplus of a: torch 3, Flax 2": (
        lambda y, x: F.softplus(y, beta=3),
        softplus(2.0),
    ),
    "slope of a leaky relu of a: torch 0.07, Flax 0.05": (
        lambda y, x: F.leaky_relu(y, 0.07),
        lambda y, x: jax.nn.leaky_relu(y, 0.05),
    ),
    "the number at which a relu ends of a: torch 0.5, Flax none": (
        lambda y, x: y.clamp(0, 0.5),
        lambda y, x: jax.nn.relu(y),
    ),
    "Flax rounds a to float16 before silu": (
        lambda y, x: F.silu(y),
        lambda y, x: jax.nn.silu(y.astype(jnp.float16).astype(y.dtype)),
    ),
    "Flax has 2 × torch's − 1": (lambda y, x: y, lambda y, x: (y - 0.5) / 0.5),
}


@pytest.mark.parametrize("said", PARAMETERS)
def test_a_parameter_is_found(said):
    own, flax = PARAMETERS[said]
    first = judged(*sequences(own, flax)).first_divergence
    assert first.path == "b (input)" and said in first.causes, first.causes


NONE = {
    "resizing": (pictures, lambda y, x: up(y), lambda y, x: larger(jnp.sin(y) + x, "lanczos3")),
    "pooling": (sequences, lambda y, x: y.mean(1), lambda y, x: (y**3).mean(1) + x[:, 1]),
    "gate": (
        sequences,
        lambda y, x: x * torch.sigmoid(y),
        lambda y, x: x * jax.nn.sigmoid(1.3 * y),
    ),
    "parameter": (sequences, lambda y, x: F.elu(y, 0.4), lambda y, x: jax.nn.elu(y, 0.7) + x / 3),
}


@pytest.mark.parametrize("name", NONE)
def test_nothing_is_claimed_of_flax_where_nothing_fits(name):
    pair, own, flax = NONE[name]
    first = judged(*pair(own, flax)).first_divergence
    assert first.path == "b (input)"
    assert all(cause.endswith("Flax something else") for cause in first.causes), first.causes


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 64, 56, 56), marks=pytest.mark.slow),
        (1, 197, 768),
        pytest.param((8, 2048), marks=pytest.mark.slow),
    ],
)
def test_the_search_ends_where_tensors_are_large(shape):
    rng = np.random.default_rng(0)
    known = {f"layer{i}": rng.normal(size=shape) for i in range(8)}
    if len(shape) == 3:
        known["qkv"] = rng.normal(size=(*shape[:2], 3 * shape[2]))
    start = time.process_time()
    found = explain_by_families(
        known,
        rng.normal(size=shape),
        rng.normal(size=shape),
        lambda truth, flax: lambda array: array,
        LARGER,
    )
    assert list(found) == [] and time.process_time() - start < 60
