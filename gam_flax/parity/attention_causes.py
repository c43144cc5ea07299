"""Attention between known tensors: heads, scale, axis of the softmax, mask, order and merging."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, permutations

import numpy as np

from gam_flax.parity.families import Family, Problem, Settings, Trial

_HEADS = 64  # no network has more
_LATEST = 4  # of these tensors queries, keys and values are three
_SLACK = 1e-6  # jax.nn.dot_product_attention takes its softmax in float32, whatever the dtype
_FEW = 4  # queries that settings are tried on first

_SCALES: dict[str, Callable[[int, int], float]] = {
    "scale 1/√d": lambda d, whole: d**-0.5,
    "scale 1/√D": lambda d, whole: whole**-0.5,
    "no scale": lambda d, whole: 1.0,
    "scale 1/d": lambda d, whole: 1 / d,
    "scale √d": lambda d, whole: d**0.5,
}
_AXES = {"softmax over the keys": 3, "softmax over the queries": 2, "softmax over the heads": 1}
_MERGES = {
    "heads merged as (tokens, heads, d)": (0, 2, 1, 3),
    "heads merged without transposing back": (0, 1, 2, 3),
    "heads merged as (tokens, d, heads)": (0, 2, 3, 1),
}
_SPLITS = {
    "split as (3, heads, d)": ((3, "h", "d"), (2, 0, 3, 1, 4)),
    "split as (heads, 3, d)": (("h", 3, "d"), (3, 0, 2, 1, 4)),
    "split as (3, d, heads)": ((3, "d", "h"), (2, 0, 4, 1, 3)),
    "split as (heads, d, 3)": (("h", "d", 3), (4, 0, 2, 1, 3)),
    "split as (d, heads, 3)": (("d", "h", 3), (4, 0, 3, 1, 2)),
}
_SPLITS_OF_ONE = {  # of queries, keys and values that are three layers' outputs
    "heads split as (heads, d)": True,
    "heads split as (d, heads)": False,
}
_ROLES = ("queries", "keys", "values")

Mask = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(rows, columns) of the logits → whether a number is masked."""


def _causal(shift: int) -> Mask:
    return lambda row, column: column >= row + shift


_MASKS: dict[str, tuple[Mask, str, float]] = {  # what, and how it is laid on
    "no mask": (lambda row, column: (column < 0) & (row < 0), "fill", -np.inf),
    "a causal mask": (_causal(1), "fill", -np.inf),
    "a causal mask that shows the next token": (_causal(2), "fill", -np.inf),
    "a causal mask that hides the token itself": (_causal(0), "fill", -np.inf),
    "the causal mask the wrong way round": (lambda row, column: column < row, "fill", -np.inf),
    "what is visible masked and the rest seen": (lambda r, c: c <= r, "fill", -np.inf),
    "a causal mask of −10 instead of −∞": (_causal(1), "fill", -10.0),
    "a causal mask of −10 added": (_causal(1), "add", -10.0),
    "a causal mask added as zeros and ones": (lambda r, c: c <= r, "add", 1.0),
    "a causal mask of zeros": (_causal(1), "fill", 0.0),
    "a causal mask after the softmax": (_causal(1), "after", 0.0),
}


def attentions(problem: Problem) -> Iterator[Family]:
    """Attention of a fused layer's output, or of those of three, that gives such a tensor."""
    sought = problem.torch.shape
    if len(sought) != 3 or problem.beside:  # a layer is given all of it, and nothing else
        return
    latest = [*problem.known.items()][::-1]
    for name, tensor in latest:
        if tensor.shape == (*sought[:2], 3 * sought[2]):
            yield _family(f"attention of {name}", [tensor], _ROLES, sought)
    single = [(n, t) for n, t in latest if t.ndim == 3 and t.shape[::2] == sought[::2]][:_LATEST]
    for three in combinations(single, 3):
        names, tensors = zip(*three[::-1], strict=True)
        said = f"attention of {', '.join(names)}"
        yield _family(said, list(tensors), names, sought)


