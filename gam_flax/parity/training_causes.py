"""Why two trainings parted, found by experiment: torch's is repeated with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gam_flax.convert.leaves import join
from gam_flax.parity.align import OutputLayout
from gam_flax.parity.judge import gap, magnitude
from gam_flax.parity.optimizers import Optimizer, recipe
from gam_flax.parity.torch_side import as_picture
from gam_flax.parity.training import STEP, Lay, TorchRun, Training, laid
from gam_flax.parity.training_hypotheses import Hypothesis, hypotheses, of_another_rate
from gam_flax.parity.training_rules import Clip, settings_of, step

_SAME = 1e-10
"""Trainings that are nearer than this, of a tensor's scale, are not looked into: Adam may bring
rounding up to 1e-12."""
_CLOSE = 1e-9
"""What may be left of a divergence that is explained; and a hundredth of it at the most."""

_REFINED = 6  # trainings by which a learning rate is found to three digits

_STEPS = ("losses", "parameters", "optimizer_state")
_MOMENTA = (0.1, 0.01, 0.001, 0.03, 0.003, 0.3, 0.5, 0.9, 0.97, 0.99, 0.999, 0.0, 1.0)


def explain_training(
    model: Any,
    x: np.ndarray,
    torch: Training,
    flax: Training,
    *,
    optimizer: Optimizer,
    train: bool,
    partners: Mapping[str, str],
    lay: Lay,
    frozen: Collection[str] = (),
    loss: Callable[[Any], Any] | None = None,
    lay_output: OutputLayout = as_picture,
) -> tuple[str, ...]:
    """Likely causes of a divergence in training, a line each.

    torch's training is repeated in float64 with one setting of its optimizer changed
    (`training_hypotheses` has the list). A change after which losses, parameters and the
    optimizer's state are Flax's, to 1e-9 of their scale and to a hundredth of the divergence, is a
    cause; several are where they do the same. Most are given up after two or three steps, as the
    loss is not Flax's. torch's SGD, Adam and AdamW can be repeated, without hooks of the user's.

    Running statistics are looked at by themselves: where all else agrees or is explained, every
    BatchNorm's momentum is changed, and its variance is made the biased one that Flax's own keeps.

    Args:
        torch, flax: the two trainings in float64, without factors. In a narrower dtype rounding
            hides what is looked for: train once more in float64.
        optimizer, train, frozen, loss, lay_output: as they were for `train_torch`.
        partners: torch key → Flax path of parameters and buffers.
        lay: how torch's tensors become Flax's.

    Returns:
        Nothing where nothing that was tried gives Flax's numbers, or nothing diverges.
    """

    def fresh() -> TorchRun:
        types = {"dtype": "float64", "rounded_to": "float64"}
        return TorchRun(
            model, x, {}, train=train, frozen=frozen, loss=loss, lay_output=lay_output, **types
        )

    ruler = _Ruler(flax, partners, lay)
    run = fresh()
    chosen = recipe(optimizer)
    settings = settings_of(chosen.torch(list(run.trained.values())), run.trained)
    if settings is None:
        return ()
    clip = None if chosen.clip is None else Clip("norm", chosen.clip)
    found = [Hypothesis("", "", settings, clip)]
    apart = ruler.distance(torch)
    if not ruler.begins(torch):
        return ()  # the models differ, not how they are trained
    if not apart <= _SAME:
        start = {key: p.detach().numpy() for key, p in run.trained.items()}
        ndims = {key: array.ndim for key, array in start.items()}
        moved = (key for key in start if not np.array_equal(start[key], torch.parameters[key]))
        still = [key for key in moved if ruler.is_start(key, start[key])]
        known = _is_written_out(found[0], fresh(), torch)
        tried = hypotheses(settings, clip, ndims, still) if known else ()
        limit = min(_CLOSE, apart / 100)
        own, found = found[0], _reproducing(tried, fresh, ruler, limit)
        if known and not found:
            tried = _other_rates(own, start, fresh, ruler)
            found = _reproducing(tried, fresh, ruler, limit)
    lines = [hypothesis.line for hypothesis in found if hypothesis.line]
    if train and found:
        lines += _norm_causes(fresh(), found[0], ruler)
    return tuple(lines)


# The optimizer


class _Ruler:
    """How far a training of torch's is from Flax's."""

    def __init__(self, flax: Training, partners: Mapping[str, str], lay: Lay):
        self.losses = flax.losses
        self._flax = flax
        self._partners = partners
        self._lay = lay

    def distance(self, torch: Training) -> float:
        """The largest error in losses, parameters and optimizer's state, of a tensor's scale."""
        return _worst(laid(torch, self._flax, self._partners, self._lay))

    def begins(self, torch: Training) -> bool:
        """Whether the losses agree before any step."""
        return abs(torch.losses[0] - self.losses[0]) <= _CLOSE * abs(self.losses[0])

    def reproduces(self, hypothesis: Hypothesis, run: TorchRun, limit: float) -> bool:
        """Whether torch trained so is nearer to Flax than `limit`."""
        allowed = limit * max(map(abs, self.losses))
        found = _repeated(hypothesis, run, self.losses, allowed)
        return found is not None and self.distance(found) <= limit

    def is_start(self, key: str, start: np.ndarray) -> bool:
        """Whether Flax's parameter is after its steps what torch's was before."""
        after = self.partner(key, start, self._flax.parameters)
        return after is not None and np.array_equal(*after)

    def statistic(self, key: str, own: np.ndarray) -> float:
        """The error of a buffer of torch's, of its scale; infinite where Flax has none."""
        pair = self.partner(key, own, self._flax.statistics)
        return np.inf if pair is None else _error(*pair, magnitude(pair[1]))

    def movements(
        self, torch: Training, start: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """How torch's and Flax's parameters have moved, all in one."""
        moved: list[tuple[np.ndarray, np.ndarray]] = []
        for key, before in start.items():
            first = self.partner(key, before, self._flax.parameters)
            last = self.partner(key, torch.parameters[key], self._flax.parameters)
            if first is not None and last is not None:
                moved.append(((last[0] - first[0]).ravel(), (last[1] - first[0]).ravel()))
        own, theirs = zip(*moved, strict=True)
        return np.concatenate(own), np.concatenate(theirs)

    def partner(
        self, key: str, own: np.ndarray, theirs: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """torch's tensor laid out for Flax, and Flax's."""
        path = self._partners.get(key, "")
        if path not in theirs:
            return None
        laid_out = self._lay(key, path, own, theirs[path].shape)
        return None if laid_out is None else (laid_out, theirs[path])


def _reproducing(
    tried: Iterable[Hypothesis], fresh: Callable[[], TorchRun], ruler: _Ruler, limit: float
) -> list[Hypothesis]:
    """The first of every name that does."""
    found: dict[str, Hypothesis] = {}
    for hypothesis in tried:
        if hypothesis.name not in found and ruler.reproduces(hypothesis, fresh(), limit):
            found[hypothesis.name] = hypothesis
    return list(found.values())


def _other_rates(
    own: Hypothesis,
    start: Mapping[str, np.ndarray],
    fresh: Callable[[], TorchRun],
    ruler: _Ruler,
) -> Iterator[Hypothesis]:
    """Learning rates of which the parameters move as far as Flax's, by least squares."""
    factor = 1.0
    for _ in range(_REFINED):
        tried = of_another_rate(own, factor)
        trained = _repeated(tried, fresh(), ruler.losses, np.inf)
        if trained is None:
            return
        moved, wanted = ruler.movements(trained, start)
        factor *= float(moved @ wanted) / (float(moved @ moved) or np.nan)
        if not np.isfinite(factor) or not 1e-6 < abs(factor) < 1e6:
            return
    yield of_another_rate(own, factor)


def _is_written_out(own: Hypothesis, run: TorchRun, torch: Training) -> bool:
    """Whether torch's optimizer does what its settings tell, and nothing else."""
    found = _repeated(own, run, torch.losses, np.inf)
    if found is None:
        return False
    pairs = {
        (kind, key): (array, getattr(torch, kind)[key])
        for kind in _STEPS[1:]
        for key, array in getattr(found, kind).items()
        if key in getattr(torch, kind)
    }
    return _worst(pairs) <= _CLOSE


def _repeated(
    hypothesis: Hypothesis, run: TorchRun, losses: list[float], allowed: float
) -> Training | None:
    """As many steps as there are `losses`; None as soon as one is more than `allowed` off."""
    taken: list[float] = []
    state: dict[str, dict[str, Any]] = {}
    first: dict[str, np.ndarray] = {}
    for wanted in losses:
        taken.append(run.backward())
        if not abs(taken[-1] - wanted) <= allowed:
            return None
        step(run.trained, hypothesis.settings, hypothesis.clip, state, len(taken))
        first = first or {
            f"{key}.{name}": moment.numpy().copy()
            for key, moments in state.items()
            for name, moment in moments.items()
        }
    return run.finish(taken, first)


def _worst(pairs: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]]) -> float:
    """The largest error of a tensor of `_STEPS`, of its scale. Moments of one kind share theirs:
    some are rounding noise."""
    scales: dict[str, float] = {}
    for (kind, key), (own, _) in pairs.items():
        group = _group(kind, key)
        scales[group] = max(scales.get(group, 0.0), magnitude(own))
    errors = [
        _error(own, partner, scales[_group(kind, key)])
        for (kind, key), (own, partner) in pairs.items()
        if kind in _STEPS and key != STEP
    ]
    return max(errors, default=0.0)


