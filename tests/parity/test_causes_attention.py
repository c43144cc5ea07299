"""Attention between layers: what Flax does otherwise is named, and nothing where nothing fits."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from gam_flax.convert import load_torch
from gam_flax.parity import compare

WIDTH, HEADS, TOKENS = 8, 2, 5
X = np.random.default_rng(0).normal(size=(2, TOKENS, WIDTH))


def future(tokens: int, shift: int = 1) -> np.ndarray:
    return np.triu(np.ones((tokens, tokens), bool), shift)


class Fused(nn.Module):
    """Causal attention, queries, keys and values by one layer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, n, WIDTH))


class FlaxFused(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.heads, self.scale, self.axis = HEADS, (WIDTH // HEADS) ** -0.5, -1
        self.split: Callable = lambda y, h: y.reshape(*y.shape[:2], 3, h, -1).transpose(
            2, 0, 3, 1, 4
        )
        self.mask: Callable = lambda a: jnp.where(future(TOKENS), -jnp.inf, a)
        self.after: Callable = lambda weights: weights
        self.merge: Callable = lambda y: y.transpose(0, 2, 1, 3).reshape(len(y), TOKENS, WIDTH)

    def __call__(self, x):
        q, k, v = self.split(self.qkv(x), self.heads)
        weights = jax.nn.softmax(self.mask(q @ k.swapaxes(2, 3) * self.scale), self.axis)
        return self.proj(self.merge(self.after(weights) @ v))


def others(**parts: Callable) -> Callable:
    """Sets attributes of the Flax model."""

    def change(twin: FlaxFused) -> None:
        for name, value in parts.items():
            setattr(twin, name, value)

    return change


def hidden(masked: np.ndarray, value: float = -np.inf) -> Callable:
    return lambda a: jnp.where(masked, value, a)


def reordered(order: tuple[int, ...]) -> Callable:
    def split(y, h):
        parts = y.reshape(*y.shape[:2], 3, h, -1).transpose(2, 0, 3, 1, 4)
        return parts[jnp.asarray(order)]

    return split


def split_as(lengths: Callable, axes: tuple[int, ...]) -> Callable:
    return lambda y, h: y.reshape(*y.shape[:2], *lengths(h)).transpose(axes)


FAULTS = {
    "torch 2 heads, Flax 4 heads": others(heads=4, scale=2**-0.5),
    "torch scale 1/√d, Flax scale 1/√D": others(scale=WIDTH**-0.5),
    "torch scale 1/√d, Flax no scale": others(scale=1.0),
    "torch softmax over the keys, Flax softmax over the queries": others(axis=-2),
    "torch softmax over the keys, Flax softmax over the heads": others(axis=1),
    "torch a causal mask, Flax no mask": others(mask=lambda a: a),
    "Flax the causal mask the wrong way round": others(mask=hidden(future(TOKENS).T)),
    "Flax a causal mask that shows the next token": others(mask=hidden(future(TOKENS, 2))),
    "Flax a causal mask of −10 instead of −∞": others(mask=hidden(future(TOKENS), -10.0)),
    "Flax a causal mask after the softmax": others(
        mask=lambda a: a, after=lambda w: jnp.where(future(TOKENS), 0.0, w)
    ),
    "Flax the order keys, queries, values": others(split=reordered((1, 0, 2))),
    "Flax the order values, queries, keys": others(split=reordered((1, 2, 0))),
    "Flax split as (heads, 3, d)": others(split=split_as(lambda h: (h, 3, -1), (3, 0, 2, 1, 4))),
    "Flax split as (3, d, heads)": others(split=split_as(lambda h: (3, -1, h), (2, 0, 4, 1, 3))),
    "Flax heads merged without transposing back": others(
        merge=lambda y: y.reshape(len(y), TOKENS, WIDTH)
    ),
    "torch 2 heads and scale 1/√d, Flax 4 heads and no scale": others(heads=4, scale=1.0),
}


def twins(change: Callable = lambda twin: None) -> tuple[Fused, FlaxFused]:
    torch.manual_seed(0)
    model, twin = Fused(), FlaxFused()
    load_torch(twin, model)
    change(twin)
    return model, twin


def test_the_honest_twin_agrees():
    assert compare(*twins(), X).ok


@pytest.mark.parametrize("said", FAULTS)
def test_what_the_attention_does_otherwise_is_named(said):
    first = compare(*twins(FAULTS[said]), X, gradients=False).first_divergence
    assert first is not None and first.path == "proj (input)"
    (cause,) = first.causes
    assert cause.startswith("attention of qkv") and cause.endswith(said), cause


@pytest.mark.parametrize(
    "change",
    [
        others(scale=0.37),
        others(after=lambda weights: weights**2),
        others(mask=lambda a: jnp.where(future(TOKENS), -jnp.inf, a + 0.1 * jnp.arange(TOKENS))),
    ],
)
def test_an_attention_that_no_setting_gives_has_no_cause(change):
    first = compare(*twins(change), X, gradients=False).first_divergence
    assert first is not None and first.path == "proj (input)" and first.causes == ()


class Three(nn.Module):
    """Queries of one sequence, keys and values of another, by three layers; in any order."""

    def __init__(self):
        super().__init__()
        self.v, self.q, self.k, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        def split(y):
            return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        v, q, k = split(self.v(x)), split(self.q(x[:, :3])), split(self.k(x))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class FlaxThree(nnx.Module):
    """`dot_product_attention`, whose softmax may be in float32."""

    def __init__(self, attention: Callable, **settings):
        rngs = nnx.Rngs(0)
        self.v, self.q, self.k, self.out = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))
        self.attention, self.settings = attention, settings

    def __call__(self, x):
        def split(y):
            return y.reshape(*y.shape[:2], HEADS, -1)

        v, q, k = split(self.v(x)), split(self.q(x[:, :3])), split(self.k(x))
        y = self.attention(q, k, v, **self.settings)
        return self.out(y.reshape(len(x), 3, WIDTH))


@pytest.mark.parametrize(
    ("attention", "settings", "said"),
    [
        (nnx.dot_product_attention, {}, ""),
        (jax.nn.dot_product_attention, {}, "float32"),
        (jax.nn.dot_product_attention, {"scale": 1.0}, "torch scale 1/√d, Flax no scale"),
        (lambda q, k, v: nnx.dot_product_attention(q, v, k), {}, "q as queries, v as keys"),
    ],
)
def test_three_layers_and_softmax_in_float32(attention, settings, said):
    torch.manual_seed(0)
    model, twin = Three(), FlaxThree(attention, **settings)
    load_torch(twin, model)
    report = compare(model, twin, X, gradients=False)
    causes = report.first_divergence.causes if report.first_divergence else ("",)
    assert report.first_divergence is None or report.first_divergence.path == "out (input)"
    assert len(causes) == 1 and said in causes[0], causes
