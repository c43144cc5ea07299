"""The state of an optax optimizer: what each part of it is called in torch, and how to fill it.

optax composes: a state is a nest of tuples, dicts and NamedTuples, in which the moments are trees
of the parameters' own structure. `FIELDS` says what every field of every NamedTuple is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from gam_flax.convert import leaves
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.flax_paths import dotted, nnx_variables, turned_kernels
from gam_flax.convert.torch_optimizer import STEP

_INNER, _KEPT = "(inner)", "(kept)"

FIELDS: dict[str, dict[str, str]] = {
    "EmptyState": {},  # clipping, weight decay, a constant learning rate, set_to_zero
    "TraceState": {"trace": "momentum_buffer"},
    "ScaleByAdamState": {"count": STEP, "mu": "exp_avg", "nu": "exp_avg_sq"},
    "ScaleByRmsState": {"nu": "square_avg"},
    "ScaleByRStdDevState": {"mu": "grad_avg", "nu": "square_avg"},
    "ScaleByScheduleState": {"count": STEP},
    "WeightDecaySchedule": {"count": STEP},
    "WrappedScheduleState": {"count": STEP},
    "MaskedState": {"inner_state": _INNER},
    "PartitionState": {"inner_states": _INNER},
    "InjectStatefulHyperparamsState": {
        "count": STEP,
        "hyperparams": _KEPT,
        "hyperparams_states": _INNER,
        "inner_state": _INNER,
    },
}
"""optax state → field → the key of torch's state, STEP for a counter, or how to go on."""

_WHY_NOT = {
    "ScaleByAmsgradState": "optax keeps the maximum of the second moment after its bias "
    "correction, torch the maximum before it",
    "EmaState": "no torch optimizer keeps an average of its updates",
    "MultiStepsState": "no torch optimizer keeps gradients between its steps",
}


class Moment(NamedTuple):
    """One array of an optax state.

    path: of its parameter in Flax.
    key: what torch calls it, such as "exp_avg".
    leaf: the array, or its shape and dtype alone.
    count: the counter beside it, None where its state has none.
    """

    path: str
    key: str
    leaf: Any
    count: Any


class Parameters:
    """The names of a model's parameters.

    paths: torch's name → Flax path.
    turned: the Flax paths of the kernels that `leaves` calls so; a tree alone does not tell them.
    """

    def __init__(self, params: Any):
        from flax import nnx

        self._model = params if isinstance(params, nnx.Module) else None
        self.turned: frozenset[str] = frozenset()
        if self._model is not None:
            paths: Iterable[str] = nnx_variables(params)
            self.turned = turned_kernels(self._model)
        else:
            if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
                params = params["params"]  # Linen variables, of which optax sees this part
            paths = [path for path, _ in self.flat(params)]
        self.paths = {leaves.torch_name(path): path for path in paths}

    def flat(self, tree: Any) -> Iterator[tuple[str, Any]]:
        """(Flax path, leaf) of a tree of the parameters' structure, without what is masked."""
        import jax

        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            yield self.name(path), leaf

    def name(self, path: tuple[Any, ...]) -> str:
        """A path of jax as a path of the model."""
        import jax

        if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # inside a variable of NNX
            path = path[:-1]
        parts = [getattr(p, "key", getattr(p, "idx", getattr(p, "name", p))) for p in path]
        return ".".join(map(str, parts)) if self._model is None else dotted(self._model, parts)


def moments(state: Any, params: Parameters) -> Iterator[Moment]:
    """Every array of moments in `state`.

    Raises:
        CheckpointError: a part of the state is not in `FIELDS`.
    """
    for node in _nodes(state):
        fields = _fields(node)
        counts = [getattr(node, field) for field, role in fields.items() if role == STEP]
        for field, role in fields.items():
            if role not in (STEP, _INNER, _KEPT):
                for path, leaf in params.flat(getattr(node, field)):
                    yield Moment(path, role, leaf, scalar(counts[0]) if counts else None)


def counters(state: Any) -> list[Any]:
    """Every counter in `state`, those of schedules included."""
    return [
        scalar(getattr(node, field))
        for node in _nodes(state)
        for field, role in _fields(node).items()
        if role == STEP
    ]


def filled(
    state: Any,
    params: Parameters,
    moment: Callable[[str, str], Any],
    count: Callable[[list[str]], Any],
    around: list[str] | None = None,
) -> Any:
    """`state` with new numbers; dtypes and devices stay.

    Args:
        moment: (Flax path, torch key) → the new array.
        count: Flax paths → the new value of their counter. A counter stands for the parameters
            with moments in the smallest part of the state around it that has any.
        around: the paths that have moments around `state`.
    """
    import jax

    paths = [found.path for found in moments(state, params)] or around or []

    def inside(part: Any) -> Any:
        return filled(part, params, moment, count, paths)

    if isinstance(state, Mapping):
        return {name: inside(part) for name, part in state.items()}
    if type(state) in (tuple, list):
        return type(state)(map(inside, state))
    new = {}
    for field, role in _fields(state).items():
        old = getattr(state, field)
        if role == _INNER:
            new[field] = inside(old)
        elif role == STEP:
            new[field] = jax.tree.map(lambda leaf: placed(count(paths), leaf), old)
        elif role != _KEPT:
            new[field] = jax.tree_util.tree_map_with_path(
                lambda path, leaf, key=role: placed(moment(params.name(path), key), leaf), old
            )
    return state._replace(**new)


def placed(value: Any, old: Any) -> Any:
    """`value` as an array of its own, of the dtype and on the devices of `old`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        new = jnp.array(np.asarray(value).astype(old.dtype))
    return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new


def scalar(counter: Any) -> Any:
    """The one leaf of a counter, which `nnx.Optimizer` wraps into a variable."""
    import jax

    return jax.tree.leaves(counter)[0]


def _nodes(state: Any) -> Iterator[Any]:
    """Every NamedTuple in `state` from the outside in."""
    if isinstance(state, Mapping) or type(state) in (tuple, list):
        for part in state.values() if isinstance(state, Mapping) else state:
            yield from _nodes(part)
        return
    yield state
    for field, role in _fields(state).items():
        if role == _INNER:
            yield from _nodes(getattr(state, field))


def _fields(node: Any) -> dict[str, str]:
    kind = type(node)
    fields = FIELDS.get(kind.__name__) if kind.__module__.split(".")[0] == "optax" else None
    if fields is None or set(fields) != set(node._fields):
        why = _WHY_NOT.get(kind.__name__, f"known are {', '.join(FIELDS)}")
        raise CheckpointError(
            f"the optax state holds a {shorten(kind.__name__)}, which has no counterpart in a "
            f"torch optimizer: {why}"
        )
    return fields
