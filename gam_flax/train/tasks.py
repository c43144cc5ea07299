"""What a network learns: what a batch's loss is, and how good it is on the test pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import optax

if TYPE_CHECKING:
    from gam_flax.train.settings import Settings

Metrics = dict[str, jax.Array]
Batch = dict[str, jax.Array]


class Task(Protocol):
    """What training has to know of a task.

    metric: the name, among those that `score` gives, of what is best when it is highest.
    """

    metric: ClassVar[str]

    def loss(
        self, network: Any, images: jax.Array, batch: Batch, settings: Settings
    ) -> tuple[jax.Array, Metrics]:
        """Of a batch, a mean over its pictures; and what else is to be shown of it."""
        ...

    def answers(self, network: Any, images: jax.Array, batch: Batch) -> Any:
        """What `score` wants to see of a batch of test pictures; traced, as `loss` is."""
        ...

    def score(self, answers: list[Any]) -> dict[str, float]:
        """Of the answers to all test pictures, as numpy's arrays."""
        ...


@dataclass(frozen=True)
class Classification:
    """cross-entropy(logits, smoothed labels); the batch has "label" (B,)."""

    metric: ClassVar[str] = "accuracy"

    def loss(
        self, network: Any, images: jax.Array, batch: Batch, settings: Settings
    ) -> tuple[jax.Array, Metrics]:
        logits = _wide(network(images))
        labels = jax.nn.one_hot(batch["label"], logits.shape[-1], dtype=logits.dtype)
        smooth = optax.smooth_labels(labels, settings.label_smoothing)
        right = (logits.argmax(-1) == batch["label"]).mean(dtype=logits.dtype)
        return optax.softmax_cross_entropy(logits, smooth).mean(), {"accuracy": right}

    def answers(self, network: Any, images: jax.Array, batch: Batch) -> Metrics:
        """Sums over the pictures."""
        logits = _wide(network(images))
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = logits.argmax(-1) == batch["label"]
        weight = batch["weight"]
        return {
            "loss": (each * weight).sum(),
            "accuracy": (right * weight).sum(),
            "count": weight.sum(),
        }

    def score(self, answers: list[dict[str, Any]]) -> dict[str, float]:
        count = sum(float(found["count"]) for found in answers)
        return {
            name: sum(float(found[name]) for found in answers) / count
            for name in ("loss", "accuracy")
        }


@dataclass(frozen=True)
class Detection:
    """YOLOv5's loss, with the gains it is trained with; the batch has "boxes" (B, T, 5), see
    `detection_loss`.

    The gains of L levels and K classes, at pictures of S pixels:

        box 0.05 · 3 / L      objectness (S / 640)² · 3 / L      classes 0.5 · K / 80 · 3 / L
    """

    metric: ClassVar[str] = "map50"

    def loss(
        self, network: Any, images: jax.Array, batch: Batch, settings: Settings
    ) -> tuple[jax.Array, Metrics]:
        from gam_flax.detection import detection_loss

        outputs = [_wide(y) for y in network(images)]
        levels = 3 / len(outputs)
        found = detection_loss(
            outputs,
            batch["boxes"],
            network.detect.anchors[...],
            box=0.05 * levels,
            objectness=(images.shape[1] / 640) ** 2 * levels,
            classification=0.5 * network.num_classes / 80 * levels,
            label_smoothing=settings.label_smoothing,
        )
        parts = found._asdict()
        return parts.pop("total"), parts

    def answers(self, network: Any, images: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        from gam_flax.detection import non_maximum_suppression

        predictions = network.decode([_wide(y) for y in network(images)])
        found = non_maximum_suppression(
            predictions, confidence=0.001, iou=0.6, multi_label=True, candidates=4096
        )
        side = jnp.asarray(images.shape[2:0:-1] * 2, predictions.dtype)  # x, y, w, h
        truth = batch["boxes"].at[..., 1:].multiply(side)
        return {**found._asdict(), "truth": truth, "weight": batch["weight"]}

    def score(self, answers: list[dict[str, Any]]) -> dict[str, float]:
        from gam_flax.detection.precision import mean_average_precision

        each = [
            {name: values[i] for name, values in batch.items()}
            for batch in answers
            for i in range(len(batch["weight"]))
            if batch["weight"][i]
        ]
        return mean_average_precision(each)


def _wide(x: jax.Array) -> jax.Array:
    """What a loss is computed in: float32, or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
