"""Experiments on one torch layer: what would it return, were one of its settings another?

A cause is named only where the changed layer returns what Flax's does. Everything runs in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

Experiment = tuple[str, Callable[[Any], Any], Any]
"""What is changed, the layer as it then is, and its input. It may raise when called."""

EPS = (1e-3, 1e-6, 1e-5, 1e-12, 1e-8, 1e-7, 1e-4, 1e-2, 0.0)


def experiments(layer: nn.Module, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    """Every experiment that fits the kind of `layer`, on its input `x`.

    Args:
        flax: the Flax layer, whose own settings are tried first; None where it is not known.
    """
    from torch import nn

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    kinds: list[tuple[tuple[type, ...], Callable[..., Iterator[Experiment]]]] = [
        (convolutions, _convolution),
        ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed_convolution),
        ((nn.Linear,), _linear),
        (batch_norms, _batch_norm),
        ((*batch_norms, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d), _norm),
        ((nn.GroupNorm,), _group_norm),
        ((nn.LayerNorm,), _layer_norm),
        ((nn.MaxPool2d, nn.AvgPool2d), _pool),
        ((nn.Upsample,), _upsample),
        ((nn.Softmax, nn.LogSoftmax), _softmax),
        ((nn.Embedding,), _embedding),
    ]
    for types, of_kind in kinds:
        if isinstance(layer, types):
            yield from of_kind(layer, x, flax)
    if getattr(layer, "bias", None) is not None:
        yield "no bias is added", _changed(layer, bias=None), x
        if isinstance(layer, (*convolutions, nn.Linear)):
            twice = _with(layer, "bias", lambda bias: 2 * bias)
            yield "the bias is added twice", twice, x
    if isinstance(layer, (*convolutions, nn.Linear)):
        for name in ("bfloat16", "float16", "float32"):
            yield f"it computes in {name}", partial(_rounded, layer, name), x


def functions() -> dict[str, Callable[[Any], Any]]:
    """Activations and what else stands between layers, of one tensor."""
    import torch
    import torch.nn.functional as F

    return {
        "relu": F.relu,
        "gelu (exact)": F.gelu,
        "gelu (tanh approximation)": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu6": F.relu6,
        "hard sigmoid": F.hardsigmoid,
        "hard swish": F.hardswish,
        "leaky relu (slope 0.01)": F.leaky_relu,
        "leaky relu (slope 0.1)": lambda x: F.leaky_relu(x, 0.1),
        "leaky relu (slope 0.2)": lambda x: F.leaky_relu(x, 0.2),
        "leaky relu (slope 0.3)": lambda x: F.leaky_relu(x, 0.3),
        "elu": F.elu,
        "selu": F.selu,
        "celu": F.celu,
        "softplus": F.softplus,
        "mish": F.mish,
        "softsign": F.softsign,
        "log sigmoid": F.logsigmoid,
        "exp": torch.exp,
        "square": torch.square,
        "absolute value": torch.abs,
        "sin": torch.sin,
        "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "softmax over the channels": lambda x: torch.softmax(x, 1 if x.ndim > 1 else 0),
        "softmax over the last axis": lambda x: torch.softmax(x, -1),
        "log softmax over the channels": lambda x: torch.log_softmax(x, 1 if x.ndim > 1 else 0),
        "sign change": torch.neg,
    }


def _changed(layer: nn.Module, **settings: Any) -> nn.Module:
    """A copy of `layer` with other settings."""
    copy = deepcopy(layer)
    for name, value in settings.items():
        setattr(copy, name, value)
    return copy


def _with(layer: nn.Module, name: str, change: Callable[[Any], Any]) -> nn.Module:
    """A copy of `layer` with another tensor."""
    import torch

    copy = deepcopy(layer)
    with torch.no_grad():
        new = change(getattr(copy, name)).contiguous()
    setattr(copy, name, torch.nn.Parameter(new, requires_grad=False))
    return copy


def _rounded(layer: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    import torch

    dtype = getattr(torch, name)
    return deepcopy(layer).to(dtype)(x.to(dtype)).to(x.dtype)


def _convolution(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    import torch

    space = tuple(range(2, x.ndim))
    plain = _changed(layer, padding=(0,) * len(space), padding_mode="zeros")
    setattr(plain, "_reversed_padding_repeated_twice", [0, 0] * len(space))  # noqa: B010
    yield (
        f"padding 'SAME' at stride {layer.stride[0]}",
        plain,
        same_padding(x, layer.kernel_size, layer.stride, layer.dilation),
    )
    yield "padding 'VALID', none at all", plain, x
    half = [size // 2 for size in layer.kernel_size for _ in (0, 1)][::-1]
    yield "padding of half the kernel", plain, torch.nn.functional.pad(x, half)
    for shift in (-1, 1):
        sides = [max(0, p + shift) for p in _sides(layer) for _ in (0, 1)][::-1]
        yield f"padding of {sides[0]} a side", plain, torch.nn.functional.pad(x, sides)
    for mode, name in (
        ("replicate", "replicate"),
        ("reflect", "reflect"),
        ("circular", "circular"),
    ):
        if layer.padding_mode != mode and any(_sides(layer)):
            sides = [p for p in _sides(layer) for _ in (0, 1)][::-1]
            if max(sides) < min(x.shape[2:]):
                yield f"padding mode {name}", plain, torch.nn.functional.pad(x, sides, mode=mode)
    if layer.padding_mode != "zeros":
        sides = [p for p in _sides(layer) for _ in (0, 1)][::-1]
        yield "padding with zeros", plain, torch.nn.functional.pad(x, sides)
    if any(d != 1 for d in layer.dilation):
        flat = _changed(layer, dilation=(1,) * len(space))
        yield "dilation 1, padding as it is", flat, x
        flat = _changed(plain, dilation=(1,) * len(space))
        yield "dilation 1", flat, torch.nn.functional.pad(x, half)
    for stride in (1, 2):
        if any(s != stride for s in layer.stride):
            yield f"stride {stride}", _changed(layer, stride=(stride,) * len(space)), x
    yield "the kernel is flipped", _with(layer, "weight", lambda w: w.flip(space)), x
    if len(space) == 2:
        turned = _with(layer, "weight", lambda w: w.transpose(2, 3))
        yield "height and width of the kernel are exchanged", turned, x
    if layer.weight.shape[0] == layer.weight.shape[1]:
        exchanged = _with(layer, "weight", lambda w: w.transpose(0, 1))
        yield "input and output channels of the kernel are exchanged", exchanged, x
    if layer.groups > 1:
        yield "the groups take other channels (interleaved)", layer, _shuffled(x, layer.groups)
        for parts in dict.fromkeys((layer.groups, layer.out_channels // layer.groups)):
            shuffled = partial(_then_shuffled, layer, parts)
            yield f"the output's channels are shuffled, in {parts} groups", shuffled, x


def _sides(layer: Any) -> tuple[int, ...]:
    return layer.padding if isinstance(layer.padding, tuple) else (0,) * len(layer.kernel_size)


def same_padding(x: Any, kernel_size: Any, stride: Any, dilation: Any, fill: float = 0.0) -> Any:
    """`x` padded as XLA pads for 'SAME': an odd pixel goes to the end."""
    import torch

    sides: list[int] = []
    sizes = [_tuple(size, x.ndim - 2) for size in (kernel_size, stride, dilation)]
    for length, k, s, d in zip(x.shape[2:], *sizes, strict=True):
        total = max((math.ceil(length / s) - 1) * s + (k - 1) * d + 1 - length, 0)
        sides = [total // 2, total - total // 2, *sides]
    return torch.nn.functional.pad(x, sides, value=fill)


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,) * length


def _then_shuffled(layer: Any, groups: int, x: Any) -> Any:
    return _shuffled(layer(x), groups)


def _shuffled(x: Any, groups: int) -> Any:
    import torch.nn.functional as F

    return F.channel_shuffle(x, groups) if x.shape[1] % groups == 0 else x


def _transposed_convolution(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    space = tuple(range(2, x.ndim))
    yield "the kernel is flipped", _with(layer, "weight", lambda w: w.flip(space)), x
    if layer.weight.shape[0] == layer.weight.shape[1]:
        exchanged = _with(layer, "weight", lambda w: w.transpose(0, 1))
        yield "input and output channels of the kernel are exchanged", exchanged, x
        both = _with(exchanged, "weight", lambda w: w.flip(space))
        yield "the kernel is flipped, its input and output channels exchanged", both, x
    for name, same in (("'SAME'", True), ("'VALID'", False)):
        padded = [
            _transposed_padding(k, s, d, same=same)
            for k, s, d in zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ]
        yield f"padding {name}", partial(_cropped, layer, padded), x
    literal = [(p, p) for p in layer.padding]
    what = "padding counted as Flax counts it: torch's p is dilation · (kernel − 1) − p there"
    yield what, partial(_cropped, layer, literal), x
    for padding in range(max(layer.kernel_size)):
        if any(p != padding for p in layer.padding):
            yield f"padding {padding}", _changed(layer, padding=(padding,) * len(space)), x
    for stride in (1, 2):
        if any(s != stride for s in layer.stride):
            yield f"stride {stride}", _changed(layer, stride=(stride,) * len(space)), x
    if any(d != 1 for d in layer.dilation):
        yield "dilation 1", _changed(layer, dilation=(1,) * len(space)), x
    for extra in range(max(layer.stride)):
        if any(p != extra for p in layer.output_padding):
            other = _changed(layer, output_padding=(extra,) * len(space))
            yield f"output padding {extra}", other, x


def _transposed_padding(size: int, stride: int, dilation: int, *, same: bool) -> tuple[int, int]:
    """What `jax.lax.conv_transpose` adds before and after one axis of the dilated input, for
    'SAME' or for 'VALID'."""
    k = (size - 1) * dilation + 1
    if same:
        total = k + stride - 2
        before = k - 1 if stride > k - 1 else -(-total // 2)
    else:
        total = k + stride - 2 + max(k - stride, 0)
        before = k - 1
    return before, total - before


def _cropped(layer: Any, padded: list[tuple[int, int]], x: Any) -> Any:
    """The layer with Flax's `padded` zeros on each side of its input, made of the whole outcome."""
    import torch

    none = (0,) * len(layer.kernel_size)
    whole = _changed(layer, padding=none, output_padding=none, bias=None)(x)
    sides: list[int] = []
    reaches = ((k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    for (before, after), reach in zip(padded, reaches, strict=True):
        sides = [before - reach, after - reach, *sides]
    y = torch.nn.functional.pad(whole, sides)
    return y if layer.bias is None else y + layer.bias.reshape(-1, *(1,) * len(none))


def _linear(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    if layer.in_features == layer.out_features:
        yield "the kernel is transposed", _with(layer, "weight", lambda w: w.T), x


def _norm(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    own = getattr(flax, "epsilon", getattr(flax, "eps", None))
    for eps in dict.fromkeys([own, *EPS]):
        if isinstance(eps, float) and eps != layer.eps:
            yield f"eps {eps:g}, in torch {layer.eps:g}", _changed(layer, eps=eps), x
    if layer.weight is not None:
        import torch

        unit = _with(layer, "weight", torch.ones_like)
        yield "no scale is applied", unit, x
        yield "the scale is 1 + weight", _with(layer, "weight", lambda w: 1 + w), x
        if layer.bias is not None:
            yield "neither scale nor bias is applied", _with(unit, "bias", torch.zeros_like), x
    axes = (0, *range(2, x.ndim))
    for name, over in (
        ("over the batch and the pixels, as BatchNorm", axes),
        ("over the pixels of each channel, as InstanceNorm", tuple(range(2, x.ndim))),
        ("over the channels of each pixel, as LayerNorm", (1,)),
        ("over the last axis", (x.ndim - 1,)),
        ("over the whole picture", tuple(range(1, x.ndim))),
    ):
        if over:
            yield f"the mean and variance are {name}", partial(_affine, layer, over, 0), x
    yield "the variance is unbiased, n / (n − 1)", partial(_affine, layer, axes, 1), x
    yield "the mean is not taken off (RMSNorm)", partial(_root_mean_square, layer), x


def _affine(layer: Any, axes: tuple[int, ...], less: int, x: Any) -> Any:
    """(x − mean) / √(var + eps) · weight + bias, var = Σ (x − mean)² / (n − less) over `axes`."""
    mean = x.mean(axes, keepdim=True)
    count = math.prod(x.shape[axis] for axis in axes)
    variance = ((x - mean) ** 2).sum(axes, keepdim=True) / max(count - less, 1)
    return _scaled(layer, (x - mean) / (variance + layer.eps) ** 0.5)


def _root_mean_square(layer: Any, x: Any) -> Any:
    shape = getattr(layer, "normalized_shape", None)
    axes = tuple(range(-len(shape), 0)) if shape else (1,)
    return _scaled(layer, x / ((x**2).mean(axes, keepdim=True) + layer.eps) ** 0.5)


def _scaled(layer: Any, y: Any) -> Any:
    shape = getattr(layer, "normalized_shape", None)
    if layer.weight is None:
        return y
    view = tuple(shape) if shape else (-1, *(1,) * (y.ndim - 2))
    y = y * layer.weight.reshape(view)
    return y if layer.bias is None else y + layer.bias.reshape(view)


def _batch_norm(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    if layer.running_mean is not None and layer.training:
        yield "it normalizes with the running statistics (evaluation)", _changed(layer).eval(), x
    elif x.numel() > x.shape[1]:
        yield "it normalizes with the batch's statistics (training)", _changed(layer).train(), x
    if layer.running_mean is not None and not layer.training:
        square = _changed(layer, running_var=layer.running_var**2)
        yield "the running variance is taken for a standard deviation", square, x
        root = _changed(layer, running_var=layer.running_var**0.5)
        yield "the root of the running variance is taken twice", root, x


def _group_norm(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    channels = layer.num_channels
    for groups in range(1, channels + 1):
        if channels % groups == 0 and groups != layer.num_groups:
            yield f"{groups} groups", _changed(layer, num_groups=groups), x


def _layer_norm(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    yield "divided by (std + eps), the deviation unbiased", partial(_by_deviation, layer), x


def _by_deviation(layer: Any, x: Any) -> Any:
    centred = x - x.mean(-1, keepdim=True)
    return _scaled(layer, centred / (x.std(-1, keepdim=True) + layer.eps))


def _pool(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    import torch

    maximum = isinstance(layer, torch.nn.MaxPool2d)
    fill = -math.inf if maximum else 0.0
    plain = _changed(layer, padding=0, ceil_mode=False)
    if not (maximum and _tuple(layer.dilation, 2) != (1, 1)):
        yield "padding 'SAME'", plain, same_padding(x, layer.kernel_size, layer.stride, 1, fill)
    yield "padding 'VALID', none at all", plain, x
    yield f"ceil_mode {not layer.ceil_mode}", _changed(layer, ceil_mode=not layer.ceil_mode), x
    if maximum:
        p = _tuple(layer.padding, 2)
        sides = [p[1], p[1], p[0], p[0]]
        yield "the padding is of zeros, which may win", plain, torch.nn.functional.pad(x, sides)
    else:
        include = not layer.count_include_pad
        yield f"count_include_pad {include}", _changed(layer, count_include_pad=include), x
    other = torch.nn.AvgPool2d if maximum else torch.nn.MaxPool2d
    name = "average" if maximum else "maximum"
    yield f"the {name}", other(layer.kernel_size, layer.stride, layer.padding), x


def _upsample(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    for mode in ("nearest", "bilinear", "bicubic"):
        for corners in (None, True, False):
            if (mode == "nearest") == (corners is None):
                other = _changed(layer, mode=mode, align_corners=corners)
                yield f"mode {mode}, align_corners {corners}", other, x


def _softmax(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    for axis in range(x.ndim):
        yield f"over axis {axis} of torch's layout", _changed(layer, dim=axis), x


def _embedding(layer: Any, x: torch.Tensor, flax: Any) -> Iterator[Experiment]:
    root = layer.embedding_dim**0.5
    scaled = _with(layer, "weight", lambda weight: weight * root)
    yield "the rows are multiplied with the root of their length", scaled, x.long()
