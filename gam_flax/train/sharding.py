"""Where arrays live: one mesh, of one device or of many, with one axis over the batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"

WORTH_SHARDING = 2**14
"""Smaller arrays stay whole on every device."""


def make_mesh() -> Mesh:
    """All devices of all processes in one row."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def state_shardings(state: Any, mesh: Mesh, parameters: str) -> Any:
    """A sharding for each array of a state, or of the shapes of one.

    Args:
        parameters: "replicated", or "sharded": every large array is cut along its longest axis
            that the devices divide, optimizer's state and averages included (FSDP).
    """

    def place(leaf: Any) -> NamedSharding:
        cut = [n for n in leaf.shape if n % mesh.size == 0]
        if parameters == "replicated" or leaf.size < WORTH_SHARDING or not cut:
            return NamedSharding(mesh, P())
        axis = leaf.shape.index(max(cut))
        return NamedSharding(mesh, P(*[None] * axis, AXIS))

    return jax.tree.map(place, state)


def placed(state: Any, shardings: Any) -> Any:
    """The arrays of a state, the same on every process, where `shardings` say."""

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(
            whole.shape, sharding, lambda part: np.array(whole[part])
        )

    return jax.tree.map(place, state, shardings)


def gathered(state: Any, mesh: Mesh) -> Any:
    """The whole of each array on this process's first device; all processes must ask for it."""
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(state)
    return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, whole)


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch lie on this process's devices, in the order of `put_batch`."""
    parts = NamedSharding(mesh, P(AXIS)).addressable_devices_indices_map((batch_size,))
    return np.sort(np.concatenate([np.arange(batch_size)[part] for part in parts.values()]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, which is cut along its first axis over the mesh."""
    sharding = NamedSharding(mesh, P(AXIS))
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }
