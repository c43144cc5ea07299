"""Why a weight of Flax's is not torch's: it was laid out, named or read otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import permutations

import ml_dtypes
import numpy as np

from gam_flax.convert import leaves
from gam_flax.parity.align import Layouts, flattenings
from gam_flax.parity.glue import channel_order, near

_SHOWN = 4  # channels that a message names


def explain_weight(
    key: str,
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]],
    partners: Mapping[str, str],
    layouts: Layouts,
    pictures: Iterable[tuple[int, ...]],
) -> Iterator[str]:
    """The causes of one weight, the likeliest first.

    Args:
        key: torch's.
        weights: torch key → torch's tensor and Flax's, each in its own layout.
        partners: torch key → Flax path.
        layouts: how torch's tensors become Flax's.
        pictures: (C, H, W) that may have been flattened before a linear layer.
    """
    torch, flax = (array.astype(np.float64) for array in weights[key])
    laid = layouts.leaf(partners[key], torch)
    yield from _of_another(key, flax, weights, partners, layouts)
    turned = partners[key] in layouts.turned
    of_its_own = list(_not_turned(partners[key], torch, laid, flax)) if turned else []
    yield from of_its_own or _axes(torch, laid, flax)
    for order in flattenings(pictures, len(flax) if flax.ndim else 0):
        if laid.shape == flax.shape and near(laid[order], flax):
            yield "flatten order: the rows stand in the order (H, W, C), in torch in (C, H, W)"
    if laid.shape != flax.shape:
        return
    yield from _values(laid, flax)
    if laid.ndim:
        yield from _channels(laid, flax)


def _of_another(
    key: str,
    flax: np.ndarray,
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]],
    partners: Mapping[str, str],
    layouts: Layouts,
) -> Iterator[str]:
    if not np.ptp(flax) if flax.size else True:  # fresh biases and scales are all the same
        return
    for other, (tensor, theirs) in weights.items():
        if other == key or tensor.size != flax.size:
            continue
        laid = layouts.leaf(partners[other], tensor.astype(np.float64))
        if laid.shape == flax.shape and np.array_equal(laid, flax):
            mine = layouts.leaf(partners[key], weights[key][0].astype(np.float64))
            back = theirs.shape == mine.shape and np.array_equal(mine, theirs.astype(np.float64))
            yield f"it has the weights of {other}" + (": the two are swapped" if back else "")


def _not_turned(name: str, torch: np.ndarray, laid: np.ndarray, flax: np.ndarray) -> Iterator[str]:
    """What goes wrong with the kernel of a transposed convolution alone."""
    right = "in Flax it is (*k, in, out) with the space backwards, unless transpose_kernel=True"
    space = tuple(range(laid.ndim - 2))
    for said, wrong in (
        ("the kernel is not flipped", np.flip(laid, space)),
        (
            "transposed kernel: it is laid out for transpose_kernel=True",
            leaves.to_flax_layout(name, torch),
        ),
        ("transposed kernel: input and output channels are exchanged", np.swapaxes(laid, -1, -2)),
    ):
        if wrong.shape == flax.shape and near(wrong, flax):
            yield f"{said}; {right}"
            return


def _axes(torch: np.ndarray, laid: np.ndarray, flax: np.ndarray) -> Iterator[str]:
    """Transposed, reshaped or flipped."""
    space = tuple(range(torch.ndim - 2))
    for axes in permutations(range(torch.ndim)):
        moved = torch.transpose(axes)
        if moved.shape != flax.shape:
            continue
        wrong = f"transposed kernel: torch's axes stand in the order {axes}"
        if near(moved, flax) and not _same(moved, laid):
            yield f"{wrong}, which is wrong"
            return
        if torch.ndim > 2 and near(np.flip(moved, space), flax) and not _same(moved, laid):
            yield f"{wrong} and are flipped, which is wrong"
            return
    if torch.ndim > 1 and torch.size == flax.size:
        for name, array in (("torch's layout", torch), ("the right layout", laid)):
            if near(array.reshape(flax.shape), flax) and not _same(array, flax):
                yield f"reshaped from {name} instead of transposed"
                return
    if laid.ndim > 2 and laid.shape == flax.shape:
        for axes in (space, *((axis,) for axis in space)):
            if near(np.flip(laid, axes), flax):
                yield "the kernel is flipped"
                return


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a, b)


def _values(laid: np.ndarray, flax: np.ndarray) -> Iterator[str]:
    if not flax.any():
        yield "Flax's is all zeros, as if it had not been loaded"
        return
    if flax.size > 1 and (flax == 1).all():
        yield "Flax's is all ones, as if it had not been loaded"
        return
    sizes = np.abs(laid)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            rounded = laid.astype(dtype).astype(laid.dtype)
        if np.array_equal(rounded, flax):
            yield f"rounded to {np.dtype(dtype).name}"
            return
    large = sizes > 1e-6 * sizes.max(initial=0)
    ratio = flax[large] / laid[large]
    if ratio.size > 1 and np.ptp(ratio) <= 1e-6 * abs(ratio[0]):
        yield f"Flax's is {ratio[0]:.6g} × torch's"
    elif near(flax, laid + (flax - laid).flat[0]):
        yield f"Flax's is {(flax - laid).flat[0]:.6g} more than torch's"
    elif laid.size > 1 and near(flax, np.abs(laid)):
        yield "Flax's has lost its signs"
    elif (laid > 0).all() and np.allclose(flax, np.sqrt(laid), rtol=1e-6):
        yield "Flax's is the root of torch's: a deviation instead of a variance"
    elif np.allclose(flax, laid**2, rtol=1e-6, atol=0):
        yield "Flax's is the square of torch's"
    elif (laid != 0).all() and np.allclose(flax, 1 / laid, rtol=1e-6):
        yield "Flax's is 1 / torch's"


def _channels(laid: np.ndarray, flax: np.ndarray) -> Iterator[str]:
    """Single channels that differ, or channels in another order."""
    names = {-1: "output", -2: "input"} if laid.ndim > 1 else {-1: ""}
    for axis, name in names.items():
        rest = tuple(i for i in range(laid.ndim) if i != laid.ndim + axis)
        wrong = np.flatnonzero((laid != flax).any(rest) if rest else laid != flax)
        count = laid.shape[axis]
        if 0 < len(wrong) < count and len(wrong) <= max(1, count // 2):
            shown = ", ".join(map(str, wrong[:_SHOWN])) + (", …" if len(wrong) > _SHOWN else "")
            yield f"only {len(wrong)} of {count} {name} channels differ: {shown}".replace("  ", " ")
            break
    for axis, name in names.items():
        order = channel_order(laid, flax, axis)
        if order is not None and order != sorted(order):
            yield f"the {name} channels stand in another order: {order[:12]}".replace("  ", " ")
            return
