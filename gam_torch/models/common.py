"""What the networks share: how an attention block is chosen and placed, and what a stage is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import nn

from gam_torch.attention.common import check_choice
from gam_torch.attention.identity import start_as_identity
from gam_torch.attention.registry import create_attention

Attention = str | Callable[..., nn.Module] | None
"""A name of `list_attentions()`, a factory called with the channels, or None."""

Attend = Callable[[int], nn.Module | None]
"""What a network gives to its blocks: the attention block for so many channels, or None."""

AttentionAt = Literal["blocks"] | Sequence[int]
"""In every block, or after these stages, counted from 1."""


class Stage(NamedTuple):
    """One of the outputs of `stage_outputs`: its channels, and how many pixels of the picture lie
    between two of its own, a side."""

    channels: int
    stride: int


def attends(
    attention: Attention,
    options: Mapping[str, Any] | None,
    *,
    identity_start: bool,
) -> Attend:
    """How a network builds its attention blocks. GAM is the paper's, gated and with ratio 16, but
    for what `options` say."""

    def attend(channels: int) -> nn.Module | None:
        if attention is None:
            return None
        arguments = {**({"variant": "paper"} if attention == "gam" else {}), **(options or {})}
        make = attention if callable(attention) else partial(create_attention, attention)
        block = make(channels, **arguments)
        return start_as_identity(block) if identity_start else block

    return attend


def attends_not(channels: int) -> None:
    """An `Attend` that builds none."""


def stages_with_attention(attention_at: AttentionAt, count: int) -> tuple[int, ...]:
    """The stages that a block follows, of `count`; none where every block has one inside.

    Raises:
        ValueError: a stage that does not exist.
    """
    after = () if attention_at == "blocks" else tuple(attention_at)
    for stage in after:
        check_choice("attention_at", stage, range(1, count + 1))
    return after


def check_classes(num_classes: int) -> None:
    """Raises ValueError for a negative number of classes."""
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no head) or more, got {num_classes}")
