"""A model as a file that runs without this package: `jax.export`, for several platforms at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export
from jax.typing import DTypeLike

from gam_flax.attention.common import check_choice
from gam_flax.convert.files import check_free, whole_file

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_model(
    model: nnx.Module | Callable[[Any], Any],
    input_shape: Sequence[int | str],
    path: str | os.PathLike,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    dtype: DTypeLike = jnp.float32,
    force: bool = False,
) -> None:
    """Writes `model` in evaluation, weights included, as one program for several platforms.

        export_model(model, ("b", 224, 224, 3), "model.jax_export")

        from pathlib import Path                            # elsewhere, with jax alone:
        from jax import export
        model = export.deserialize(bytearray(Path("model.jax_export").read_bytes()))
        logits = model.call(pictures)                       # any number of them

    No machine of a platform is needed to export for it. Each platform computes a convolution in
    its own way: a CPU by the algorithm that `gam_flax.ops.convolution` chooses, with eight
    pictures in mind where the batch is open; the others by their libraries. That holds for a
    model of `optimize_for_inference` too.

    Args:
        model: any NNX module of one array, exported in evaluation; it stays as it is. Or any
            function of one array, exported as it is: for Linen
            `lambda x: module.apply(variables, x)`.
        input_shape: (B, H, W, C). A name instead of a number is a size that is open until the
            call: "b" for the batch, and as a rule only there, since algorithms are chosen by the
            sizes of pictures.
        path: of the file, some 4 bytes a parameter.
        platforms: some of cpu, cuda, rocm and tpu.
        dtype: of the input.
        force: replace `path` where it exists.

    Raises:
        ValueError: an unknown platform; what `model` raises on an input of that shape.
        CheckpointError: `path` exists, or cannot be written.
        ModuleNotFoundError: the extra `export` is not installed.
    """
    check_free(path, force=force)
    for platform in platforms:
        check_choice("platforms", platform, PLATFORMS)
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.eval()
    shape = export.symbolic_shape(", ".join(map(str, input_shape)))
    x = jax.ShapeDtypeStruct(shape, dtype)
    exported = export.export(jax.jit(lambda x: model(x)), platforms=platforms)(x)
    program = exported.serialize()
    with whole_file(path, force=force) as part:
        part.write_bytes(program)
