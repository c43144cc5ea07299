"""A convolution whose result and whose two gradients are each computed in a way of their own.

y = correlate(x, k), and what goes backward from a gradient g of y, are three functions of two
arguments each, linear in both, and all made of one sum of products g · x · k:

    result(x, k) → like g,    by_pictures(g, k) → like x,    by_kernel(x, g) → like k.

The gradient of any of them by one of its arguments is another of the three. So they are closed
under differentiation, and as primitives of JAX each keeps its own algorithm in every derivative,
of every order, forward and reverse. (JAX's own transposes of the products inside would leave axes
out of order: they were measured to take up to 1.6 times as long.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from gam_flax.ops.convolution import direct, fourier
from gam_flax.ops.convolution.tiles import Padding, Tiling, adjoint_padding


class Plan(NamedTuple):
    """What is computed, and how: the tiles of each of the three functions, None for none.

    sizes: of the pictures; kernel_size: of the kernel.
    """

    sizes: tuple[int, int]
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: Padding
    groups: int = 1
    result: Tiling | None = None
    by_pictures: Tiling | None = None
    by_kernel: Tiling | None = None

    @property
    def pointwise(self) -> bool:
        bare = self.kernel_size == (1, 1) and self.padding == ((0, 0), (0, 0))
        return bare and self.groups == 1


def correlate(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k l D O"], plan: Plan
) -> Float[Array, "B h w O"]:
    """The convolution of stride and padding that the plan says."""
    return _bind(RESULT, x, kernel, plan)


def _without_tiles(x: Array, kernel: Array, plan: Plan) -> Array:
    if plan.pointwise:
        return direct.pointwise(x, kernel, plan.strides)
    way = partial(direct.in_borders, strides=plan.strides, padding=plan.padding)
    groups = direct.merged_groups(x.shape[-1], kernel.shape[-1], plan.groups)
    return direct.per_group(way, x, direct.merged(kernel, plan.groups, groups), groups)


def _result(x: Array, kernel: Array, plan: Plan) -> Array:
    if plan.result is None:
        return _without_tiles(x, kernel, plan)
    return fourier.correlate(x, kernel, plan.padding, plan.result, plan.groups)


def _by_pictures(g: Array, kernel: Array, plan: Plan) -> Array:
    padding = adjoint_padding(plan.kernel_size, plan.padding)
    if plan.by_pictures:
        return fourier.correlate_flipped(g, kernel, padding, plan.by_pictures, plan.groups)
    if plan.strides == (1, 1) and direct.is_larger(plan.kernel_size, plan.sizes):
        bare = plan._replace(padding=padding, result=None)
        return _without_tiles(g, fourier.flipped(kernel, plan.groups), bare)
    like = _like(g, (g.shape[0], *plan.sizes, kernel.shape[2] * plan.groups))
    return jax.linear_transpose(lambda x: _without_tiles(x, kernel, plan), like)(g)[0]


def _by_kernel(x: Array, g: Array, plan: Plan) -> Array:
    if plan.pointwise:
        return direct.pointwise_gradient(x, g, plan.strides)
    if plan.by_kernel is None:
        way = partial(direct.of_kernel, strides=plan.strides, padding=plan.padding)
        like = _like(g, (*plan.kernel_size, x.shape[-1] // plan.groups, g.shape[-1]))
        return jax.linear_transpose(lambda k: direct.per_group(way, x, k, plan.groups), like)(g)[0]
    return fourier.kernel_gradient(
        x, g, plan.kernel_size, plan.padding, plan.by_kernel, plan.groups
    )


def _like(g: Array, shape: tuple[Any, ...]) -> Any:
    """An array of `shape`, of `g`'s type otherwise: what shard_map knows of it, too."""
    return jax.typeof(g).update(shape=shape)


def _primitive(name: str, function: Callable[..., Array]) -> Primitive:
    """Of a function of two arrays and a plan; its derivatives are still to be told."""
    made = Primitive(f"convolution_{name}")

    def typed(*args: Any, plan: Plan) -> Any:
        # The shape is that of XLA's convolution, and so is what shard_map wants to know.
        bare = plan._replace(result=None, by_pictures=None, by_kernel=None)
        return jax.make_jaxpr(partial(function, plan=bare))(*args).out_avals[0]

    def batched(args: Any, axes: Any, *, plan: Plan) -> tuple[Array, int]:
        return jax.vmap(partial(function, plan=plan), axes)(*args), 0

    made.def_impl(jax.jit(function, static_argnames="plan"))
    made.def_abstract_eval(typed)
    batching.primitive_batchers[made] = batched
    mlir.register_lowering(made, mlir.lower_fun(function, multiple_results=False))
    return made


RESULT = _primitive("result", _result)
BY_PICTURES = _primitive("by_pictures", _by_pictures)
BY_KERNEL = _primitive("by_kernel", _by_kernel)


def _bind(primitive: Primitive, one: Array, other: Array, plan: Plan) -> Array:
    # Under shard_map both must vary along the same axes of the mesh.
    axes = [jax.typeof(array).mat.varying for array in (one, other)]
    one, other = (
        jax.lax.pcast(array, tuple((axes[0] | axes[1]) - mine), to="varying")
        for array, mine in zip((one, other), axes, strict=True)
    )
    return primitive.bind(one, other, plan=plan)


ad.defbilinear(
    RESULT,
    lambda g, x, kernel, plan: _bind(BY_PICTURES, g, kernel, plan),
    lambda g, x, kernel, plan: _bind(BY_KERNEL, x, g, plan),
)
ad.defbilinear(
    BY_PICTURES,
    lambda dx, g, kernel, plan: _bind(RESULT, dx, kernel, plan),
    lambda dx, g, kernel, plan: _bind(BY_KERNEL, dx, g, plan),
)
ad.defbilinear(
    BY_KERNEL,
    lambda dkernel, x, g, plan: _bind(BY_PICTURES, g, dkernel, plan),
    lambda dkernel, x, g, plan: _bind(RESULT, x, dkernel, plan),
)
