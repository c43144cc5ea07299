"""A detector made ready to look at photographs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8

from gam_flax.detection.letterbox import Letterboxed, letterbox, undo
from gam_flax.detection.suppression import non_maximum_suppression
from gam_flax.optimize import optimize_for_inference


class Found(NamedTuple):
    """What was found in one picture, best first.

    boxes: left, top, right, bottom, in the picture's own pixels.
    scores: 0 to 1.
    classes: numbers.
    """

    boxes: Float[np.ndarray, "N 4"]
    scores: Float[np.ndarray, "N"]
    classes: Int[np.ndarray, "N"]


class Detector:
    """Letterbox, network, suppression; compiled once for each size of a letterboxed picture.

        detector = Detector(gam_flax.convert.load("best.safetensors"), side=640)
        found = detector([photograph])[0]

    Args:
        model: a network with `decode` and `strides`, such as `YOLOv5`; its norms are folded.
        side: of the frame that a picture is brought into, in pixels; the shorter side of the frame
            is as short as the network's stride allows.
        batch_size: pictures at a time; a batch that is not full is filled up.
        mean, std: of each channel, of pixels scaled to 0 … 1.
        **options: of `non_maximum_suppression`.

    Raises:
        ValueError: the model is no detector, or `side` is no multiple of its largest stride.
    """

    def __init__(
        self,
        model: Any,
        *,
        side: int = 640,
        batch_size: int = 1,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        **options: Any,
    ):
        if not hasattr(model, "decode"):
            raise ValueError(f"a {type(model).__name__} finds no boxes: it is no detector")
        self.stride = max(model.strides)
        if side % self.stride or side <= 0:
            raise ValueError(f"side {side}: must be a multiple of {self.stride}")
        self.side = side
        self.batch_size = batch_size
        self.sizes: set[tuple[int, int]] = set()
        graph, self._state = nnx.split(optimize_for_inference(model))
        shift, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

        @jax.jit
        def answer(state: Any, images: jax.Array) -> Any:
            self.sizes.add((images.shape[1], images.shape[2]))  # once, when it is compiled
            network: Any = nnx.merge(graph, state)
            predictions = network.decode(network((images - shift) / scale))
            return non_maximum_suppression(predictions, **options)

        self._answer = answer

    def __call__(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[Found]:
        """What is in each picture, RGB, of any sizes."""
        framed = [letterbox(image, self.side, stride=self.stride) for image in images]
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, one in enumerate(framed):
            by_size.setdefault(one.image.shape, []).append(i)
        found: dict[int, Found] = {}
        for same in by_size.values():
            for start in range(0, len(same), self.batch_size):
                some = same[start : start + self.batch_size]
                answers = self._of_a_batch(np.stack([framed[i].image for i in some]))
                for place, i in enumerate(some):
                    found[i] = _own(answers, place, framed[i], images[i].shape)
        return [found[i] for i in range(len(images))]

    def _of_a_batch(self, images: np.ndarray) -> Any:
        short = self.batch_size - len(images)
        filled = np.pad(images, ((0, short), (0, 0), (0, 0), (0, 0)))
        return jax.device_get(self._answer(self._state, filled))


def _own(answers: Any, place: int, framed: Letterboxed, shape: tuple[int, ...]) -> Found:
    """One picture's answer in its own pixels."""
    count = int(answers.count[place])
    boxes = undo(answers.boxes[place, :count], framed, shape[0], shape[1])
    return Found(boxes, answers.scores[place, :count], answers.classes[place, :count])
