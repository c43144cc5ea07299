"""Train the classifier that ships with this project, in PyTorch, on Fashion-MNIST.

    python examples/09_train_the_shipped_classifier.py      a taste: one epoch of 2,000 images
        --full              the shipped recipe, half an hour on 2 cores
        --full --ship       … and replace gam_flax/assets

The recipe (`--full`): ResNet-8 (stages of 16, 32 and 64 channels, one block each) with a GAM
(reference family, ratio 4, 7×7) after each stage, 212,714 parameters; all 60,000 training images,
shifted by up to two pixels and flipped at random; 12 epochs, batch 128; SGD with Nesterov momentum
0.9, weight decay 5e-4 on matrices and kernels only, one cycle up to a learning rate of 0.2; seed 0.
It stops and resumes: every epoch's end is kept in --run.

The data are the four IDX files, from `apt install dataset-fashion-mnist` or
https://github.com/zalandoresearch/fashion-mnist (MIT licence), in the folder --data.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress, TextColumn

from gam_torch import create_model

ARGUMENTS = {
    "name": "resnet8",
    "attention": "gam",
    "attention_options": {"variant": "reference"},
    "attention_at": [1, 2, 3],
    "in_channels": 1,
    "num_classes": 10,
}
REFERENCE = {"channel_gate": "identity", "shuffle": None, "padding_mode": "zeros"}
MEAN, STD = 0.2860, 0.3530  # of the training pixels, scaled to 0 … 1
CLASSES = [
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
]


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: a type byte, the number of axes, their lengths, the data."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path}: not an IDX file of bytes")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    if not images.exists():
        raise SystemExit(f"{images}: not found; apt install dataset-fashion-mnist, or say --data")
    return read_idx(images), read_idx(labels)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(images[:, None].astype(np.float32)) / 255
    return ((x - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One shift of up to two pixels and one coin's flip for the whole batch."""
    dy, dx, flip = torch.randint(0, 5, (3,), generator=generator).tolist()
    height, width = x.shape[2:]
    x = F.pad(x, (2, 2, 2, 2), value=-MEAN / STD)[:, :, dy : dy + height, dx : dx + width]
    return x.flip(3) if flip % 2 else x


def make_optimizer(model: torch.nn.Module, epochs: int, steps: int):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 5e-4}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, epochs=epochs, steps_per_epoch=steps
    )
    return optimizer, schedule


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    model.eval()
    right = 0
    for i in range(0, len(images), 500):
        predicted = model(to_tensor(images[i : i + 500])).argmax(1).numpy()
        right += int((predicted == labels[i : i + 500]).sum())
    return right / len(images)


def train(train_set, test_set, epochs: int, batch: int, run: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    images, labels = train_set
    model = create_model(**ARGUMENTS)
    for parameter in model.parameters():  # faster convolutions on a CPU
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    steps = len(images) // batch
    optimizer, schedule = make_optimizer(model, epochs, steps)
    generator = torch.Generator().manual_seed(0)
    state = run / "last.pt"
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        generator.set_state(saved["generator"])
        first = saved["epoch"]
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=epochs * steps, note="")
        progress.advance(task, first * steps)
        for epoch in range(first, epochs):
            model.train()
            order = torch.randperm(len(images), generator=generator).numpy()
            for step in range(steps):
                rows = order[step * batch : (step + 1) * batch]
                x = augment(to_tensor(images[rows]), generator)
                y = torch.from_numpy(labels[rows].astype(np.int64))
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, note=f"loss {loss.item():.3f}")
            progress.print(f"epoch {epoch + 1}: test accuracy {accuracy(model, *test_set):.4f}")
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "generator": generator.get_state(),
                "epoch": epoch + 1,
            }
            torch.save(saved, state.with_suffix(".part"))
            os.replace(state.with_suffix(".part"), state)
    return model


def write(folder: Path, model: torch.nn.Module, test_set, test_accuracy: float) -> None:
    """The checkpoint, which names its network, and the first 200 test images."""
    about = {
        "build": "create_model",
        "arguments": json.dumps(ARGUMENTS),
        "behaviour": json.dumps({f"attention{stage}": REFERENCE for stage in (1, 2, 3)}),
        "mean": str(MEAN),
        "std": str(STD),
        "classes": json.dumps(CLASSES),
        "test_accuracy": f"{test_accuracy:.4f}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    torch.save({"state_dict": tensors, "gam_attention": about}, folder / "fashion_gam.pt")
    images, labels = test_set
    np.savez_compressed(folder / "fashion_test_200.npz", images=images[:200], labels=labels[:200])
    print(f"test accuracy {test_accuracy:.4f}; written: {folder / 'fashion_gam.pt'}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the classifier that ships.")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--full", action="store_true", help="the shipped recipe")
    parser.add_argument("--run", type=Path, default=Path("runs/fashion_gam"))
    parser.add_argument("--ship", action="store_true", help="replace the shipped files")
    options = parser.parse_args()
    train_set, test_set = load(options.data, "train"), load(options.data, "t10k")
    epochs = 12 if options.full else 1
    if not options.full:
        train_set = tuple(part[:2000] for part in train_set)
        test_set = tuple(part[:1000] for part in test_set)
    run = options.run / ("full" if options.full else "taste")
    run.mkdir(parents=True, exist_ok=True)
    batch = 128 if options.full else 32
    model = train(train_set, test_set, epochs, batch, run)
    assets = Path(__file__).parents[1] / "gam_flax" / "assets"
    write(assets if options.ship else run, model, test_set, accuracy(model, *test_set))


if __name__ == "__main__":
    main()
