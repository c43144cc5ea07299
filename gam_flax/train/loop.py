"""A run from its folder to its end: trained, evaluated, saved, gone on with."""

from __future__ import annotations

import json
import time
from collections import deque
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text

from gam_flax.convert.saved import save
from gam_flax.train.board import Board
from gam_flax.train.checkpoints import Checkpoints
from gam_flax.train.curves import draw_curves
from gam_flax.train.data import Data, read_data
from gam_flax.train.diagnosis import where_it_began
from gam_flax.train.errors import TrainingError
from gam_flax.train.fit import Result
from gam_flax.train.handover import going_on
from gam_flax.train.hosts import is_first, wait_for_all
from gam_flax.train.metrics import MetricLines, read_metrics
from gam_flax.train.network import build_network
from gam_flax.train.pipeline import evaluation_batches, stream, training_batches
from gam_flax.train.progress import Progress
from gam_flax.train.recipe import learning_rate_schedule, make_optimizer
from gam_flax.train.run_folder import RunFolder, opened
from gam_flax.train.settings import Settings
from gam_flax.train.sharding import gathered, make_mesh, own_rows, put_batch
from gam_flax.train.step import Steps, TrainState, make_steps
from gam_flax.train.stopping import SharedStopRequest, StopRequest, stop_request

WINDOW = 50
"""Images per second are those of so many steps."""


def run(
    settings: Settings,
    out: Path,
    *,
    workers: int,
    save_every: int | None,
    tensorboard: bool,
    force: bool,
    console: Console,
) -> Result:
    """What `fit` does. Of several hosts all come here, and the first alone writes and speaks."""
    console.quiet = console.quiet or not is_first()

    def say(line: str) -> None:
        console.print(Text(line))

    data = read_data(settings.data, settings.data_dir, side=settings.side)
    mesh = make_mesh()
    per_epoch = _steps_in_an_epoch(settings, data, mesh)
    with ExitStack() as stack:
        folder = stack.enter_context(opened(out, settings, force=force))
        steps = _compiled(settings, data, mesh, per_epoch, say)
        checkpoints = stack.enter_context(closing(Checkpoints(folder.checkpoints, say)))
        initial = going_on(steps.initial(), settings)
        state = checkpoints.restore_latest(initial)
        new = state is None
        state = initial if state is None else state
        first = int(state.step)
        say(f"{out}: {'a new run' if new and not first else f'going on from step {first}'}")
        training = Training(settings, data, mesh, steps, per_epoch, save_every, workers)
        training.checkpoints, training.say = checkpoints, say
        kinds = [partial(MetricLines, folder.metrics)] if is_first() else []
        kinds += [partial(Board, folder.board)] if is_first() and tensorboard else []
        training.records = [stack.enter_context(closing(kind(until=first))) for kind in kinds]
        total = settings.epochs * per_epoch
        training.bar = stack.enter_context(Progress(console, total, first))
        training.stop = stack.enter_context(stop_request())
        state = training.from_step(first, total, state)
        step = int(state.step)
        checkpoints.wait()
        if checkpoints.latest_step() != step:
            raise TrainingError(f"{out}: the end of step {step} was not saved; make room")
        wait_for_all("the metrics are written")
        accuracies = _accuracies(folder, data.task.metric)
        best = max(accuracies, default=None)
        if step < total:
            say(f"stopped after step {step} of {total}, which is saved; the same call goes on")
            return Result(step, False, None, best)
        _write_models(folder, training, state, accuracies)
        if is_first():
            _draw(folder, say)
        return Result(step, True, accuracies[-1], best)


