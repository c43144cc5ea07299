"""Data-parallel training: the same code for one device and for many.

    python examples/06_several_devices.py                   one process, four devices
    python examples/06_several_devices.py --processes 2     two processes, as on two hosts

The four devices are one CPU that says it is four; on a machine with GPUs or TPUs they are those.
A mesh names the devices, the batch is cut along it, the parameters lie on every device, and jit
adds what each device has to tell the others. Means are over the whole batch, so that the losses
are those of one device, BatchNorm's statistics included: that is what is printed.

`gam_flax.train` and `gam-flax train` do all this themselves, on every device that there is.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gam_flax

BATCH = 40


def losses_on(mesh: Mesh, images: np.ndarray, labels: np.ndarray, steps: int) -> list[float]:
    """The losses of some steps, the batch cut over the devices of `mesh`."""
    model = gam_flax.create_model(
        "resnet8",
        layers=(1, 1),
        widths=(8, 16),
        attention="gam",
        attention_options={"ratio": 4},
        in_channels=1,
        num_classes=10,
        rngs=nnx.Rngs(0),
    )
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.sgd(0.05, momentum=0.9)

    def step(params: Any, rest: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            network = nnx.merge(graph, params, rest, copy=True)
            each = optax.softmax_cross_entropy_with_integer_labels(network(x), y)
            return each.mean(), nnx.state(network, nnx.Not(nnx.Param))

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), new, state, value

    everywhere, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params, rest, state = jax.device_put((params, rest, optimizer.init(params)), everywhere)
    run = jax.jit(step, donate_argnums=(0, 1, 2))
    losses = []
    for i in range(steps):
        rows = np.arange(i * BATCH, (i + 1) * BATCH) % len(images)
        x, y = jax.device_put((images[rows], labels[rows]), cut)
        params, rest, state, value = run(params, rest, state, x, y)
        losses.append(float(value))
    return losses


def one_process(steps: int) -> None:
    with np.load(str(files("gam_flax") / "assets" / "fashion_test_200.npz")) as data:
        images = (data["images"][..., None] / 255.0).astype(np.float32)
        labels = data["labels"].astype(np.int32)
    found = {}
    for count in (1, jax.device_count()):
        mesh = jax.make_mesh(
            (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
        )
        found[count] = losses_on(mesh, images, labels, steps)
        print(f"{count} devices:", *(f"{loss:.5f}" for loss in found[count]))
    one, many = (jnp.asarray(losses) for losses in found.values())
    print(f"largest difference: {jnp.abs(one - many).max():.1e}")


def several_processes(count: int, out: Path) -> None:
    """`gam-flax train` once for each host, here all on this one, each with its part of the batch.

    On real hosts: the same command on each, with the address of the first; on Slurm, Open MPI or a
    TPU `--distributed` finds all that by itself.
    """
    from fashion import few_pictures

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "gam_flax.cli", "train", "--data", "arrays"]
    command += ["--data-dir", str(few_pictures(out.parent)), "--model", "resnet8"]
    command += ["--attention", "se", "--model-options", '{"attention_options": {"ratio": 4}}']
    command += ["--epochs", "2", "--batch-size", "50", "--out", str(out)]
    command += ["--coordinator-address", address, "--num-processes", str(count)]
    processes = [subprocess.Popen([*command, "--process-id", str(i)]) for i in range(count)]
    if any([process.wait() for process in processes]):
        raise SystemExit("a process failed; what it said is above")


def main() -> None:
    parser = argparse.ArgumentParser(description="Data-parallel training.")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/hosts"))
    options = parser.parse_args()
    if options.processes > 1:
        several_processes(options.processes, options.out)
        return
    jax.config.update("jax_num_cpu_devices", 4)  # before jax looks for its devices
    one_process(options.steps)


if __name__ == "__main__":
    main()
