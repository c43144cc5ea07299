"""`gam-flax detect`: boxes on photographs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from gam_flax.convert.checkpoint import read_checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.files import check_free, whole_file
from gam_flax.convert.saved import load_checkpoint, picture_settings

Option = typer.Option

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""Of the pictures in a folder."""


def detect(
    images: Annotated[list[Path], typer.Argument(help="Photographs, or folders of them.")],
    checkpoint: Annotated[
        Path, Option(help="A detector that `save` or `convert` wrote, or a training run's folder.")
    ],
    out: Annotated[Path, Option(help="Folder for the pictures and detections.json.")] = Path(
        "detections"
    ),
    side: Annotated[
        int | None, Option(min=32, help="Pixels that the network is to see; default: its usual.")
    ] = None,
    confidence: Annotated[float, Option(min=0, max=1, help="Of a box, at least.")] = 0.25,
    iou: Annotated[float, Option(min=0, max=1, help="Boxes that share more are one thing.")] = 0.45,
    max_boxes: Annotated[int, Option(min=1, help="Of a picture.")] = 300,
    multi_label: Annotated[
        bool, Option("--multi-label", help="Several classes may have the same box.")
    ] = False,
    agnostic: Annotated[
        bool, Option("--agnostic", help="Boxes of different classes are one thing too.")
    ] = False,
    batch_size: Annotated[int, Option(min=1, help="Pictures at a time.")] = 8,
    force: Annotated[bool, Option("--force", help="Replace files that exist.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """What is where in photographs: boxes drawn on them, and as JSON."""
    from gam_flax.detection.detector import Detector

    console = Console(soft_wrap=True, stderr=as_json)
    pictures = _pictures(images, out, force=force)
    opened = read_checkpoint(_model_in(checkpoint))
    settings = picture_settings(opened.metadata, opened.path)
    classes = settings.pop("classes", None)
    settings |= {"side": side} if side else {}
    try:
        model = load_checkpoint(opened)
        detector = Detector(
            model,
            batch_size=min(batch_size, len(pictures)),
            confidence=confidence,
            iou=iou,
            max_boxes=max_boxes,
            multi_label=multi_label,
            agnostic=agnostic,
            **settings,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{shorten(opened.path)}: {shorten(error, 300)}") from error
    count = int(getattr(model, "num_classes", 0))
    names = classes or [str(i) for i in range(count)]
    if len(names) != count:
        raise CheckpointError(f"{shorten(opened.path)}: {len(names)} names for {count} classes")
    out.mkdir(parents=True, exist_ok=True)
    said = []
    quiet = not console.is_terminal or len(pictures) == 1
    with Progress(console=console, disable=quiet) as bar:
        task = bar.add_task("detecting", total=len(pictures))
        for some in _batches(list(pictures.items()), batch_size):
            for line in _detected(detector, some, names, force=force):
                said.append(line)
                if not as_json:
                    console.print(_told(line), markup=False, highlight=False)
            bar.advance(task, len(some))
    with whole_file(out / "detections.json", force=force) as part:
        part.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(said))


def _model_in(checkpoint: Path) -> Path:
    """The file, or the best of a run's folder."""
    best = checkpoint / "best.safetensors"
    return best if checkpoint.is_dir() and best.exists() else checkpoint


def _pictures(images: Sequence[Path], out: Path, *, force: bool) -> dict[Path, Path]:
    """Each photograph, and where the one with boxes on it goes, which is free."""
    found: dict[Path, Path] = {}
    for image in images:
        inside = [image]
        if image.is_dir():
            inside = sorted(p for p in image.rglob("*") if p.suffix.lower() in ENDINGS)
            if not inside:
                raise CheckpointError(f"{shorten(image)}: has no pictures in it")
        for one in inside:
            target = out / f"{one.stem}.png"
            other = next((p for p, t in found.items() if t == target and p != one), None)
            if other is not None:
                raise CheckpointError(
                    f"{shorten(one)} and {shorten(other)} would both become {shorten(target)}; "
                    "draw them into two folders (--out)"
                )
            if target.resolve() == one.resolve():
                raise CheckpointError(f"{shorten(one)}: would be written over; say another --out")
            check_free(target, force=force)
            found[one] = target
    check_free(out / "detections.json", force=force)
    return found


def _batches(items: list[tuple[Path, Path]], size: int) -> Iterator[list[tuple[Path, Path]]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _detected(
    detector: Any, some: list[tuple[Path, Path]], names: Sequence[str], *, force: bool
) -> Iterator[dict[str, Any]]:
    from PIL import Image

    from gam_flax.detection.drawing import draw_boxes

    pixels = [_read(image) for image, _ in some]
    for (image, target), own, found in zip(some, pixels, detector(pixels), strict=True):
        with whole_file(target, force=force) as part:
            draw_boxes(Image.fromarray(own), found, names).save(part, format="png")
        boxes = [
            {"class": names[int(c)], "score": float(score), "box": [float(x) for x in box]}
            for box, score, c in zip(*found, strict=True)
        ]
        size = [own.shape[1], own.shape[0]]
        yield {"image": str(image), "drawn": str(target), "size": size, "boxes": boxes}


def _read(path: Path) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CheckpointError(
            f"{shorten(path)}: not a readable picture: {shorten(error, 100)}"
        ) from error


def _told(line: dict[str, Any]) -> str:
    counts: dict[str, int] = {}
    for box in line["boxes"]:
        counts[box["class"]] = counts.get(box["class"], 0) + 1
    what = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
    return f"{shorten(line['image'])}: {what}; {shorten(line['drawn'])}"
