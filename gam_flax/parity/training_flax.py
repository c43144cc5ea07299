"""A Flax model, NNX or Linen, trained for some steps with optax."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.errors import CheckpointError
from gam_flax.convert.optax_state import Parameters, counters, moments
from gam_flax.parity.flax_side import cast, switches
from gam_flax.parity.optimizers import Optimizer, recipe
from gam_flax.parity.pure import Pure, is_float
from gam_flax.parity.trace import Calls, cotangent, results, wide
from gam_flax.parity.training import STEP, Training


class TrainingProgram:
    """A Flax model and its optimizer, compiled once: (x, factors) → `Training`.

    Parameters and input are rounded to `dtype`; statistics as well, but they are kept in float32
    or wider. jax's switches are put back.

    Args:
        model: in the mode that it is trained in.
        evaluation: the same model in evaluation.
        optimizer: whose optax half is taken.
        steps: 1 or more.
        partners: torch key → Flax path, of parameters and buffers.
        frozen: torch keys of parameters whose gradient is to be zero, as for `train_torch`.
        fixed: torch keys of parameters that are not trained, see `training.untrained`: the
            optimizer does not hear of them. Parameters that are not floating are never trained.
        loss: of the output, instead of that of `Training`; one number.
    """

    def __init__(
        self,
        model: Pure,
        evaluation: Pure,
        *,
        optimizer: Optimizer,
        steps: int,
        dtype: str,
        partners: Mapping[str, str],
        frozen: Collection[str] = (),
        fixed: Collection[str] = (),
        loss: Callable[[Any], Any] | None = None,
    ):
        self._model, self._dtype, self._steps = model, dtype, steps
        self._keys = {path: key for key, path in partners.items()}
        self._fixed = {partners[key] for key in fixed if key in partners}
        still = {partners[key] for key in frozen if key in partners}
        optax = recipe(optimizer).optax
        self._init = jax.jit(optax.init)
        self._update = jax.jit(partial(_update, optax))
        self._gradients = jax.jit(partial(_gradients, model.apply, still, loss or _mean_square))
        self._evaluate = jax.jit(partial(_outputs, evaluation.apply))

    def __call__(self, x: np.ndarray, factors: Mapping[str, float]) -> Training:
        """One training.

        Args:
            x: (B, *space, C).
            factors: what parameters and statistics are multiplied with before they are rounded,
                by Flax path.
        """
        rounded = {
            path: cast(array, self._dtype, factors.get(path, 1.0))
            for path, array in {**self._model.parameters, **self._model.statistics}.items()
        }
        wider = jnp.promote_types(self._dtype, jnp.float32)
        statistics = {path: cast(rounded[path], wider) for path in self._model.statistics}
        trained, rest = self._split({path: rounded[path] for path in self._model.parameters})
        x = cast(x, self._dtype)
        # Under x64 optax computes its scalars (bias corrections, schedules) in float64, as torch
        # does in Python whatever the dtype; the arrays keep theirs. In float32 1 - 0.999 is off by
        # 1e-5 of itself, and Adam's first steps by half as much.
        with jax.enable_x64(True):
            state = self._init(trained)
        losses, first = [], None
        for _ in range(self._steps):
            with switches(self._dtype):
                found = self._gradients(trained, rest, statistics, x)
            loss, statistics, gradients = found
            losses.append(float(loss))
            with jax.enable_x64(True):
                trained, state = self._update(gradients, state, trained)
            first = state if first is None else first
        parameters = {**rest, **trained}
        with switches(self._dtype):
            output = self._evaluate(parameters, statistics, x)
        return Training(
            losses=losses,
            parameters={path: wide(parameters[path]) for path in self._model.parameters},
            statistics={path: wide(array) for path, array in statistics.items()},
            output={part: wide(y) for part, y in output.items()},
            **self._named(first, trained),
        )

    def _split(self, parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Those that are trained, and the others."""
        trained = {
            path: array
            for path, array in parameters.items()
            if is_float(array) and path not in self._fixed
        }
        return trained, {path: parameters[path] for path in parameters if path not in trained}

    def _named(self, state: Any, trained: Mapping[str, Any]) -> dict[str, Any]:
        """The optax state under torch's names, by the table that users convert with."""
        found: dict[str, np.ndarray] = {}
        try:
            for moment in moments(state, Parameters(trained)):
                key = self._keys.get(moment.path) or leaves.torch_name(moment.path)
                found[f"{key}.{moment.key}"] = wide(moment.leaf)
                if moment.count is not None:
                    found[STEP] = wide(moment.count)
            counts = counters(state)
        except CheckpointError as error:
            return {"unnamed": str(error)}
        if counts:
            found.setdefault(STEP, wide(counts[0]))
        return {"optimizer_state": found}


def _gradients(
    apply: Any,
    still: Collection[str],
    loss: Callable[[Any], Any],
    trained: dict,
    rest: dict,
    statistics: dict,
    x: Any,
) -> tuple[Any, dict, dict]:
    """Loss, statistics after the pass, and gradients, zero for `still`."""

    def measure(trained: dict) -> tuple[Any, dict]:
        output, after = apply({**rest, **trained}, statistics, x, Calls())
        return loss(output), after

    (value, after), found = jax.value_and_grad(measure, has_aux=True)(trained)
    return value, after, {k: jnp.zeros_like(g) if k in still else g for k, g in found.items()}


def _update(optimizer: Any, gradients: dict, state: Any, trained: dict) -> tuple[dict, Any]:
    """Parameters and optax state after one step."""
    updates, state = optimizer.update(gradients, state, trained)
    return {path: (p + updates[path]).astype(p.dtype) for path, p in trained.items()}, state


def _outputs(apply: Any, parameters: dict, statistics: dict, x: Any) -> dict[str, Any]:
    return dict(results(apply(parameters, statistics, x, Calls())[0]))


def _mean_square(output: Any) -> Any:
    """Σ ½ · mean (output − target)², in float32 or wider."""
    total = jnp.zeros(())
    for part, y in results(output):
        if is_float(y):
            y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
            target = jnp.asarray(cotangent(part, y.shape), y.dtype)
            total = total + jnp.square(y - target).mean() / 2
    return total
