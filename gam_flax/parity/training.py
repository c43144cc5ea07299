"""A torch model trained for some steps, and how its training is laid beside Flax's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from gam_flax.convert.torch_file import to_numpy
from gam_flax.parity.align import OutputLayout
from gam_flax.parity.masks import REFUSED
from gam_flax.parity.optimizers import Optimizer, recipe
from gam_flax.parity.torch_side import as_picture, like_output
from gam_flax.parity.trace import channels_first, results, wide

STEP = "step"

_COUNTED = ("mu_product",)  # follows from the number of steps alone, and is nobody's moment
_AS_OPTAX = {"exp_inf": "exp_avg_sq"}  # optax keeps Adamax's maximum where Adam's second moment is

Lay = Callable[[str, str, np.ndarray, tuple[int, ...]], np.ndarray | None]
"""(torch key, Flax path, torch's tensor, Flax's shape) → the tensor as Flax has it, or None; as
`align.Layouts.parameter`."""


@dataclass
class Training:
    """What some steps of training gave, in float64 whatever it was computed in.

    Every step is taken on the same batch. The loss is Σ ½ · mean (output − target)² over the
    floating outputs, with `trace.cotangent` as target. (Σ output · cotangent, of which single
    gradients are taken, has no minimum, and its gradients grow with the number of outputs: with
    the usual learning rates it runs away.)

    Keys and layouts are torch's where torch was trained and Flax's where Flax was, but for
    `optimizer_state`, whose keys are torch's on both sides.

    losses: of each step, before its update.
    parameters, statistics: after the last step.
    optimizer_state: after the first step, "conv1.weight.exp_avg" and the like, and "step" where
        steps are counted.
    output: the trained model's in evaluation, by part as in `Trace.outputs`, channels last.
    unnamed: why the optimizer's state cannot be told in torch's terms; it is left out then.
    """

    losses: list[float]
    parameters: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    optimizer_state: dict[str, np.ndarray] = field(default_factory=dict)
    output: dict[str, np.ndarray] = field(default_factory=dict)
    unnamed: str = ""


@dataclass(frozen=True)
class Trainings:
    """Both models trained on the given input; `frozen` as for `train_torch`."""

    torch: Training
    flax: Training
    frozen: Collection[str]


def untrained(model: Any) -> frozenset[str]:
    """The keys of the torch parameters that are not to be trained: requires_grad is False."""
    return frozenset(key for key, p in model.named_parameters() if not p.requires_grad)


def train_torch(
    model: Any,
    x: np.ndarray,
    factors: Mapping[str, float],
    *,
    optimizer: Optimizer,
    steps: int,
    dtype: str,
    rounded_to: str,
    train: bool,
    frozen: Collection[str] = (),
    loss: Callable[[Any], Any] | None = None,
    lay_output: OutputLayout = as_picture,
) -> Training:
    """Trains a copy of `model` on the CPU.

    Weights and input are rounded to `rounded_to` and trained in `dtype`, the parameters that have
    requires_grad alone. A parameter that the loss does not reach has a gradient of zero, as in
    jax; torch by itself would leave it out, and not even decay it. The random state is put back.

    Args:
        x: (B, *space, C).
        factors: what parameters and buffers are multiplied with before they are rounded.
        steps: 1 or more.
        train: in training mode, which moves the running statistics, or in evaluation.
        frozen: keys of parameters whose gradient is to be zero, since it is rounding noise, such
            as that of a bias before a BatchNorm: Adam scales noise up to steps of the learning
            rate. They are in the optimizer all the same, and may decay.
        loss: of the output, instead of the mean square; a tensor of one number.
        lay_output: how the model's outputs are laid out for Flax.

    Raises:
        ValueError: the forward draws random numbers; an unknown optimizer.
    """
    run = TorchRun(
        model,
        x,
        factors,
        dtype=dtype,
        rounded_to=rounded_to,
        train=train,
        frozen=frozen,
        loss=loss,
        lay_output=lay_output,
    )
    chosen = recipe(optimizer)
    stepper = chosen.torch(list(run.trained.values()))
    losses, state = [], {}
    for step in range(steps):
        losses.append(run.backward())
        if chosen.clip is not None:
            clip(run.trained.values(), chosen.clip)
        stepper.step()
        if step == 0:
            state = _named_state(run.trained, stepper.state)
    return run.finish(losses, state)


class TorchRun:
    """A copy of a torch model, and the gradients of its loss on one batch.

    Args: as `train_torch`.

    trained: the parameters that are trained, by key; they may be changed in place.
    """

    def __init__(
        self,
        model: Any,
        x: np.ndarray,
        factors: Mapping[str, float],
        *,
        dtype: str,
        rounded_to: str,
        train: bool,
        frozen: Collection[str] = (),
        loss: Callable[[Any], Any] | None = None,
        lay_output: OutputLayout = as_picture,
    ):
        import torch

        narrow, used = getattr(torch, rounded_to), getattr(torch, dtype)
        copy = deepcopy(model).to("cpu", torch.float64).train(train)
        with torch.no_grad():
            for key, tensor in [*copy.named_parameters(), *copy.named_buffers()]:
                if key in factors and tensor.is_floating_point():
                    tensor.mul_(factors[key])
        self.model = copy.to(narrow).to(used)
        pixels = torch.from_numpy(channels_first(x).copy())
        self._x = pixels.to(narrow).to(used) if pixels.is_floating_point() else pixels
        self.trained = {key: p for key, p in copy.named_parameters() if p.requires_grad}
        self._frozen = frozen
        self._lay_output = lay_output
        self._loss = loss or partial(_mean_square, lay=lay_output)

    def backward(self) -> float:
        """One forward and backward. The gradients are in `trained`, the loss is returned."""
        import torch

        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            before = torch.get_rng_state()
            loss = self._loss(self.model(self._x))
            if not torch.equal(torch.get_rng_state(), before):
                raise ValueError(f"the torch model {REFUSED}")
        wanted = list(self.trained.values())
        found: tuple[Any, ...] = (None,) * len(wanted)
        if wanted and loss.requires_grad:
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        for (key, parameter), gradient in zip(self.trained.items(), found, strict=True):
            silent = gradient is None or key in self._frozen
            parameter.grad = torch.zeros_like(parameter) if silent else gradient
        return float(loss.detach())

    def finish(self, losses: list[float], state: Mapping[str, np.ndarray]) -> Training:
        """What the training gave; the model is in evaluation afterwards."""
        import torch

        after = Training(
            losses=losses,
            parameters={key: _numpy(p) for key, p in self.model.named_parameters()},
            statistics={key: _numpy(buffer) for key, buffer in self.model.named_buffers()},
            optimizer_state=dict(state),
        )
        with torch.no_grad():
            output = self.model.eval()(self._x)
        arrays = {part: _numpy(y) for part, y in results(output)}
        after.output = {part: self._lay_output(part, y)(y) for part, y in arrays.items()}
        return after


def clip(parameters: Collection[Any], limit: float) -> None:
    """Scales the gradients of all torch parameters down to a global norm of `limit`, as optax
    does: g · min(1, limit / ‖g‖)."""
    import torch

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    if norm >= limit:
        for gradient in gradients:
            gradient.div_(norm).mul_(limit)


def laid(
    torch: Training, flax: Training, partners: Mapping[str, str], lay: Lay
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """(field of `Training`, torch key) → torch's tensor as Flax has it, and Flax's.

    What has no partner or another shape is left out.

    Args:
        partners: torch key → Flax path of parameters and buffers.
    """
    found = {("losses", ""): (np.asarray(torch.losses), np.asarray(flax.losses))}
    for kind in ("parameters", "statistics"):
        theirs = getattr(flax, kind)
        for key, array in getattr(torch, kind).items():
            if key in partners and partners[key] in theirs:
                found[kind, key] = array, theirs[partners[key]]
    for key, array in torch.optimizer_state.items():
        if key in flax.optimizer_state:
            found["optimizer_state", key] = array, flax.optimizer_state[key]
    for (kind, key), (own, partner) in list(found.items()):
        name = key if kind in ("parameters", "statistics") else key.rpartition(".")[0]
        if name in partners:
            own = lay(name, partners[name], own, partner.shape)
            found[kind, key] = own, partner  # type: ignore[assignment]
    for part, y in torch.output.items():
        if part in flax.output:
            found["output", part] = y, flax.output[part]
    return {
        place: pair
        for place, pair in found.items()
        if pair[0] is not None and pair[0].shape == pair[1].shape
    }


def _mean_square(output: Any, lay: OutputLayout) -> Any:
    """Σ ½ · mean (output − target)², in float32 or wider."""
    import torch

    total = torch.zeros(())
    for part, y in results(output):
        if y.is_floating_point():
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            target = torch.from_numpy(like_output(part, y.detach(), lay))
            total = total + (y - target.to(y.dtype)).square().mean() / 2
    return total


def _named_state(trained: Mapping[str, Any], state: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """What a torch optimizer keeps, under the keys of the parameters."""
    found: dict[str, np.ndarray] = {}
    for key, parameter in trained.items():
        for name, value in state.get(parameter, {}).items():
            name = _AS_OPTAX.get(name, name)
            if name in _COUNTED:
                continue
            if name == STEP:
                found[STEP] = np.asarray(float(value))
            elif hasattr(value, "shape"):
                found[f"{key}.{name}"] = _numpy(value)
    return found


def _numpy(tensor: Any) -> np.ndarray:
    """A copy in float64 or complex128: torch may write over the original later."""
    return wide(to_numpy(tensor, "a tensor of the training")).copy()
