"""The blocks as other people's code has them, written from the descriptions in docs/families.md.

They are the independent truth: nothing here uses gam_torch.
"""

from __future__ import annotations

import torch
from torch import nn


def shuffle(x: torch.Tensor, groups: int = 4) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class WildGAM(nn.Module):
    """Families A, B, C, C0 and F: two `Sequential`s."""

    def __init__(self, c, rate=4, *, gated=False, group=False, shuffled=None):
        super().__init__()
        m, groups = c // rate, rate if group else 1
        self.gated, self.shuffled = gated, shuffled
        self.channel_attention = nn.Sequential(nn.Linear(c, m), nn.ReLU(), nn.Linear(m, c))
        self.spatial_attention = nn.Sequential(
            nn.Conv2d(c, m, 7, padding=3, groups=groups),
            nn.BatchNorm2d(m),
            nn.ReLU(),
            nn.Conv2d(m, c, 7, padding=3, groups=groups),
            nn.BatchNorm2d(c),
        )

    def forward(self, x):
        gate = self.channel_attention(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x * (gate.sigmoid() if self.gated else gate)
        if self.shuffled == "features":
            x = shuffle(x)
        gate = self.spatial_attention(x).sigmoid()
        return x * (shuffle(gate) if self.shuffled == "gate" else gate)


class WildReplicate(nn.Module):
    """Family D."""

    def __init__(self, c, rate=4):
        super().__init__()
        m = c // rate
        self.linear1, self.linear2 = nn.Linear(c, m), nn.Linear(m, c)
        self.conv1 = nn.Conv2d(c, m, 7, padding=3, padding_mode="replicate")
        self.conv2 = nn.Conv2d(m, c, 7, padding=3, padding_mode="replicate")
        self.norm1, self.norm2 = nn.BatchNorm2d(m), nn.BatchNorm2d(c)

    def forward(self, x):
        gate = self.linear2(self.linear1(x.permute(0, 2, 3, 1)).relu()).permute(0, 3, 1, 2)
        x = x * gate
        return x * self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).sigmoid()


class WildSeed(nn.Module):
    """Family E: `bn` is the first norm, `bn1` the second."""

    def __init__(self, c, ratio=4):
        super().__init__()
        m = c // ratio
        self.channel_attention = nn.Module()
        self.channel_attention.fc1 = nn.Linear(c, m)
        self.channel_attention.fc2 = nn.Linear(m, c)
        self.spatial_attention = nn.Module()
        self.spatial_attention.conv1 = nn.Conv2d(c, m, 7, padding=3)
        self.spatial_attention.bn = nn.BatchNorm2d(m)
        self.spatial_attention.conv2 = nn.Conv2d(m, c, 7, padding=3)
        self.spatial_attention.bn1 = nn.BatchNorm2d(c)

    def forward(self, x):
        ch, sp = self.channel_attention, self.spatial_attention
        x = x * ch.fc2(ch.fc1(x.permute(0, 2, 3, 1)).relu()).permute(0, 3, 1, 2)
        return x * sp.bn1(sp.conv2(sp.bn(sp.conv1(x)).relu())).sigmoid()


class WildCBAM(nn.Module):
    """Jongchan/attention-module: max first, BatchNorm behind the spatial convolution."""

    def __init__(self, c, r=4):
        super().__init__()
        self.ChannelGate = nn.Module()
        self.ChannelGate.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(c, c // r), nn.ReLU(), nn.Linear(c // r, c)
        )
        self.SpatialGate = nn.Module()
        self.SpatialGate.spatial = nn.Module()
        self.SpatialGate.spatial.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.SpatialGate.spatial.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x):
        mlp, spatial = self.ChannelGate.mlp, self.SpatialGate.spatial
        avg = x.mean((2, 3), keepdim=True)
        peak = x.amax((2, 3), keepdim=True)
        x = x * (mlp(avg) + mlp(peak)).sigmoid()[:, :, None, None]
        maps = torch.cat((x.max(1)[0].unsqueeze(1), x.mean(1).unsqueeze(1)), dim=1)
        return x * spatial.bn(spatial.conv(maps)).sigmoid()


