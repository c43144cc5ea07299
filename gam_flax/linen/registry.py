"""Linen attention blocks by name."""

from __future__ import annotations

from functools import partial
from typing import Any

from flax import linen as nn

from gam_flax.attention.common import check_choice
from gam_flax.linen.bam import BAM
from gam_flax.linen.cbam import CBAM
from gam_flax.linen.gam import GAM
from gam_flax.linen.se import SqueezeExcitation

ATTENTIONS: dict[str, Any] = {"bam": BAM, "cbam": CBAM, "gam": GAM, "se": SqueezeExcitation}


def list_attentions() -> list[str]:
    """The names that `create_attention` knows."""
    return sorted(ATTENTIONS)


def create_attention(name: str, *, variant: str | None = None, **kwargs: Any) -> nn.Module:
    """Builds an attention block by name; its channels are read from its first input.

    Args:
        name: one of `list_attentions()`.
        variant: one of the block's documented variants; None for its defaults.
        **kwargs: the block's own fields, see its class.

    Raises:
        ValueError: an unknown name or variant.
    """
    check_choice("name", name, list_attentions())
    block = ATTENTIONS[name]
    make = block if variant is None else partial(block.from_variant, variant)
    return make(**kwargs)
