"""Networks that are not ours: the same small ones in torch, NNX and Linen, as users write them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from gam_flax.convert.flax_paths import linen_leaves, nnx_variables
from gam_flax.convert.leaves import to_flax_layout, torch_name
from gam_flax.parity import ParityReport

PAD = ((1, 1), (1, 1))


def torch_net(dropout: float = 0.0) -> torch.nn.Module:
    """conv1 norm relu pool conv2 gap flat drop fc: (B, 3, H, W) → (B, 5)."""
    torch.manual_seed(0)
    layers = OrderedDict(
        conv1=torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        norm=torch.nn.BatchNorm2d(8),
        relu=torch.nn.ReLU(inplace=True),
        pool=torch.nn.MaxPool2d(2),
        conv2=torch.nn.Conv2d(8, 6, 3, padding=1, groups=2),
        gap=torch.nn.AdaptiveAvgPool2d(1),
        flat=torch.nn.Flatten(),
        drop=torch.nn.Dropout(dropout),
        fc=torch.nn.Linear(6, 5),
    )
    return torch.nn.Sequential(layers)


class NNXNet(nnx.Module):
    """The same, with modules for what has weights; the arguments are there to get it wrong."""

    def __init__(self, padding: Any = PAD, use_bias: bool = True, features: int = 6):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, 8, (3, 3), strides=2, padding=padding, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(8, features, (3, 3), padding=PAD, feature_group_count=2, rngs=rngs)
        self.fc = nnx.Linear(features, 5, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.conv1(x)))
        x = self.conv2(nnx.max_pool(x, (2, 2), strides=(2, 2)))
        return self.fc(x.mean((1, 2)))


class LinenNet(linen.Module):
    """The same in Linen, with flax's own names for its layers where `own_names`."""

    own_names: bool = False

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def name(torch: str) -> str | None:
            return None if self.own_names else torch

        x = linen.Conv(8, (3, 3), strides=2, padding=PAD, name=name("conv1"))(x)
        norm = linen.BatchNorm(momentum=0.9, use_running_average=not train, name=name("norm"))
        x = linen.max_pool(jax.nn.relu(norm(x)), (2, 2), strides=(2, 2))
        conv2 = linen.Conv(6, (3, 3), padding=PAD, feature_group_count=2, name=name("conv2"))
        return linen.Dense(5, name=name("fc"))(conv2(x).mean((1, 2)))


OWN_NAMES = {"conv1": "Conv_0", "norm": "BatchNorm_0", "conv2": "Conv_1", "fc": "Dense_0"}


def fill(model: nnx.Module, source: torch.nn.Module) -> nnx.Module:
    """`model` with the weights of `source` where both have them in the same shape."""
    state = source.state_dict()
    for path, variable in nnx_variables(model).items():
        key = torch_name(path)
        if key in state and tuple(state[key].shape) == _shape(path, variable):
            variable.set_value(jnp.array(to_flax_layout(path, state[key].numpy())))
    return model


def _shape(path: str, variable: Any) -> tuple[int, ...]:
    """Of a Flax tensor, in torch's layout."""
    shape = tuple(variable.shape)
    return (shape[-1], shape[-2], *shape[:-2]) if path.endswith("kernel") else shape


def nnx_net(source: torch.nn.Module, **options: Any) -> nnx.Module:
    """The NNX network with the weights of `source`."""
    return fill(NNXNet(**options), source)


def linen_net(source: torch.nn.Module, own_names: bool = False) -> tuple[Any, dict[str, Any]]:
    """The Linen network and its variables, with the weights of `source`."""
    module = LinenNet(own_names)
    places = linen_leaves(jax.eval_shape(module.init, jax.random.key(0), pictures(1)))
    torch_names = {flax: torch for torch, flax in OWN_NAMES.items()}
    variables: dict[str, Any] = {}
    for collection, layer, leaf in places:
        key = torch_name(f"{torch_names.get(layer, layer)}.{leaf}")
        array = to_flax_layout(leaf, source.state_dict()[key].numpy())
        variables.setdefault(collection, {}).setdefault(layer, {})[leaf] = jnp.array(
            array
        )  # no view of torch's
    return module, variables


def pictures(batch: int = 2, side: int = 9) -> np.ndarray:
    """(B, H, W, 3), N(0, 1), float32."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, side, side, 3)).astype(np.float32)


X = pictures()


def stages(report: ParityReport) -> list[str]:
    """The stages that the report has rows of."""
    return list(dict.fromkeys(row.stage for row in report.rows))


def first(report: ParityReport) -> tuple[str, str, str]:
    """Stage, path and verdict of the first divergence."""
    row = report.first_divergence
    assert row is not None
    return row.stage, row.path, row.verdict
