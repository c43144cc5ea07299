"""Checkpoints of a run, by orbax: written beside the training, the latest two and the best kept."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from gam_flax.convert.errors import shorten
from gam_flax.train.errors import TrainingError
from gam_flax.train.hosts import all_say, is_first, wait_for_all
from gam_flax.train.step import TrainState

CHECKSUMS = "checksums"
"""Beside the arrays: of what a disk gives back, the files' own formats check only a part."""

PATIENCE = 0.2
"""Seconds in which reads that are not wanted any more come to their end."""

Say = Callable[[str], None]

LATEST = 2
"""How many are kept beside the best: should the last be broken, there is one before it."""


class Checkpoints:
    """The checkpoints of one run, in folders named by their step.

    A folder gets its name when it is complete: what a killed process leaves has another name and
    is taken away by the next one.

    Args:
        folder: of the checkpoints; made where it does not exist.
        say: is given a line where something is wrong that training survives.
    """

    def __init__(self, folder: Path, say: Say):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # it prints every error twice
        self.folder = folder.absolute()
        self._say = say
        self._manager = _manager(self.folder)
        self._writing: int | None = None

    def save(self, state: TrainState, accuracy: float | None = None) -> None:
        """Copies the state and writes it in the background.

        Args:
            accuracy: on the test pictures, by which the best is chosen; None where it was not
                measured.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()
        metrics = None if accuracy is None else {"accuracy": accuracy}
        named = _named(state)
        named[CHECKSUMS] = _checksums(named)
        arrays = ocp.args.Composite(state=ocp.args.StandardSave(named))
        self._writing = step
        self._guarded(lambda: self._manager.save(step, args=arrays, metrics=metrics))

    def wait(self) -> None:
        """Until all is written; what could not be is said."""
        self._guarded(self._manager.wait_until_finished)

    def restore_latest(self, like: TrainState) -> TrainState | None:
        """The newest state that can be read; None where there is none.

        One that cannot be read is moved to `broken/` beside the checkpoints.

        Raises:
            TrainingError: there were checkpoints, and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self.restore(step, like)
            except TrainingError as error:
                older = f"going on from step {n}" if (n := _next(steps, step)) else "none is older"
                self._set_aside(step)
                self._say(f"{error}; moved to {self.folder.parent / 'broken'}, {older}")
        if steps:
            raise TrainingError(
                f"{shorten(self.folder)}: no checkpoint can be read; say --force to start anew"
            )
        return None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, on the devices of `like`.

        Raises:
            TrainingError: it cannot be read.
        """
        named = _named(like)
        target = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, {**named, CHECKSUMS: _checksums(named)}
        )
        read = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        found, wrong = _attempt(lambda: self._manager.restore(step, args=read))
        if not all_say(found is not None):
            raise TrainingError(
                f"{shorten(self.folder / str(step))}: the checkpoint is cut short or broken: "
                f"{wrong or 'another host says so'}"
            )
        arrays = dict(found["state"])
        if not (arrays.pop(CHECKSUMS) == _checksums(arrays)).all():
            raise TrainingError(
                f"{shorten(self.folder / str(step))}: the checkpoint is broken: its numbers are "
                "not the ones that were saved"
            )
        return _unnamed(arrays, like)

    def best_step(self) -> int | None:
        """The step with the highest accuracy of those that are kept."""
        return self._manager.best_step()

    def latest_step(self) -> int | None:
        """The newest step that is written."""
        return self._manager.latest_step()

    def close(self) -> None:
        """Waits for what is being written."""
        self.wait()
        self._manager.close()

    def _guarded(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # a full disk comes as OSError, ValueError or XlaRuntimeError
            last = self.latest_step()
            kept = "there is none before" if last is None else f"the last good one is {last}"
            self._say(
                f"{shorten(self.folder)}: checkpoint {self._writing} could not be written: "
                f"{_first_line(error)}; {kept}"
            )

    def _set_aside(self, step: int) -> None:
        place = self.folder.parent / "broken" / str(step)
        if is_first():
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(self.folder / str(step), place)
        wait_for_all("the checkpoint is away")
        self._manager.reload()


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """What was read, or None and why; what a broken file raises is up to the libraries.

    orbax leaves the reads behind that were under way beside the one that failed. They would print
    tracebacks of their own whenever they are collected: they are collected here, in silence.
    """
    try:
        return read(), ""
    except Exception as error:
        wrong = _first_line(error)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    time.sleep(PATIENCE)
    gc.collect()
    sys.unraisablehook = hook
    return None, wrong


def _manager(folder: Path) -> ocp.CheckpointManager:
    best = policy.BestN(
        get_metric_fn=lambda metrics: metrics["accuracy"],
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(n=LATEST), best]),
        best_fn=lambda metrics: metrics["accuracy"],
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(folder, options=options)


def _checksums(arrays: dict[str, Any]) -> jax.Array:
    """Of each array, the sum of its 32-bit words modulo 2³²; on every device, as the step is."""
    return jax.jit(_sums, out_shardings=arrays["step"].sharding)(arrays)


def _sums(arrays: dict[str, Any]) -> jax.Array:

    def words(x: jax.Array) -> jax.Array:
        if x.dtype == bool:
            return x.astype(jnp.uint32)
        width = min(32, 8 * x.dtype.itemsize)
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
        return bits.astype(jnp.uint32)

    return jnp.stack([jnp.sum(words(x), dtype=jnp.uint32) for _, x in sorted(arrays.items())])


def _named(state: TrainState) -> dict[str, Any]:
    """Each array under its path, random keys as the numbers in them."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): _plain(leaf) for path, leaf in flat}


def _unnamed(arrays: dict[str, Any], like: TrainState) -> TrainState:
    def leaf(path: Any, old: Any) -> Any:
        new = arrays[_name(path)]
        if not _is_key(old):
            return new
        return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))

    return jax.tree_util.tree_map_with_path(leaf, like)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _next(steps: list[int], step: int) -> int | None:
    older = [n for n in steps if n < step]
    return older[0] if older else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[0], 160)