class Training:
    """The loop over the steps.

    The numbers of a step are fetched while the device is busy with the next one.
    """

    checkpoints: Checkpoints
    records: list[MetricLines | Board]
    bar: Progress
    stop: StopRequest | SharedStopRequest
    say: Any

    def __init__(
        self,
        settings: Settings,
        data: Data,
        mesh: Mesh,
        steps: Steps,
        per_epoch: int,
        save_every: int | None,
        workers: int,
    ):
        self.settings = settings
        self.mesh = mesh
        self.steps = steps
        self.per_epoch = per_epoch
        self.save_every = save_every
        self.workers = workers
        rows = own_rows(mesh, settings.batch_size)
        self.data = data
        self.batches = training_batches(
            data.train,
            batch_size=settings.batch_size,
            seed=settings.seed,
            change=data.training_change(crop=settings.crop, flip=settings.flip),
            rows=rows,
        )
        self.test_batches = evaluation_batches(
            data.test,
            batch_size=settings.batch_size,
            change=data.evaluation_change,
            rows=rows,
        )
        self.times: deque[float] = deque(maxlen=WINDOW)

    def from_step(self, first: int, total: int, state: TrainState) -> TrainState:
        """The state after step `total`, or after the step at which a stop was asked for."""
        waiting: tuple[int, dict[str, jax.Array]] | None = None
        with closing(stream(self.batches, first, workers=self.workers)) as batches:
            for step in range(first + 1, total + 1):
                state, metrics = self.steps.train(state, put_batch(next(batches), self.mesh))
                if waiting is not None:
                    self._note(*waiting, state)
                waiting = (step, metrics)
                ends = step % self.per_epoch == 0
                stops = self.stop.at(step)
                if ends or stops or (self.save_every and step % self.save_every == 0):
                    self._note(*waiting, state)
                    waiting = None
                    accuracy = self._evaluate(step, state) if ends else None
                    for record in self.records:
                        record.to_disk()
                    self.checkpoints.save(state, accuracy)
                if stops:
                    break
        return state

    def _note(self, step: int, metrics: dict[str, jax.Array], state: TrainState) -> None:
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if not values.pop("sound"):
            self._give_up(step, values, state)
        self.times.append(time.perf_counter())
        epoch = round(step / self.per_epoch, 4)
        self._record(step=step, epoch=epoch, part="train", **values)
        self.bar.show(step, values, self._speed())

    def _record(self, **values: Any) -> None:
        for record in self.records:
            record.write(**values)

    def _speed(self) -> float:
        """Images per second of the last steps."""
        if len(self.times) < 2:
            return 0.0
        seconds = self.times[-1] - self.times[0]
        return (len(self.times) - 1) * self.settings.batch_size / seconds

    def _evaluate(self, step: int, state: TrainState) -> float:
        speed = self._speed()
        answers = []
        with closing(stream(self.test_batches, 0, workers=self.workers)) as batches:
            for batch in batches:
                answers.append(
                    jax.device_get(self.steps.evaluate(state, put_batch(batch, self.mesh)))
                )
        self.times.clear()  # evaluation is no part of the speed of training
        found = self.data.task.score(answers)
        epoch = step // self.per_epoch
        self._record(step=step, epoch=epoch, part="test", **found, images_per_second=speed)
        metric = self.data.task.metric
        told = [
            f"{name} {value:.2%}" if name == metric else f"{name} {value:.4f}"
            for name, value in found.items()
        ]
        self.say(
            f"epoch {epoch} of {self.settings.epochs}: test {', '.join(told)}; "
            f"{speed:,.0f} images/s"
        )
        return found[metric]

    def _give_up(self, step: int, values: dict[str, float], state: TrainState) -> None:
        """The state is still the one before the step, and its batch can be had again."""
        self.checkpoints.wait()
        batch = self.batches[step - 1]
        where = where_it_began(*self.steps.as_trained(gathered(state, self.mesh), batch))
        last = self.checkpoints.latest_step()
        kept = "no checkpoint was written yet" if last is None else f"checkpoint {last} is kept"
        raise TrainingError(
            f"step {step}: the loss is {values['loss']:.4g} and the gradient's norm "
            f"{values['gradient_norm']:.4g}; it began {where}; {kept}; a lower learning rate, "
            "a warm-up or clipping may help"
        )


def _steps_in_an_epoch(settings: Settings, data: Data, mesh: Mesh) -> int:
    part = settings.batch_size // settings.accumulate
    if part % mesh.size:
        raise TrainingError(
            f"batch-size {settings.batch_size}: in {settings.accumulate} parts must be a multiple "
            f"of the {mesh.size} devices"
        )
    if settings.batch_size > len(data.train):
        raise TrainingError(
            f"batch-size {settings.batch_size}: there are only {len(data.train)} training pictures"
        )
    return len(data.train) // settings.batch_size


def _compiled(settings: Settings, data: Data, mesh: Mesh, per_epoch: int, say: Any) -> Steps:
    schedule = learning_rate_schedule(settings, settings.epochs * per_epoch)
    return make_steps(
        build_network(settings, data, say),
        settings,
        make_optimizer(settings, schedule),
        schedule,
        (data.mean, data.std),
        mesh,
        data.task,
    )


def _accuracies(folder: RunFolder, metric: str) -> list[float]:
    return [line[metric] for line in read_metrics(folder.metrics) if line["part"] == "test"]


def _write_models(
    folder: RunFolder, training: Training, state: TrainState, accuracies: list[float]
) -> None:
    step = training.checkpoints.best_step()
    best = state if step is None else training.checkpoints.restore(step, state)
    _write_model(folder.last, training, state, accuracies[-1])
    _write_model(folder.best, training, best, max(accuracies))


def _write_model(path: Path, training: Training, state: TrainState, accuracy: float) -> None:
    """With what a user needs beside the weights. All hosts have parts, the first one writes."""
    whole = gathered(state, training.mesh)
    about = {
        "mean": json.dumps(training.data.mean),
        "std": json.dumps(training.data.std),
        "classes": json.dumps(training.data.classes),
        "side": json.dumps(training.data.side),
        f"test_{training.data.task.metric}": f"{accuracy:.4f}",
    }
    if is_first():
        save(training.steps.model(whole), path, force=True, about=about)


def _draw(folder: RunFolder, say: Any) -> None:
    try:
        draw_curves(folder.metrics, folder.curves, force=True)
    except ModuleNotFoundError as error:
        say(f"curves.png was not drawn: {error.name} is not installed: gam-attention[plots]")
