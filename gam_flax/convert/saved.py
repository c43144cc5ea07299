"""Flax models out: as PyTorch weights in memory, and as safetensors that know their model."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.checkpoint import Checkpoint, read_checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.files import write_safetensors
from gam_flax.convert.flax_paths import arrays, nnx_modules, nnx_variables, turned_kernels
from gam_flax.convert.into_flax import assign, begin_random_state, load_torch
from gam_flax.convert.source import told_by_attributes

if TYPE_CHECKING:
    from flax import nnx

BUILDERS = (
    "BAM",
    "CBAM",
    "GAM",
    "ChannelAttention",
    "MobileNetV2",
    "ResNet",
    "SpatialAttention",
    "SqueezeExcitation",
    "YOLOv5",
    "create_attention",
    "create_model",
)
"""What a file may name as its constructor: names that both packages have."""

PICTURES: dict[str, Any] = {"mean": int | float, "std": int | float, "classes": str, "side": int}
"""What the metadata of a trained network tell of its pictures: JSON, of these types."""


def to_torch(model_or_variables: Any) -> dict[str, np.ndarray]:
    """The weights under torch's keys and in torch's layout, bit for bit: a state_dict of numpy.

        torch_model.load_state_dict({k: torch.tensor(v) for k, v in to_torch(model).items()})

    bfloat16 comes as `ml_dtypes.bfloat16`, which torch does not read from numpy; `gam-flax
    convert --to torch` writes files of it.

    Running statistics, which Flax keeps in float32 or wider, leave in the dtype of their norm's
    weight where that loses no bit, as after loading a bfloat16 module; the counters leave as
    int64.

    Args:
        model_or_variables: an NNX module or Linen variables, whose transposed convolutions are
            taken to have transpose_kernel=True.
    """
    turned = frozenset()
    if not isinstance(model_or_variables, Mapping):
        turned = turned_kernels(model_or_variables)
    tensors = {
        leaves.torch_name(path): leaves.to_torch_layout(path, array, turned=path in turned)
        for path, array in arrays(model_or_variables).items()
    }
    return {key: np.array(_as_torch_has_it(key, tensors), order="C") for key in tensors}


def _as_torch_has_it(key: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    path, leaf = leaves.split(key)
    array = tensors[key]
    if leaf == "num_batches_tracked":
        return array.astype(np.int64)
    weight = tensors.get(leaves.join(path, "weight"))
    if leaf in ("running_mean", "running_var") and weight is not None:
        with np.errstate(over="ignore"):
            narrow = array.astype(weight.dtype)
        if narrow.astype(array.dtype).tobytes() == array.tobytes():
            return narrow
    return array


def save(
    model: nnx.Module,
    path: str | os.PathLike,
    *,
    force: bool = False,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file with Flax paths; `load` builds the same model from it.

    The metadata hold the constructor and its arguments where the model is one of this package's,
    what no weight shows of each attention block in it, and the norms' eps. A file is written
    whole or not at all.

    Args:
        about: what else the metadata are to hold, such as the mean and deviation that the
            pictures were brought to.

    Raises:
        CheckpointError: `path` exists and `force` is not given, or it cannot be written.
    """
    from gam_flax.ops.batch_norm import BatchNorm
    from gam_flax.optimize import described

    metadata = {**(about or {}), "format": "flax", **constructor(model)}
    said = {
        where: told[1]
        for where, module in nnx_modules(model).items()
        if (told := told_by_attributes(module))
    }
    metadata["behaviour"] = json.dumps(said)
    metadata["norms"] = json.dumps(
        {
            where: {"eps": module.eps, "momentum": module.momentum}
            for where, module in nnx_modules(model).items()
            if isinstance(module, BatchNorm)
        }
    )
    if optimized := described(model):
        metadata["optimized"] = json.dumps(optimized)
    if turned := turned_kernels(model):
        metadata["turned"] = json.dumps(sorted(turned))
    write_safetensors(path, arrays(model), metadata, force=force)


def load(path: str | os.PathLike) -> nnx.Module:
    """The model that `save` or `gam-flax convert` wrote, in training mode as if just built.

    Raises:
        CheckpointError: the file cannot be read, or does not say how its model is built.
    """
    return load_checkpoint(read_checkpoint(path))


