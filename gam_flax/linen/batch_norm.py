"""The BatchNorm of `gam_flax.ops.batch_norm` as a Linen module."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.ops.batch_norm import RunningStatistics, initial_statistics, normalize, update


class BatchNorm(nn.Module):
    """Batch normalization with torch's meaning of every number, see `gam_flax.ops.BatchNorm`.

    Parameters `scale`, `bias`; collection `batch_stats`: `mean`, `var`, `num_batches_tracked`.

    Args:
        eps: added to the variance.
        momentum: weight of the new value; None for the mean over all batches.
        dtype: of the result; None for the wider of the input's and the parameters' type.
        param_dtype: of `scale` and `bias`.

    Raises:
        ValueError: one value a channel in training.
    """

    eps: float = 1e-5
    momentum: float | None = 0.1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"], train: bool = False) -> Float[Array, "*B C"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        initial = initial_statistics(channels, self.param_dtype)
        kept = [
            self.variable("batch_stats", name, lambda value=value: value)
            for name, value in initial._asdict().items()
        ]
        running = RunningStatistics(*(variable.value for variable in kept))
        mean, var = running.mean, running.var
        if train:
            mean, var, after = update(running, x, self.momentum)
            if not self.is_initializing():
                for variable, value in zip(kept, after, strict=True):
                    variable.value = value
        return normalize(x, mean, var, scale, bias, eps=self.eps, dtype=self.dtype)
