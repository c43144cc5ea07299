"""A model made ready for inference: norms folded into convolutions, kernels transformed once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gam_flax.ops.batch_norm import BatchNorm
from gam_flax.ops.convolution.choose import Shape, cheapest_tiling
from gam_flax.ops.convolution.convolve import MANY_GROUPS, conv_general_dilated
from gam_flax.ops.convolution.fourier import Tiling
from gam_flax.ops.convolution.prepared import PreparedConv, window
from gam_flax.ops.sequential import Sequential

Path = tuple[Any, ...]
Periods = tuple[int, int]

DIRECT = partial(conv_general_dilated, algorithm="direct")
"""What a convolution is computed by that is not even worth preparing."""


class Identity(nnx.Module):
    """What stands where a norm was."""

    def __call__(self, x: Any) -> Any:
        return x


class FoldedConv(nnx.Conv):
    """A convolution with the norm after it in its kernel and its bias."""


def optimize_for_inference(
    model: nnx.Module, input_shape: Sequence[int] | None = None
) -> nnx.Module:
    """A copy of `model` that answers the same in evaluation, sooner; `model` stays as it is.

    1. Each BatchNorm right after a convolution is folded into it,

            kernel · γ / √(var + eps),      (bias − mean) · γ / √(var + eps) + β,

       in `Sequential` and where a module of `gam_flax` says in `NORMS` which norm follows which
       convolution.
    2. On a CPU, each convolution that is cheaper in the Fourier domain keeps the spectrum of its
       kernel in the kernel's stead, see `gam_flax.ops.convolution`: for a 7 × 7 kernel six to
       twenty times the numbers. What is cheaper depends on the pictures' size.

    The copy is for evaluation alone. It is saved, loaded, jitted and exported as any model.

    Args:
        model: any NNX module.
        input_shape: (B, H, W, C) of what it will see most; it still takes others. None leaves
            out the second step.

    Raises:
        ValueError: `model` takes no input of that shape.
    """
    model = nnx.clone(model)
    model.eval()
    for path, conv, norm in list(_followed(model)):
        place = get(model, path)
        setattr(place, conv, _folded(getattr(place, conv), getattr(place, norm)))
        setattr(place, norm, Identity())
    if input_shape is not None and jax.default_backend() == "cpu":
        for path, periods in _periods(model, tuple(input_shape)).items():
            conv = get(model, path)
            if periods is None:
                conv.conv_general_dilated = DIRECT
            else:
                put(model, path, PreparedConv.of(conv, periods))
    return model


def _followed(model: nnx.Module) -> Iterator[tuple[Path, str, str]]:
    """Each place where a norm follows a convolution: its path, and their names there."""
    for path, module in nnx.iter_modules(model):
        names = [str(i) for i in range(len(module))] if isinstance(module, Sequential) else []
        pairs = [*zip(names, names[1:], strict=False), *getattr(module, "NORMS", {}).items()]
        for conv, norm in pairs:
            if isinstance(getattr(module, conv), nnx.Conv) and isinstance(
                getattr(module, norm), BatchNorm
            ):
                yield path, conv, norm


def _folded(conv: nnx.Conv, norm: BatchNorm) -> FoldedConv:
    assert conv.kernel is not None
    wide = jnp.promote_types(conv.kernel.dtype, norm.var.dtype)
    factor = jax.lax.rsqrt(norm.var[...].astype(wide) + norm.eps) * norm.scale[...]
    bias = 0 if conv.bias is None else conv.bias[...]
    made = nnx.eval_shape(lambda: _like(conv))  # its weights are not drawn: they are known
    assert made.kernel is not None and made.bias is not None
    made.kernel.set_value((conv.kernel[...] * factor).astype(conv.kernel.dtype))
    moved = (bias - norm.mean[...]) * factor + norm.bias[...]
    made.bias.set_value(moved.astype(conv.kernel.dtype))
    return made


def _like(conv: nnx.Conv) -> FoldedConv:
    """With `conv`'s settings and a bias."""
    return FoldedConv(
        conv.in_features,
        conv.out_features,
        conv.kernel_size,
        conv.strides,
        padding=conv.padding,
        input_dilation=conv.input_dilation,
        kernel_dilation=conv.kernel_dilation,
        feature_group_count=conv.feature_group_count,
        dtype=conv.dtype,
        param_dtype=conv.param_dtype,
        precision=conv.precision,
        conv_general_dilated=conv.conv_general_dilated,
        rngs=nnx.Rngs(0),
    )


