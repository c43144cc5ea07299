"""`gam-flax maps`: a figure of each photograph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from gam_flax.convert.checkpoint import read_checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.files import check_free
from gam_flax.convert.saved import load_checkpoint, picture_settings
from gam_flax.train.run_folder import names_in

if TYPE_CHECKING:
    from gam_flax.maps.photograph import Photograph

Option = typer.Option


def maps(
    images: Annotated[list[Path], typer.Argument(help="Photographs.")],
    checkpoint: Annotated[
        Path, Option(help="A model that `save` wrote, or the folder of a training run.")
    ],
    out: Annotated[Path, Option(help="Folder for the figures.")] = Path("attention-maps"),
    block: Annotated[
        list[str] | None,
        Option(
            help="Path of a block to draw, or 'all'; default: the last of each size of the picture."
        ),
    ] = None,
    side: Annotated[
        int | None, Option(min=1, help="Pixels that the network is to see; default: its usual.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace files that exist.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """What the attention did to photographs: gates and activations of each, as one figure."""
    from gam_flax.maps.photograph import draw_attention_maps

    console = Console(soft_wrap=True, stderr=as_json)
    figures = _figures(images, out, force=force)
    opened = read_checkpoint(names_in(checkpoint).best if checkpoint.is_dir() else checkpoint)
    model, settings = load_checkpoint(opened), picture_settings(opened.metadata, opened.path)
    settings |= {"side": side} if side else {}
    out.mkdir(parents=True, exist_ok=True)
    said = []
    quiet = not console.is_terminal or len(images) == 1
    for image, figure in track(
        list(zip(images, figures, strict=True)), "drawing", console=console, disable=quiet
    ):
        try:
            seen = draw_attention_maps(
                model, image, figure, blocks=_blocks(block), force=force, **settings
            )
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{opened.path}: {shorten(error, 300)}") from error
        said.append(_as_json(seen, image, figure))
        if not as_json:
            likeliest = "".join(f", {name} {p:.1%}" for name, p in seen.likeliest(1))
            console.print(f"{shorten(image)}{likeliest}: {figure}", markup=False, highlight=False)
    if as_json:
        print(json.dumps(said))


def _blocks(words: list[str] | None) -> Any:
    if not words:
        return "last"
    return "all" if words == ["all"] else words


def _figures(images: list[Path], out: Path, *, force: bool) -> list[Path]:
    """Where each photograph's figure goes, each free."""
    figures: dict[Path, Path] = {}
    for image in images:
        figure = out / f"{image.stem}.png"
        if figure in figures:
            raise CheckpointError(
                f"{shorten(image)} and {shorten(figures[figure])} would both become "
                f"{shorten(figure)}; draw them into two folders (--out)"
            )
        figures[figure] = image
        check_free(figure, force=force)
    return list(figures)


def _as_json(seen: Photograph, image: Path, figure: Path) -> dict[str, Any]:
    blocks = [
        {
            "path": attention.path,
            "kind": attention.kind,
            "shape": list(attention.before.shape[1:]),
            "channel_gate": _numbers(attention.channel),
            "spatial_gate": None if attention.spatial is None else _numbers(attention.spatial),
            "rms_before": _rms(attention.before),
            "rms_after": _rms(attention.after),
        }
        for attention in seen.maps
    ]
    prediction = [{"class": name, "probability": p} for name, p in seen.likeliest(5)]
    return {"image": str(image), "figure": str(figure), "prediction": prediction, "blocks": blocks}


def _numbers(gate: np.ndarray) -> dict[str, float]:
    return {name: float(getattr(gate, name)()) for name in ("mean", "std", "min", "max")}


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))
