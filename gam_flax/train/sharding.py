"""Where arrays live: one mesh, of one device or of many, with one axis over the batch."""

from __future__ import annotations

from typing import Any

import jax
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


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch, cut along its first axis over the mesh."""
    sharding = NamedSharding(mesh, P(AXIS))
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }
