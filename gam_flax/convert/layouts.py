"""How attention blocks are stored in the checkpoints that circulate: the table of layouts.

A layout maps the layers of a block, as some code names them, to the canonical names, and says
which variants its weights could mean. Two layouts that share their names are told apart by the
shapes of the tensors, see `describe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gam_flax.attention.variants import BAM_VARIANTS, CBAM_VARIANTS, GAM_VARIANTS, SE_VARIANTS

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a block's tensors by their canonical keys."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "bam": BAM_VARIANTS,
    "cbam": CBAM_VARIANTS,
    "gam": GAM_VARIANTS,
    "se": SE_VARIANTS,
}

UNSEEN: dict[str, dict[str, Any]] = {
    "bam": {"combine": "product"},
    "cbam": {"concat": "max_mean"},
    "gam": {"channel_gate": "identity", "shuffle": None, "padding_mode": "zeros"},
    "se": {"gate": "sigmoid"},
}
"""The constructor arguments that no weight shows, with their defaults: what a variant decides."""


def behaviour(kind: str, variant: str) -> dict[str, Any]:
    """What `variant` says about the arguments that no weight shows."""
    options = VARIANTS[kind][variant]
    return {name: options.get(name, default) for name, default in UNSEEN[kind].items()}


class Mismatch(Exception):
    """The names are a layout's, the shapes are not; the text says which."""


@dataclass(frozen=True)
class Layout:
    """One way in which a block is stored.

    kind: "gam", "cbam", "se" or "bam".
    name: what the layout is called in reports, for GAM the letter of its family.
    layers: path of each layer inside the block → canonical path.
    variants: what the weights could mean, given the names alone.
    describe: canonical shapes → constructor arguments; raises Mismatch.
    distinctive: whether the names alone claim to be this kind of block, so that other shapes
        under them are worth a word.
    """

    kind: str
    name: str
    layers: Mapping[str, str]
    variants: tuple[str, ...]
    describe: Callable[[Shapes], dict[str, Any]]
    distinctive: bool = True


def _expect(shapes: Shapes, key: str, *allowed: tuple[int, ...]) -> None:
    if shapes[key] not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise Mismatch(f"{key} is {shapes[key]} where {wanted} fits the other weights")


def _has_bias(shapes: Shapes, *layers: str) -> bool:
    """Whether the layers have biases: all of them, or none."""
    with_bias = [layer for layer in layers if f"{layer}.bias" in shapes]
    if with_bias and len(with_bias) < len(layers):
        without = next(layer for layer in layers if layer not in with_bias)
        raise Mismatch(f"{with_bias[0]} has a bias and {without} has none")
    return bool(with_bias)


def ratio_of(channels: int, hidden: int) -> float:
    """A ratio r with int(channels / r) == hidden; an integer where there is one."""
    for ratio in (channels // hidden, channels / hidden):
        if int(channels / ratio) == hidden:
            return ratio
    return channels / (hidden + 0.5)


def _bottleneck(shapes: Shapes, fc1: str, fc2: str) -> tuple[int, int, str]:
    """Channels, hidden channels and form, "linear" or "conv", of a two-layer perceptron."""
    first = shapes[f"{fc1}.weight"]
    if len(first) not in (2, 4) or first[2:] not in ((), (1, 1)) or 0 in first:
        raise Mismatch(f"{fc1}.weight is {first}, neither linear (m, C) nor 1×1 (m, C, 1, 1)")
    hidden, channels = first[:2]
    _expect(shapes, f"{fc2}.weight", (channels, hidden, *first[2:]))
    return channels, hidden, "conv" if first[2:] else "linear"


def _kernel_size(shapes: Shapes, key: str) -> int:
    shape = shapes[key]
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] % 2 == 0 or 0 in shape:
        raise Mismatch(f"{key} is {shape}, not a square odd 2-D kernel")
    return shape[2]


