"""One step of training, and one of evaluation, as pure functions of a state and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gam_flax.train.settings import Settings
from gam_flax.train.sharding import placed, state_shardings
from gam_flax.train.tasks import Classification, Metrics, Task

CLASSIFICATION = Classification()


class TrainState(NamedTuple):
    """All that a run is at one moment.

    step: updates made.
    params: the parameters, float32.
    rest: running statistics, and dropout's keys and counters.
    optimizer: optax's state.
    average: the moving average of the parameters; () without one.
    sound: False from the first step on whose loss or gradient was not finite; from then on
        nothing of the state changes any more.
    """

    step: jax.Array
    params: Any
    rest: Any
    optimizer: Any
    average: Any
    sound: jax.Array


class Steps(NamedTuple):
    """The compiled functions of a run.

    initial: () → the state at step 0, on the mesh.
    shapes: of the state, with shardings: `train.lower(shapes, …)` compiles without any array.
    train: (state, batch) → the next state, metrics; the old state is used up.
    evaluate: (state, batch) → what the task's `score` wants to see of it.
    model: state → the model with these weights, in evaluation mode.
    as_trained: (state, batch) → the model in training mode, the pictures as it sees them, and the
        loss of such a model: what `where_it_began` looks at.
    """

    initial: Callable[[], TrainState]
    shapes: TrainState
    train: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped
    model: Callable[[TrainState], nnx.Module]
    as_trained: Callable[
        [TrainState, dict[str, Any]],
        tuple[nnx.Module, jax.Array, Callable[[nnx.Module], jax.Array]],
    ]


def make_steps(
    model: nnx.Module,
    settings: Settings,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    normalize: tuple[tuple[float, ...], tuple[float, ...]],
    mesh: Mesh,
    task: Task = CLASSIFICATION,
) -> Steps:
    """The functions that train `model` for `task`, compiled for `mesh` when they are first called.

    Under the mesh a batch is cut over the devices, and means are over the whole of it: BatchNorm's
    statistics are global. With `accumulate` they are of one part of the batch.

    Args:
        model: gives the structure and the parameters at the start; one of shapes alone, of
            `nnx.eval_shape`, can be compiled but has no `initial`.
        normalize: mean and deviation of each channel, of pixels scaled to 0 … 1.
        task: what it learns.
    """
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    model.eval()
    eval_graph = nnx.split(model, nnx.Param, ...)[0]
    prepare = _preparation(normalize, settings.dtype)

    def start(params: Any, rest: Any) -> TrainState:
        average = () if settings.ema is None else jax.tree.map(jnp.copy, params)
        zero, sound = jnp.zeros((), jnp.int32), jnp.ones((), bool)
        return TrainState(zero, params, rest, optimizer.init(params), average, sound)

    def loss_of(params: Any, rest: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        network = nnx.merge(graph, params, rest, copy=True)
        loss, shown = task.loss(network, prepare(part["image"]), part, settings)
        return loss, (nnx.state(network, nnx.Not(nnx.Param)), {"loss": loss, **shown})

    def gradient(state: TrainState, batch: dict[str, jax.Array]) -> tuple[Any, Any, Metrics]:
        """Means over the parts of the batch; the statistics after the last of them.

        Not a `lax.scan`: XLA's convolutions inside a loop took four times as long on a CPU. The
        barrier keeps a part from beginning before the one before it has gone, or their
        activations would be in memory together.
        """
        rest, total = state.rest, None
        for i in range(settings.accumulate):
            part = jax.tree.map(lambda x, i=i: _part(x, i, settings.accumulate), batch)
            part, total = jax.lax.optimization_barrier((part, total))
            graded = jax.value_and_grad(loss_of, has_aux=True)(state.params, rest, part)
            (_, (rest, shown)), grads = graded
            found = (grads, shown)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        grads, metrics = jax.tree.map(lambda x: x / settings.accumulate, total)
        return grads, rest, metrics

    def train(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        grads, rest, metrics = gradient(state, batch)
        norm = optax.tree.norm(grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average: Any = ()
        if settings.ema is not None:
            average = optax.incremental_update(params, state.average, 1 - settings.ema)
        sound = state.sound & jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        after = TrainState(state.step + 1, params, rest, optimizer_state, average, sound)
        kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, state)
        metrics["gradient_norm"] = norm
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return kept._replace(sound=sound), {**metrics, "sound": sound}

    def evaluate(state: TrainState, batch: dict[str, jax.Array]) -> Any:
        network = nnx.merge(eval_graph, _evaluated(state), state.rest)
        return task.answers(network, prepare(batch["image"]), batch)

    def as_trained(state: TrainState, batch: dict[str, Any]) -> Any:
        network = nnx.merge(graph, state.params, state.rest)
        batch = jax.tree.map(jnp.asarray, batch)
        images = prepare(batch["image"])
        return network, images, lambda model: task.loss(model, images, batch, settings)[0]

    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(start, params, rest)
    shardings = state_shardings(shapes, mesh, settings.parameters)
    return Steps(
        lambda: placed(start(params, rest), shardings),
        jax.tree.map(lambda x, to: x.update(sharding=to), shapes, shardings),
        jax.jit(train, donate_argnums=0, out_shardings=(shardings, everywhere)),
        jax.jit(evaluate, out_shardings=everywhere),
        lambda state: nnx.merge(eval_graph, _evaluated(state), state.rest),
        as_trained,
    )


def _evaluated(state: TrainState) -> Any:
    return state.params if state.average == () else state.average


def _preparation(normalize: Any, dtype: str) -> Callable[[jax.Array], jax.Array]:
    """Bytes → what the network sees."""
    wide = wide_type(dtype)
    mean, std = (jnp.asarray(values, wide) for values in normalize)
    return lambda images: ((images.astype(wide) / 255 - mean) / std).astype(dtype)


def wide_type(dtype: str) -> Any:
    """Of parameters, logits and losses, where layers compute in `dtype`: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def _part(x: jax.Array, i: int, count: int) -> jax.Array:
    """The rows whose number leaves i when divided by `count`: of each device's as many."""
    return x.reshape(-1, count, *x.shape[1:])[:, i]
