"""One convolution, several algorithms: the same numbers, the same derivatives."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from gam_flax.ops import convolution_algorithm, convolve
from gam_flax.ops.conv import conv2d
from gam_flax.ops.convolution import choose, direct, fourier, tiles
from gam_flax.ops.convolution.choose import Shape
from gam_flax.ops.convolution.convolve import conv_general_dilated
from gam_flax.ops.convolution.tiles import Tiling

EXACT = 1e-13
"""Of the largest number, in float64: rounding, and a hundred times less than a wrong tap."""


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def off(found, expected) -> float:
    """The largest difference over the largest number expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def draw_arrays(seed, batch, sizes, kernel_size, channels, outputs, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, *sizes, channels)).astype(dtype)
    kernel = rng.standard_normal((*kernel_size, channels, outputs)).astype(dtype)
    return jnp.asarray(x), jnp.asarray(kernel)


@st.composite
def problems(draw):
    kernel_size = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    sizes = draw(st.tuples(st.integers(7, 30), st.integers(7, 30)))
    padding = tuple(
        draw(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1))) for k in kernel_size
    )
    periods = tuple(draw(st.integers(k, k + 30)) for k in kernel_size)
    rows, images = draw(st.integers(1, periods[0] // 2 + 1)), draw(st.integers(0, 3))
    overlap, parts = draw(st.sampled_from(["inputs", "outputs"])), draw(st.sampled_from([1, 2]))
    tiling = Tiling(periods, rows, images, overlap, parts)
    return kernel_size, sizes, padding, tiling


@settings(max_examples=12, deadline=None)
@given(
    problem=problems(),
    seed=st.integers(0, 99),
    features=st.sampled_from([(2, 6, 1), (6, 2, 1), (6, 6, 3)]),
)
def test_fourier_tiles_are_the_convolution(problem, seed, features):
    kernel_size, sizes, padding, tiling = problem
    channels, outputs, groups = features
    x, _ = draw_arrays(seed, 3, sizes, (1, 1), channels, 1)
    _, kernel = draw_arrays(seed, 1, sizes, kernel_size, channels // groups, outputs)
    plain = partial(direct.plain, strides=(1, 1), padding=padding, groups=groups)
    expected, back = jax.vjp(plain, x, kernel)
    g = jnp.cos(expected)
    if groups > 1:
        tiling = tiling._replace(parts=1)
    assert off(fourier.correlate(x, kernel, padding, tiling, groups), expected) < EXACT
    by_kernel = fourier.kernel_gradient(x, g, kernel_size, padding, tiling, groups)
    assert off(by_kernel, back(g)[1]) < EXACT
    around = tiles.adjoint_padding(kernel_size, padding)
    by_pictures = fourier.correlate_flipped(g, kernel, around, tiling, groups)
    assert off(by_pictures, back(g)[0]) < EXACT
    spectra = fourier.kernel_spectra(kernel, tiling.periods, groups)
    found = fourier.correlate_spectra(x, spectra, kernel_size, padding, tiling)
    assert off(found, expected) < EXACT


@pytest.mark.parametrize("period", [16, 17, 19, 20])
def test_a_period_wraps_only_where_zeros_serve_both_borders(period):
    """14 pixels and one border of 3 are 17 points; with one less, tiles must overlap."""
    one = tiles.cut(14, 7, (3, 3), period)
    assert one.count == (1 if period >= 17 else 2)


def test_one_point_too_few_would_be_noticed(monkeypatch):
    x, kernel = draw_arrays(0, 1, (14, 14), (7, 7), 2, 2)
    padding = ((3, 3), (3, 3))
    expected = direct.plain(x, kernel, (1, 1), padding)
    whole = tiles.Cut(1, 14, tiles.Window(0, 14), 3, tiles.Window(0, 14))
    monkeypatch.setattr(tiles, "cut", lambda *args: whole)
    assert off(fourier.correlate(x, kernel, padding, Tiling((17, 17))), expected) < EXACT
    assert off(fourier.correlate(x, kernel, padding, Tiling((16, 16))), expected) > 0.01


WAYS = {
    "fourier": ({}, 1),
    "pointwise": ({"padding": ((0, 0), (0, 0))}, 1),
    "pointwise, strided": ({"padding": ((0, 0), (0, 0)), "strides": (2, 3)}, 1),
    "piecewise": ({}, 1),
    "piecewise, strided": ({"strides": (2, 1)}, 1),
    "piecewise, grouped": ({"groups": 2}, 2),
    "piecewise, narrow groups": ({"groups": 3}, 3),
    "piecewise, narrow groups, strided": ({"groups": 3, "strides": (1, 2)}, 3),
    "fourier, grouped": ({"groups": 2}, 2),
    "tap_by_tap": ({"groups": 6}, 6),
    "tap_by_tap, strided": ({"groups": 6, "strides": (2, 2)}, 6),
}


@pytest.fixture(params=WAYS)
def both(request, monkeypatch):
    """The plain convolution and another way to compute it, x and kernel."""
    options, groups = WAYS[request.param]
    size = (1, 1) if request.param.startswith("pointwise") else (5, 3)
    monkeypatch.setattr(direct, "CACHED", 200)  # a picture at a time
    monkeypatch.setattr(direct, "NARROW", 3)  # groups of two channels become one
    x, kernel = draw_arrays(1, 2, (9, 11), size, 6 // groups, 6)
    x = draw_arrays(2, 2, (9, 11), (1, 1), 6, 1)[0]
    options = {"padding": ((2, 2), (1, 1)), **options}
    name = request.param.partition(",")[0]
    return (
        partial(convolve, algorithm="plain", **options),
        partial(convolve, algorithm=name, **options),
        x,
        kernel,
    )


def test_first_and_second_derivatives(both):
    plain, other, x, kernel = both
    dx, dk = jnp.cos(x), jnp.sin(kernel)

    def derivatives(way):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(way(x, kernel)))

        gradients = jax.grad(loss, (0, 1))
        forward = jax.jvp(way, (x, kernel), (dx, dk))
        twice = jax.jvp(gradients, (x, kernel), (dx, dk))[1]
        reverse_twice = jax.grad(lambda *a: optimal(gradients(*a)), (0, 1))(x, kernel)
        return [*forward, *gradients(x, kernel), *twice, *reverse_twice]

    def optimal(tree):
        return sum(jnp.sum(leaf**2) for leaf in tree)

    for found, expected in zip(derivatives(other), derivatives(plain), strict=True):
        assert off(found, expected) < 1e-12


def test_under_jit_vmap_and_remat(both):
    plain, other, x, kernel = both
    expected = plain(x, kernel)
    assert off(jax.jit(other)(x, kernel), expected) < EXACT
    assert off(jax.checkpoint(other)(x, kernel), expected) < EXACT
    many = jnp.stack([x, 2 * x, -x])
    found = jax.vmap(other, (0, None))(many, kernel)
    assert off(found, jnp.stack([expected, 2 * expected, -expected])) < EXACT


def test_under_shard_map(both):
    """Pictures vary over the mesh and the kernel does not: its gradient is a sum over devices,
    which shard_map only puts in where a convolution says what varies."""
    plain, other, x, kernel = both
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(x, kernel):
        return jax.lax.psum(jnp.sum(jnp.sin(other(x, kernel))), "data")

    gradients = jax.grad(loss, (0, 1))

    specs = (P("data"), P())
    found = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs)(x, kernel)
    expected = jax.grad(lambda *a: jnp.sum(jnp.sin(plain(*a))), (0, 1))(x, kernel)
    for one, right in zip(found, expected, strict=True):
        assert off(one, right) < 1e-12


def test_gradients_under_vmap(both):
    """Of each picture alone, and of one picture by several kernels."""
    plain, other, x, kernel = both
    kernels = jnp.stack([kernel, 2 * kernel])

    def gradients(way):
        gradient = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(way(x, kernel))), (0, 1))
        each = jax.vmap(gradient, (0, None))(x[:, None], kernel)
        return [*each, *jax.vmap(gradient, (None, 0))(x, kernels)]

    for found, expected in zip(gradients(other), gradients(plain), strict=True):
        assert off(found, expected) < 1e-12


