"""A convolution whose kernel was transformed once, for inference."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.ops.convolution import direct, fourier
from gam_flax.ops.convolution.choose import Shape, best_tiling
from gam_flax.ops.convolution.fourier import Padding


class PreparedConv(nnx.Module):
    """A convolution of stride 1 in the Fourier domain; it has its kernel's spectrum, no kernel.

    It takes pictures of any size; the periods suit one size best. That is for a CPU: elsewhere
    the kernel is made of its spectrum again, and the convolution is plain.

    Args:
        features: channels in and out.
        periods: points of a tile along H and W; each group's spectrum holds about their product
            a channel pair.
        dtype: of the result; None for the wider of the input's and the parameters' type.
        rngs: not used; taken so that every layer is built alike.
    """

    def __init__(
        self,
        features: tuple[int, int],
        kernel_size: tuple[int, int],
        *,
        padding: Padding,
        periods: tuple[int, int],
        groups: int = 1,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.features = features
        self.kernel_size = kernel_size
        self.padding = padding
        self.periods = periods
        self.groups = groups
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        channels, outputs = (number // groups for number in features)
        shape = (groups, periods[0] // 2 + 1, periods[1], channels, 2 * outputs)
        self.spectrum = nnx.Param(jnp.zeros(shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features[1], param_dtype)) if use_bias else None

    @classmethod
    def like(cls, conv: nnx.Conv, periods: tuple[int, int]) -> PreparedConv:
        """Of `conv`'s settings, and zeros."""
        assert conv.kernel is not None
        return cls(
            (conv.in_features, conv.out_features),
            window(conv)[0],
            padding=window(conv)[1],
            periods=periods,
            groups=conv.feature_group_count,
            use_bias=conv.bias is not None,
            dtype=conv.dtype,
            param_dtype=jnp.promote_types(conv.kernel.dtype, jnp.float32),
        )

    @classmethod
    def of(cls, conv: nnx.Conv, periods: tuple[int, int]) -> PreparedConv:
        """The same convolution as `conv`."""
        made = nnx.eval_shape(lambda: cls.like(conv, periods))
        assert conv.kernel is not None
        kernel = conv.kernel[...].astype(made.param_dtype)
        made.spectrum.set_value(_spectra(kernel, periods, made.groups))
        if made.bias is not None and conv.bias is not None:
            made.bias.set_value(conv.bias[...].astype(made.param_dtype))
        return made

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        wide = x.astype(jnp.promote_types(x.dtype, self.spectrum.dtype))
        y = jax.lax.platform_dependent(
            wide, self.spectrum[...], cpu=self._in_tiles, default=self._plain
        )
        if self.bias is not None:
            y += self.bias[...]
        return y.astype(self.dtype or jnp.result_type(x, self.spectrum[...]))

    def _in_tiles(self, x: Array, spectra: Array) -> Array:
        parts = jnp.split(x, self.groups, -1)
        tiling = best_tiling(self._shape(parts[0]), prepared=True, periods=self.periods)
        assert tiling is not None
        y = [
            fourier.correlate_spectrum(part, spectrum, self.kernel_size, self.padding, tiling)
            for part, spectrum in zip(parts, spectra, strict=True)
        ]
        return jnp.concatenate(y, -1) if len(y) > 1 else y[0]

    def _plain(self, x: Array, spectra: Array) -> Array:
        kernel = _kernel(spectra.astype(x.dtype), self.periods, self.kernel_size)
        return direct.plain(x, kernel, (1, 1), self.padding, self.groups)

    def _shape(self, x: Array) -> Shape:
        outputs = self.features[1] // self.groups
        kernel = jax.ShapeDtypeStruct((*self.kernel_size, x.shape[-1], outputs), x.dtype)
        return Shape.of(x, kernel, (1, 1), self.padding, 1)


def window(conv: nnx.Conv) -> tuple[tuple[int, int], Padding]:
    """The size of a two-dimensional convolution's kernel, and its padding in numbers."""
    size: Any = conv.kernel_size
    numbers: Any = conv.padding
    (high, wide), ((top, bottom), (left, right)) = size, numbers
    return (high, wide), ((top, bottom), (left, right))


@partial(jax.jit, static_argnums=(1, 2))
def _spectra(kernel: Array, periods: tuple[int, int], groups: int) -> Array:
    parts = jnp.stack(jnp.split(kernel, groups, -1))
    return jax.lax.map(lambda part: fourier.kernel_spectrum(part, periods), parts)


def _kernel(spectra: Array, periods: tuple[int, int], kernel_size: tuple[int, int]) -> Array:
    """The kernel again: `_spectra` undone, exact but for rounding."""
    real, imaginary = jnp.split(spectra, 2, -1)
    whole = jnp.fft.ifft(jax.lax.complex(real, -imaginary), axis=2)  # the spectrum is conjugate
    kernels = jnp.fft.irfft(whole, periods[0], axis=1)
    (high, wide), (_, _, _, channels, outputs) = kernel_size, kernels.shape
    taps = kernels[:, :high, :wide].transpose(1, 2, 3, 0, 4)
    return taps.reshape(high, wide, channels, len(spectra) * outputs)
