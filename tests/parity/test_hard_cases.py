"""Pairs that once broke the harness: crashes, honest ones flagged, faults passed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

from gam_flax.convert import load_torch
from gam_flax.ops.batch_norm import BatchNorm
from gam_flax.parity import compare
from gam_flax.parity.glue import channel_order, relations
from tests.parity.networks import X, nnx_net, torch_net

RNG = np.random.default_rng(0)
V = RNG.normal(size=(6, 6))


@dataclass
class Answer:
    scores: Any
    auxiliary: Any


class Answering(nn.Module):
    """Gives a dataclass, with an output of one number in it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        y = self.fc(x)
        return Answer(torch.softmax(y, -1), y.square().mean())


class FlaxAnswering(nnx.Module):
    def __init__(self, last=jax.nn.softmax):
        self.fc = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.last = last

    def __call__(self, x):
        y = self.fc(x)
        return Answer(self.last(y), jnp.square(y).mean())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_outputs_in_a_dataclass_and_of_one_number(dtype):
    model, twin = Answering(), FlaxAnswering()
    load_torch(twin, model)
    report = compare(model, twin, V, dtype=dtype)
    paths = [row.path for row in report.rows if row.stage == "output"]
    assert report.ok and paths == ["[scores]", "[auxiliary]"]
    twin.last = jax.nn.sigmoid
    assert compare(model, twin, V, dtype=dtype).first_divergence.path == "[scores]"


def test_what_cannot_be_compared_is_refused_in_a_line():
    class Silent(nn.Module):
        def forward(self, x):
            return "a word"

    model = torch_net()
    twin = nnx_net(model)
    with pytest.raises(ValueError, match="returns a str, in which no tensor is found"):
        compare(Silent(), twin, X)
    with pytest.raises(ValueError, match=r"no numbers in it, its shape is \(0, 9, 9, 3\)"):
        compare(model, twin, np.zeros((0, 9, 9, 3)))
    for wrong in (np.array(["picture"]), np.array([{"x": X}])):
        with pytest.raises(ValueError, match="inputs must be one array"):
            compare(model, twin, wrong)


class OwnNorm(nn.Module):
    """A norm whose statistics no table knows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("moving_mean", torch.zeros(6))
        self.register_buffer("ones", torch.ones(6))

    def forward(self, x):
        if self.training:
            self.moving_mean += 0.1 * (x.mean(0).detach() - self.moving_mean)
        return x * self.ones


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_statistics_that_move_must_have_a_partner(dtype):
    class Same(nnx.Module):
        def __call__(self, x):
            return x

    assert compare(OwnNorm(), Same(), V, dtype=dtype).ok
    report = compare(OwnNorm(), Same(), V, dtype=dtype, train=True)
    wrong = [row for row in report.rows if not row.ok]
    assert [(r.stage, r.path, r.verdict) for r in wrong] == [
        ("running statistics", "moving_mean", "missing")
    ]


def test_a_forward_may_write_over_its_input():
    model = nn.Sequential()
    model.act, model.fc = nn.ReLU(inplace=True), nn.Linear(6, 6)

    class Net(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.fc(jax.nn.relu(x))

    twin = Net()
    load_torch(twin, model)
    assert compare(model, twin, V).ok


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(4))

    def forward(self, x):
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = torch.relu(norm(linear(x)))
        return x


class FlaxDeep(nnx.Module):
    def __init__(self):
        self.linears = nnx.List([nnx.Linear(6, 6, rngs=nnx.Rngs(0)) for _ in range(4)])
        self.norms = nnx.List([BatchNorm(6) for _ in range(4)])

    @nnx.jit
    def __call__(self, x):
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = jax.nn.relu(norm(linear(x)))
        return x


def test_a_model_whose_layers_are_inside_jit_is_allowed_what_torch_needs_for_all_of_them():
    torch.manual_seed(0)
    model, twin = Deep(), FlaxDeep()
    load_torch(twin, model)
    assert compare(model, twin, V, dtype="float32", train=True).ok


def test_the_counter_of_a_schedule_is_no_fault():
    model = torch_net()
    schedule = optax.sgd(optax.constant_schedule(1e-2), momentum=0.9)
    report = compare(
        model,
        nnx_net(model),
        X,
        dtype="float32",
        steps=2,
        optimizer=(lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9), schedule),
    )
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("ours", "optaxes"),
    [
        (torch.optim.Adamax, optax.adamax),
        (
            lambda ps, lr: torch.optim.RMSprop(ps, lr=lr, alpha=0.9),
            lambda lr: optax.rmsprop(lr, decay=0.9, eps_in_sqrt=False),
        ),
    ],
)
def test_what_follows_from_the_count_of_steps_needs_no_partner(ours, optaxes):
    model = torch_net()
    pair = (lambda ps: ours(ps, lr=1e-3), optaxes(1e-3))
    assert compare(model, nnx_net(model), X, steps=2, optimizer=pair).ok
    other = (pair[0], optaxes(2e-3))
    assert not compare(model, nnx_net(model), X, steps=2, optimizer=other).ok


def test_what_nadam_multiplies_its_betas_to_is_no_moment():
    net = Answering()
    pair = (lambda ps: torch.optim.NAdam(ps, lr=1e-3), optax.nadam(1e-3))
    twin = FlaxAnswering()
    load_torch(twin, net)
    rows = compare(net, twin, V, steps=1, optimizer=pair).rows
    states = [row for row in rows if row.stage == "optimizer state"]
    assert states and all(row.verdict != "missing" for row in states)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda k: 1.0001 * k, "1.0001 × torch's"),
        (lambda k: k.astype(np.float16).astype(k.dtype), "rounded to float16"),
        (lambda k: k.astype(ml_dtypes.bfloat16).astype(k.dtype), "rounded to bfloat16"),
    ],
)
def test_a_weight_is_rounded_only_where_it_is_the_rounded_one(change, cause):
    model, twin = Answering(), FlaxAnswering()
    load_torch(twin, model)
    twin.fc.kernel.set_value(jnp.asarray(change(np.asarray(twin.fc.kernel.get_value()))))
    causes = compare(model, twin, V).first_divergence.causes
    assert any(cause in line for line in causes), causes


def test_channels_in_another_order_are_found_among_dead_ones():
    pictures = RNG.normal(size=(2, 4, 4, 32))
    pictures[..., [1, 16, 17, 31]] = 0
    joined = np.roll(pictures, 16, -1)
    assert channel_order(pictures, joined) == [*range(16, 32), *range(16)]
    (line,) = relations(pictures, joined, lambda array: array)
    assert line == "concat order: Flax's channels are torch's 16–31, 0–15"


def test_what_is_computed_in_float32_is_named():
    class Coarse(FlaxAnswering):
        def __call__(self, x):
            y = self.fc(x)
            y32 = jax.nn.softmax(y.astype(jnp.float32)).astype(y.dtype)
            return Answer(y32, jnp.square(y).mean())

    model, twin = Answering(), Coarse()
    load_torch(twin, model)
    first = compare(model, twin, V).first_divergence
    assert first.path == "[scores]" and any("float32" in line for line in first.causes)
