"""SGD and Adam written out, with every setting in which torch and optax are known to part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Clip:
    """How gradients are clipped to `limit`.

    kind: "norm": all together, as optax does and `training.clip`; "torch norm": the same with 1e-6
        added to the norm, as `clip_grad_norm_` does; "value": number by number; "update norm": as
        "norm", but of what the optimizer makes of them.
    """

    kind: str
    limit: float


@dataclass(frozen=True)
class Settings:
    """Of one parameter.

        d = direction(± g [+ weight_decay · p])        p ← p − lr · (d [+ weight_decay · p])

    direction: m ← momentum · m + (1 − dampening) · g, m or g + momentum · m with Nesterov; for
    Adam m̂ / (√(v̂ + eps_root) + eps), m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², the hats
    for the bias correction.

    decoupled: weight decay after the direction (AdamW), not in the gradient (L2).
    nesterov: with Adam what optax's `nesterov` does, NAdam.
    """

    adam: bool
    lr: float
    weight_decay: float = 0.0
    decoupled: bool = False
    maximize: bool = False
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    bias_correction: bool = True


def settings_of(optimizer: Any, parameters: Mapping[str, Any]) -> dict[str, Settings] | None:
    """The settings that a `torch.optim.SGD`, `Adam` or `AdamW` has for each parameter that is in
    it; None for another kind, or settings that are not written out here."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for key, parameter in parameters.items():
        if id(parameter) in groups:
            settings = _settings(type(optimizer).__name__, groups[id(parameter)])
            if settings is None:
                return None
            found[key] = settings
    return found


def _settings(kind: str, group: Mapping[str, Any]) -> Settings | None:
    same = {name: group[name] for name in ("lr", "weight_decay", "maximize") if name in group}
    if kind == "SGD":
        return Settings(
            adam=False,
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            **same,
        )
    if kind in ("Adam", "AdamW") and not group["amsgrad"]:
        beta1, beta2 = group["betas"]
        return Settings(
            adam=True,
            decoupled=group.get("decoupled_weight_decay", kind == "AdamW"),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            **same,
        )
    return None


def step(
    parameters: Mapping[str, Any],
    settings: Mapping[str, Settings],
    clip: Clip | None,
    state: dict[str, dict[str, Any]],
    number: int,
) -> None:
    """Moves the torch `parameters` that have settings, in place, by their gradients.

    Args:
        state: key → torch's name of a moment → its value; brought up to date.
        number: of the step: 1, 2, …
    """
    import torch

    with torch.no_grad():
        gradients = {key: p.grad for key, p in parameters.items()}
        if clip is not None and clip.kind != "update norm":
            gradients = _clipped(clip, gradients)
        changes = {
            key: _change(settings[key], parameters[key], g, state.setdefault(key, {}), number)
            for key, g in gradients.items()
            if key in settings
        }
        if clip is not None and clip.kind == "update norm":
            changes = _clipped(clip, changes)
        for key, change in changes.items():
            parameters[key].add_(change)


def _clipped(clip: Clip, tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    if clip.kind == "value":
        return {key: g.clamp(-clip.limit, clip.limit) for key, g in tensors.items()}
    norm = float(torch.stack([g.square().sum() for g in tensors.values()]).sum().sqrt())
    norm += 1e-6 if clip.kind == "torch norm" else 0.0
    return {key: g * min(1.0, clip.limit / norm) for key, g in tensors.items()} if norm else tensors


def _change(s: Settings, p: Any, g: Any, state: dict[str, Any], step: int) -> Any:
    """What is added to parameter `p` with gradient `g`."""
    if s.maximize:
        g = -g
    if s.weight_decay and not s.decoupled:
        g = g + s.weight_decay * p
    direction = (_adam if s.adam else _sgd)(s, g, state, step)
    if s.weight_decay and s.decoupled:
        direction = direction + s.weight_decay * p
    return -s.lr * direction


def _sgd(s: Settings, g: Any, state: dict[str, Any], step: int) -> Any:
    if not s.momentum:
        return g
    # torch does not dampen the first gradient
    fresh = g if step == 1 else s.momentum * state["momentum_buffer"] + (1 - s.dampening) * g
    state["momentum_buffer"] = fresh
    return g + s.momentum * fresh if s.nesterov else fresh


def _adam(s: Settings, g: Any, state: dict[str, Any], step: int) -> Any:
    m = state["exp_avg"] = s.beta1 * state.get("exp_avg", 0.0) + (1 - s.beta1) * g
    v = state["exp_avg_sq"] = s.beta2 * state.get("exp_avg_sq", 0.0) + (1 - s.beta2) * g * g
    if s.bias_correction:
        v = v / (1 - s.beta2**step)
        m = m / (1 - s.beta1 ** (step + s.nesterov))
        g = g / (1 - s.beta1**step)
    if s.nesterov:
        m = s.beta1 * m + (1 - s.beta1) * g
    return m / ((v + s.eps_root).sqrt() + s.eps)
