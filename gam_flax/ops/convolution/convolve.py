"""One convolution, several ways to compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, get_args

import jax
from jax import lax
from jaxtyping import Array, Float

from gam_flax.ops.convolution import direct, planned
from gam_flax.ops.convolution.choose import Shape, best_tiling, cheapest_tiling, functions
from gam_flax.ops.convolution.planned import Plan
from gam_flax.ops.convolution.tiles import Padding

Algorithm = Literal["auto", "direct", "plain", "piecewise", "pointwise", "tap_by_tap", "fourier"]
"""
- plain: `lax.conv_general_dilated`.
- piecewise: plain, a group at a time, the kernel's gradient a few pictures at a time.
- pointwise: a product at every pixel; kernels of one pixel, not grouped or padded.
- tap_by_tap: shifted pictures, added; depthwise convolutions only.
- fourier: a product per frequency and group, tile by tile, see `fourier.py`.
- direct: one of these but for the last, whichever suits it.
- auto: on a CPU whichever the cost model of `choose.py` finds cheapest; elsewhere plain.
"""

MANY_GROUPS = 64
"""Beyond it a convolution per group is more to compile than it saves."""

_algorithm: ContextVar[str] = ContextVar("algorithm", default="auto")

Way = Callable[[Array, Array], Array]


@contextmanager
def convolution_algorithm(algorithm: str) -> Iterator[None]:
    """Within it, layers that are traced take `algorithm`; what jit has traced before stays.

    A convolution that the algorithm does not know (a stride under "fourier") is plain.

    Raises:
        ValueError: an unknown algorithm.
    """
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"algorithm must be one of {get_args(Algorithm)}, got {algorithm!r}")
    token = _algorithm.set(algorithm)
    try:
        yield
    finally:
        _algorithm.reset(token)


def convolve(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k l D O"],
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    groups: int = 1,
    algorithm: Algorithm | None = None,
) -> Float[Array, "B h w O"]:
    """A convolution as torch means it, of NHWC pictures with an HWIO kernel.

        y[b, i, j, o] = Σ x[b, s·i + u − p, s·j + v − q, c] · kernel[u, v, c, o]

    All algorithms give the same numbers to rounding, and derivatives of any order.

    Args:
        padding: zeros before and after, along H and along W.
        groups: D · groups = C; group g of the outputs sees group g of the inputs.
        algorithm: None for what `convolution_algorithm` says, "auto" outside of it. One that
            does not know this convolution leaves it to "plain".
    """
    return _convolve(x, kernel, strides, padding, groups, algorithm or _algorithm.get())


@partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)
def _convolve(
    x: Array,
    kernel: Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int,
    algorithm: str,
) -> Array:
    plain = partial(direct.plain, strides=strides, padding=padding, groups=groups)
    other = _other_way(Shape.of(x, kernel, strides, padding, groups), algorithm)
    if other is None:
        return plain(x, kernel)
    if algorithm in ("auto", "direct"):
        return lax.platform_dependent(x, kernel, cpu=other, default=plain)
    return other(x, kernel)


def _other_way(shape: Shape, algorithm: str) -> Way | None:
    """How `algorithm` computes it, None for the plain way."""
    auto = algorithm in ("auto", "direct")
    if shape.depthwise and (auto or algorithm == "tap_by_tap"):
        return partial(direct.tap_by_tap, strides=shape.strides, padding=shape.padding)
    if algorithm not in PLANNED or not shape.known or shape.groups > MANY_GROUPS:
        return None
    plan = Plan(shape.sizes, shape.kernel_size, shape.strides, shape.padding, shape.groups)
    if algorithm == "pointwise" and not plan.pointwise:
        return None
    choose = PLANNED[algorithm]
    if choose and not plan.pointwise and shape.strides == (1, 1):
        tilings = {name: choose(*function) for name, function in functions(shape).items()}
        plan = plan._replace(**tilings)
    return lambda x, kernel: planned.correlate(x, kernel, plan)


PLANNED = {
    "auto": cheapest_tiling,
    "fourier": best_tiling,
    **dict.fromkeys(("direct", "piecewise", "pointwise")),
}
"""The algorithms that have a `Plan` → what chooses its tiles."""


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    algorithm: Algorithm | None = None,
    **others: Any,
) -> Array:
    """`lax.conv_general_dilated`, by `convolve` where that knows the convolution.

    It is what the argument of that name of Flax's convolutions takes, in NNX and in Linen.
    `algorithm` is that of `convolve`.
    """
    dilated = any(d != 1 for d in [*(lhs_dilation or ()), *(rhs_dilation or ())])
    known = lhs.ndim == 4 and not dilated and not any(others.values())
    known = known and not isinstance(padding, str)
    if known and dimension_numbers == lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC")
    ):
        pads: Any = padding
        (top, bottom), (left, right) = pads
        down, along = window_strides
        return convolve(
            lhs,
            rhs,
            strides=(down, along),
            padding=((top, bottom), (left, right)),
            groups=feature_group_count,
            algorithm=algorithm,
        )
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        **others,
    )