def test_the_layer_takes_what_is_chosen():
    """In NNX and in Linen, by `conv_general_dilated=`; dilation and strides are left to XLA."""
    layer = conv2d(4, 4, 7, padding=3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = draw_arrays(3, 2, (12, 12), (1, 1), 4, 1)[0]
    expected = layer(x)
    with convolution_algorithm("fourier"):
        found = layer(x)
        text = str(jax.make_jaxpr(layer)(x))
    assert "conv_general_dilated" not in text
    assert 0 < off(found, expected) < EXACT
    module = linen.Conv(
        4, (7, 7), padding=3, conv_general_dilated=conv_general_dilated, param_dtype=jnp.float64
    )
    variables = {"params": {"kernel": layer.kernel[...], "bias": layer.bias[...]}}
    with convolution_algorithm("fourier"):
        assert off(module.apply(variables, x), expected) < EXACT
    same = linen.Conv(4, (7, 7), padding="SAME", conv_general_dilated=conv_general_dilated)
    assert same.init_with_output(jax.random.key(0), x)[0].shape == x.shape
    dilated = conv2d(4, 4, 3, padding=2, dilation=2, rngs=nnx.Rngs(0))
    with convolution_algorithm("fourier"):
        assert "conv_general_dilated" in str(jax.make_jaxpr(dilated)(x))


def test_an_unknown_algorithm_is_one_line():
    with pytest.raises(ValueError, match="algorithm must be one of"), convolution_algorithm("fft"):
        pass


@pytest.mark.parametrize("sides, channels, outputs", [(14, 64, 32), (28, 16, 64), (7, 128, 32)])
def test_float32_is_no_less_exact_than_the_plain_way(sides, channels, outputs):
    padding = ((3, 3), (3, 3))
    x, kernel = draw_arrays(4, 8, (sides, sides), (7, 7), channels, outputs, np.float32)
    g = draw_arrays(5, 8, (sides, sides), (1, 1), outputs, 1, np.float32)[0]
    way = partial(convolve, padding=padding, algorithm="fourier")
    plain = partial(convolve, padding=padding, algorithm="plain")

    def answers(way, *args):
        y, pull = jax.vjp(way, *args[:2])
        return [y, *pull(args[2])]

    exact = answers(plain, *(a.astype(jnp.float64) for a in (x, kernel, g)))
    for ours, theirs, true in zip(
        answers(way, x, kernel, g), answers(plain, x, kernel, g), exact, strict=True
    ):
        error, plain_error = (float(jnp.sqrt(jnp.mean((a - true) ** 2))) for a in (ours, theirs))
        assert error <= plain_error


@pytest.mark.parametrize(
    "channels, outputs, groups, merged",
    [(64, 16, 4, 2), (16, 64, 4, 2), (64, 64, 4, 4), (32, 32, 1, 1), (6, 6, 3, 1), (32, 144, 8, 8)],
)
def test_narrow_groups_become_one(channels, outputs, groups, merged):
    """Until there are five channels and outputs in each, but never more than 32."""
    assert direct.merged_groups(channels, outputs, groups) == merged


class TestTheChoice:
    """What the cost model says, without a clock."""

    LARGE = Shape(32, (14, 14), 512, 128, (7, 7), padding=((3, 3), (3, 3)))

    def test_a_large_kernel_goes_to_the_fourier_domain(self):
        assert choose.cheapest_tiling(self.LARGE) == choose.best_tiling(self.LARGE)

    def test_a_pointwise_convolution_never_does(self):
        small = self.LARGE._replace(kernel_size=(1, 1), padding=((0, 0), (0, 0)))
        assert choose.cheapest_tiling(small) is None

    def test_one_picture_does_not_pay_for_the_kernels_transform(self):
        assert choose.cheapest_tiling(self.LARGE._replace(batch=1)) is None

    @pytest.mark.parametrize("channels, large", [(2, 1e9), (6, 1e9), (2, 0), (6, 0)])
    def test_every_tiling_worth_trying_is_right(self, channels, large, monkeypatch):
        shape = Shape(2, (6, 7), channels, 4, (5, 3), padding=((2, 2), (1, 1)), bytes=8)
        x, kernel = draw_arrays(6, 2, shape.sizes, shape.kernel_size, channels, 4)
        expected = direct.plain(x, kernel, (1, 1), shape.padding)
        monkeypatch.setattr(choose, "SLAB", 1000)  # a few rows, or parts, at a time
        monkeypatch.setattr(choose, "LARGE", large)
        assert any((tiling.parts > 1) == (large == 0) for tiling in choose.tilings(shape))
        for tiling in choose.tilings(shape):
            assert off(fourier.correlate(x, kernel, shape.padding, tiling), expected) < EXACT

    def test_elsewhere_than_on_a_cpu_it_is_plain(self):
        """One exported program has both; each platform is left with its own."""
        x = jax.ShapeDtypeStruct((32, 14, 14, 512), jnp.float32)
        kernel = jax.ShapeDtypeStruct((7, 7, 512, 128), jnp.float32)
        way = partial(convolve, padding=((3, 3), (3, 3)), algorithm="auto")
        for platform, plain in (("cpu", False), ("cuda", True), ("tpu", True)):
            text = jax.jit(way).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
            assert ("stablehlo.convolution" in text) == plain

    @pytest.mark.parametrize("channels, outputs", [(512, 128), (4, 4), (2, 4)])
    def test_a_symbolic_batch_is_no_obstacle(self, channels, outputs):
        (batch,) = jax.export.symbolic_shape("b")
        x = jax.ShapeDtypeStruct((batch, 14, 14, channels), jnp.float32)
        kernel = jax.ShapeDtypeStruct((7, 7, channels, outputs), jnp.float32)

        def way(x, kernel):
            return convolve(x, kernel, padding=((3, 3), (3, 3)), algorithm="auto")

        def gradient(x, kernel):
            return jax.grad(lambda kernel: way(x, kernel).sum())(kernel)

        assert jax.export.export(jax.jit(way))(x, kernel).out_avals[0].shape[0] == batch
        assert jax.export.export(jax.jit(gradient))(x, kernel).out_avals[0].shape == kernel.shape
