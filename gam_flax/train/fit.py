"""Training, as one call."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gam_flax.train.errors import require_libraries
from gam_flax.train.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Result:
    """What a run came to.

    step: updates made.
    finished: False where it was stopped; the same call goes on.
    accuracy: on the test pictures at the end, of a detector mAP@0.5; None where it was stopped.
    best_accuracy: the highest at the end of an epoch; None before the first.
    """

    step: int
    finished: bool
    accuracy: float | None
    best_accuracy: float | None


def fit(
    settings: Settings,
    out: str | os.PathLike,
    *,
    workers: int = 0,
    save_every: int | None = None,
    tensorboard: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> Result:
    """Trains a network, or goes on where a run stopped or was killed.

    The folder gets run.json (the settings), metrics.jsonl (a line a step, and one an evaluation),
    checkpoints/ (the latest two and the best), and at the end last.safetensors, best.safetensors
    (for `gam_flax.convert.load`) and curves.png. A run that was killed and goes on ends with the
    same bits as one that was not, on the same machine with the same number of devices. On a GPU
    that takes XLA_FLAGS=--xla_gpu_deterministic_ops=true.

    After `jax.distributed.initialize` several processes train as one: all of them call this with
    the same arguments and a folder that they share, and get the same result.

    Args:
        settings: what is trained on what, and how.
        out: the folder of the run, made where it does not exist.
        workers: processes that read and augment; 0 for threads of this one. The pictures are the
            same for any number.
        save_every: steps between checkpoints, beside those at the end of each epoch.
        tensorboard: write the metrics for TensorBoard as well, into tensorboard/.
        force: take away the run in `out` and start anew.
        console: where progress is shown, standard output by default.

    Raises:
        TrainingError: the folder holds another run; settings, data and devices do not go
            together; the loss or a gradient is not finite: which step, which layer, and which
            checkpoint was the last; what was to be saved at the end could not be written.
        DataError: pictures are missing or broken.
        CheckpointError: `settings.init` does not fit.
        ModuleNotFoundError: the extra `train` is not installed, or `tensorboard` where that is
            asked for.
    """
    require_libraries()
    from rich.console import Console

    from gam_flax.train.loop import run

    return run(
        settings,
        Path(out),
        workers=workers,
        save_every=save_every,
        tensorboard=tensorboard,
        force=force,
        console=console or Console(soft_wrap=True),
    )