def _family(
    noun: str, tensors: list[np.ndarray], names: Sequence[str], sought: tuple[int, ...]
) -> Family:
    batch, tokens, width = sought
    heads = [h for h in range(1, min(width, _HEADS) + 1) if width % h == 0]
    orders = [_order(names, order) for order in permutations(range(3))]
    choices = {
        "heads": [_heads(h) for h in heads],
        "scale": [*_SCALES],
        "mask": [*_MASKS],
        "order": orders,
        "split": [*(_SPLITS if len(tensors) == 1 else _SPLITS_OF_ONE)],
        "axis": [*_AXES],
        "merge": [*_MERGES],
    }
    tried = {
        "scale": [*_SCALES][:3],
        "mask": [*_MASKS][:2],
        "order": orders if len(tensors) == 3 else orders[:1],
        "axis": [*_AXES][:1],
        "merge": [*_MERGES][:1],
    }
    make = partial(_attention, tensors, dict(zip(orders, permutations(range(3)), strict=True)))
    cost = batch * tokens * max(t.shape[1] for t in tensors) * width * 2.0
    few = cost * min(1.0, _FEW / tokens)
    return Family(noun, choices, make, cost, few, tried, ("heads",), _SLACK)


def _heads(count: int) -> str:
    return f"{count} heads" if count > 1 else "1 head"


def _order(names: Sequence[str], order: tuple[int, ...]) -> str:
    """Which stands where: "q, k, v from …"."""
    if names is _ROLES:
        return f"the order {', '.join(names[i] for i in order)}"
    return ", ".join(f"{names[i]} as {role}" for i, role in zip(order, _ROLES, strict=True))


def _attention(
    tensors: list[np.ndarray],
    orders: dict[str, tuple[int, ...]],
    settings: Settings,
    few: bool,
) -> Trial:
    """softmax(q kᵀ · scale + mask) v, or the rows of a few queries alone."""
    heads = int(settings["heads"].split()[0])
    parts = _parts(tensors, settings["split"], heads)
    order = orders[settings["order"]]
    if len(tensors) == 1:
        # Part i of the layer's output is what `order` says: its inverse is wanted.
        order = tuple(np.argsort(order))
    q, k, v = (parts[i] for i in order)
    batch, heads, tokens, d = q.shape
    rows = np.arange(tokens)
    axis, merge = _AXES[settings["axis"]], _MERGES[settings["merge"]]
    if few and axis == 3 and merge[1] == 2:  # each row of the outcome is one query's
        rows = np.unique(np.linspace(0, tokens - 1, _FEW).astype(int))
    logits = q[:, :, rows] @ k.swapaxes(2, 3) * _SCALES[settings["scale"]](d, d * heads)
    weights = _weighed(logits, rows, settings["mask"], axis)
    outcome = (weights @ v).transpose(merge).reshape(batch, len(rows), heads * d)
    return (slice(None), rows), outcome


def _parts(tensors: list[np.ndarray], split: str, heads: int) -> list[np.ndarray]:
    """Queries, keys and values, (B, heads, tokens, d) each."""
    if len(tensors) == 1:
        (fused,), (lengths, axes) = tensors, _SPLITS[split]
        sizes = {"h": heads, "d": fused.shape[2] // 3 // heads, 3: 3}
        return [*fused.reshape(*fused.shape[:2], *(sizes[n] for n in lengths)).transpose(axes)]
    if _SPLITS_OF_ONE[split]:
        return [t.reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3) for t in tensors]
    return [t.reshape(*t.shape[:2], -1, heads).transpose(0, 3, 1, 2) for t in tensors]


def _weighed(logits: np.ndarray, rows: np.ndarray, mask: str, axis: int) -> np.ndarray:
    """The masked softmax."""
    masked, how, value = _MASKS[mask]
    hidden = masked(rows[:, None], np.arange(logits.shape[3]))
    if how == "fill":
        logits = np.where(hidden, value, logits)
    elif how == "add":
        logits = logits + value * hidden
    weights = np.exp(logits - logits.max(axis, keepdims=True))
    weights = weights / weights.sum(axis, keepdims=True)
    return np.where(hidden, 0.0, weights) if how == "after" else weights
