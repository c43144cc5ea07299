"""What makes a run. The same settings and the same data give the same numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gam_flax.convert.errors import shorten
from gam_flax.train.data import KINDS
from gam_flax.train.errors import TrainingError

CHOICES = {
    "data": KINDS,
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "cifar", "imagenet", "constant"),
    "dtype": ("float32", "bfloat16", "float64"),
    "parameters": ("replicated", "sharded"),
}

LEARNING_RATES = {"sgd": 0.1, "adamw": 1e-3}
WEIGHT_DECAYS = {"sgd": 5e-4, "adamw": 5e-2}


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Args:
        data: kind of data, see `read_data`.
        data_dir: where it lies; None for the kind's own place.
        side: of a folder's pictures, in pixels, also of those with boxes.
        model: a name of `list_models()`, or a YOLOv5's YAML file.
        attention: a name of `list_attentions()`, or None.
        model_options: further arguments of the network. ResNets get the CIFAR stem for pictures
            of up to 64 pixels, unless these say otherwise.
        dtype: of the computation. The parameters are float32, with float64 they are float64;
            that takes JAX_ENABLE_X64=1.
        remat: compute each block once more in the backward pass: less memory, more time.
        init: checkpoint to start from, PyTorch's or ours.
        variant: of the attention in `init`, where its weights cannot tell, see `load_torch`.
        fresh: layers that do not take their weights from `init`, see `load_torch`'s `keep`; None
            for the last layer, and the attention where `init` has none.
        init_step: go on after so many steps that torch made: all weights come from `init`, a
            PyTorch file that also has the optimizer's state_dict under "optimizer".
        epochs: how often each picture is seen.
        batch_size: pictures a step, of all devices and hosts together.
        accumulate: the batch goes through the network in so many parts, and its gradient is their
            mean. BatchNorm sees a part at a time.
        seed: of the parameters, the order, the augmentation and dropout.
        crop: black pixels around the picture, out of which a random part is cut; None for an
            eighth of its side (4 of 32, as in the papers), 0 for folders. Pictures with boxes are
            scaled and moved instead.
        flip: mirror half of the pictures; None for what suits the data (not digits).
        optimizer: "sgd" (with `momentum`, Nesterov) or "adamw".
        learning_rate: the highest; None for 0.1 with sgd, 0.001 with adamw.
        schedule: see `learning_rate_schedule`.
        warmup: epochs in which the learning rate rises from 0, of all `epochs`.
        momentum: of sgd.
        weight_decay: of kernels; biases and norms have none. None for 5e-4 with sgd, where it is
            added to the gradient, and 0.05 with adamw.
        clip: the global norm that gradients are clipped to; None for no clipping.
        label_smoothing: ε of (1 − ε) · one-hot + ε / classes.
        ema: weight of the old value in the moving average of the parameters, which is then what
            is evaluated and saved as the model; None for no average.
        parameters: "replicated" on every device, or "sharded" over them (FSDP).

    Raises:
        TrainingError: a setting that makes no sense, by its name.
    """

    data: str
    data_dir: str | None = None
    side: int | None = None
    model: str = "resnet18"
    attention: str | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    remat: bool = False
    init: str | None = None
    variant: str | None = None
    fresh: tuple[str, ...] | None = None
    init_step: int | None = None
    epochs: int = 10
    batch_size: int = 128
    accumulate: int = 1
    seed: int = 0
    crop: int | None = None
    flip: bool | None = None
    optimizer: str = "sgd"
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.0
    momentum: float = 0.9
    weight_decay: float | None = None
    clip: float | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
    parameters: str = "replicated"

    def __post_init__(self):
        for name, choices in CHOICES.items():
            _check(getattr(self, name) in choices, self, name, f"one of {', '.join(choices)}")
        for name in ("epochs", "batch_size", "accumulate"):
            _check(getattr(self, name) >= 1, self, name, "1 or more")
        for name in ("crop", "learning_rate", "weight_decay", "clip"):
            _check((getattr(self, name) or 0) >= 0, self, name, "0 or more")
        _check(self.clip != 0, self, "clip", "above 0")
        _check(0 <= self.seed < 2**32, self, "seed", "0 to 4294967295")
        _check(0 <= self.warmup < self.epochs, self, "warmup", f"fewer than {self.epochs} epochs")
        for name in ("momentum", "label_smoothing", "ema"):
            _check(0 <= (getattr(self, name) or 0) < 1, self, name, "at least 0 and below 1")
        goes_on = self.init_step is None or (self.init is not None and self.init_step > 0)
        _check(goes_on, self, "init_step", "1 or more, with init")
        whole = self.batch_size % self.accumulate == 0
        _check(whole, self, "accumulate", f"a divisor of the batch size, {self.batch_size}")

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return LEARNING_RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    @property
    def decay(self) -> float:
        """The weight decay."""
        return WEIGHT_DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay

    def to_json(self) -> str:
        """One object, one line a setting."""
        return json.dumps(asdict(self), indent=1)


def _check(good: bool, settings: Settings, name: str, expected: str) -> None:
    if not good:
        found = shorten(getattr(settings, name))
        raise TrainingError(f"{name.replace('_', '-')} {found}: must be {expected}")


def differences(settings: Settings, text: str) -> list[str]:
    """How these settings differ from the ones that `to_json` wrote: "epochs 5, was 3"."""
    now, then = json.loads(settings.to_json()), json.loads(text)
    names = {**then, **now}
    return [
        f"{name.replace('_', '-')} {shorten(now.get(name))}, was {shorten(then.get(name))}"
        for name in names
        if now.get(name) != then.get(name)
    ]