class WildTimmCBAM(nn.Module):
    """timm: 1×1 convolutions, mean first."""

    def __init__(self, c, r=4):
        super().__init__()
        self.channel = nn.Module()
        self.channel.fc1 = nn.Conv2d(c, c // r, 1, bias=False)
        self.channel.fc2 = nn.Conv2d(c // r, c, 1, bias=False)
        self.spatial = nn.Module()
        self.spatial.conv = nn.Module()
        self.spatial.conv.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.spatial.conv.bn = nn.BatchNorm2d(1)

    def forward(self, x):
        ch, sp = self.channel, self.spatial.conv
        avg = ch.fc2(ch.fc1(x.mean((2, 3), keepdim=True)).relu())
        peak = ch.fc2(ch.fc1(x.amax((2, 3), keepdim=True)).relu())
        x = x * (avg + peak).sigmoid()
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * sp.bn(sp.conv(maps)).sigmoid()


class WildShortCBAM(nn.Module):
    """The short rewrites: `ca` and `sa`, no norm."""

    def __init__(self, c, r=4, *, mean_first=True):
        super().__init__()
        self.mean_first = mean_first
        self.ca, self.sa = nn.Module(), nn.Module()
        self.ca.fc = nn.Sequential(
            nn.Conv2d(c, c // r, 1, bias=False), nn.ReLU(), nn.Conv2d(c // r, c, 1, bias=False)
        )
        self.sa.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        fc = self.ca.fc
        x = x * (fc(x.mean((2, 3), keepdim=True)) + fc(x.amax((2, 3), keepdim=True))).sigmoid()
        maps = [x.mean(1, keepdim=True), x.amax(1, keepdim=True)]
        return x * self.sa.conv1(torch.cat(maps if self.mean_first else maps[::-1], 1)).sigmoid()


class WildSE(nn.Module):
    """moskomule/senet.pytorch."""

    def __init__(self, c, r=4):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(c, c // r, bias=False), nn.ReLU(), nn.Linear(c // r, c, bias=False)
        )

    def forward(self, x):
        return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]


class WildConvSE(nn.Module):
    """torchvision's SqueezeExcitation; MobileNetV3 gives it a hard sigmoid."""

    def __init__(self, c, r=4, *, hard=False):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(c, c // r, 1), nn.Conv2d(c // r, c, 1)
        self.gate = nn.Hardsigmoid() if hard else nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()))


class WildBAM(nn.Module):
    """Jongchan/attention-module: the product of both gates under one sigmoid."""

    def __init__(self, c, r=4):
        super().__init__()
        m = c // r
        channel, spatial = nn.Sequential(), nn.Sequential()
        channel.add_module("gate_c_fc_0", nn.Linear(c, m))
        channel.add_module("gate_c_bn_1", nn.BatchNorm1d(m))
        channel.add_module("gate_c_relu_1", nn.ReLU())
        channel.add_module("gate_c_fc_final", nn.Linear(m, c))
        spatial.add_module("gate_s_conv_reduce0", nn.Conv2d(c, m, 1))
        spatial.add_module("gate_s_bn_reduce0", nn.BatchNorm2d(m))
        spatial.add_module("gate_s_relu_reduce0", nn.ReLU())
        for i in range(2):
            spatial.add_module(f"gate_s_conv_di_{i}", nn.Conv2d(m, m, 3, padding=4, dilation=4))
            spatial.add_module(f"gate_s_bn_di_{i}", nn.BatchNorm2d(m))
            spatial.add_module(f"gate_s_relu_di_{i}", nn.ReLU())
        spatial.add_module("gate_s_conv_final", nn.Conv2d(m, 1, 1))
        self.channel_att, self.spatial_att = nn.Module(), nn.Module()
        self.channel_att.gate_c, self.spatial_att.gate_s = channel, spatial

    def forward(self, x):
        channel = self.channel_att.gate_c(x.mean((2, 3)))[:, :, None, None]
        return x * (1 + (channel * self.spatial_att.gate_s(x)).sigmoid())


class UltralyticsCBAM(nn.Module):
    """A look-alike that is to be refused."""

    def __init__(self, c):
        super().__init__()
        self.channel_attention, self.spatial_attention = nn.Module(), nn.Module()
        self.channel_attention.fc = nn.Conv2d(c, c, 1)
        self.spatial_attention.cv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, norms and running statistics that are nobody's initial values; eval mode, double."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dtype.is_floating_point:
            noise = torch.randn(tensor.shape, generator=generator) * 0.3
            with torch.no_grad():
                tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise)
        else:
            tensor.fill_(17)
    return module.double().eval()
