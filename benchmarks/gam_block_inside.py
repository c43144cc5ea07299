"""The processes that gam_block.py and yolov5.py measure: one framework, one work, all its shapes.

python -m benchmarks.gam_block_inside flax|eager|channels_last|compile WORK CACHE SHAPE...

A shape is BATCH,CHANNELS,SIDE. The numbers are seconds: "8,256,28" of one call, "first 8,256,28" of
the first call, which compiles; and the peak of memory, in MB. CACHE is a folder where compiled
programs are kept. In the environment GAM_KERNEL_SIZE is 7, GAM_DEVICE cpu and GAM_PRECISION float32
where they are not said.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.inside import Stages, peak_memory, report

RATE = 0.01
WARM = 0.4
"""Seconds of calls before those that count."""
DEVICE = os.environ.get("GAM_DEVICE", "cpu")
PRECISION = os.environ.get("GAM_PRECISION", "float32")
"""float32, TF32 or bfloat16."""


class Work(NamedTuple):
    """model: a variant of GAM, or a network of `create_model`, which takes `arguments`.
    shapes: BATCH,CHANNELS,SIDE. calls: the median of so many counts. options: of
    `optimize_for_inference`."""

    model: str
    training: bool
    shapes: tuple[str, ...]
    calls: int = 7
    options: Mapping[str, Any] = {}
    arguments: Mapping[str, Any] = {}


INFERENCE = (
    *("8,256,28", "8,512,14", "32,512,7", "16,1024,14"),
    *("1,256,28", "1,512,14", "1,64,56", "8,64,56"),
)
PAPER = {"attention": "gam", "attention_options": {"ratio": 16}}
TRAINING = ("32,64,56", "32,256,28", "32,512,14", "64,512,7")
BLOCKS = {
    "inference": Work("reference", False, INFERENCE),
    "training": Work("reference", True, TRAINING),
    "grouped inference": Work("grouped", False, INFERENCE),
    "grouped training": Work("grouped", True, TRAINING),
    "ResNet-50 with GAM, inference": Work("resnet50", False, ("8,3,224",), 3, arguments=PAPER),
    "ResNet-50 with GAM, inference, all the memory": Work(
        "resnet50", False, ("8,3,224",), 3, {"memory": math.inf}, PAPER
    ),
    "ResNet-50 with GAM, training": Work("resnet50", True, ("8,3,224",), 1, arguments=PAPER),
}
DETECTION = ("1,3,320", "8,3,320", "1,3,640", "8,3,640")
DETECTORS = {
    f"YOLO{name[4:]} with GAM, {variant}": Work(
        name,
        False,
        DETECTION,
        3,
        {},
        {"attention": "gam", "attention_options": {"variant": variant}},
    )
    for name in ("yolov5n", "yolov5s")
    for variant in ("reference", "grouped")
}
WORKS = BLOCKS | DETECTORS


def pictures(shape: tuple[int, int, int]) -> Any:
    import numpy as np

    batch, channels, side = shape
    return np.random.default_rng(0).standard_normal((batch, side, side, channels), np.float32)


def build(package: Any, work: Work, channels: int, **how: Any) -> Any:
    """The same model of either package."""
    if work.model in package.list_models():
        return package.create_model(work.model, **work.arguments, **how)
    kernel_size = int(os.environ.get("GAM_KERNEL_SIZE", "7"))
    return package.GAM.from_variant(work.model, channels, kernel_size=kernel_size, **how)


def flax(work: Work, shape: tuple[int, int, int]) -> Callable[[], Any]:
    """Under jit: what `optimize_for_inference` made, or forward, backward and an SGD update."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import gam_flax

    dtype = jnp.bfloat16 if PRECISION == "bfloat16" else jnp.float32
    x = jnp.asarray(pictures(shape), dtype)
    model = build(gam_flax, work, shape[1], dtype=dtype, rngs=nnx.Rngs(0))
    if not work.training:
        model.eval()
        fast = gam_flax.optimize_for_inference(model, x.shape, **work.options)
        del model
        graph, state = nnx.split(fast)
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
    work: Work, shape: tuple[int, int, int], *, channels_last: bool, compiled: bool
) -> Callable[[], Any]:
    import torch

    import gam_torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    dtype = torch.bfloat16 if PRECISION == "bfloat16" else torch.float32
    torch.set_float32_matmul_precision("high" if PRECISION == "TF32" else "highest")
    torch.backends.cudnn.allow_tf32 = PRECISION == "TF32"
    x = torch.from_numpy(pictures(shape)).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    x = x.to(DEVICE, dtype)
    model = build(gam_torch, work, shape[1])
    model.to(DEVICE, dtype, memory_format=layout)
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    forward = torch.compile(model) if compiled else model
    if not work.training:
        model.eval()

        def answer() -> Any:
            with torch.inference_mode():
                y = forward(x)
            wait()
            return y

        return answer
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> Any:
        optimizer.zero_grad()
        (forward(x) ** 2).mean().backward()
        optimizer.step()
        wait()

    return step


def run(role: str, work: Work, shape: tuple[int, int, int]) -> Callable[[], Any]:
    if role == "flax":
        return flax(work, shape)
    on_gpu = DEVICE == "cuda"  # where nothing but channels last is worth comparing
    return torch(
        work, shape, channels_last=on_gpu or role == "channels_last", compiled=role == "compile"
    )


def main() -> None:
    role, work, cache, *shapes = sys.argv[1:]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache) / "inductor")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(cache) / "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    stages = Stages()
    for name in shapes:
        batch, channels, side = map(int, name.split(","))
        call = run(role, WORKS[work], (batch, channels, side))
        with stages(f"first {name}"):
            call()
        stages.repeat(name, call, WORKS[work].calls, WARM)
        del call
    report({**stages.seconds, "peak memory": peak_memory()})


if __name__ == "__main__":
    main()
