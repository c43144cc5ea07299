"""`gam-flax export`: a saved model as a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.files import check_free

Option = typer.Option


def export(
    source: Annotated[Path, typer.Argument(help="A model that `save` wrote.")],
    destination: Annotated[Path, typer.Argument(help="File to write.")],
    input_shape: Annotated[
        str | None,
        Option(
            help="B,H,W,C; a name is a size that stays open. Default: b and the network's pictures."
        ),
    ] = None,
    platforms: Annotated[str, Option(help="Some of cpu, cuda, rocm, tpu.")] = "cpu,cuda,tpu",
    optimize: Annotated[
        bool, Option("--optimize", help="Fold norms; prepare kernels where this is a CPU.")
    ] = False,
    force: Annotated[bool, Option("--force", help="Replace files that exist.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Write a saved model as one program for several platforms, which jax alone can run."""
    from gam_flax.convert.checkpoint import read_checkpoint
    from gam_flax.convert.saved import load_checkpoint, picture_settings
    from gam_flax.export.program import export_model
    from gam_flax.ops.convolution.choose import USUAL_BATCH
    from gam_flax.optimize import optimize_for_inference
    from gam_flax.preprocess import usual_side

    check_free(destination, force=force)
    checkpoint = read_checkpoint(source)
    model = load_checkpoint(checkpoint)
    told = picture_settings(checkpoint.metadata, checkpoint.path)
    side, channels = told.get("side", usual_side(model)), getattr(model, "in_channels", 3)
    sizes = _sizes(input_shape or f"b,{side},{side},{channels}")
    names = [name.strip() for name in platforms.split(",")]
    try:
        if optimize:
            seen = [size if isinstance(size, int) else USUAL_BATCH for size in sizes]
            model = optimize_for_inference(model, seen)
        export_model(model, sizes, destination, platforms=names, force=force)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{shorten(source)}: cannot be exported with --input-shape "
            f"{','.join(map(str, sizes))} --platforms {shorten(platforms)}: {shorten(error, 200)}"
        ) from error
    size = destination.stat().st_size
    if as_json:
        said = {"path": str(destination), "bytes": size, "platforms": names, "input_shape": sizes}
        print(json.dumps(said))
    else:
        shape = " × ".join(map(str, sizes))
        line = f"{destination}: {size:,} bytes, input {shape}, for {', '.join(names)}"
        Console(soft_wrap=True).print(line, markup=False, highlight=False)


def _sizes(words: str) -> list[int | str]:
    parts = [word.strip() for word in words.split(",")]
    return [int(part) if part.isdigit() else part for part in parts]
