"""Optimizers and learning rates, out of optax's parts."""

from __future__ import annotations

from typing import Any

import jax
import optax

from gam_flax.train.settings import Settings

DROPS = {
    "cifar": (0.2, (60 / 200, 120 / 200, 160 / 200)),
    "imagenet": (0.1, (30 / 90, 60 / 90)),
}
"""Factor, and the parts of the training after which it is applied."""


def learning_rate_schedule(settings: Settings, steps: int) -> optax.Schedule:
    """The learning rate of each step, of `steps`.

    | name     | after the warm-up, which rises from 0 in a line                                  |
    |----------|----------------------------------------------------------------------------------|
    | cosine   | half a cosine from the highest down to 0                                         |
    | cifar    | × 0.2 after 60, 120 and 160 of 200 epochs, or as many parts of what there is      |
    | imagenet | × 0.1 after 30 and 60 of 90 epochs, or as many parts of what there is             |
    | constant | the highest                                                                      |

    Source: "imagenet" is what GAM's paper, arXiv 2112.05561, says; for CIFAR it says nothing,
    "cifar" is of its author's next paper, NAM, arXiv 2111.12419.
    """
    rate = settings.rate
    warm = round(settings.warmup / settings.epochs * steps)
    if settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(rate, max(1, steps - warm))
    elif settings.schedule == "constant":
        after = optax.constant_schedule(rate)
    else:
        factor, parts = DROPS[settings.schedule]
        drops = {round(part * steps) - warm: factor for part in parts}
        after = optax.piecewise_constant_schedule(rate, drops)
    if not warm:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warm), after], [warm])


def make_optimizer(settings: Settings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer: gradients are clipped, then decay is added (sgd), then the step is made.

    Only arrays of two axes and more decay: kernels, not biases nor norms.
    """
    parts = [] if settings.clip is None else [optax.clip_by_global_norm(settings.clip)]
    if settings.optimizer == "sgd":
        parts.append(optax.add_decayed_weights(settings.decay, mask=_kernels))
        parts.append(optax.sgd(schedule, momentum=settings.momentum, nesterov=True))
    else:
        parts.append(optax.adamw(schedule, weight_decay=settings.decay, mask=_kernels))
    return optax.chain(*parts)


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
