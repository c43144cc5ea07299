"""Optimizers written twice, in torch and in optax, with the same settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import torch

FIRST, SECOND = range(4), range(4, 9)


class Recipe(NamedTuple):
    """One optimizer twice.

    before: what users of torch write between backward() and step().
    step: the steps of FIRST, where one side counts them and the other does not.
    """

    torch: Callable[[torch.nn.Module], torch.optim.Optimizer]
    optax: Callable[[], optax.GradientTransformation]
    before: Callable[..., None] | None = None
    step: int | None = None


def one_group(kind: type[torch.optim.Optimizer], **settings: Any):
    return lambda model: kind(model.parameters(), **settings)


def is_kernel(parameter: Any) -> bool:
    return parameter.ndim > 1


def two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Weight decay and a learning rate of their own for kernels; not in the model's order."""
    rest = [p for p in model.parameters() if not is_kernel(p)]
    kernels = [p for p in model.parameters() if is_kernel(p)]
    groups = [{"params": rest, "lr": 3e-3, "weight_decay": 0.0}, {"params": kernels}]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=1e-2)


def two_labels() -> optax.GradientTransformation:
    return optax.partition(
        {True: optax.adamw(1e-2, weight_decay=1e-2), False: optax.adamw(3e-3, weight_decay=0.0)},
        partial(jax.tree.map, is_kernel),
    )


def clip(model: torch.nn.Module, *_: Any) -> None:
    """As optax does it; `clip_grad_norm_` adds 1e-6 to the norm, which shows at 1e-12."""
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    for parameter in model.parameters():
        parameter.grad *= min(1.0, 0.1 / float(norm))


def decaying(count: jax.Array) -> jax.Array:
    """In float64; optax's own schedules divide counts in float32, which shows at 1e-12."""
    return 1e-2 * 0.8 ** count.astype(jnp.float64)


def schedule(_: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["lr"] = 1e-2 * 0.8**step


ADAMW = one_group(torch.optim.AdamW, lr=1e-2, weight_decay=1e-2)
RMSPROP = {"decay": 0.99, "eps": 1e-8, "eps_in_sqrt": False}
RECIPES = {
    "sgd": Recipe(one_group(torch.optim.SGD, lr=0.1), lambda: optax.sgd(0.1)),
    "momentum": Recipe(
        one_group(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
        lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.05, momentum=0.9)),
    ),
    "nesterov": Recipe(
        one_group(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
        lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    ),
    "sgd, schedule": Recipe(
        one_group(torch.optim.SGD, lr=0.05, momentum=0.9),
        lambda: optax.sgd(decaying, momentum=0.9),
        schedule,
        step=len(FIRST),
    ),
    "adam": Recipe(
        one_group(torch.optim.Adam, lr=1e-2, betas=(0.8, 0.99)),
        lambda: optax.adam(1e-2, b1=0.8, b2=0.99),
    ),
    "adamw": Recipe(ADAMW, lambda: optax.adamw(1e-2, weight_decay=1e-2)),
    "adamw, clipped": Recipe(
        ADAMW,
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=1e-2)),
        clip,
    ),
    "adamw, schedule": Recipe(
        ADAMW,
        lambda: optax.inject_hyperparams(optax.adamw)(decaying, weight_decay=1e-2),
        schedule,
    ),
    "adamw, two groups": Recipe(two_groups, two_labels),
    "rmsprop": Recipe(
        one_group(torch.optim.RMSprop, lr=1e-3), lambda: optax.rmsprop(1e-3, **RMSPROP), step=4
    ),
    "rmsprop, centered": Recipe(
        one_group(torch.optim.RMSprop, lr=1e-3, centered=True),
        lambda: optax.rmsprop(1e-3, centered=True, **RMSPROP),
        step=4,
    ),
}


@cache
def in_optax(name: str) -> optax.GradientTransformation:
    """One object a recipe, so that its update is compiled once."""
    return RECIPES[name].optax()
