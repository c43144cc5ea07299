"""What the networks share: how an attention block is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from gam_torch.attention.registry import create_attention

Attention = str | Callable[..., nn.Module] | None
"""A name of `list_attentions()`, a factory called with the channels, or None."""


def build_attention(
    attention: Attention, channels: int, options: Mapping[str, Any]
) -> nn.Module | None:
    """The block for `channels`, or None. GAM without options is the paper's: gated, ratio 16."""
    if attention is None:
        return None
    if callable(attention):
        return attention(channels, **options)
    if attention == "gam" and not options:
        options = {"variant": "paper"}
    return create_attention(attention, channels, **options)
