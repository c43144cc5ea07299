"""A training that began in torch goes on here: the optimizer's state comes along."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp

from gam_flax.convert.errors import shorten
from gam_flax.convert.leaves import split
from gam_flax.convert.optimizer import load_torch_optimizer
from gam_flax.convert.source import open_source
from gam_flax.train.errors import TrainingError
from gam_flax.train.settings import Settings
from gam_flax.train.sharding import placed
from gam_flax.train.step import TrainState


def going_on(state: TrainState, settings: Settings) -> TrainState:
    """The state after `settings.init_step` steps, with torch's optimizer; else as it is.

    Optimizers with one group of parameters, in the order of the model's, or built from
    `named_parameters()`.

    Raises:
        TrainingError: the file has no optimizer in it.
        CheckpointError: the optimizer is of another kind, or of other parameters.
    """
    step = settings.init_step
    if step is None:
        return state
    theirs = _optimizer_in(settings)
    one_group = len(theirs.get("param_groups", [])) == 1
    optimizer = load_torch_optimizer(
        state.optimizer,
        state.params,
        theirs,
        names=_parameters_in(settings) if one_group else None,
        step=step,
    )
    shardings = jax.tree.map(lambda old: old.sharding, state.optimizer)
    return state._replace(
        step=placed(jnp.int32(step), state.step.sharding),
        optimizer=placed(optimizer, shardings),
    )


def _optimizer_in(settings: Settings) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(str(settings.init), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise TrainingError(
            f"{shorten(settings.init)}: cannot be read for its optimizer: {shorten(error, 120)}"
        ) from error
    found = content.get("optimizer") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise TrainingError(
            f"{shorten(settings.init)}: has no state_dict of an optimizer under 'optimizer'; "
            "leave init-step away to start with its weights alone"
        )
    return found


def _parameters_in(settings: Settings) -> list[str]:
    """The names of the parameters, in the order of the file, which is the model's."""
    names = open_source(settings.init).tensors
    return [name for name in names if split(name)[1] in ("weight", "bias")]
