"""A model made ready for inference: norms folded into convolutions, kernels transformed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gam_flax.ops.batch_norm import BatchNorm
from gam_flax.ops.convolution.choose import Preparation, Shape, preparations
from gam_flax.ops.convolution.convolve import MANY_GROUPS, conv_general_dilated
from gam_flax.ops.convolution.prepared import PreparedConv, window
from gam_flax.ops.sequential import Sequential

Path = tuple[Any, ...]
Periods = tuple[int, int]


class Identity(nnx.Module):
    """What stands where a norm was."""

    def __call__(self, x: Any) -> Any:
        return x


class FoldedConv(nnx.Conv):
    """A convolution with the norm after it in its kernel and its bias."""


USUAL_MEMORY = 350e6
"""Bytes that spectra may take by default. A process that runs ResNet-50 with GAM then takes about
twice what torch takes."""


def optimize_for_inference(
    model: nnx.Module,
    input_shape: Sequence[int] | None = None,
    *,
    memory: float = USUAL_MEMORY,
) -> nnx.Module:
    """A copy of `model` that answers the same in evaluation, sooner; `model` stays as it is.

    1. Each BatchNorm right after a convolution is folded into it,

            kernel · γ / √(var + eps),      (bias − mean) · γ / √(var + eps) + β,

       in `Sequential` and where a module of `gam_flax` says in `NORMS` which norm follows which
       convolution.
    2. On a CPU, each convolution that is cheaper in the Fourier domain keeps the spectrum of its
       kernel in the kernel's stead, see `gam_flax.ops.convolution`: for a 7 × 7 kernel three to
       twenty times the numbers. What is cheaper depends on the pictures' size. `memory` goes
       first where it saves most time a byte.

    The copy is for evaluation alone. It is saved, loaded, jitted and exported as any model.

    Args:
        model: any NNX module.
        input_shape: (B, H, W, C) of what it will see most; it still takes others. None leaves
            out the second step.
        memory: bytes that the spectra may take. `math.inf` is the fastest, 0 prepares nothing;
            docs/speed.md has what a network gains for how much.

    Raises:
        ValueError: `model` takes no input of that shape.
    """
    model = nnx.clone(model)
    model.eval()
    ready: dict[Path, Periods | None] = {}
    if input_shape is not None and jax.default_backend() == "cpu":
        ready = _spent_best(_choices(model, tuple(input_shape)), memory)
    norms = dict(_followed(model))
    # One after the other, so that not all kernels are there twice.
    for path in dict.fromkeys([*norms, *ready]):
        conv = get(model, path)
        if path in norms:
            conv = _folded(conv, get(model, norms[path]))
            put(model, norms[path], Identity())
        periods = ready.get(path)
        put(model, path, conv if periods is None else PreparedConv.of(conv, periods))
    return model


def _spent_best(
    choices: Mapping[Path, list[Preparation]], memory: float
) -> dict[Path, Periods | None]:
    """One of the choices each; again and again what saves most seconds a byte more."""
    taken = {path: some[0] for path, some in choices.items()}
    while True:
        better = [
            ((taken[path].seconds - one.seconds) / max(1, one.bytes - taken[path].bytes), path, one)
            for path, some in choices.items()
            for one in some
            if one.seconds < taken[path].seconds and one.bytes - taken[path].bytes <= memory
        ]
        if not better:
            return {path: one.periods for path, one in taken.items()}
        _, path, one = max(better, key=lambda found: found[0])
        memory -= one.bytes - taken[path].bytes
        taken[path] = one


def _followed(model: nnx.Module) -> Iterator[tuple[Path, Path]]:
    """The paths of each convolution that a norm follows, and of the norm."""
    for path, module in nnx.iter_modules(model):
        names = [str(i) for i in range(len(module))] if isinstance(module, Sequential) else []
        pairs = [*zip(names, names[1:], strict=False), *getattr(module, "NORMS", {}).items()]
        for conv, norm in pairs:
            if isinstance(getattr(module, conv), nnx.Conv) and isinstance(
                getattr(module, norm), BatchNorm
            ):
                yield (*path, conv), (*path, norm)


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
    """Stands for a layer while shapes are traced, and notes what it was given."""

    def __init__(self, layer: Any, seen: list[tuple[int, ...]]):
        self.layer, self.seen = layer, seen

    def __call__(self, x: Any) -> Any:
        self.seen.append(x.shape)
        return self.layer(x)


def shapes_given(
    model: nnx.Module, wanted: Callable[[nnx.Module], bool], input_shape: tuple[int, ...]
) -> dict[Path, list[tuple[int, ...]]]:
    """The shapes that each of the wanted layers is given, once for each call, in evaluation."""
    watched = nnx.clone(model)
    watched.eval()
    seen: dict[Path, list[tuple[int, ...]]] = {}
    for path, layer in list(nnx.iter_modules(watched)):
        if wanted(layer):
            put(watched, path, _Watched(layer, seen.setdefault(path, [])))
    jax.eval_shape(lambda x: watched(x), jax.ShapeDtypeStruct(input_shape, jnp.float32))
    return seen


def _choices(model: nnx.Module, input_shape: tuple[int, ...]) -> dict[Path, list[Preparation]]:
    """The convolutions that could be prepared, and how; first as they are."""
    seen = shapes_given(model, _could_be_prepared, input_shape)
    return {path: _preparations(get(model, path), some) for path, some in seen.items() if some}


def _could_be_prepared(conv: nnx.Module) -> bool:
    if not isinstance(conv, nnx.Conv):
        return False
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


def _preparations(conv: nnx.Conv, shapes: list[tuple[int, ...]]) -> list[Preparation]:
    """For the largest picture it saw."""
    return preparations(shape_of(conv, max(shapes, key=math.prod)))


def shape_of(conv: nnx.Conv, given: tuple[int, ...]) -> Shape:
    """What the choice depends on, of a convolution of stride 1 that is given such pictures."""
    batch, high, wide, _ = given
    kernel_size, padding = window(conv)
    features, groups = (conv.in_features, conv.out_features), conv.feature_group_count
    return Shape(batch, (high, wide), *features, kernel_size, padding=padding, groups=groups)


def described(model: nnx.Module) -> dict[str, Any]:
    """Dotted path → what `optimize_for_inference` put there, as JSON has it; see `rebuild`."""
    found: dict[str, Any] = {}
    for path, module in nnx.iter_modules(model):
        dotted = ".".join(map(str, path))
        if isinstance(module, PreparedConv):
            found[dotted] = {"periods": list(module.periods), "bias": module.use_bias}
        elif isinstance(module, Identity):
            found[dotted] = {}
        elif isinstance(module, FoldedConv):
            found[dotted] = {"folded": True}
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
        put(model, path, _made(old, change))


def _made(old: Any, change: Mapping[str, Any]) -> nnx.Module:
    if not change:
        return Identity()
    if change.get("folded") or change.get("bias"):
        old = nnx.eval_shape(lambda: _like(old))
    if "periods" in change:
        first, second = change["periods"]
        return nnx.eval_shape(lambda: PreparedConv.like(old, (first, second)))
    return old


def get(model: Any, path: Sequence[Any]) -> Any:
    """The module at `path`; None where there is none."""
    for part in path:
        model = getattr(model, str(part), None)
    return model


def put(model: Any, path: Sequence[Any], module: Any) -> None:
    setattr(get(model, path[:-1]), str(path[-1]), module)
