"""A convolution whose kernel was transformed once, for inference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.ops.convolution import direct, fourier
from gam_flax.ops.convolution.choose import Shape, best_tiling
from gam_flax.ops.convolution.tiles import Padding


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
        kernel = (*kernel_size, features[0] // groups, features[1])
        shapes = fourier.spectra_shapes(kernel, periods, groups)
        parts = [nnx.Param(jnp.zeros(shape, param_dtype)) for shape in shapes]
        # Not a list: jax.export serializes trees with keys that are strings.
        self.spectra = nnx.Dict({str(i): part for i, part in enumerate(parts)})
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
        transform = jax.jit(fourier.kernel_spectra, static_argnums=(1, 2))
        for one, found in zip(
            made.spectra.values(), transform(kernel, periods, made.groups), strict=True
        ):
            one.set_value(found)
        if made.bias is not None and conv.bias is not None:
            made.bias.set_value(conv.bias[...].astype(made.param_dtype))
        return made

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        spectra = [one[...] for one in self.spectra.values()]
        wide = x.astype(jnp.promote_types(x.dtype, spectra[0].dtype))
        y = jax.lax.platform_dependent(wide, spectra, cpu=self._in_tiles, default=self._plain)
        if self.bias is not None:
            y += self.bias[...]
        return y.astype(self.dtype or jnp.result_type(x, *spectra))

    def _in_tiles(self, x: Array, spectra: list[Array]) -> Array:
        kernel = (*self.kernel_size, self.features[0] // self.groups, self.features[1])
        shape = Shape.of(
            x, jax.ShapeDtypeStruct(kernel, x.dtype), (1, 1), self.padding, self.groups
        )
        tiling = best_tiling(shape, "prepared", periods=self.periods)
        assert tiling is not None
        return fourier.correlate_spectra(x, spectra, self.kernel_size, self.padding, tiling)

    def _plain(self, x: Array, spectra: list[Array]) -> Array:
        kernel = _kernel(
            [one.astype(x.dtype) for one in spectra],
            self.periods,
            self.kernel_size,
            self.features[0] // self.groups,
        )
        return direct.plain(x, kernel, (1, 1), self.padding, self.groups)


def window(conv: nnx.Conv) -> tuple[tuple[int, int], Padding]:
    """The size of a two-dimensional convolution's kernel, and its padding in numbers."""
    size: Any = conv.kernel_size
    numbers: Any = conv.padding
    (high, wide), ((top, bottom), (left, right)) = size, numbers
    return (high, wide), ((top, bottom), (left, right))


def _kernel(
    spectra: list[Array], periods: tuple[int, int], kernel_size: tuple[int, int], channels: int
) -> Array:
    """The kernel again: `fourier.kernel_spectra` undone, exact but for rounding."""
    spectrum = jnp.concatenate(spectra)
    real, imaginary = jnp.split(spectrum, 2, -1 if spectrum.shape[-2] == channels else -2)
    whole = jnp.fft.ifft(jax.lax.complex(real, -imaginary), axis=2)  # the spectrum is conjugate
    kernels = jnp.fft.irfft(whole, periods[0], axis=0)
    (high, wide), (groups, outputs) = kernel_size, (kernels.shape[1], kernels.shape[-1])
    taps = kernels[:high, :, :wide].transpose(0, 2, 3, 1, 4)
    return taps.reshape(high, wide, channels, groups * outputs)