def _group(kind: str, key: str) -> str:
    return f"{kind} of {key.rpartition('.')[2] if kind == 'optimizer_state' else key}"


def _error(own: np.ndarray, partner: np.ndarray, scale: float) -> float:
    error = float(np.max(np.nan_to_num(gap(own, partner), nan=np.inf), initial=0.0))
    return error / scale if scale else 0.0 if error == 0 else np.inf


# The running statistics


class _Norm:
    """What a torch BatchNorm saw, call by call, from now on; its own statistics are in disorder.

    momentum: as it was, None for the mean of all batches.
    """

    def __init__(self, path: str, module: Any):
        self.path = path
        self.momentum = module.momentum
        self._start = {leaf: getattr(module, leaf).numpy().copy() for leaf in _STATISTICS}
        self._count = int(module.num_batches_tracked or 0)
        self._seen: list[tuple[dict[str, np.ndarray], float]] = []
        module.momentum = 1.0  # the running statistics are then those of the last batch
        module.register_forward_hook(self._note)

    def _note(self, module: Any, args: Any, output: Any) -> None:
        if module.training:
            batch = {leaf: getattr(module, leaf).numpy().copy() for leaf in _STATISTICS}
            self._seen.append((batch, args[0].numel() / args[0].shape[1]))

    def after(self, leaf: str, momentum: float | None, biased: bool) -> np.ndarray:
        """A running statistic as it were with another momentum, or of biased variances."""
        running = self._start[leaf]
        for number, (batch, n) in enumerate(self._seen, self._count + 1):
            share = 1 / number if momentum is None else momentum
            new = batch[leaf] * ((n - 1) / n if biased else 1.0)
            running = (1 - share) * running + share * new
        return running


