"""Two models, one input: where do they part?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from gam_flax.convert.rename import Rename
from gam_flax.parity.align import Layout, check_names
from gam_flax.parity.judge import DTYPES
from gam_flax.parity.masks import Masks
from gam_flax.parity.optimizers import Optimizer, recipe
from gam_flax.parity.progress import progress_bar
from gam_flax.parity.report import ParityReport

Loss = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""Of torch's output and of Flax's, one number each."""


def compare(
    torch_model: Any,
    flax_model: Any,
    inputs: Shaped[np.ndarray, "B ..."],
    *,
    train: bool = False,
    gradients: bool = True,
    dtype: str = "float64",
    steps: int = 0,
    optimizer: Optimizer = "sgd",
    loss: Loss | None = None,
    rename: Rename = None,
    layout: Mapping[str, Layout] | None = None,
    masks: Masks | None = None,
    multiple: float = 4.0,
    progress: bool = True,
) -> ParityReport:
    """Runs a torch model and a Flax model on the same input and compares all that they compute.

    Stage by stage: parameters and buffers, which are to be equal; the output of every call of
    every layer, each model running freely, and the model's output; the single steps, in which
    Flax's layers are fed with torch's activations, so that errors do not pile up and the guilty
    layer, or what lies before it, stands alone; the loss, Σ output · cotangent (fixed numbers
    between -1 and 1) or your own; its gradients by the input and by every parameter; in training,
    the running statistics; with `steps`, the optimizer's state after one step, the losses, weights
    and statistics of all steps (½ mean (output − target)² with a fixed target, or your loss), and
    the output in evaluation afterwards.

    The first divergence is marked, with its likely causes: experiments that turn torch's numbers
    into Flax's by changing one setting. See docs/parity.md.

    A row agrees when Flax is as near to torch's float64 run as can be asked:

        |Flax − oracle| ≤ multiple · max|torch − oracle| + unit · scale

    where unit is 1e-12 in float64 (torch is the oracle then, so that the first term is 0) and the
    dtype's eps in float32 and bfloat16, and scale the tensor's largest magnitude. Where terms
    cancel, the scale is that of the terms: of a gradient the largest gradient, of an optimizer's
    moment the largest of its name, of a running mean the deviation of its values. A tensor that is
    rounding noise on both sides, as the gradient of a bias before a BatchNorm in training, has
    verdict "noise" and agrees: torch's float64 value is below unit · largest, Flax's below
    unit · largest in float64 and below √unit · largest otherwise. There is no other tolerance. In
    float32 and bfloat16 both errors are the largest over eight runs, seven of them with input and
    weights a few units off, so that a tensor of few numbers is not judged by luck; and a bfloat16
    gradient's unit is √eps, as XLA adds gradients in bfloat16 where torch does in float32.

    Layers and parameters are paired by path, leaves by the table of `gam_flax.convert.leaves`.
    What has no partner is listed in `unmatched`; only a parameter without one is a divergence.
    Arrays of four axes and more are channels last in Flax and channels first in torch; where
    torch itself holds them channels last, around a Linear, the shape tells. For layers and
    parameters axes of length one do not count, for the output they do.

    Both models are run on copies, torch's on the CPU, with their train or eval flags set and
    everything floating cast to `dtype` (Flax's statistics to float32 or wider); the models, jax's
    x64 switch, torch's default dtype and random state are as before afterwards.

    Args:
        torch_model: a `torch.nn.Module`.
        flax_model: an `nnx.Module` or a pair (linen module, variables). A Linen module hears of
            `train` by an argument or field of one of the usual names (train, deterministic, …).
        inputs: (B, H, W, C), (B, features), … as Flax takes it, of any dtype.
        train: compare in training mode.
        gradients: whether to differentiate.
        dtype: "float64", "float32" or "bfloat16".
        steps: of training, after all else agrees so far; 0 for none. Gradients that are noise are
            kept at zero on both sides: Adam would scale them up.
        optimizer: a name of `optimizers.NAMES` ("sgd", "momentum", "nesterov", "adam", "adamw",
            each also with "+clip"), or a pair (parameters → torch optimizer, optax transformation).
        loss: of torch's output and of Flax's, one number each.
        rename: torch's path of a layer → Flax's, a mapping (which also holds for what lies under
            a path, and may name single tensors by their keys) or a function.
        layout: key of a parameter, path of a layer (for its output), or path and " (input)" →
            a function of torch's array that gives Flax's; where the rules do not.
        masks: torch's path of a Dropout, or of another layer with a probability p that multiplies
            by a random mask → what it keeps in training, ones and zeros in Flax's layout, with
            axes of length one broadcast. Both layers then compute x · mask / (1 − p), each with
            its own p, at every call and in every step.
        multiple: how many times torch's own error Flax may be off.
        progress: show a bar while the standard error is a terminal.

    Raises:
        TypeError: models of other kinds.
        ValueError: an unknown dtype; inputs that are not one array with numbers; a name in
            `rename`, `layout` or `masks` that torch's model has not; an output without tensors; a
            torch forward that draws random numbers (Dropout in training without its mask), which
            two frameworks cannot draw alike.
        Exception: whatever the torch forward raises; and the Flax forward, unless a row
            diverges before it, which is then the news: the last row has verdict "raised".
    """
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    if not isinstance(torch_model, torch.nn.Module):
        raise TypeError(f"torch_model must be a torch.nn.Module, got {type(torch_model).__name__}")
    if isinstance(torch_model, torch.jit.ScriptModule) or hasattr(torch_model, "_orig_mod"):
        raise TypeError(
            "torch_model is scripted or compiled, so that its layers cannot be watched: give the "
            "module that it was made of"
        )
    array = one_array(inputs)
    if steps < 0:
        raise ValueError(f"steps must be 0 (no training) or more, got {steps}")
    recipe(optimizer)
    if isinstance(rename, Mapping):
        check_names("rename", rename, torch_model)
    check_names("layout", layout or {}, torch_model)
    from gam_flax.parity.question import Question
    from gam_flax.parity.runs import answer

    question = Question(
        torch_model=torch_model,
        flax_model=flax_model,
        inputs=array,
        train=train,
        gradients=gradients or steps > 0,
        dtype=dtype,
        steps=steps,
        optimizer=optimizer,
        loss=loss or (None, None),
        rename=rename,
        layout=layout or {},
        masks=masks or {},
        multiple=multiple,
    )
    with progress_bar(progress) as bar:
        return answer(question, bar)


def one_array(inputs: Any) -> np.ndarray:
    """The input as an array that a model can be asked of."""
    import torch

    if isinstance(inputs, (tuple, list)) and any(hasattr(item, "shape") for item in inputs):
        raise ValueError(
            f"inputs must be one array, channels last, got a {type(inputs).__name__} of "
            f"{len(inputs)}: wrap both models into ones that take one array apart"
        )
    try:
        array = np.asarray(inputs.detach().cpu() if isinstance(inputs, torch.Tensor) else inputs)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"inputs must be one array, channels last: {error}") from error
    if array.dtype.kind not in "biufV" or array.ndim == 0:
        raise ValueError(f"inputs must be one array of numbers, got {type(inputs).__name__}")
    if not array.size:
        raise ValueError(f"inputs has no numbers in it, its shape is {array.shape}")
    return array


def assert_parity(
    torch_model: Any, flax_model: Any, inputs: Shaped[np.ndarray, "B ..."], **options: Any
) -> ParityReport:
    """`compare`, and an AssertionError that shows the first divergence where there is one.

    Args: as `compare`.

    Raises:
        AssertionError: the models are not the same.
        Exception: as `compare`.
    """
    report = compare(torch_model, flax_model, inputs, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report
