"""The optimizers of the training stages, each written twice: for torch and for optax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CLIP = 1e-2
"""The global norm to which "…+clip" clips gradients: small, so that it does clip."""

_SGD: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
_ADAM = {"adam": {}, "adamw": {"weight_decay": 1e-2}}

NAMES = tuple(name + clip for name in (*_SGD, *_ADAM) for clip in ("", "+clip"))


@dataclass(frozen=True)
class Recipe:
    """One optimizer twice, with the same settings.

    torch: list of parameters → `torch.optim.Optimizer`, which may leave some of them out.
    optax: a `GradientTransformation`. It sees a flat dictionary, Flax path → array, of the
        floating parameters that are trained.
    clip: the global norm to which torch's gradients are clipped before the step, None for no
        clipping; what optax does is up to `optax`. Clipped by hand, as optax clips:
        g · min(1, clip / ‖g‖). `torch.nn.utils.clip_grad_norm_` divides by ‖g‖ + 1e-6, which
        two runs in float64 show.
    """

    torch: Callable[[list[Any]], Any]
    optax: Any
    clip: float | None = None


Optimizer = str | Recipe | tuple[Callable[[list[Any]], Any], Any]
"""A name among `NAMES`, a recipe, or its first two fields as a pair."""


def recipe(optimizer: Optimizer) -> Recipe:
    """The recipe that `optimizer` stands for.

    | name     | torch                                                | optax                      |
    |----------|------------------------------------------------------|----------------------------|
    | sgd      | SGD(lr=1e-2)                                         | sgd(1e-2)                  |
    | momentum | SGD(lr=1e-2, momentum=0.9)                           | sgd(1e-2, momentum=0.9)    |
    | nesterov | SGD(lr=1e-2, momentum=0.9, nesterov=True)            | the same with nesterov     |
    | adam     | Adam(lr=1e-3, betas=(0.9, 0.999), eps=1e-8)          | adam(1e-3)                 |
    | adamw    | AdamW(lr=1e-3, betas, eps as adam, weight_decay=1e-2)| adamw(1e-3, …, the same)   |
    | …+clip   | gradients by hand, see `Recipe.clip`, then as above  | chain(clip_by_global_norm) |

    The settings are torch's defaults, but for the learning rate and the momentum of SGD, which has
    none. optax's defaults are the same but for the weight decay, 1e-4. optax's schedules compute
    in float32 even in float64, so none is here.

    Raises:
        ValueError: an unknown name, or something else.
    """
    match optimizer:
        case str() if optimizer in NAMES:
            return _named(*optimizer.partition("+")[::2])
        case Recipe():
            return optimizer
        case (factory, transformation) if callable(factory) and hasattr(transformation, "update"):
            return Recipe(factory, transformation)
    raise ValueError(
        f"optimizer must be one of {', '.join(NAMES)}, or a pair (parameters → torch optimizer, "
        f"optax transformation), got {optimizer!r}"
    )


def _named(name: str, clip: str) -> Recipe:
    import optax
    import torch

    if name in _SGD:
        kind, settings = torch.optim.SGD, {"lr": 1e-2, **_SGD[name]}
        transformation = optax.sgd(1e-2, **_SGD[name])
    else:
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, **_ADAM[name]}
        optax_kind = optax.adamw if name == "adamw" else optax.adam
        transformation = optax_kind(1e-3, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, **_ADAM[name])
    if clip:
        transformation = optax.chain(optax.clip_by_global_norm(CLIP), transformation)
    return Recipe(
        lambda parameters: kind(parameters, **settings), transformation, CLIP if clip else None
    )
