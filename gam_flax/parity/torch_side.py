"""A torch model, run on a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any
from weakref import ref

import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.torch_file import to_numpy
from gam_flax.parity.align import Layout, OutputLayout
from gam_flax.parity.masks import REFUSED
from gam_flax.parity.trace import (
    Calls,
    Fed,
    See,
    Trace,
    channels_first,
    channels_last,
    cotangent,
    lean,
    results,
    unlaid,
    wide,
)


def as_picture(part: str, array: np.ndarray) -> Layout:
    """The layout of outputs that are pictures, or have no space."""
    return channels_last


def weights(model: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters and buffers as they are, in torch's names, layout and dtypes."""
    parameters = {key: to_numpy(tensor, key) for key, tensor in model.named_parameters()}
    buffers = {key: to_numpy(tensor, key) for key, tensor in model.named_buffers()}
    return parameters, buffers


def transposed_convolutions(model: Any) -> list[str]:
    """The keys of the weights of a model's transposed convolutions."""
    from torch import nn

    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    modules = model.named_modules()
    return [leaves.join(path, "weight") for path, module in modules if isinstance(module, kinds)]


def run(
    model: Any,
    x: np.ndarray,
    factors: Mapping[str, float],
    *,
    dtype: str,
    rounded_to: str,
    train: bool,
    gradients: bool,
    loss: Callable[[Any], Any] | None = None,
    fed: Trace | None = None,
    lay: OutputLayout = as_picture,
    see: See | None = None,
    tell: Callable[[str], None] = lambda path: None,
) -> Trace:
    """One forward, and one backward where `gradients` are wanted, of a copy of `model` on the CPU.

    Weights and input are rounded to `rounded_to` and computed with in `dtype`. The random state
    is put back.

    Args:
        x: (B, *space, C).
        factors: what parameters and buffers are multiplied with before they are rounded.
        loss: of the output; None for Σ output · cotangent.
        fed: the run whose activations every layer is given instead of its own; the gradients are
            then those at these activations.
        lay: how the model's outputs are laid out for Flax.
        see: takes what the layers are given and give, as it comes; the trace then has none of it.
        tell: hears the path of each layer.

    Raises:
        ValueError: the forward draws random numbers.
    """
    import torch

    def cast(tensor: Any) -> Any:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(getattr(torch, rounded_to)).to(getattr(torch, dtype))

    copy = deepcopy(model).to("cpu", torch.float64).train(train).requires_grad_(False)
    for key, tensor in [*copy.named_parameters(), *copy.named_buffers()]:
        if key in factors and tensor.is_floating_point():
            tensor.mul_(factors[key])
    copy = copy.to(getattr(torch, rounded_to)).to(getattr(torch, dtype))
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    pixels = cast(torch.from_numpy(channels_first(x).copy()))
    pixels.requires_grad_(gradients and pixels.is_floating_point())

    keep = _Copies() if see is None else _view
    calls = Calls(keep, see=see, tell=tell)
    if fed is not None:
        calls = Fed(fed.inputs, fed.layers, _adopt, keep, see=see, tell=tell)
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        _watch(copy, calls, _refuse_draws(torch.get_rng_state()))
        try:
            output = copy(pixels.clone())  # which the model may write over
        except RuntimeError as error:
            error.add_note(_what_was_given(x, pixels, dtype))
            raise
    outputs = dict(results(output))
    if not outputs:
        raise ValueError(
            f"the torch model returns a {type(output).__name__}, in which no tensor is found: "
            "wrap it into a module that returns tensors, in tuples, dictionaries or dataclasses"
        )
    arrays = {part: _numpy(tensor) for part, tensor in outputs.items()}
    trace = Trace(
        inputs=calls.inputs,
        layers=calls.outputs,
        order=calls.order,
        outputs={part: lay(part, array)(array) for part, array in arrays.items()},
        statistics={key: _numpy(tensor) for key, tensor in copy.named_buffers()},
    )
    if gradients:
        roots = _weighed(output, lay) if loss is None else [(loss(output), torch.tensor(1.0))]
        _backward(copy, pixels, roots, trace)
    return trace


def _what_was_given(x: np.ndarray, pixels: Any, dtype: str) -> str:
    """For whoever gave channels first, or integers to a model of floating numbers."""
    moved = f"moved to torch's order, {tuple(pixels.shape)}, " if pixels.ndim >= 4 else ""
    return (
        f"inputs of shape {x.shape}, taken as channels last, were {moved}given to the torch model "
        f"as {pixels.dtype}; its weights are in {dtype} (dtype=)"
    )


