"""One small network and its training, in torch, NNX and Linen: stopped in one, gone on in another.

Its first convolution has no bias: before a BatchNorm that would have a true gradient of zero, and
Adam scales the rounding noise, which is each framework's own, up to steps of the learning rate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen, nnx

import gam_flax
from gam_flax.convert import load_torch, load_torch_linen, to_torch
from gam_flax.ops.batch_norm import BatchNorm

PAD = ((1, 1), (1, 1))


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (B, H, W, 3) and targets (B, 4) of one step, the same in every framework."""
    rng = np.random.default_rng(step)
    return rng.normal(size=(6, 5, 5, 3)), rng.normal(size=(6, 4))


# torch


def torch_net(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """conv1 norm relu conv2 gap head; the head begins with a square linear layer."""
    torch.manual_seed(0)
    linear = torch.nn.Linear
    layers = OrderedDict(
        conv1=torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
        norm=torch.nn.BatchNorm2d(8),
        relu=torch.nn.ReLU(),
        conv2=torch.nn.Conv2d(8, 6, 3, padding=1, groups=2),
        gap=torch.nn.AdaptiveAvgPool2d(1),
        flat=torch.nn.Flatten(),
        head=torch.nn.Sequential(linear(6, 6), torch.nn.ReLU(), linear(6, 4)),
    )
    return torch.nn.Sequential(layers).to(dtype)


def train_torch(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    before: Callable[[torch.nn.Module, torch.optim.Optimizer, int], None] | None = None,
) -> None:
    """Takes `steps`; `before(model, optimizer, step)` comes between the gradients and the step."""
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        output = model(torch.from_numpy(np.moveaxis(x, -1, 1)))
        (output - torch.from_numpy(y)).square().mean().backward()
        if before:
            before(model, optimizer, step)
        optimizer.step()


# Flax


class Net(nnx.Module):
    """The same network in NNX."""

    def __init__(self, dtype: Any = jnp.float64):
        types: dict[str, Any] = {"param_dtype": dtype, "rngs": nnx.Rngs(0)}
        self.conv1 = nnx.Conv(3, 8, (3, 3), padding=PAD, use_bias=False, **types)
        self.norm = BatchNorm(8, **types)
        self.conv2 = nnx.Conv(8, 6, (3, 3), padding=PAD, feature_group_count=2, **types)
        self.head = nnx.Sequential(nnx.Linear(6, 6, **types), nnx.relu, nnx.Linear(6, 4, **types))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.conv1(x)))
        return self.head(self.conv2(x).mean((1, 2)))


class LinenHead(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(linen.Dense(6, param_dtype=jnp.float64, name="0")(x))
        return linen.Dense(4, param_dtype=jnp.float64, name="2")(x)


class LinenNet(linen.Module):
    """The same network in Linen."""

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types: dict[str, Any] = {"param_dtype": jnp.float64}
        x = linen.Conv(8, (3, 3), padding=PAD, use_bias=False, name="conv1", **types)(x)
        x = jax.nn.relu(gam_flax.linen.BatchNorm(name="norm", **types)(x, train))
        conv2 = linen.Conv(6, (3, 3), padding=PAD, feature_group_count=2, name="conv2", **types)
        return LinenHead(name="head")(conv2(x).mean((1, 2)))


@cache
def nnx_gradients() -> Callable[..., tuple[Any, Any]]:
    """(parameters, statistics, x, y) → gradients and statistics after, compiled once for all."""
    graph = nnx.graphdef(Net())

    def loss(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, stats, copy=True)
        return jnp.square(model(x) - y).mean(), nnx.state(model, nnx.BatchStat)

    return jax.jit(jax.grad(loss, has_aux=True))


@cache
def linen_gradients() -> Callable[..., tuple[Any, Any]]:
    def loss(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": stats}
        output, after = LinenNet().apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.square(output - y).mean(), after["batch_stats"]

    return jax.jit(jax.grad(loss, has_aux=True))


@cache
def plain_update(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """(gradients, state, parameters) → parameters and state after, compiled once for each `tx`."""

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(update)


@nnx.jit
def nnx_update(optimizer: nnx.Optimizer, model: nnx.Module, grads: Any) -> None:
    optimizer.update(model, grads)


class Training:
    """A Flax network with the weights of a torch one, and its optimizer.

    params: what the converter takes as such.
    state: what it takes as the optimizer's state.
    """

    def __init__(self, source: torch.nn.Module, tx: optax.GradientTransformation):
        raise NotImplementedError

    params: Any
    state: Any

    def weights(self) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def train(self, steps: range) -> None:
        raise NotImplementedError


class OptimizerTraining(Training):
    """`nnx.Optimizer`."""

    def __init__(self, source: torch.nn.Module, tx: optax.GradientTransformation):
        self.params = Net()
        load_torch(self.params, source)
        self.state = nnx.Optimizer(self.params, tx, wrt=nnx.Param)

    def weights(self) -> dict[str, np.ndarray]:
        return to_torch(self.params)

    def train(self, steps: range) -> None:
        for step in steps:
            params, stats = nnx.state(self.params, nnx.Param, nnx.BatchStat)
            grads, stats = nnx_gradients()(params, stats, *batch(step))
            nnx.update(self.params, stats)
            nnx_update(self.state, self.params, grads)


class PlainTraining(Training):
    """optax without a wrapper, over the parameters of an NNX model."""

    def __init__(self, source: torch.nn.Module, tx: optax.GradientTransformation):
        self.params = Net()
        load_torch(self.params, source)
        self.state = tx.init(nnx.state(self.params, nnx.Param))
        self._update = plain_update(tx)

    def weights(self) -> dict[str, np.ndarray]:
        return to_torch(self.params)

    def train(self, steps: range) -> None:
        for step in steps:
            params, stats = nnx.state(self.params, nnx.Param, nnx.BatchStat)
            grads, stats = nnx_gradients()(params, stats, *batch(step))
            params, self.state = self._update(grads, self.state, params)
            nnx.update(self.params, params, stats)


class LinenTraining(Training):
    """optax without a wrapper, over the parameters of a Linen module."""

    def __init__(self, source: torch.nn.Module, tx: optax.GradientTransformation):
        shapes = jax.eval_shape(LinenNet().init, jax.random.key(0), jnp.zeros((1, 5, 5, 3)))
        variables, _ = load_torch_linen(shapes, source)
        self.params, self._stats = variables["params"], variables["batch_stats"]
        self.state = tx.init(self.params)
        self._update = plain_update(tx)

    def weights(self) -> dict[str, np.ndarray]:
        return to_torch({"params": self.params, "batch_stats": self._stats})

    def train(self, steps: range) -> None:
        for step in steps:
            grads, self._stats = linen_gradients()(self.params, self._stats, *batch(step))
            self.params, self.state = self._update(grads, self.state, self.params)


TRAININGS = {"optimizer": OptimizerTraining, "plain": PlainTraining, "linen": LinenTraining}


def disagreement(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """max|a − b| / max|b| of the worst tensor."""
    assert ours.keys() == theirs.keys()
    return max(
        float(np.abs(np.asarray(ours[key]) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
        for key, b in theirs.items()
    )
