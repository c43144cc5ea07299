"""Faults, one at a time: what is done to an honest pair, and what the harness is to say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from gam_flax.ops.conv import channel_shuffle
from gam_flax.parity.optimizers import Recipe


@dataclass(frozen=True)
class Mutation:
    """One fault.

    fault: in words, for the table.
    network: a name of the zoo.
    apply: changes (torch model, Flax model), mostly the latter, in place.
    path: of the row that is to be marked; a layer, or a layer's input where the fault lies before.
    cause: a part of the cause that is to be named; "" where none can be told.
    options: of `compare`.
    """

    fault: str
    network: str
    apply: Callable[[Any, Any], None]
    path: str
    cause: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def put(path: str, value: Any) -> Callable[[Any, Any], None]:
    """Sets an attribute of the Flax model, or of a layer in it."""

    def apply(model: Any, twin: Any) -> None:
        *layers, name = path.split(".")
        for layer in layers:
            twin = getattr(twin, layer)
        setattr(twin, name, value)

    return apply


def kernel(path: str, change: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    """Changes a weight of the Flax model."""

    def apply(model: Any, twin: Any) -> None:
        for name in path.split("."):
            twin = getattr(twin, name)
        twin.set_value(jnp.asarray(change(np.asarray(twin.get_value()))))

    return apply


def swap(first: str, second: str) -> Callable[[Any, Any], None]:
    """Exchanges two layers of the Flax model."""

    def apply(model: Any, twin: Any) -> None:
        a, b = getattr(twin, first), getattr(twin, second)
        setattr(twin, first, b)
        setattr(twin, second, a)

    return apply


def bump(kernel: np.ndarray) -> np.ndarray:
    """One output channel a little off."""
    kernel = kernel.copy()
    kernel[..., 3] += 1e-3
    return kernel


def unflatten(kernel: np.ndarray) -> np.ndarray:
    """The rows of `fc1` for features flattened in the order (H, W, C)."""
    return kernel.reshape(8, 4, 3, 8).transpose(1, 2, 0, 3).reshape(96, 8)


def both(*changes: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def apply(model: Any, twin: Any) -> None:
        for change in changes:
            change(model, twin)

    return apply


def nothing(model: Any, twin: Any) -> None:
    """The models are the same; what differs is how they are trained."""


def sgd(**settings: Any) -> Callable[[list], Any]:
    return lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, **settings)


def adam() -> Callable[[list], Any]:
    return lambda parameters: torch.optim.Adam(parameters, lr=1e-3)


def adamw() -> Callable[[list], Any]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)


def biased(model: Any, twin: Any) -> None:
    """Flax's own BatchNorm instead of ours."""
    own = nnx.BatchNorm(8, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))
    for name in ("scale", "bias", "mean", "var"):
        getattr(own, name).set_value(getattr(twin.norm1, name).get_value())
    twin.norm1 = own


def flax_momentum(model: Any, twin: Any) -> None:
    twin.norm1.momentum = 0.9


TRAIN = {"train": True}