class _Watched:
    """Stands for a convolution while shapes are traced, and notes what it was given."""

    def __init__(self, conv: nnx.Conv, seen: list[tuple[int, ...]]):
        self.conv, self.seen = conv, seen

    def __call__(self, x: Any) -> Any:
        self.seen.append(x.shape)
        return self.conv(x)


def _periods(model: nnx.Module, input_shape: tuple[int, ...]) -> dict[Path, Periods | None]:
    """The convolutions that could be prepared, and their tiles where that is cheaper."""
    watched = nnx.clone(model)
    seen: dict[Path, list[tuple[int, ...]]] = {}
    for path, conv in list(nnx.iter_modules(watched)):
        if isinstance(conv, nnx.Conv) and _could_be_prepared(conv):
            put(watched, path, _Watched(conv, seen.setdefault(path, [])))
    x = jax.ShapeDtypeStruct(input_shape, jnp.float32)
    jax.eval_shape(lambda x: watched(x), x)
    tilings = {path: _tiling(get(model, path), shapes) for path, shapes in seen.items()}
    return {path: tiling and tiling.periods for path, tiling in tilings.items()}


def _could_be_prepared(conv: nnx.Conv) -> bool:
    dilations = (conv.input_dilation, conv.kernel_dilation, conv.strides)
    return (
        type(conv) in (nnx.Conv, FoldedConv)
        and len(conv.kernel_size) == 2
        and not any(np.any(np.asarray(numbers) != 1) for numbers in dilations)
        and not isinstance(conv.padding, str | int)
        and conv.conv_general_dilated is conv_general_dilated
        and conv.feature_group_count <= MANY_GROUPS
        and not 1 < conv.feature_group_count == conv.in_features
    )


def _tiling(conv: nnx.Conv, shapes: list[tuple[int, ...]]) -> Tiling | None:
    """For the largest picture it saw."""
    if not shapes:
        return None
    batch, high, wide, _ = max(shapes, key=math.prod)
    kernel_size, padding = window(conv)
    shape = Shape(
        batch,
        (high, wide),
        conv.in_features,
        conv.out_features,
        kernel_size,
        padding=padding,
        groups=conv.feature_group_count,
    )
    return cheapest_tiling(shape.one_group(), prepared=True)


def described(model: nnx.Module) -> dict[str, Any]:
    """Dotted path → what `optimize_for_inference` put there, as JSON has it; see `rebuild`."""
    found: dict[str, Any] = {}
    for path, module in nnx.iter_modules(model):
        dotted = ".".join(map(str, path))
        if isinstance(module, PreparedConv):
            found[dotted] = {"periods": list(module.periods), "bias": module.use_bias}
        elif isinstance(module, FoldedConv):
            found[dotted] = {"bias": True}
        elif isinstance(module, Identity):
            found[dotted] = {}
    return found


def rebuild(model: nnx.Module, changes: Mapping[str, Any]) -> None:
    """Puts into `model`, which may hold shapes alone, the modules that `described` told of.

    Raises:
        ValueError: there is no convolution, or no norm, where one should be.
    """
    for dotted, change in changes.items():
        path = tuple(dotted.split("."))
        old = get(model, path)
        wanted = nnx.Conv if change else BatchNorm
        if not isinstance(old, wanted):
            raise ValueError(f"{dotted} is no {wanted.__name__}")
        put(model, path, nnx.eval_shape(lambda old=old, change=change: _made(old, change)))


def _made(old: Any, change: Mapping[str, Any]) -> nnx.Module:
    if not change:
        return Identity()
    conv = _like(old) if change["bias"] else old
    if "periods" not in change:
        return conv
    first, second = change["periods"]
    return PreparedConv.like(conv, (first, second))


def get(model: Any, path: Sequence[Any]) -> Any:
    """The module at `path`; None where there is none."""
    for part in path:
        model = getattr(model, str(part), None)
    return model


def put(model: Any, path: Sequence[Any], module: Any) -> None:
    setattr(get(model, path[:-1]), str(path[-1]), module)
