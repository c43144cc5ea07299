"""A forward or a training step, compiled for devices that need not be there, and its figures.

The compiler is the one of the devices of the mesh: those of `tpu_topology` are TPUs that nobody
has to have, compiled for by libtpu.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gam_flax
from gam_flax.train import Settings
from gam_flax.train.recipe import make_optimizer
from gam_flax.train.sharding import AXIS, state_shardings
from gam_flax.train.step import make_steps

NORMALIZE = ((0.5,) * 3, (0.25,) * 3)

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}
"""What libtpu asks the machine for, where it is no TPU's."""


def tpu_topology(name: str) -> Mesh:
    """All chips of such a TPU, as "v5e:2x2", in one row. Before jax is used for anything else."""
    from jax.experimental import topologies

    for key, value in NO_TPU.items():
        os.environ.setdefault(key, value)
    found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    return Mesh(np.array(found.devices), (AXIS,))


def compile_training(
    mesh: Mesh, *, model: str, attention: str, batch: int, side: int, parameters: str, effort: float
) -> jax.stages.Compiled:
    """A step of `gam_flax.train`: SGD with momentum, bfloat16, BatchNorm over the whole batch.

    Args:
        batch: pictures of each device.
        parameters: "replicated" or "sharded".
        effort: of the compiler, −1 to 1; 0 is its own.
    """
    settings = Settings("folder", dtype="bfloat16", parameters=parameters, schedule="constant")
    schedule = optax.constant_schedule(settings.rate)
    network = _shapes(model, attention)
    optimizer = make_optimizer(settings, schedule)
    steps = make_steps(network, settings, optimizer, schedule, NORMALIZE, mesh)
    whole = batch * mesh.size
    pictures = _cut((whole, side, side, 3), jnp.uint8, mesh)
    classes = _cut((whole,), jnp.int32, mesh)
    lowered = steps.train.lower(steps.shapes, {"image": pictures, "label": classes})
    return lowered.compile(compiler_options=_effort(effort))


def compile_forward(
    mesh: Mesh, *, model: str, attention: str, batch: int, side: int, parameters: str, effort: float
) -> jax.stages.Compiled:
    """The network's answer to pictures, in evaluation mode; arguments as `compile_training`."""
    network = _shapes(model, attention)
    network.eval()
    graph, state = nnx.split(network)
    shardings = state_shardings(state, mesh, parameters)
    state = jax.tree.map(lambda x, to: x.update(sharding=to), state, shardings)
    pictures = _cut((batch * mesh.size, side, side, 3), jnp.bfloat16, mesh)
    answer = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    lowered = answer.lower(state, pictures)
    return lowered.compile(compiler_options=_effort(effort))


def compile_block(
    mesh: Mesh, *, channels: int, batch: int, side: int, effort: float
) -> jax.stages.Compiled:
    """GAM alone, forward and gradient, in training mode; arguments as `compile_training`."""
    block = nnx.eval_shape(
        lambda: gam_flax.GAM(channels, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    )
    graph, params, rest = nnx.split(block, nnx.Param, ...)

    def loss(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        gam = nnx.merge(graph, params, rest, copy=True)
        return jnp.square(gam(x).astype(jnp.float32)).mean(), nnx.state(gam, nnx.Not(nnx.Param))

    whole = NamedSharding(mesh, P())
    params, rest = jax.tree.map(lambda x: x.update(sharding=whole), (params, rest))
    features = _cut((batch * mesh.size, side, side, channels), jnp.bfloat16, mesh)
    lowered = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, rest, features)
    return lowered.compile(compiler_options=_effort(effort))


def figures(compiled: jax.stages.Compiled, batch: int) -> dict[str, Any]:
    """What the compiler says of one device's program.

    Memory in bytes: `arguments` (state and batch), `temporary`, `peak` of both with what is not
    given back in place. `layout_copies`: bytes written by copies and transposes that are no part
    of another operation, of `accessed`, all bytes read and written. `collectives`: kind → count
    and bytes of the results; `gathered_activations`: results of all-gathers whose first axis is
    the batch of one device or a multiple of it.
    """
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    text = compiled.as_text() or ""
    collectives: dict[str, dict[str, int]] = {}
    for kind, shape in _collectives(text):
        one = collectives.setdefault(kind, {"count": 0, "bytes": 0})
        one["count"] += 1
        one["bytes"] += _bytes(shape)
    gathered = [s for kind, s in _collectives(text) if kind == "all-gather" and _of(s, batch)]
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": peak,
        "flops": cost["flops"],
        "accessed": cost["bytes accessed"],
        "layout_copies": sum(_bytes(shape) for shape in _layout_copies(text)),
        "collectives": collectives,
        "gathered_activations": gathered,
    }


def _effort(effort: float) -> dict[str, Any]:
    return {"exec_time_optimization_effort": effort}


def _shapes(model: str, attention: str) -> nnx.Module:
    return nnx.eval_shape(
        lambda: gam_flax.create_model(
            model, attention=attention, num_classes=1000, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
    )


def _cut(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(AXIS)))


# The compiled program's text: NAME = SHAPE OPERATION(…), in computations that begin with a name

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
LAYOUT_ONLY = {"parameter", "copy", "transpose", "bitcast", "reshape"}


def _computations(text: str) -> dict[str, list[tuple[str, str, str]]]:
    """Computation → its instructions: shape, operation, the rest of the line."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    inside: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if begins := COMPUTATION.match(line):
            inside = found.setdefault(begins[1], [])
        elif instruction := INSTRUCTION.match(line):
            _, shape, operation, rest = instruction.groups()
            inside.append((shape, operation, rest))
    return found


def _collectives(text: str) -> Iterator[tuple[str, str]]:
    for instructions in _computations(text).values():
        for shape, operation, _ in instructions:
            kind = operation.removesuffix("-start")
            if kind in COLLECTIVES:
                yield kind, shape


def _layout_copies(text: str) -> Iterator[str]:
    """Shapes written by copies and transposes, alone or fused with nothing else."""
    computations = _computations(text)
    every = [rest for found in computations.values() for _, _, rest in found]
    fused = {name for rest in every for name in re.findall(r"calls=%?([\w.-]+)", rest)}
    for name, instructions in computations.items():
        if name in fused:
            continue
        for shape, operation, rest in instructions:
            called = re.search(r"calls=%?([\w.-]+)", rest)
            parts = {op for _, op, _ in computations.get(called[1], [])} if called else set()
            alone = parts and parts <= LAYOUT_ONLY and parts & {"copy", "transpose"}
            if operation in ("copy", "transpose") or alone:
                yield shape


def _bytes(shape: str) -> int:
    """Of all arrays in a shape, or in a tuple of shapes."""
    total = 0
    for dtype, sides in ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        total += bits * int(np.prod([int(n) for n in sides.split(",") if n] or [1])) // 8
    return total


def _of(shape: str, batch: int) -> bool:
    """Whether an array of four axes in it begins with the batch, of one device or of several."""
    sides = [sides.split(",") for _, sides in ARRAY.findall(shape)]
    return any(len(s) == 4 and int(s[0]) >= batch and int(s[0]) % batch == 0 for s in sides)
