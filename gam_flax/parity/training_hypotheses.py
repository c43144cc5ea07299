"""What may be set otherwise in an optax optimizer than in its torch twin: a list to be tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gam_flax.parity.training_rules import Clip, Settings

All = Mapping[str, Settings]
"""The settings of the parameters that are trained, by torch key."""

_BOTH = {
    "weight_decay": ("weight decay", (0.0, 1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1)),
    "maximize": ("sign of the gradient", (False, True)),
}
_SGD = {
    "nesterov": ("Nesterov", (False, True)),
    "momentum": ("momentum", (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)),
    "dampening": ("dampening", (0.0, 0.1, 0.5, 0.9)),
}
_ADAM = {
    "beta1": ("Adam's first beta", (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)),
    "beta2": ("Adam's second beta", (0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)),
    "eps": ("Adam's eps", (0.0, 1e-15, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)),
    "bias_correction": ("Adam's bias correction", (False, True)),
    "nesterov": ("Nesterov in Adam, NAdam", (False, True)),
}
"""Setting → what it is called, and the values that are tried."""

_FACTORS = (0.01, 0.1, 0.5, 2.0, 10.0, 100.0)
_NORMS = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Hypothesis:
    """Flax's steps are those that torch takes with these settings.

    name: of what is changed; of two hypotheses of one name, the first is the more likely.
    line: what is reported if they are.
    """

    name: str
    line: str
    settings: All
    clip: Clip | None


def hypotheses(
    settings: All, clip: Clip | None, ndims: Mapping[str, int], still: Iterable[str]
) -> Iterator[Hypothesis]:
    """One change at a time, each other than what torch has.

    Args:
        settings, clip: torch's. Parameters that its optimizer leaves out have no settings.
        ndims: the number of axes of every parameter that could be trained.
        still: the keys of those that torch's steps move and Flax's leave as they were.
    """
    for name, new, line in _changed_settings(settings, ndims, list(still)):
        if new != settings:
            yield Hypothesis(name, f"{name}: {line}", new, clip)
    for other in _clippings(clip):
        if other != clip:
            line = f"clipping: {_line(_shown(clip), _shown(other))}"
            yield Hypothesis("clipping", line, settings, other)


def of_another_rate(own: Hypothesis, factor: float) -> Hypothesis:
    """The same with the learning rates multiplied."""
    settings = own.settings
    name, new, line = _plain(
        "learning rate", "lr", settings, lambda s: replace(s, lr=_rounded(s.lr * factor))
    )
    uphill = " (uphill: the sign of the gradient)" if factor < 0 else ""
    return Hypothesis(name, f"{name}: {line}{uphill}", new, own.clip)


def _rounded(number: float) -> float:
    """To as many digits as people write."""
    return float(f"{number:.3g}")


Change = tuple[str, dict[str, Settings], str]


def _changed_settings(
    settings: All, ndims: Mapping[str, int], still: list[str]
) -> Iterator[Change]:
    adam = any(s.adam for s in settings.values())
    for field, (name, values) in {**(_ADAM if adam else _SGD), **_BOTH}.items():
        for value in values:
            yield _plain(name, field, settings, lambda s, f=field, v=value: replace(s, **{f: v}))
    for factor in _FACTORS:
        yield _plain("learning rate", "lr", settings, lambda s, f=factor: replace(s, lr=s.lr * f))
    yield from _decays(settings, ndims)
    if adam:
        yield from _roots(settings)
    yield from _on_one_side(settings, ndims, still)


def _plain(name: str, field: str, settings: All, to: Callable[[Settings], Settings]) -> Change:
    new = {key: to(s) for key, s in settings.items()}
    return name, new, _line(f"{field}={_told(field, settings)}", f"{field}={_told(field, new)}")


def _decays(settings: All, ndims: Mapping[str, int]) -> Iterator[Change]:
    name = "weight decay"
    kinds = {True: "decoupled decay (AdamW)", False: "decay in the gradient (L2)"}
    if not any(s.weight_decay for s in settings.values()):
        return
    new = {key: replace(s, decoupled=not s.decoupled) for key, s in settings.items()}
    own = next(iter(settings.values())).decoupled
    yield name, new, _line(kinds[own], kinds[not own])
    new = {
        key: s if ndims[key] > 1 else replace(s, weight_decay=0.0) for key, s in settings.items()
    }
    yield name, new, _line("it on biases and norms as well", "decay on weights of two axes or more")
    if not all(s.lr for s in settings.values()):
        return
    for sign, how in ((1, "subtracted"), (-1, "added")):
        new = {
            key: replace(s, decoupled=True, weight_decay=sign * s.weight_decay / s.lr)
            for key, s in settings.items()
        }
        other = f"weight_decay · parameter {how} after the learning rate, so not scaled"
        yield name, new, _line(kinds[own], other)


def _roots(settings: All) -> Iterator[Change]:
    name = "Adam's eps"
    own = f"√v + eps with eps={_told('eps', settings)}"
    new = {key: replace(s, eps=0.0, eps_root=s.eps) for key, s in settings.items()}
    yield name, new, _line(own, "√(v + eps)")
    for root in (1e-16, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5):
        new = {key: replace(s, eps_root=root) for key, s in settings.items()}
        yield name, new, _line(own, f"√(v + eps_root) + eps with eps_root={root:g}")


def _on_one_side(settings: All, ndims: Mapping[str, int], still: list[str]) -> Iterator[Change]:
    """Parameters that only one of the two trains."""
    name = "trained parameters"
    alone = [key for key in still if key in settings]
    new = {key: replace(s, lr=0.0) if key in alone else s for key, s in settings.items()}
    yield name, new, f"{_listed(alone)} in torch's optimizer, left as they are by Flax's steps"
    left = [key for key in ndims if key not in settings]
    if left and settings:
        as_others = dict.fromkeys(left, next(iter(settings.values())))
        new = {key: {**settings, **as_others}[key] for key in ndims if key in {*settings, *left}}
        yield name, new, f"{_listed(left)} not in torch's optimizer, trained by Flax's steps"


def _clippings(clip: Clip | None) -> Iterator[Clip | None]:
    limits = sorted({*_NORMS, clip.limit} if clip else _NORMS)
    yield None
    for kind in ("norm", "torch norm", "value", "update norm"):
        yield from (Clip(kind, limit) for limit in limits)


def _shown(clip: Clip | None) -> str:
    if clip is None:
        return "none"
    kinds = {
        "norm": "the gradients' global norm clipped to {:g}",
        "torch norm": "the gradients' global norm + 1e-6 clipped to {:g} (clip_grad_norm_)",
        "value": "each gradient's numbers clipped to {:g}",
        "update norm": "the update's global norm clipped to {:g}, after the optimizer",
    }
    return kinds[clip.kind].format(clip.limit)


def _line(own: str, other: str) -> str:
    return f"torch has {own}, Flax's steps are those of {other}"


def _told(field: str, settings: All) -> str:
    values: dict[Any, None] = dict.fromkeys(getattr(s, field) for s in settings.values())
    return " and ".join(str(v) if isinstance(v, bool) else f"{v:g}" for v in values)


def _listed(keys: list[str]) -> str:
    more = [f"and {len(keys) - 3} more"] if len(keys) > 3 else []
    return ", ".join([*keys[:3], *more])
