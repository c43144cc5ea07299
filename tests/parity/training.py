"""A torch model and its twin, trained alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from flax import linen, nnx

import gam_flax
from gam_flax.convert.leaves import to_flax_layout, torch_name
from gam_flax.ops.batch_norm import BatchNorm
from gam_flax.parity import flax_side, torch_side
from gam_flax.parity.align import Layouts, Names
from gam_flax.parity.judge import gap, magnitude
from gam_flax.parity.training import Training, laid, train_torch, untrained
from gam_flax.parity.training_flax import TrainingProgram
from tests.parity.networks import PAD, NNXNet, X, nnx_net

BEFORE_A_NORM = ("conv1.bias",)  # its gradient is rounding noise
LAY = Layouts({}).parameter


def nnx_twin(model: torch.nn.Module) -> nnx.Module:
    """With a norm that keeps torch's running variance."""
    twin = nnx_net(model)
    assert isinstance(twin, NNXNet)
    twin.norm = BatchNorm(8, rngs=nnx.Rngs(0))
    return twin


class LinenTwin(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = linen.Conv(8, (3, 3), strides=2, padding=PAD, name="conv1")(x)
        x = jax.nn.relu(gam_flax.linen.BatchNorm(name="norm")(x, train))
        x = linen.max_pool(x, (2, 2), strides=(2, 2))
        x = linen.Conv(6, (3, 3), padding=PAD, feature_group_count=2, name="conv2")(x)
        return linen.Dense(5, name="fc")(x.mean((1, 2)))


def linen_twin(model: torch.nn.Module) -> tuple[Any, dict[str, Any]]:
    shapes = jax.eval_shape(LinenTwin().init, jax.random.key(0), X)
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}

    def value(path: Any, _: Any) -> np.ndarray:
        name = ".".join(part.key for part in path[1:])
        return to_flax_layout(name, state[torch_name(name)])

    return LinenTwin(), jax.tree_util.tree_map_with_path(value, shapes)


class Pair(NamedTuple):
    """A torch model, its twin, and what both are trained with."""

    model: torch.nn.Module
    twin: Any
    optimizer: Any = "adamw"
    steps: int = 20
    dtype: str = "float64"
    train: bool = True
    frozen: tuple[str, ...] = BEFORE_A_NORM
    loss: tuple[Any, Any] = (None, None)

    def torch(self, factors: Any = None, dtype: str = "", x: np.ndarray = X) -> Training:
        kinds = {"dtype": dtype or self.dtype, "rounded_to": self.dtype}
        same = {"optimizer": self.optimizer, "steps": self.steps, "train": self.train}
        return train_torch(
            self.model, x, factors or {}, frozen=self.frozen, loss=self.loss[0], **same, **kinds
        )

    def flax(self) -> tuple[TrainingProgram, dict[str, str]]:
        """The program, and the partners of torch's parameters and buffers."""
        model, evaluation = (
            flax_side.pure(self.twin, dtype=self.dtype, train=train)
            for train in (self.train, False)
        )
        known = {**model.parameters, **model.statistics}
        keys = [key for kind in torch_side.weights(self.model) for key in kind]
        partners = {key: name for key in keys if (name := Names(None).leaf(key, known))}
        program = TrainingProgram(
            model,
            evaluation,
            optimizer=self.optimizer,
            steps=self.steps,
            dtype=self.dtype,
            partners=partners,
            frozen=self.frozen,
            fixed=untrained(self.model),
            loss=self.loss[1],
        )
        return program, partners

    def both(self) -> tuple[Training, Training, dict[str, str]]:
        program, partners = self.flax()
        return self.torch(), program(X, {}), partners


def errors(own: Training, flax: Training, partners: dict[str, str]) -> dict[tuple[str, str], float]:
    """Of every tensor, of its scale."""
    pairs = laid(own, flax, partners, LAY)
    return {
        place: float(gap(a, b).max()) / (magnitude(a) or 1.0) for place, (a, b) in pairs.items()
    }


def wide_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: tensor.double().numpy() for key, tensor in model.state_dict().items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """These networks are too small for more, and a busy machine makes more slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
