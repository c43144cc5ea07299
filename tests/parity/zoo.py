"""Networks to get wrong: torch as people write it, NNX with every choice between layers an
attribute, so that one mistake is one assignment."""

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
from gam_flax.ops.conv import channel_shuffle, conv2d, max_pool2d


class Backbone(nn.Module):
    """conv (stride 2) norm relu pool, a residual block with dilation and groups, flatten, fc."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fc1 = nn.Linear(8 * 4 * 3, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 3, stride=2, padding=1)
        y = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.conv3(y) + x)
        x = F.gelu(self.fc1(x.flatten(1)))
        return self.fc3(F.leaky_relu(self.fc2(x), 0.2))


class FlaxBackbone(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv1 = conv2d(3, 8, 3, stride=2, padding=1, rngs=rngs)
        self.norm1 = BatchNorm(8)
        self.conv2 = conv2d(8, 8, 3, padding=2, dilation=2, groups=2, rngs=rngs)
        self.norm2 = BatchNorm(8)
        self.conv3 = conv2d(8, 8, 3, padding=1, use_bias=False, rngs=rngs)
        self.fc1 = nnx.Linear(8 * 4 * 3, 8, rngs=rngs)
        self.fc2 = nnx.Linear(8, 8, rngs=rngs)
        self.fc3 = nnx.Linear(8, 5, rngs=rngs)
        self.stem: Callable = jax.nn.relu
        self.pool: Callable = lambda x: max_pool2d(x, 3, stride=2, padding=1)
        self.join: Callable = lambda y, x: jax.nn.relu(y + x)
        self.flat: Callable = lambda x: jnp.moveaxis(x, -1, 1).reshape(len(x), -1)
        self.gelu: Callable = lambda x: jax.nn.gelu(x, approximate=False)
        self.leaky: Callable = lambda x: jax.nn.leaky_relu(x, 0.2)

    def __call__(self, x):
        x = self.pool(self.stem(self.norm1(self.conv1(x))))
        y = jax.nn.relu(self.norm2(self.conv2(x)))
        x = self.join(self.conv3(y), x)
        x = self.gelu(self.fc1(self.flat(x)))
        return self.fc3(self.leaky(self.fc2(x)))


class Neck(nn.Module):
    """Two branches, upsampled, concatenated, shuffled and gated, as in a detector's neck."""

    def __init__(self):
        super().__init__()
        self.small = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.large = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(3, 12)
        self.gate = nn.Conv2d(12, 12, 1)
        self.up = nn.ConvTranspose2d(12, 12, 2, stride=2)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        small = F.interpolate(self.small(x), scale_factor=2, mode="nearest")
        y = F.silu(self.norm(torch.cat([small, self.large(x)], 1)))
        y = F.channel_shuffle(y, 3) * torch.sigmoid(self.gate(y))
        return self.head(F.avg_pool2d(self.up(y), 2))


def _twice(x):
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


class FlaxNeck(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.small = conv2d(3, 6, 3, stride=2, padding=1, rngs=rngs)
        self.large = conv2d(3, 6, 3, padding=1, rngs=rngs)
        self.norm = nnx.GroupNorm(12, num_groups=3, epsilon=1e-5, rngs=rngs)
        self.gate = conv2d(12, 12, 1, rngs=rngs)
        self.up = nnx.ConvTranspose(12, 12, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        self.head = conv2d(12, 4, 1, rngs=rngs)
        self.upsample: Callable = _twice
        self.join: Callable = lambda small, large: jnp.concatenate([small, large], -1)
        self.act: Callable = jax.nn.silu
        self.mix: Callable = lambda y: channel_shuffle(y, 3)
        self.squash: Callable = jax.nn.sigmoid

    def __call__(self, x):
        y = self.act(self.norm(self.join(self.upsample(self.small(x)), self.large(x))))
        y = self.mix(y) * self.squash(self.gate(y))
        return self.head(nnx.avg_pool(self.up(y), (2, 2), strides=(2, 2), padding="VALID"))


class Mixer(nn.Module):
    """Layer norms, attention over a sequence, an MLP: (B, N, 12) → (B, 12)."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)
        self.norm2 = nn.LayerNorm(12)
        self.fc1 = nn.Linear(12, 24)
        self.fc2 = nn.Linear(24, 12)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) * 12**-0.5, -1)
        x = x + self.proj(weights @ v)
        return (x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean(1)


class FlaxMixer(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm1 = nnx.LayerNorm(12, epsilon=1e-5, rngs=rngs)
        self.qkv = nnx.Linear(12, 36, rngs=rngs)
        self.proj = nnx.Linear(12, 12, rngs=rngs)
        self.norm2 = nnx.LayerNorm(12, epsilon=1e-5, rngs=rngs)
        self.fc1 = nnx.Linear(12, 24, rngs=rngs)
        self.fc2 = nnx.Linear(24, 12, rngs=rngs)
        self.split: Callable = lambda y: jnp.split(y, 3, -1)
        self.scale = 12**-0.5
        self.gelu: Callable = lambda x: jax.nn.gelu(x, approximate=False)
        self.residual: Callable = lambda x, y: x + y

    def __call__(self, x):
        q, k, v = self.split(self.qkv(self.norm1(x)))
        weights = jax.nn.softmax(q @ k.swapaxes(1, 2) * self.scale, -1)
        x = self.residual(x, self.proj(weights @ v))
        return (x + self.fc2(self.gelu(self.fc1(self.norm2(x))))).mean(1)


DEEP = {"layers": (6, 6, 6), "widths": (4, 4, 8), "num_classes": 5, "attention": "gam"}
DEEP |= {"attention_options": {"ratio": 2, "kernel_size": 3}, "attention_at": [2]}


def deep() -> nn.Module:
    """A ResNet of 38 convolutions and as many norms, with a GAM in the middle."""
    return gam_torch.create_model("resnet20", **DEEP)


def flax_deep() -> nnx.Module:
    return gam_flax.create_model("resnet20", **DEEP, rngs=nnx.Rngs(0))


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], nnx.Module], tuple[int, ...]]] = {
    "backbone": (Backbone, FlaxBackbone, (4, 16, 12, 3)),
    "neck": (Neck, FlaxNeck, (2, 8, 6, 3)),
    "mixer": (Mixer, FlaxMixer, (3, 5, 12)),
    "deep": (deep, flax_deep, (4, 16, 16, 3)),
}
"""Name → torch's, Flax's, and the input's shape, channels last."""


def twins(name: str) -> tuple[Any, Any, np.ndarray]:
    """An honest pair of a network and an input; statistics and norms are not as initialised."""
    make_torch, make_flax, shape = ZOO[name]
    torch.manual_seed(0)
    model = make_torch()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    twin = make_flax()
    load_torch(twin, model)
    return model, twin, np.random.default_rng(0).normal(size=shape)
