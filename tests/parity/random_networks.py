"""Random networks, each written for torch and for NNX from one drawn plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

import gam_flax
import gam_torch
from gam_flax.convert import load_torch
from gam_flax.ops.batch_norm import BatchNorm
from gam_flax.ops.conv import conv2d, max_pool2d

EXACT = {"epsilon": 1e-5, "use_fast_variance": False}
"""Of Flax's norms. By default their variance is E[x²] − E[x]², 15 times as far off as torch's in
float32, which the harness reports."""

Step = dict[str, Any]
"""One step of a plan: its kind, and what that needs."""

ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "relu": (F.relu, jax.nn.relu),
    "gelu": (F.gelu, lambda x: jax.nn.gelu(x, approximate=False)),
    "silu": (F.silu, jax.nn.silu),
    "tanh": (torch.tanh, jnp.tanh),
    "sigmoid": (torch.sigmoid, jax.nn.sigmoid),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), lambda x: jax.nn.leaky_relu(x, 0.1)),
}


def draw_plan(seed: int) -> tuple[list[Step], tuple[int, ...]]:
    """Steps, and the input's shape, channels last."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(3, 5)), *(int(n) for n in rng.integers(6, 11, 2)), 3)
    side, channels, plan = min(shape[1:3]), 3, []
    for _ in range(int(rng.integers(3, 8))):
        kind = str(rng.choice(["conv", "conv", "norm", "act", "pool", "residual", "attention"]))
        if kind in ("norm", "residual", "attention") and channels == 3:
            kind = "conv"
        if kind == "pool" and side < 4:
            kind = "act"
        step = {"kind": kind, "channels": channels}
        if kind == "conv":
            step |= _conv(rng, channels, side)
            channels, side = step["out"], -(-side // step["stride"])
        elif kind == "norm":
            step["norm"] = str(rng.choice(["batch", "group", "layer"]))
        elif kind == "act":
            step["act"] = str(rng.choice(list(ACTIVATIONS)))
        elif kind == "pool":
            step["pool"] = str(rng.choice(["max", "avg"]))
            side //= 2
        elif kind == "residual":
            step |= {"depthwise": bool(rng.integers(2)), "act": str(rng.choice(list(ACTIVATIONS)))}
        else:
            step["attention"] = str(rng.choice(["gam", "cbam", "se", "bam"]))
        plan.append(step)
    plan.append({"kind": "head", "channels": channels, "act": str(rng.choice(list(ACTIVATIONS)))})
    return plan, shape


def _conv(rng: np.random.Generator, channels: int, side: int) -> Step:
    groups = int(rng.choice([1, 1, 2, 4])) if channels % 4 == 0 else 1
    size = int(rng.choice([1, 3, 5]))
    dilation = int(rng.choice([1, 1, 2])) if size == 3 else 1
    return {
        "out": int(rng.choice([4, 8, 12])),
        "size": size,
        "stride": int(rng.choice([1, 1, 2])) if side > 3 else 1,
        "padding": dilation * (size // 2),
        "dilation": dilation,
        "groups": groups,
        "bias": bool(rng.integers(2)),
    }


class TorchNet(nn.Module):
    def __init__(self, plan: list[Step]):
        super().__init__()
        self.plan = plan
        for i, step in enumerate(plan):
            for name, module in torch_layers(step).items():
                self.add_module(f"{name}{i}", module)

    def forward(self, x):
        for i, step in enumerate(self.plan):
            x = self.step(x, step, lambda name, i=i: getattr(self, f"{name}{i}"))
        return x

    def step(self, x, step, layer):
        match step["kind"]:
            case "conv":
                return layer("conv")(x)
            case "norm" if step["norm"] == "layer":
                return layer("norm")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            case "norm":
                return layer("norm")(x)
            case "act":
                return ACTIVATIONS[step["act"]][0](x)
            case "pool":
                pool = F.max_pool2d if step["pool"] == "max" else F.avg_pool2d
                return pool(x, 2)
            case "residual":
                return x + ACTIVATIONS[step["act"]][0](layer("conv")(x))
            case "attention":
                return layer("attention")(x)
        x = ACTIVATIONS[step["act"]][0](layer("fc")(x.mean((2, 3))))
        return layer("out")(layer("norm")(x))


def torch_layers(step: Step) -> dict[str, nn.Module]:
    c = step["channels"]
    match step["kind"]:
        case "conv":
            names = ("stride", "padding", "dilation", "groups", "bias")
            conv = nn.Conv2d(c, step["out"], step["size"], **{n: step[n] for n in names})
            return {"conv": conv}
        case "norm":
            norms = {"batch": nn.BatchNorm2d, "layer": nn.LayerNorm}
            norm = nn.GroupNorm(2, c) if step["norm"] == "group" else norms[step["norm"]](c)
            return {"norm": norm}
        case "residual":
            return {"conv": nn.Conv2d(c, c, 3, padding=1, groups=c if step["depthwise"] else 1)}
        case "attention":
            return {"attention": gam_torch.create_attention(step["attention"], c, ratio=2)}
        case "head":
            return {"fc": nn.Linear(c, 8), "norm": nn.LayerNorm(8), "out": nn.Linear(8, 5)}
    return {}


class FlaxNet(nnx.Module):
    def __init__(self, plan: list[Step]):
        self.plan = tuple(tuple(step.items()) for step in plan)
        for i, step in enumerate(plan):
            for name, module in flax_layers(step).items():
                setattr(self, f"{name}{i}", module)

    def __call__(self, x):
        for i, step in enumerate(map(dict, self.plan)):
            x = self.step(x, step, lambda name, i=i: getattr(self, f"{name}{i}"))
        return x

    def step(self, x, step, layer):
        match step["kind"]:
            case "conv":
                return layer("conv")(x)
            case "norm":
                return layer("norm")(x)
            case "act":
                return ACTIVATIONS[step["act"]][1](x)
            case "pool" if step["pool"] == "max":
                return max_pool2d(x, 2, stride=2, padding=0)
            case "pool":
                return nnx.avg_pool(x, (2, 2), strides=(2, 2), padding="VALID")
            case "residual":
                return x + ACTIVATIONS[step["act"]][1](layer("conv")(x))
            case "attention":
                return layer("attention")(x)
        x = ACTIVATIONS[step["act"]][1](layer("fc")(x.mean((1, 2))))
        return layer("out")(layer("norm")(x))


def flax_layers(step: Step) -> dict[str, nnx.Module]:
    c, rngs = step["channels"], nnx.Rngs(0)
    match step["kind"]:
        case "conv":
            names = ("stride", "padding", "dilation", "groups")
            options = {n: step[n] for n in names} | {"use_bias": step["bias"], "rngs": rngs}
            return {"conv": conv2d(c, step["out"], step["size"], **options)}
        case "norm" if step["norm"] == "batch":
            return {"norm": BatchNorm(c)}
        case "norm" if step["norm"] == "group":
            return {"norm": nnx.GroupNorm(c, num_groups=2, **EXACT, rngs=rngs)}
        case "norm":
            return {"norm": nnx.LayerNorm(c, **EXACT, rngs=rngs)}
        case "residual":
            groups = c if step["depthwise"] else 1
            return {"conv": conv2d(c, c, 3, padding=1, groups=groups, rngs=rngs)}
        case "attention":
            name = step["attention"]
            return {"attention": gam_flax.create_attention(name, c, ratio=2, rngs=rngs)}
        case "head":
            return {
                "fc": nnx.Linear(c, 8, rngs=rngs),
                "norm": nnx.LayerNorm(8, **EXACT, rngs=rngs),
                "out": nnx.Linear(8, 5, rngs=rngs),
            }
    return {}


def honest_twins(seed: int) -> tuple[nn.Module, nnx.Module, np.ndarray]:
    """A drawn network in both frameworks with the same weights, and an input."""
    plan, shape = draw_plan(seed)
    torch.manual_seed(seed)
    model, twin = TorchNet(plan), FlaxNet(plan)
    load_torch(twin, model)
    return model, twin, np.random.default_rng(seed).normal(size=shape)
