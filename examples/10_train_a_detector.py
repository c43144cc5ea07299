"""A YOLOv5 with GAM, trained in Flax on shapes over photographs; then the same boxes in PyTorch.

    python examples/10_train_a_detector.py            a taste: it finds nothing yet
    python examples/10_train_a_detector.py --full     half an hour on two cores, mAP@0.5 > 0.99

Stop it when you like: the same call goes on where it stopped. On the command line this is
`gam-flax train --data yolo --data-dir runs/shapes --model yolov5n --attention gam …` and
`gam-flax detect`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from PIL import Image
from shapes import CLASSES, write_shapes

import gam_torch
from gam_flax.convert import convert_file, load
from gam_flax.detection import Detector, draw_boxes, mean_average_precision
from gam_flax.detection import non_maximum_suppression as suppression
from gam_flax.train import Settings, fit, read_data
from gam_torch.detection import non_maximum_suppression as suppression_in_torch

LOOSE: dict[str, Any] = {"confidence": 0.001, "iou": 0.6, "multi_label": True, "candidates": 4096}
"""How mAP is measured: with nearly all boxes, for it sees how they are ordered."""


def main() -> None:
    parser = argparse.ArgumentParser(description="A detector with GAM, in Flax and in PyTorch.")
    parser.add_argument("--full", action="store_true", help="1,600 pictures, 24 epochs")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    train, val, side, epochs = (1600, 200, 128, 24) if options.full else (16, 8, 64, 1)

    # 1. Pictures and labels, as they lie in any folder for YOLO.
    place = write_shapes(options.out / f"shapes_{train}", train=train, val=val, side=side)

    # 2. Trained: the smallest network, with GAM before SPPF as most forks have it.
    settings = Settings(
        "yolo",
        str(place),
        side=side,
        model="yolov5n",
        attention="gam",
        epochs=epochs,
        batch_size=min(32, train // 2),
        optimizer="adamw",
        learning_rate=0.003,
        warmup=0.04 * epochs,
        ema=0.995 if options.full else None,
    )
    run = options.out / f"detector_{train}"
    fit(settings, run, workers=1 if options.full else 0)

    # 3. Written as a PyTorch file, which the twin loads; the same test pictures through both.
    model: Any = load(run / "best.safetensors")
    model.eval()
    convert_file(run / "best.safetensors", run / "best.pt", to="torch", force=True)
    twin = gam_torch.YOLOv5("yolov5n", attention="gam", num_classes=len(CLASSES)).eval()
    twin.load_state_dict(torch.load(run / "best.pt", weights_only=True)["state_dict"])
    pictures = read_data("yolo", place, side=side).test
    ours, theirs = [], []
    forward = nnx.jit(lambda model, x: suppression(model.decode(model(x)), **LOOSE))
    for i in range(len(pictures)):
        element = pictures[i]
        x = element["image"][None].astype(np.float32) / 255
        truth = element["boxes"] * np.array([1, side, side, side, side])
        found = jax.device_get(forward(model, x))
        ours.append({name: part[0] for name, part in found._asdict().items()} | {"truth": truth})
        with torch.no_grad():
            y = twin.decode(twin(torch.tensor(x).permute(0, 3, 1, 2)))
            seen = suppression_in_torch(y, **LOOSE)
        parts = {name: part[0].numpy() for name, part in seen._asdict().items()}
        theirs.append(parts | {"truth": truth})
    for name, found in (("Flax", ours), ("PyTorch", theirs)):
        told = mean_average_precision(found)
        print(f"{name}: mAP@0.5 {told['map50']:.4f}, mAP@0.5:0.95 {told['map50_95']:.4f}")

    # 4. Boxes on test pictures.
    detector = Detector(model, side=side)
    some = [pictures[i]["image"] for i in range(8)]
    sheet = Image.new("RGB", (4 * 320, 2 * 320))
    for i, (pixels, found) in enumerate(zip(some, detector(some), strict=True)):
        large = found._replace(boxes=found.boxes * 320 / side)
        drawn = draw_boxes(Image.fromarray(pixels).resize((320, 320)), large, CLASSES)
        sheet.paste(drawn, (i % 4 * 320, i // 4 * 320))
    sheet.save(run / "detections.png")
    print(f"boxes on test pictures: {run / 'detections.png'}")


if __name__ == "__main__":
    main()
