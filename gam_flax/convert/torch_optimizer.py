"""The state_dict of a torch optimizer: what it keeps of each parameter, under its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gam_flax.convert.errors import CheckpointError, shorten

STEP = "step"

_TRANSPORT = re.compile(r"(?:(?:module|_orig_mod)\.)*")  # DataParallel, torch.compile
_MOST_STEPS = 2**31 - 1  # that an int32 counts


@dataclass(frozen=True)
class TorchParameter:
    """What a torch optimizer holds of one parameter.

    index: its number in the state_dict.
    keys: the moments that its group's settings make torch keep.
    moments: those that are kept: all, or none before the first step.
    steps: how many it has taken; None where this kind of optimizer does not count.
    shape: None where nothing tells it.
    idle: whether it is known to take no gradient: frozen, or without state where others have some.
    """

    index: int
    keys: frozenset[str]
    moments: Mapping[str, Any]
    steps: int | None
    shape: tuple[int, ...] | None
    idle: bool


def state_dict_of(source: Any) -> Mapping[str, Any]:
    """The state_dict of a torch optimizer, which may be one already.

    Raises:
        CheckpointError: it is neither.
    """
    found = source.state_dict() if _is_live(source) else source
    whole = isinstance(found, Mapping) and isinstance(found.get("state"), Mapping)
    groups = found.get("param_groups") if whole else None
    if not isinstance(groups, list) or not all(map(_is_group, groups)):
        raise CheckpointError(
            f"a {type(source).__name__} without 'state' and 'param_groups' is no torch optimizer: "
            "give the optimizer or its state_dict, such as checkpoint['optimizer']"
        )
    return found


def torch_parameters(source: Any, names: Any, known: Collection[str]) -> dict[str, TorchParameter]:
    """Torch name → what the optimizer holds of that parameter.

    Args:
        source: an optimizer or its state_dict.
        names: as `load_torch_optimizer` takes them.
        known: the names that the Flax model has.
    """
    found = state_dict_of(source)
    groups, states = found["param_groups"], found["state"]
    live = [p for g in source.param_groups for p in g["params"]] if _is_live(source) else []
    indices = [index for group in groups for index in group["params"]]
    keys = [_keys(group) for group in groups for _ in group["params"]]
    named = [_plain(name, known) for name in _names(groups, names, live)]
    if len(named) != len(indices) or len(set(named)) != len(named):
        raise CheckpointError(
            f"the torch optimizer has {len(indices)} parameters, and {len(named)} names are given, "
            f"{len(set(named))} of them different"
        )
    stray = [index for index in states if index not in indices]
    if stray:
        raise CheckpointError(f"the torch state has parameter {shorten(stray[0])} in no group")
    begun = any(states.values())
    tensors = live or [None] * len(indices)
    return {
        name: _parameter(name, index, of, states.get(index, {}), tensor, begun)
        for name, index, of, tensor in zip(named, indices, keys, tensors, strict=True)
    }


def _is_live(source: Any) -> bool:
    return hasattr(source, "param_groups")


def _is_group(group: Any) -> bool:
    indices = group.get("params") if isinstance(group, Mapping) else None
    return isinstance(indices, list) and all(isinstance(index, int) for index in indices)


def _parameter(
    name: str, index: int, keys: frozenset[str], state: Any, tensor: Any, begun: bool
) -> TorchParameter:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{shorten(name)}: its torch state is a {type(state).__name__}")
    kept = {key: value for key, value in state.items() if value is not None}
    if kept and kept.keys() != keys:
        raise CheckpointError(
            f"{shorten(name)}: the torch state has {listed(kept)}, where the settings of its "
            f"group ask for {listed(keys)}"
        )
    steps = _steps(name, kept.pop(STEP, 0)) if STEP in keys else None
    for key, value in kept.items():
        if not hasattr(value, "layout"):
            raise CheckpointError(f"{shorten(name)}: {key} of the torch state is no tensor")
    tensors = [tensor] if tensor is not None else list(kept.values())
    shape = tuple(tensors[0].shape) if tensors else None
    idle = not tensor.requires_grad if tensor is not None else False
    return TorchParameter(index, keys - {STEP}, kept, steps, shape, idle or (begun and not kept))


def _steps(name: str, value: Any) -> int:
    """A step of torch's, which is a tensor of one float, or in old files an int."""
    try:
        steps = float(value)
    except (TypeError, ValueError, RuntimeError):
        steps = -1.0
    if not steps.is_integer() or not 0 <= steps <= _MOST_STEPS:
        raise CheckpointError(f"{shorten(name)}: step of the torch state is no number of steps")
    return int(steps)


def _keys(group: Mapping[str, Any]) -> frozenset[str]:
    """What torch keeps of a parameter in `group`; the settings tell the kind of optimizer."""
    momentum = {"momentum_buffer"} if group.get("momentum") else set()
    if "dampening" in group:
        return frozenset(momentum)
    if "betas" in group and "amsgrad" in group:
        if group["amsgrad"]:
            raise CheckpointError(
                "amsgrad does not go over: torch keeps the maximum of the second moment before "
                "its bias correction, optax the maximum after it"
            )
        return frozenset({STEP, "exp_avg", "exp_avg_sq"})
    if "alpha" in group and "centered" in group:
        if momentum:
            raise CheckpointError(
                "RMSprop with momentum does not go over: optax multiplies with the learning rate "
                "before the momentum, torch after it"
            )
        return frozenset({STEP, "square_avg", *(["grad_avg"] if group["centered"] else [])})
    settings = shorten(listed(group.keys() - {"params", "param_names"}), 200)
    raise CheckpointError(
        f"the torch optimizer is none of SGD, Adam, AdamW and RMSprop: its settings are {settings}"
    )


def _names(groups: list[Mapping[str, Any]], names: Any, live: list[Any]) -> list[str]:
    if hasattr(names, "named_parameters"):
        return _names_of_model(len(groups), dict(names.named_parameters()), live)
    if names is None and not all("param_names" in group for group in groups):
        raise CheckpointError(
            "the torch optimizer does not name its parameters: give names, such as "
            "[name for name, _ in model.named_parameters()]"
        )
    if names is None:
        names = [name for group in groups for name in group["param_names"]]
    found = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(name, str) for name in found):
        raise CheckpointError("the names of the torch optimizer's parameters are not all strings")
    return found


def _names_of_model(groups: int, model: Mapping[str, Any], live: list[Any]) -> list[str]:
    if not live and groups > 1:
        raise CheckpointError(
            f"{groups} groups, and a model does not tell which parameter is in which: give names "
            "as a list, in the order of the groups"
        )
    if not live:
        return list(model)
    by_tensor = {id(tensor): name for name, tensor in model.items()}
    if not all(id(tensor) in by_tensor for tensor in live):
        raise CheckpointError(
            "the torch optimizer has parameters that are not of the model given as names"
        )
    return [by_tensor[id(tensor)] for tensor in live]


def _plain(name: str, known: Collection[str]) -> str:
    """`name` without what a wrapper around the model put before it."""
    return name if name in known else _TRANSPORT.sub("", name, count=1)


def listed(keys: Iterable[object]) -> str:
    """Keys for a message."""
    return ", ".join(sorted(map(shorten, keys))) or "nothing"
