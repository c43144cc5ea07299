"""BatchNorm that means what torch's means."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class RunningStatistics(NamedTuple):
    """What a BatchNorm remembers: float32 or wider, whatever it normalizes."""

    mean: Float[Array, "C"]
    var: Float[Array, "C"]
    num_batches_tracked: Int[Array, ""]


def initial_statistics(num_features: int, param_dtype: DTypeLike) -> RunningStatistics:
    """Mean 0, variance 1, no batch seen."""
    dtype = jnp.promote_types(param_dtype, jnp.float32)
    return RunningStatistics(
        jnp.zeros(num_features, dtype), jnp.ones(num_features, dtype), jnp.zeros((), jnp.int32)
    )


def normalize(
    x: Float[Array, "*B C"],
    mean: Float[Array, "C"],
    var: Float[Array, "C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    *,
    eps: float,
    dtype: DTypeLike | None,
) -> Float[Array, "*B C"]:
    """(x − mean) / √(var + eps) · scale + bias, computed in float32 or wider.

    The result has `dtype`, or the wider of the input's and the parameters' type, as in Flax.
    """
    wide = jnp.promote_types(jnp.result_type(x, mean), jnp.float32)
    factor = jax.lax.rsqrt(var.astype(wide) + eps) * scale
    y = (x.astype(wide) - mean) * factor + bias
    return y.astype(dtype or jnp.result_type(x, scale, bias))


def update(
    running: RunningStatistics, x: Float[Array, "*B C"], momentum: float | None
) -> tuple[Float[Array, "C"], Float[Array, "C"], RunningStatistics]:
    """The batch's mean and biased variance, and the running statistics after it.

        mean ← (1 − m) · mean + m · mean_B        var ← (1 − m) · var + m · var_B · n / (n − 1)

    n is the number of values a channel and m the momentum, or 1 / (batches seen) where that is
    None. There are two passes: E[x²] − E[x]² loses every digit at a large mean, and so does a mean
    whose rounding is not small beside the deviation. The first gives a mean that is nearly right,
    the second both of what is left. (torch adds up in float64.) An empty batch counts, and changes
    nothing else.

    Raises:
        ValueError: one value a channel, which has no variance.
    """
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1] if x.shape[-1] else 0
    if count == 1:
        raise ValueError(
            f"BatchNorm wants more than one value a channel in training, got an input of {x.shape}"
        )
    tracked = running.num_batches_tracked + 1
    if count == 0:
        return running.mean, running.var, running._replace(num_batches_tracked=tracked)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    rough = jax.lax.stop_gradient(jnp.mean(wide, axes))
    left = wide - rough
    rest = jnp.mean(left, axes)
    mean = rough + rest
    var = jnp.maximum(jnp.mean(jnp.square(left), axes) - jnp.square(rest), 0)
    new = 1 / tracked.astype(running.mean.dtype) if momentum is None else momentum

    def blend(old: Array, batch: Array) -> Array:
        return ((1 - new) * old + new * jax.lax.stop_gradient(batch)).astype(old.dtype)

    after = RunningStatistics(
        blend(running.mean, mean), blend(running.var, var * (count / (count - 1))), tracked
    )
    return mean, var, after


class BatchNorm(nnx.Module):
    """Batch normalization over all axes but the last, with torch's meaning of every number.

        y = (x − mean) / √(var + eps) · scale + bias

    It departs from `flax.nnx.BatchNorm` where that departs from torch: `momentum` is the weight
    of the *new* value, the running variance is unbiased, n / (n − 1), the variance is computed
    in two passes, statistics are kept and used in float32 or wider, the batches are counted, and
    one value a channel in training is an error.

    Args:
        num_features: C, the length of the last axis.
        eps: added to the variance.
        momentum: weight of the new value; None for the mean over all batches.
        use_running_average: normalize with the running statistics (evaluation); set by
            `model.eval()`, `model.train()` and `nnx.view`.
        dtype: of the result; None for the wider of the input's and the parameters' type.
        param_dtype: of `scale` and `bias`.
        rngs: not used; taken so that every layer is built alike.

    Raises:
        ValueError: one value a channel in training.

    Source: `torch.nn.BatchNorm2d`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        use_running_average: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.use_running_average = use_running_average
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.scale = nnx.Param(jnp.ones(num_features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_features, param_dtype))
        mean, var, tracked = initial_statistics(num_features, param_dtype)
        self.mean = nnx.BatchStat(mean)
        self.var = nnx.BatchStat(var)
        self.num_batches_tracked = nnx.BatchStat(tracked)

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            running = RunningStatistics(
                self.mean[...], self.var[...], self.num_batches_tracked[...]
            )
            mean, var, after = update(running, x, self.momentum)
            self.mean[...], self.var[...], self.num_batches_tracked[...] = after
        return normalize(
            x, mean, var, self.scale[...], self.bias[...], eps=self.eps, dtype=self.dtype
        )

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average