def _describe_gam(shapes: Shapes) -> dict[str, Any]:
    fc1, fc2 = "channel_attention.fc1", "channel_attention.fc2"
    conv1, conv2 = "spatial_attention.conv1", "spatial_attention.conv2"
    channels, hidden, form = _bottleneck(shapes, fc1, fc2)
    if form != "linear":
        raise Mismatch(f"{fc1}.weight is {shapes[f'{fc1}.weight']}, a convolution, not linear")
    kernel_size = _kernel_size(shapes, f"{conv1}.weight")
    inside = shapes[f"{conv1}.weight"][1]
    groups = channels // inside
    if channels % inside or hidden % groups:
        raise Mismatch(f"{conv1}.weight has {inside} input channels for {channels} channels")
    square = (kernel_size, kernel_size)
    _expect(shapes, f"{conv1}.weight", (hidden, inside, *square))
    _expect(shapes, f"{conv2}.weight", (channels, hidden // groups, *square))
    _expect(shapes, "spatial_attention.norm1.weight", (hidden,))
    _expect(shapes, "spatial_attention.norm2.weight", (channels,))
    return {
        "channels": channels,
        "ratio": ratio_of(channels, hidden),
        "kernel_size": kernel_size,
        "groups": groups,
        "use_bias": _has_bias(shapes, fc1, fc2, conv1, conv2),
    }


def _describe_cbam(shapes: Shapes) -> dict[str, Any]:
    fc1, fc2 = "channel_attention.fc1", "channel_attention.fc2"
    conv, norm = "spatial_attention.conv.weight", "spatial_attention.norm.weight"
    channels, hidden, form = _bottleneck(shapes, fc1, fc2)
    kernel_size = _kernel_size(shapes, conv)
    _expect(shapes, conv, (1, 2, kernel_size, kernel_size))
    if norm in shapes:
        _expect(shapes, norm, (1,))
    return {
        "channels": channels,
        "ratio": ratio_of(channels, hidden),
        "kernel_size": kernel_size,
        "projection": form,
        "use_bias": _has_bias(shapes, fc1, fc2),
        "spatial_norm": norm in shapes,
        "spatial_bias": "spatial_attention.conv.bias" in shapes,
    }


def _describe_se(projection: str) -> Callable[[Shapes], dict[str, Any]]:
    def describe(shapes: Shapes) -> dict[str, Any]:
        channels, hidden, form = _bottleneck(shapes, "fc1", "fc2")
        if form != projection:
            raise Mismatch(f"fc1.weight is {shapes['fc1.weight']}, not {projection}")
        if hidden > channels:
            raise Mismatch(f"{hidden} hidden channels for {channels}: it widens, SE squeezes")
        return {
            "channels": channels,
            "ratio": ratio_of(channels, hidden),
            "projection": form,
            "use_bias": _has_bias(shapes, "fc1", "fc2"),
        }

    return describe


def _describe_bam(shapes: Shapes) -> dict[str, Any]:
    fc1, fc2 = "channel_attention.fc1", "channel_attention.fc2"
    convs = [f"spatial_attention.conv{i}" for i in (1, 2, 3, 4)]
    channels, hidden, form = _bottleneck(shapes, fc1, fc2)
    if form != "linear":
        raise Mismatch(f"{fc1}.weight is a convolution, not linear")
    wanted = ((hidden, channels, 1, 1), (hidden, hidden, 3, 3), (hidden, hidden, 3, 3))
    for conv, shape in zip(convs, (*wanted, (1, hidden, 1, 1)), strict=True):
        _expect(shapes, f"{conv}.weight", shape)
    for norm in ("channel_attention.norm", *(f"spatial_attention.norm{i}" for i in (1, 2, 3))):
        _expect(shapes, f"{norm}.weight", (hidden,))
    return {
        "channels": channels,
        "ratio": ratio_of(channels, hidden),
        "use_bias": _has_bias(shapes, fc1, fc2, *convs),
    }


_GAM = (
    "channel_attention.fc1",
    "channel_attention.fc2",
    "spatial_attention.conv1",
    "spatial_attention.norm1",
    "spatial_attention.conv2",
    "spatial_attention.norm2",
)
_CBAM = (
    "channel_attention.fc1",
    "channel_attention.fc2",
    "spatial_attention.conv",
    "spatial_attention.norm",
)
_BAM = (
    "channel_attention.fc1",
    "channel_attention.norm",
    "channel_attention.fc2",
    "spatial_attention.conv1",
    "spatial_attention.norm1",
    "spatial_attention.conv2",
    "spatial_attention.norm2",
    "spatial_attention.conv3",
    "spatial_attention.norm3",
    "spatial_attention.conv4",
)


def _gam(name: str, variants: tuple[str, ...], layers: str, distinctive: bool = True) -> Layout:
    names = dict(zip(layers.split(), _GAM, strict=True))
    return Layout("gam", name, names, variants, _describe_gam, distinctive)


def _cbam(name: str, variants: tuple[str, ...], layers: str, distinctive: bool = True) -> Layout:
    names = dict(zip(layers.split(), _CBAM, strict=False))
    return Layout("cbam", name, names, variants, _describe_cbam, distinctive)


def _se(name: str, variants: tuple[str, ...], layers: str, projection: str) -> Layout:
    names = dict(zip(layers.split(), ("fc1", "fc2"), strict=True))
    return Layout("se", name, names, variants, _describe_se(projection), distinctive=False)


def _bam(name: str, variants: tuple[str, ...], layers: str, distinctive: bool = True) -> Layout:
    names = dict(zip(layers.split(), _BAM, strict=True))
    return Layout("bam", name, names, variants, _describe_bam, distinctive)


def _short_cbams() -> Iterator[Layout]:
    """The short rewrites of CBAM: no norm, the order of the two maps not to be told."""
    for channel, spatial in (("channel_attention", "spatial_attention"), ("ca", "sa")):
        for fc1, fc2 in (("fc1", "fc2"), ("fc.0", "fc.2"), ("mlp.0", "mlp.2")):
            for conv in ("conv1", "conv"):
                names = f"{channel}.{fc1} {channel}.{fc2} {spatial}.{conv}"
                yield _cbam("short", ("plain", "prose"), names, distinctive=False)


_A = ("reference", "gated", "grouped", "shuffled")

LAYOUTS: tuple[Layout, ...] = (
    _gam(
        "A",
        _A,
        "channel_attention.0 channel_attention.2 spatial_attention.0 spatial_attention.1 "
        "spatial_attention.3 spatial_attention.4",
    ),
    _gam(
        "A, misspelt",
        _A,
        "channels_attnetion.0 channels_attnetion.2 spatial_attention.0 spatial_attention.1 "
        "spatial_attention.3 spatial_attention.4",
    ),
    _gam("D", ("replicate",), "linear1 linear2 conv1 norm1 conv2 norm2", distinctive=False),
    _gam(
        "E",
        ("reference",),
        "channel_attention.fc1 channel_attention.fc2 spatial_attention.conv1 "
        "spatial_attention.bn spatial_attention.conv2 spatial_attention.bn1",
    ),
    _gam("canonical", (*_A, "replicate"), " ".join(_GAM)),
    _cbam(
        "Jongchan",
        ("reference",),
        "ChannelGate.mlp.1 ChannelGate.mlp.3 SpatialGate.spatial.conv SpatialGate.spatial.bn",
    ),
    _cbam(
        "timm",
        ("timm",),
        "channel.fc1 channel.fc2 spatial.conv.conv spatial.conv.bn",
        distinctive=False,
    ),
    _cbam("canonical", ("reference", "timm"), " ".join(_CBAM), distinctive=False),
    *_short_cbams(),
    _bam(
        "Jongchan",
        ("reference",),
        "channel_att.gate_c.gate_c_fc_0 channel_att.gate_c.gate_c_bn_1 "
        "channel_att.gate_c.gate_c_fc_final "
        "spatial_att.gate_s.gate_s_conv_reduce0 spatial_att.gate_s.gate_s_bn_reduce0 "
        "spatial_att.gate_s.gate_s_conv_di_0 spatial_att.gate_s.gate_s_bn_di_0 "
        "spatial_att.gate_s.gate_s_conv_di_1 spatial_att.gate_s.gate_s_bn_di_1 "
        "spatial_att.gate_s.gate_s_conv_final",
    ),
    _bam("canonical", ("reference", "paper"), " ".join(_BAM), distinctive=False),
    _se("moskomule", ("reference",), "fc.0 fc.2", "linear"),
    _se("torchvision", ("torchvision", "mobilenet_v3"), "fc1 fc2", "conv"),
    _se("canonical", ("reference", "mobilenet_v3"), "fc1 fc2", "linear"),
)
