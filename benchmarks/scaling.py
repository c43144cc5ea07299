"""Memory and communication of a training step of ResNet-50 + GAM, on few devices and on many.

    python -m benchmarks.scaling     benchmarks/results/scaling.*; seconds, no device needed

The state is counted in the shardings that training uses; what is sent is counted by the formulas
of `sent`. `benchmarks.tpu_check` has a compiler's word on both, for four chips.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh

import gam_flax
from benchmarks import processes
from gam_flax.train import Settings
from gam_flax.train.recipe import make_optimizer
from gam_flax.train.sharding import AXIS, state_shardings

RESULTS = Path(__file__).resolve().parent / "results" / "scaling"

DEVICES = (4, 8, 64, 1024)

GRADIENT = 2
"""Bytes of a gradient's or a parameter's number as it is sent: bfloat16, where that computes."""


def measured(devices: int, parameters: str) -> dict[str, float]:
    """Bytes of one device: what of the state lies there, what it sends in a step."""
    params, norms, state = _shapes()
    mesh: Any = AbstractMesh((devices,), (AXIS,))
    weights, cut = _local(params, mesh, parameters)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "parameters": total,
        "state": _local(state, mesh, parameters)[0],
        "parameters here": weights,
        "parameters cut": cut / total,
        **sent(total, cut, sum(leaf.size for leaf in norms) // 2, devices),
    }


def sent(parameters: int, cut: int, channels: int, devices: int) -> dict[str, float]:
    """Bytes that a device sends in a step, where rings of N devices carry them.

        gradient of whole parameters     all-reduce              2 (N − 1) / N · bytes
        parameters that are cut          all-gather, forward     (N − 1) / N · bytes
                                         and once more backward  (N − 1) / N · bytes
        their gradient                   reduce-scatter          (N − 1) / N · bytes
        BatchNorm, two sums a channel    all-reduce, forward and backward, float32

    Args:
        parameters: how many there are, `cut` of them over the devices.
        channels: of all BatchNorms together.
    """
    ring = (devices - 1) / devices
    return {
        "gradient": 2 * ring * (parameters - cut) * GRADIENT,
        "cut parameters": 3 * ring * cut * GRADIENT,
        "BatchNorm": 2 * ring * 2 * 2 * channels * 4,
    }


def _shapes() -> tuple[Any, list[Any], Any]:
    """Shapes of the parameters, of BatchNorm's statistics, and of all that a run holds."""
    settings = Settings("folder", schedule="constant")
    optimizer = make_optimizer(settings, optax.constant_schedule(settings.rate))
    model = nnx.eval_shape(
        lambda: gam_flax.create_model(
            "resnet50", attention="gam", num_classes=1000, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
    )
    _, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    state = (params, statistics, rest, jax.eval_shape(optimizer.init, params))
    return params, jax.tree.leaves(statistics), state


def _local(tree: Any, mesh: Any, parameters: str) -> tuple[int, int]:
    """Bytes on one device, and how many numbers lie cut over all."""
    leaves = jax.tree.leaves(tree)
    shardings = jax.tree.leaves(state_shardings(tree, mesh, parameters))
    here = [s.shard_shape(x.shape) for x, s in zip(leaves, shardings, strict=True)]
    pairs = list(zip(leaves, here, strict=True))
    total = sum(int(np.prod(shape)) * x.dtype.itemsize for x, shape in pairs)
    return total, sum(x.size for x, shape in pairs if shape != x.shape)


def rows(results: dict[str, dict[str, float]]) -> Iterator[list[str]]:
    for name, found in results.items():
        moved = found["gradient"] + found["cut parameters"] + found["BatchNorm"]
        yield [
            name,
            f"{found['state'] / 2**20:,.0f}",
            f"{found['parameters cut']:.1%}",
            f"{found['gradient'] / 2**20:,.0f}",
            f"{found['cut parameters'] / 2**20:,.0f}",
            f"{found['BatchNorm'] / 2**20:.2f}",
            f"{found['BatchNorm'] / moved:.2%}",
        ]


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    head = ["", "state, MiB", "parameters cut", "gradient sent, MiB", "parameters sent, MiB"]
    head += ["BatchNorm sent, MiB", "BatchNorm's share"]
    used = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n\n".join(
        [
            "# ResNet-50 + GAM: a training step on many devices",
            f"{record['date']}. Of one device; SGD with momentum, float32 parameters, bfloat16 "
            f"computation. {used}.",
            processes.markdown_table(head, list(rows(record["results"]))),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="a training step on many devices, counted")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    record = {
        "date": date.today().isoformat(),
        "versions": processes.versions(["gam-attention", "jax", "flax"]),
        "results": {
            f"{devices} devices, {parameters}": measured(devices, parameters)
            for devices in DEVICES
            for parameters in ("replicated", "sharded")
        },
    }
    for path in processes.write(given.out, record, markdown(record)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