MUTATIONS = [
    # convolutions
    Mutation(
        "'SAME' padding at stride 2", "backbone", put("conv1.padding", "SAME"), "conv1", "'SAME'"
    ),
    Mutation("no padding", "backbone", put("conv3.padding", "VALID"), "conv3", "'VALID'"),
    Mutation(
        "dilation forgotten",
        "backbone",
        both(put("conv2.kernel_dilation", 1), put("conv2.padding", ((1, 1), (1, 1)))),
        "conv2",
        "dilation 1",
    ),
    Mutation("a bias not added", "backbone", put("conv1.bias", None), "conv1.bias", "no bias"),
    Mutation(
        "kernel's height and width exchanged",
        "backbone",
        kernel("conv3.kernel", lambda k: k.transpose(1, 0, 2, 3)),
        "conv3.weight",
        "transposed kernel",
    ),
    Mutation(
        "square kernel not transposed",
        "backbone",
        kernel("fc2.kernel", lambda k: k.T),
        "fc2.weight",
        "transposed kernel",
    ),
    Mutation(
        "kernel reshaped instead of transposed",
        "backbone",
        kernel("conv3.kernel", lambda k: k.transpose(3, 2, 0, 1).reshape(k.shape)),
        "conv3.weight",
        "reshaped",
    ),
    Mutation(
        "kernel flipped",
        "backbone",
        kernel("conv1.kernel", lambda k: k[::-1, ::-1]),
        "conv1.weight",
        "flipped",
    ),
    Mutation(
        "one channel off",
        "backbone",
        kernel("conv3.kernel", bump),
        "conv3.weight",
        "channels differ: 3",
    ),
    Mutation(
        "channels in another order",
        "backbone",
        kernel("conv3.kernel", lambda k: k[..., ::-1]),
        "conv3.weight",
        "another order",
    ),
    Mutation(
        "two equal layers swapped", "mixer", swap("norm1", "norm2"), "norm1.weight", "swapped"
    ),
    Mutation(
        "a weight not loaded",
        "backbone",
        kernel("norm2.scale", np.ones_like),
        "norm2.weight",
        "as if it had not been loaded",
    ),
    Mutation(
        "a weight rounded to bfloat16",
        "mixer",
        kernel("fc1.kernel", lambda k: k.astype(jnp.bfloat16).astype(k.dtype)),
        "fc1.weight",
        "bfloat16",
    ),
    Mutation(
        "running variance loaded as deviation",
        "backbone",
        kernel("norm1.var", np.sqrt),
        "norm1.running_var",
        "deviation",
    ),
    Mutation(
        "transposed convolution's kernel not flipped",
        "neck",
        kernel("up.kernel", lambda k: k[::-1, ::-1]),
        "up.weight",
        "not flipped",
    ),
    Mutation(
        "transposed convolution's kernel as for transpose_kernel=True",
        "neck",
        kernel("up.kernel", lambda k: k[::-1, ::-1].swapaxes(2, 3)),
        "up.weight",
        "transpose_kernel=True",
    ),
    Mutation(
        "transpose_kernel=True and the kernel as without",
        "neck",
        put("up.transpose_kernel", True),
        "up.weight",
        "flipped",
    ),
    Mutation(
        "torch's padding for a transposed convolution's",
        "neck",
        put("up.padding", ((0, 0), (0, 0))),
        "up",
        "padding counted as Flax counts it",
    ),
    # norms
    Mutation("eps of one norm", "backbone", put("norm2.eps", 1e-3), "norm2", "eps 0.001"),
    Mutation(
        "Flax's eps in a LayerNorm", "mixer", put("norm2.epsilon", 1e-6), "norm2", "eps 1e-06"
    ),
    Mutation(
        "groups of a GroupNorm",
        "neck",
        both(put("norm.num_groups", 4), put("norm.group_size", 3)),
        "norm",
        "4 groups",
    ),
    Mutation(
        "eps in one norm of forty",
        "deep",
        lambda m, t: setattr(t.layer2[3].bn1, "eps", 1e-3),
        "layer2.3.bn1",
        "eps 0.001",
    ),
    Mutation(
        "momentum is the old value's weight",
        "backbone",
        flax_momentum,
        "norm1.running_mean",
        "weight of the old value",
        TRAIN,
    ),
    Mutation("biased running variance", "backbone", biased, "norm1.running_var", "biased", TRAIN),
    # between layers
    Mutation(
        "an activation missing",
        "backbone",
        put("stem", lambda x: x),
        "conv2 (input)",
        "missing activation",
    ),
    Mutation(
        "approximate gelu",
        "backbone",
        put("gelu", jax.nn.gelu),
        "fc2 (input)",
        "gelu (tanh approximation)",
    ),
    Mutation(
        "slope of a leaky relu",
        "backbone",
        put("leaky", jax.nn.leaky_relu),
        "fc3 (input)",
        "slope 0.01",
    ),
    Mutation(
        "'SAME' padding of a pool",
        "backbone",
        put("pool", lambda x: nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")),
        "conv2 (input)",
        "'SAME'",
    ),
    Mutation(
        "average instead of maximum",
        "backbone",
        put("pool", lambda x: nnx.avg_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))),
        "conv2 (input)",
        "average pool",
    ),
    Mutation(
        "a residual missing",
        "backbone",
        put("join", lambda y, x: jax.nn.relu(y)),
        "fc1 (input)",
        "conv3",
    ),
    Mutation(
        "no activation after the sum",
        "backbone",
        put("join", lambda y, x: y + x),
        "fc1 (input)",
        "relu",
    ),
    Mutation(
        "flattened in Flax's order, kernel as it was",
        "backbone",
        put("flat", lambda x: x.reshape(len(x), -1)),
        "fc1 (input)",
        "flatten",
    ),
    Mutation(
        "kernel for (H, W, C), flattened in torch's order",
        "backbone",
        kernel("fc1.kernel", unflatten),
        "fc1",
        "flatten order",
    ),
    Mutation(
        "concat order",
        "neck",
        put("join", lambda small, large: jnp.concatenate([large, small], -1)),
        "norm (input)",
        "concat order",
    ),
    Mutation(
        "another upsampling",
        "neck",
        put(
            "upsample",
            lambda x: jax.image.resize(
                x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), "bilinear"
            ),
        ),
        "norm (input)",
        "torch nearest, Flax bilinear",
    ),
    Mutation(
        "shuffle with groups and channels exchanged",
        "neck",
        put("mix", lambda y: channel_shuffle(y, 4)),
        "up (input)",
        "torch x shuffled in 3 groups, Flax x shuffled in 4 groups",
    ),
    Mutation("no shuffle", "neck", put("mix", lambda y: y), "up (input)", "Flax no shuffle"),
    Mutation(
        "another gate",
        "neck",
        put("squash", jax.nn.hard_sigmoid),
        "up (input)",
        "torch sigmoid, Flax hard sigmoid",
    ),
    Mutation("a relu for a silu", "neck", put("act", jax.nn.relu), "gate (input)", "silu"),
    Mutation(
        "queries, keys and values in another order",
        "mixer",
        put("split", lambda y: jnp.split(y, 3, -1)[::-1]),
        "proj (input)",
        "Flax the order values, keys, queries",
    ),
    Mutation(
        "attention not scaled",
        "mixer",
        put("scale", 1.0),
        "proj (input)",
        "torch scale 1/√d, Flax no scale",
    ),
    Mutation(
        "a residual missing in a transformer",
        "mixer",
        put("residual", lambda x, y: y),
        "norm2 (input)",
        "proj",
    ),
    # gradients
    Mutation(
        "a gradient stopped",
        "backbone",
        put("stem", lambda x: jax.lax.stop_gradient(jax.nn.relu(x))),
        "norm1.bias",
        "zero",
    ),
    Mutation(
        "a gradient scaled",
        "mixer",
        put("residual", lambda x, y: x + 2 * y - jax.lax.stop_gradient(y)),
        "proj.bias",
        "2 ×",
    ),
    # training
    Mutation(
        "Nesterov missing",
        "backbone",
        nothing,
        "losses",
        "esterov",
        {"steps": 3, "optimizer": (sgd(nesterov=True), optax.sgd(1e-2, momentum=0.9))},
    ),
    Mutation(
        "another eps of Adam",
        "backbone",
        nothing,
        "losses",
        "eps",
        {"steps": 3, "optimizer": (adam(), optax.adam(1e-3, eps=1e-6))},
    ),
    Mutation(
        "optax's weight decay",
        "mixer",
        nothing,
        "losses",
        "weight decay",
        {"steps": 3, "optimizer": (adamw(), optax.adamw(1e-3))},
    ),
    Mutation(
        "gradients not clipped",
        "mixer",
        nothing,
        "norm1.weight.momentum_buffer",
        "clip",
        {"steps": 3, "optimizer": Recipe(sgd(), optax.sgd(1e-2, momentum=0.9), clip=1e-3)},
    ),
    Mutation(
        "momentum of a norm, in training",
        "backbone",
        put("norm2.momentum", 0.01),
        "norm2.running_mean",
        "momentum 0.01",
        {"train": True, "steps": 2},
    ),
]