def _adopt(array: np.ndarray, own: Any) -> Any:
    """`array` as a tensor in place of `own`, where that can be."""
    import torch

    if not own.is_floating_point() or tuple(own.shape) != array.shape:
        return own
    given = torch.from_numpy(np.array(array, np.float64)).to(own.dtype)
    return given + (own - own.detach()) if own.requires_grad else given  # 0, with a gradient


def _watch(model: Any, calls: Calls, check: Callable[[str], None]) -> None:
    """Takes the calls of all layers through `calls`; `check` is called around each with the layer
    that was just running."""
    for path, module in model.named_modules():
        module.register_forward_pre_hook(partial(_enter, calls, check, path))
        module.register_forward_hook(partial(_leave, calls, check, path))


def _enter(calls: Calls, check: Callable[[str], None], path: str, module: Any, args: Any) -> Any:
    check(path.rpartition(".")[0])
    return calls.enter(path, args) if path else None


def _leave(
    calls: Calls, check: Callable[[str], None], path: str, module: Any, args: Any, output: Any
) -> Any:
    check(path)
    return calls.leave(path, output) if path else None


def _refuse_draws(start: Any) -> Callable[[str], None]:
    """A check that torch's random state is still `start`."""
    import torch

    def check(path: str) -> None:
        if not torch.equal(torch.get_rng_state(), start):
            raise ValueError(f"{path or 'the torch model'} {REFUSED}")

    return check


def _weighed(output: Any, lay: OutputLayout) -> list[tuple[Any, Any]]:
    """Each tensor of the output that has a gradient, and its cotangent."""
    import torch

    pairs = []
    for part, tensor in results(output):
        if tensor.requires_grad:
            weights = like_output(part, tensor.detach(), lay)
            pairs.append((tensor, torch.from_numpy(weights)))
    return pairs


def like_output(part: str, tensor: Any, lay: OutputLayout) -> np.ndarray:
    """The cotangent of an output, whose numbers stand where Flax has them, in torch's layout.

    Raises:
        ValueError: the user's layout of the output does more than to move numbers.
    """
    array = _numpy(tensor)
    layout = lay(part, array)
    found = unlaid(layout, cotangent(part, layout(array).shape), array.shape)
    if found is None:
        raise ValueError(
            f"layout= of the output {part!r} must only move its numbers, to be differentiated"
        )
    return found


def _backward(model: Any, pixels: Any, roots: list[tuple[Any, Any]], trace: Trace) -> None:
    """Fills in the loss, Σ root · weight, and its gradients."""
    import torch

    wanted = {key: p for key, p in model.named_parameters() if p.requires_grad}
    leaves = [*wanted.values(), *([pixels] if pixels.requires_grad else [])]
    found: tuple[Any, ...] = (None,) * len(leaves)
    if roots and leaves:
        weights = [weight.to(root.dtype) for root, weight in roots]
        tops = [root for root, _ in roots]
        terms = [_numpy((t * w).sum()) for t, w in zip(tops, weights, strict=True)]
        trace.loss = np.asarray(sum(terms))
        found = torch.autograd.grad(tops, leaves, weights, allow_unused=True)
    arrays = [
        np.zeros(tuple(leaf.shape)) if gradient is None else _view(gradient)
        for leaf, gradient in zip(leaves, found, strict=True)
    ]
    trace.gradients = dict(zip(wanted, arrays, strict=False))
    if pixels.requires_grad:
        trace.input_gradient = channels_last(arrays[-1])


class _Copies:
    """Tensors as arrays of their own, for torch may write over the original later; one that comes
    again unchanged is the same array."""

    def __init__(self):
        self._made: dict[int, tuple[Any, int, np.ndarray]] = {}

    def __call__(self, tensor: Any) -> np.ndarray:
        alive, version, array = self._made.get(id(tensor), (lambda: None, 0, None))
        if alive() is tensor and version == tensor._version and array is not None:
            return array
        array = _view(tensor).copy()
        self._made[id(tensor)] = ref(tensor), tensor._version, array
        return array


def _view(tensor: Any) -> np.ndarray:
    return lean(to_numpy(tensor, "an output"))


def _numpy(tensor: Any) -> np.ndarray:
    """A copy in float64 or complex128: torch may write over the original later."""
    return wide(to_numpy(tensor, "an output")).copy()