_STATISTICS = ("running_mean", "running_var")


def _norm_causes(run: TorchRun, hypothesis: Hypothesis, ruler: _Ruler) -> Iterator[str]:
    """The momentum first, by the means; then whether the variances are biased."""
    norms = [
        _Norm(path, module)
        for path, module in run.model.named_modules()
        if getattr(module, "running_mean", None) is not None and hasattr(module, "momentum")
    ]
    _repeated(hypothesis, run, ruler.losses, np.inf)

    def fits(leaf: str, momenta: Mapping[str, float | None], biased: bool = False) -> bool:
        found = ((join(n.path, leaf), n.after(leaf, momenta[n.path], biased)) for n in norms)
        return all(ruler.statistic(key, array) <= _CLOSE for key, array in found)

    own = {norm.path: norm.momentum for norm in norms}
    swapped = {path: None if m is None else 1 - m for path, m in own.items()}
    others = (dict.fromkeys(own, momentum) for momentum in _MOMENTA)
    theirs = next((m for m in (own, swapped, *others) if fits("running_mean", m)), None)
    if theirs is None:
        return
    if theirs != own:
        told = [" and ".join(map(str, dict.fromkeys(m.values()))) for m in (own, theirs)]
        yield (
            f"BatchNorm momentum: torch has momentum={told[0]}, Flax's statistics are those of "
            f"momentum={told[1]} (as torch counts; one minus this as Flax does)"
        )
    if not fits("running_var", theirs) and fits("running_var", theirs, biased=True):
        yield (
            "BatchNorm variance: torch's running variance is the unbiased one, n / (n - 1), "
            "Flax's statistics are those of the biased one"
        )
