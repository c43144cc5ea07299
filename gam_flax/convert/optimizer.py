"""The state of an optimizer from torch to optax and back, so that training goes on elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.files import to_torch_tensor
from gam_flax.convert.optax_state import Moment, Parameters, counters, filled, moments, placed
from gam_flax.convert.torch_file import to_numpy
from gam_flax.convert.torch_optimizer import (
    STEP,
    TorchParameter,
    listed,
    state_dict_of,
    torch_parameters,
)

if TYPE_CHECKING:
    import torch

_SHOWN = 4  # of the problems that a message names


def load_torch_optimizer(
    opt_state: Any,
    params: Any,
    source: Any,
    *,
    names: Iterable[str] | torch.nn.Module | None = None,
    step: int | None = None,
) -> Any:
    """The optax state that goes on where a torch optimizer stopped.

        optimizer = nnx.Optimizer(model, optax.adamw(1e-3, weight_decay=1e-2), wrt=nnx.Param)
        load_torch(model, torch_model)
        load_torch_optimizer(optimizer, model, torch_optimizer, names=torch_model)

    | torch                       | its state             | optax                                 |
    |-----------------------------|-----------------------|---------------------------------------|
    | SGD with momentum, Nesterov | momentum_buffer       | trace of sgd                          |
    | Adam, AdamW                 | exp_avg, exp_avg_sq   | mu, nu of adam, adamw                 |
    | RMSprop                     | square_avg            | nu of rmsprop(eps_in_sqrt=False)      |
    | RMSprop, centered           | grad_avg, square_avg  | mu, nu of the same with centered=True |
    | step of each parameter      | step                  | count, of schedules as well           |

    in any nest of `chain`, `masked`, `partition` (`multi_transform`), `inject_hyperparams`,
    clipping, weight decay and schedules. Arrays are laid out as the weights are, bit for bit where
    the dtypes agree, else cast to the optax state's. One count in optax stands for many
    parameters, so these must have taken the same number of steps.

    Checked: that both sides hold the same moments of the same parameters in the same shapes.
    Not checked, since an optax state does not show it: learning rates, betas, eps, weight decay,
    dampening, Nesterov, and which of adam, nadam or adamax a state belongs to. These are to be
    given to optax as they were to torch, whose defaults differ; `hyperparams` of
    `inject_hyperparams` stay as they are.

    Args:
        opt_state: what `tx.init(params)` gave, or shapes alone from `jax.eval_shape`; nothing in
            it matters but the structure. Or an `nnx.Optimizer`.
        params: the NNX model, or the tree that `tx.init` was given: Linen parameters or an
            `nnx.State`.
        source: a `torch.optim.Optimizer`, or its `state_dict()`, from memory or from
            `torch.load(path, weights_only=True)`.
        names: the parameters' torch names in the order of the optimizer's groups; or the torch
            model, for a live optimizer or for a single group of `model.parameters()`. Not needed
            where the optimizer was built from `model.named_parameters()` (torch 2.6 and later).
        step: the number of steps taken, for counts in optax that torch does not keep: SGD has
            none.

    Returns:
        A new state of the structure of `opt_state`; an `nnx.Optimizer` is filled in place, its own
        step included, and returned.

    Raises:
        CheckpointError: `source` is no optimizer, or not of these kinds; parameters cannot be
            named; a parameter, a moment or a shape is on one side only; steps differ inside one
            count; a part of `opt_state` has no counterpart. Nothing changes when this raises.
    """
    from flax import nnx

    state = opt_state.opt_state if isinstance(opt_state, nnx.Optimizer) else opt_state
    known = Parameters(params)
    theirs = torch_parameters(source, names, known.paths)
    places = list(moments(state, known))
    _check(theirs, places, known)
    values = {
        (place.path, place.key): _value(place, theirs[leaves.torch_name(place.path)], known)
        for place in places
    }
    new = filled(
        state,
        known,
        moment=lambda path, key: values[path, key],
        count=lambda paths: _one_count(paths, theirs, step),
    )
    if not isinstance(opt_state, nnx.Optimizer):
        return new
    counted = [p.steps for p in theirs.values() if p.steps is not None]
    taken = max(counted, default=step)
    opt_state.opt_state = nnx.data(new)
    if taken is not None:
        opt_state.step.set_value(placed(taken, opt_state.step.get_value()))
    return opt_state


def to_torch_optimizer(
    opt_state: Any,
    params: Any,
    like: Any,
    *,
    names: Iterable[str] | torch.nn.Module | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """The torch state_dict that goes on where an optax optimizer stopped.

        torch_optimizer.load_state_dict(
            to_torch_optimizer(optimizer, model, torch_optimizer, names=torch_model)
        )

    The opposite of `load_torch_optimizer`: the same table, the same checks, and bit for bit. The
    groups with their hyperparameters are those of `like`. The count of a schedule has no place in
    a torch optimizer: it is the `last_epoch` of a torch scheduler.

    Args:
        opt_state: an optax state, or an `nnx.Optimizer`.
        params: as for `load_torch_optimizer`.
        like: the `torch.optim.Optimizer` that is to go on, or its `state_dict()`.
        names: as for `load_torch_optimizer`.
        step: the number of steps taken, for RMSprop, where optax counts none.

    Returns:
        {"state": …, "param_groups": …} with tensors of their own, for `like.load_state_dict`.

    Raises:
        CheckpointError: as `load_torch_optimizer`.
    """
    import torch
    from flax import nnx

    state = opt_state
    if isinstance(opt_state, nnx.Optimizer):
        state = opt_state.opt_state
        step = int(opt_state.step.get_value()) if step is None else step
    known = Parameters(params)
    theirs = torch_parameters(like, names, known.paths)
    ours = list(moments(state, known))
    _check(theirs, ours, known)
    # As torch itself has it, and does not cast when it loads
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    entries: dict[int, dict[str, Any]] = {}
    for found in ours:
        name = leaves.torch_name(found.path)
        entry = entries.setdefault(theirs[name].index, {})
        if theirs[name].steps is not None and STEP not in entry:
            steps = _steps_taken(name, found, state, step)
            entry[STEP] = torch.tensor(float(steps), dtype=dtype)
        turned = found.path in known.turned
        array = leaves.to_torch_layout(found.path, np.asarray(found.leaf), turned=turned)
        entry[found.key] = to_torch_tensor(array)
    groups = [dict(group) for group in state_dict_of(like)["param_groups"]]
    return {"state": dict(sorted(entries.items())), "param_groups": groups}


# Both sides


def _check(theirs: Mapping[str, TorchParameter], ours: list[Moment], known: Parameters) -> None:
    """Raises unless both sides hold the same moments of the same parameters in the same shapes."""
    problems = [
        f"{shorten(name)} is in the torch optimizer, not among the parameters"
        for name in theirs
        if name not in known.paths
    ]
    places: dict[str, set[str]] = {name: set() for name in theirs}
    for found in ours:
        name = leaves.torch_name(found.path)
        turned = found.path in known.turned
        wanted = leaves.torch_shape(found.path, tuple(found.leaf.shape), turned=turned)
        if name not in known.paths:
            problems.append(f"{shorten(name)} is in the optax state, not among the parameters")
        elif name not in theirs:
            problems.append(f"{shorten(name)} is in the optax state, not in the torch optimizer")
        elif found.key in places[name]:
            problems.append(f"{shorten(name)} has {found.key} twice in the optax state")
        elif theirs[name].shape not in (None, wanted):
            problems.append(f"{shorten(name)} is {theirs[name].shape}, expected {wanted}")
        if name in places:
            places[name].add(found.key)
    for name, parameter in theirs.items():
        if name in known.paths and (places[name] or not parameter.idle):
            problems += _differences(name, parameter.keys, places[name])
    if problems:
        problems = list(dict.fromkeys(problems))
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise CheckpointError(
            "the optimizers do not fit: " + "; ".join([*problems[:_SHOWN], *more])
        )


def _differences(name: str, kept: frozenset[str], places: set[str]) -> list[str]:
    problems = []
    if kept - places:
        problems.append(
            f"{shorten(name)}: torch keeps {listed(kept - places)}, the optax state does not"
        )
    if places - kept:
        problems.append(
            f"{shorten(name)}: the optax state keeps {listed(places - kept)}, torch does not"
        )
    return problems


# Numbers


def _value(place: Moment, parameter: TorchParameter, known: Parameters) -> np.ndarray:
    """What torch keeps for `place`, in Flax's layout; zeros before the first step."""
    wanted = tuple(place.leaf.shape)
    if place.key not in parameter.moments:
        return np.zeros(wanted, place.leaf.dtype)
    name = f"{leaves.torch_name(place.path)} {place.key}"
    array = to_numpy(parameter.moments[place.key], name)
    turned = place.path in known.turned
    expected = leaves.torch_shape(place.path, wanted, turned=turned)
    if array.shape != expected:
        raise CheckpointError(
            f"{shorten(name)} of the torch state is {array.shape}, expected {expected}"
        )
    return leaves.to_flax_layout(place.path, array, turned=turned)


def _one_count(paths: list[str], theirs: Mapping[str, TorchParameter], step: int | None) -> int:
    """The count of the parameters at `paths`, or of all where these are none."""
    names = [leaves.torch_name(path) for path in paths] or list(theirs)
    counted = {steps: name for name in names if (steps := theirs[name].steps) is not None}
    if len(counted) > 1:
        fewest, most = min(counted), max(counted)
        raise CheckpointError(
            f"{shorten(counted[fewest])} has taken {fewest} steps in torch and "
            f"{shorten(counted[most])} {most}, where one count in optax stands for both"
        )
    if counted:
        return next(iter(counted))
    if step is None and any(theirs[n].moments or not theirs[n].keys for n in names):
        raise CheckpointError("optax counts steps where torch does not: say how many with step=")
    return step or 0


def _steps_taken(name: str, found: Moment, state: Any, step: int | None) -> int:
    """The steps that optax has counted for a parameter: beside its moments, or anywhere."""
    if found.count is not None:
        return int(found.count)
    counted = {int(counter) for counter in counters(state)}
    if len(counted) == 1:
        return counted.pop()
    if step is None:
        raise CheckpointError(
            f"{shorten(name)}: torch counts steps where optax does not: say how many with step="
        )
    return step
