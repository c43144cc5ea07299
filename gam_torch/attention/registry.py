"""Attention blocks by name."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from gam_torch.attention.bam import BAM
from gam_torch.attention.cbam import CBAM
from gam_torch.attention.common import check_choice
from gam_torch.attention.gam import GAM
from gam_torch.attention.se import SqueezeExcitation

ATTENTIONS: dict[str, Any] = {"bam": BAM, "cbam": CBAM, "gam": GAM, "se": SqueezeExcitation}


def list_attentions() -> list[str]:
    """The names that `create_attention` knows."""
    return sorted(ATTENTIONS)


def create_attention(
    name: str, channels: int, *, variant: str | None = None, **kwargs: Any
) -> nn.Module:
    """Builds an attention block by name.

    Args:
        name: one of `list_attentions()`.
        channels: of the input and of the output.
        variant: one of the block's documented variants; None for its defaults.
        **kwargs: the block's own arguments, see its class.

    Raises:
        ValueError: an unknown name or variant, or what the block itself raises.
    """
    check_choice("name", name, list_attentions())
    block = ATTENTIONS[name]
    make = block if variant is None else partial(block.from_variant, variant)
    return make(channels, **kwargs)
