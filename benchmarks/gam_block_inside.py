"""The processes that gam_block.py measures: one framework, one kind of work, all its shapes.

python -m benchmarks.gam_block_inside flax|eager|channels_last|compile WORK CACHE SHAPE...

A shape is BATCH,CHANNELS,SIDE. The numbers are seconds: "8,256,28" of one call, "compile 8,256,28"
until the first answer; and the peak of memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.inside import Stages, peak_memory, report

CALLS = 7

WORKS = {
    "inference": ("reference", False),
    "training": ("reference", True),
    "grouped inference": ("grouped", False),
    "grouped training": ("grouped", True),
}
"""Kind of work → GAM's variant, and whether it is a training step."""

RATE = 0.01


def pictures(shape: tuple[int, int, int]) -> Any:
    import numpy as np

    batch, channels, side = shape
    return np.random.default_rng(0).standard_normal((batch, side, side, channels), np.float32)


def flax(work: str, shape: tuple[int, int, int]) -> Callable[[], Any]:
    """GAM under jit: `optimize_for_inference`, or forward, backward and an SGD update."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import gam_flax

    variant, training = WORKS[work]
    x = jnp.asarray(pictures(shape))
    model = gam_flax.GAM.from_variant(variant, shape[1], rngs=nnx.Rngs(0))
    if not training:
        model.eval()
        graph, state = nnx.split(gam_flax.optimize_for_inference(model, x.shape))
        answer = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
        return lambda: jax.block_until_ready(answer(state, x))
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters: Any, rest: Any, x: Any) -> Any:
        model = nnx.merge(graph, parameters, rest, copy=True)
        return jnp.mean(model(x) ** 2), nnx.state(model, nnx.Not(nnx.Param))

    @jax.jit
    def step(parameters: Any, rest: Any, x: Any) -> Any:
        (_, rest), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, rest, x)
        return jax.tree.map(lambda p, g: p - RATE * g, parameters, gradients), rest

    return lambda: jax.block_until_ready(step(parameters, rest, x))


def torch(
    work: str, shape: tuple[int, int, int], *, channels_last: bool, compiled: bool
) -> Callable[[], Any]:
    import torch

    import gam_torch

    variant, training = WORKS[work]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.from_numpy(pictures(shape)).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    model = gam_torch.GAM.from_variant(variant, shape[1])
    model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    forward = torch.compile(model) if compiled else model
    if not training:
        model.eval()

        def answer() -> Any:
            with torch.inference_mode():
                return forward(x)

        return answer
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> Any:
        optimizer.zero_grad()
        (forward(x) ** 2).mean().backward()
        optimizer.step()

    return step


def run(role: str, work: str, shape: tuple[int, int, int]) -> Callable[[], Any]:
    if role == "flax":
        return flax(work, shape)
    return torch(work, shape, channels_last=role == "channels_last", compiled=role == "compile")


def main() -> None:
    role, work, cache, *shapes = sys.argv[1:]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache) / "inductor")
    stages = Stages()
    for name in shapes:
        batch, channels, side = map(int, name.split(","))
        call = run(role, work, (batch, channels, side))
        with stages(f"compile {name}"):
            call()
        stages.repeat(name, call, CALLS)
    report({**stages.seconds, "peak memory": peak_memory()})


if __name__ == "__main__":
    main()