def load_checkpoint(checkpoint: Checkpoint) -> nnx.Module:
    """`load`, of a file that was read already."""
    import gam_flax

    model = build(gam_flax, checkpoint.metadata, checkpoint.path)
    if "optimized" in checkpoint.metadata:
        _fill_optimized(model, checkpoint, checkpoint.path)
    else:
        load_torch(model, checkpoint)
    return model


def _fill_optimized(model: nnx.Module, checkpoint: Checkpoint, where: str) -> None:
    """What `optimize_for_inference` made is in no torch model, and is taken as it lies."""
    from gam_flax.optimize import rebuild

    try:
        rebuild(model, json.loads(checkpoint.metadata["optimized"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{where}: its metadata do not say how the model was optimized: {shorten(error, 200)}"
        ) from error
    model.eval()
    wanted = nnx_variables(model)
    for name in sorted({*wanted} ^ {*checkpoint.tensors}):
        state = "is missing" if name in wanted else "has no place in the model"
        raise CheckpointError(f"{where}: {name} {state}; save the optimized model again")
    for name, variable in wanted.items():
        array = checkpoint.tensors[name]
        if array.shape != variable.shape:
            raise CheckpointError(
                f"{where}: {name} is {array.shape}, expected {variable.shape}; save the "
                "optimized model again"
            )
        assign(variable, array)
    begin_random_state(model)


def picture_settings(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """What a checkpoint's metadata tell of the pictures that its network was trained on.

    Those of these that are there: "mean" and "std" of each channel, of pixels scaled to 0 … 1;
    "classes", their names; "side", in pixels.

    Args:
        where: the file's name, for the error.

    Raises:
        CheckpointError: an entry is not what a file of ours has there.
    """
    told: dict[str, Any] = {}
    for name, kind in PICTURES.items():
        if name not in metadata:
            continue
        try:
            found = json.loads(metadata[name])
        except (ValueError, RecursionError):
            found = None
        values = found if isinstance(found, list) else [found]
        if not values or not all(isinstance(value, kind) for value in values):
            raise CheckpointError(f"{shorten(where)}: its metadata entry {name!r} is broken")
        told[name] = values[0] if name == "side" else values
    return told


def constructor(model: Any) -> dict[str, str]:
    """ "build" and "arguments" for the metadata of a file; {} for a model that is not ours, or
    that was given a function as an argument."""
    import gam_flax

    name = type(model).__name__
    if name not in BUILDERS or getattr(gam_flax, name) is not type(model):
        return {}
    names = [n for n in inspect.signature(type(model).__init__).parameters if n != "self"]
    arguments = {n: _plain(getattr(model, n)) for n in names if n != "rngs"}
    if any(callable(value) for value in arguments.values()):
        return {}
    return {"build": name, "arguments": json.dumps(arguments)}


def _plain(value: Any) -> Any:
    """An argument as JSON has it: a dtype by its name, a frozen mapping as a dict."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, type) or hasattr(value, "itemsize"):
        return np.dtype(value).name
    return value


def build(package: Any, metadata: Mapping[str, str], where: str) -> Any:
    """The model that the metadata of a file describe, from `gam_flax` or `gam_torch`.

    In Flax it holds shapes, not yet arrays: the weights are to be loaded.

    Raises:
        CheckpointError: the file does not name a constructor of ours, or its arguments are wrong.
    """
    name = metadata.get("build")
    if name is None:
        raise CheckpointError(
            f"{where}: does not say how its model is built; build it yourself and fill it with "
            "load_torch(model, path)"
        )
    if name not in BUILDERS:
        raise CheckpointError(f"{where}: its metadata ask for {shorten(name)!r}, not a model here")
    try:
        arguments = json.loads(metadata.get("arguments", "{}"))
        make = getattr(package, name)
        if package.__name__ == "gam_torch":
            for only_flax in ("dtype", "param_dtype", "remat"):
                arguments.pop(only_flax, None)
            return make(**arguments)
        return _shapes_of(make, arguments)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: its metadata do not build a {name}: {shorten(error, 200)}"
        ) from error


def _shapes_of(make: Any, arguments: dict[str, Any]) -> nnx.Module:
    import jax.numpy as jnp
    from flax import nnx

    types = {
        name: getattr(jnp, arguments[name])
        for name in ("dtype", "param_dtype")
        if arguments.get(name) is not None
    }
    return nnx.eval_shape(lambda: make(**{**arguments, **types}, rngs=nnx.Rngs(0)))
